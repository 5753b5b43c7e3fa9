//! An agent for tests: speaks the protocol by the book, and breaks it where it is told to.

use std::collections::HashMap;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use lupin_abi::ABI_VERSION;
use lupin_abi::port::{Decoder, ExecStatus, INITIAL_CREDIT, MAX_CHUNK, ToAgent, ToManager, encode};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// What a fake agent remembers for the test to look at.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) signals: Vec<i32>,
    pub(crate) shutdown: Option<u32>,
    pub(crate) hellos: usize,
    pub(crate) connections: usize,
    pub(crate) hints: Vec<ToAgent>,
}

/// A fake agent; its thread ends with the process.
pub(crate) struct FakeAgent {
    pub(crate) seen: Arc<Mutex<Seen>>,
}

impl FakeAgent {
    /// Listens on `path` and serves one connection after the other. Its commands are named by
    /// `argv[0]`: see `Session::exec`.
    pub(crate) fn listen(
        path: &Path,
        node: u32,
        generation: u32,
        doorbell: Option<OwnedFd>,
    ) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let of_thread = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                of_thread.lock().unwrap().connections += 1;
                let mut session = Session {
                    stream: stream.unwrap(),
                    commands: HashMap::new(),
                    seen: of_thread.clone(),
                    doorbell: doorbell.as_ref().map(|fd| fd.try_clone().unwrap()),
                    node,
                    generation,
                };
                // Whatever ends the session, the next connection starts afresh.
                let _ = session.run();
            }
        });
        Self { seen }
    }
}

struct Command {
    kind: String,
    output: Vec<u8>,
    output_credit: usize,
    ended: Option<ExecStatus>,
}

struct Session {
    stream: UnixStream,
    commands: HashMap<u32, Command>,
    seen: Arc<Mutex<Seen>>,
    doorbell: Option<OwnedFd>,
    node: u32,
    generation: u32,
}

impl Session {
    fn run(&mut self) -> std::io::Result<()> {
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            while let Some(message) = decoder.next_message::<ToAgent>().unwrap() {
                self.handle(message)?;
            }
            match self.stream.read(&mut buffer)? {
                0 => return Ok(()),
                bytes => decoder.push(&buffer[..bytes]),
            }
        }
    }

    fn send(&mut self, message: &ToManager) -> std::io::Result<()> {
        self.stream.write_all(&encode(message).unwrap())
    }

    fn handle(&mut self, message: ToAgent) -> std::io::Result<()> {
        match message {
            ToAgent::Hello { .. } => {
                self.seen.lock().unwrap().hellos += 1;
                let hello = encode(&ToManager::Hello {
                    version: ABI_VERSION,
                    node: self.node,
                    generation: self.generation,
                    agent: "fake\n".into(),
                    kernel: "6.1".into(),
                })
                .unwrap();
                let fds: Vec<_> = self.doorbell.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let rights = if fds.is_empty() { &[] } else { &rights[..] };
                let fd = self.stream.as_raw_fd();
                let sent =
                    sendmsg::<()>(fd, &[IoSlice::new(&hello)], rights, MsgFlags::empty(), None)?;
                assert_eq!(sent, hello.len());
            }
            ToAgent::Exec { channel, argv, .. } => self.exec(channel, &argv)?,
            ToAgent::Stdin { channel, data } => {
                let Some(command) = self.commands.get_mut(&channel) else {
                    return Ok(());
                };
                if data.is_empty() {
                    command.ended = Some(ExecStatus::Code(0));
                } else {
                    assert!(command.output.len() + data.len() <= INITIAL_CREDIT as usize);
                    command.output.extend_from_slice(&data);
                }
            }
            ToAgent::Signal { channel, signal } => {
                self.seen.lock().unwrap().signals.push(signal);
                if let Some(command) = self.commands.get_mut(&channel) {
                    command.ended = Some(ExecStatus::Signal(signal));
                }
            }
            ToAgent::Credit { channel, bytes } => {
                if let Some(command) = self.commands.get_mut(&channel) {
                    command.output_credit += bytes as usize;
                    assert!(command.output_credit <= INITIAL_CREDIT as usize);
                }
            }
            ToAgent::Wake(_) | ToAgent::Deaths | ToAgent::Groups => {
                self.seen.lock().unwrap().hints.push(message);
            }
            ToAgent::Shutdown { grace_ms } => self.seen.lock().unwrap().shutdown = Some(grace_ms),
        }
        self.pump()
    }

    fn exec(&mut self, channel: u32, argv: &[String]) -> std::io::Result<()> {
        if argv[0] == "hint" {
            self.send(&ToManager::Deaths)?;
        }
        let mut command = Command {
            kind: argv[0].clone(),
            output: Vec::new(),
            output_credit: INITIAL_CREDIT as usize,
            ended: None,
        };
        self.send(&ToManager::Started { channel, pid: 42 })?;
        match command.kind.as_str() {
            // Standard input to standard output until its end; a signal ends it.
            "cat" | "hang" => {}
            "echo" => {
                command.output = argv[1..].join(" ").into_bytes();
                command.ended = Some(ExecStatus::Code(0));
            }
            "zeros" => {
                command.output = vec![0; argv[1].parse().unwrap()];
                command.ended = Some(ExecStatus::Code(0));
            }
            "exit" => command.ended = Some(ExecStatus::Code(argv[1].parse().unwrap())),
            "missing" => {
                let why = "No such file\x1b[31m".into();
                command.ended = Some(ExecStatus::NotStarted(libc::ENOENT, why));
            }
            "hang-up" => return Err(std::io::ErrorKind::ConnectionReset.into()),
            "garbage" => {
                self.stream.write_all(&[0xa5; 5000])?;
            }
            // Sends more than its credit.
            "flood" => {
                for _ in 0..=INITIAL_CREDIT as usize / MAX_CHUNK {
                    self.send(&ToManager::Output {
                        channel,
                        stderr: false,
                        data: vec![1; MAX_CHUNK],
                    })?;
                }
            }
            // Grants input that was never sent.
            "grant" => self.send(&ToManager::Credit { channel, bytes: 1 })?,
            // Frames for channels that nobody opened, and a log that does not end.
            "noise" => {
                for n in 0..1000 {
                    self.send(&ToManager::Exited {
                        channel: channel ^ 0x8000_0000,
                        status: ExecStatus::Code(n),
                    })?;
                    self.send(&ToManager::Log {
                        message: format!("\x1b[2J{n}"),
                    })?;
                }
                command.ended = Some(ExecStatus::Code(0));
            }
            other => panic!("unknown fake command {other}"),
        }
        self.commands.insert(channel, command);
        Ok(())
    }

    /// Sends what the credits allow.
    fn pump(&mut self) -> std::io::Result<()> {
        let mut frames = Vec::new();
        self.commands.retain(|&channel, command| {
            while !command.output.is_empty() && command.output_credit > 0 {
                let bytes = command
                    .output
                    .len()
                    .min(command.output_credit)
                    .min(MAX_CHUNK);
                command.output_credit -= bytes;
                frames.push(ToManager::Output {
                    channel,
                    stderr: false,
                    data: command.output.drain(..bytes).collect(),
                });
                if command.kind == "cat" {
                    let bytes = bytes as u32;
                    frames.push(ToManager::Credit { channel, bytes });
                }
            }
            match command.ended.clone().filter(|_| command.output.is_empty()) {
                Some(status) => {
                    frames.push(ToManager::Exited { channel, status });
                    false
                }
                None => true,
            }
        });
        frames.iter().try_for_each(|frame| self.send(frame))
    }
}
