//! The link against a manager at the other end of a socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use lupin_abi::port::{Decoder, ExecStatus, INITIAL_CREDIT, MAX_CHUNK, encode};

use super::*;
use crate::init::{Role, reap};

/// A link in a thread of its own, with a listener.
struct Linked {
    folder: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    wakeups: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

fn introduction() -> Introduction {
    Introduction {
        node: 3,
        generation: 5,
        kernel: "6.1".into(),
        environment: vec![("LUPIN_TEST".into(), "yes".into())],
    }
}

impl Linked {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let poller = Poller::new().unwrap();
        let endpoint = Endpoint::Listener(listener.into());
        let mut link = Link::new(Some(endpoint), introduction(), None, &poller).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let wakeups: Arc<AtomicUsize> = Arc::default();
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&wakeups));
        let thread = std::thread::spawn(move || {
            let mut pids = Vec::new();
            while !stopped.load(Ordering::Relaxed) || !link.pids().is_empty() {
                if stopped.load(Ordering::Relaxed) {
                    link.lost("the test is over");
                }
                let wait = if link.has_work() { 0 } else { 10 };
                for (source, _) in poller.wait(Some(Duration::from_millis(wait))).unwrap() {
                    count.fetch_add(1, Ordering::Relaxed);
                    match source {
                        Source::LinkListener => link.on_listener(&poller),
                        Source::Link => link.on_stream(&poller),
                        Source::Command(id) => link.on_command(id),
                        other => panic!("{other:?}"),
                    }
                }
                link.work(&poller);
                link.tick(&poller, Instant::now());
                pids.clone_from(&link.pids());
                reap(Role::Service, &pids, |status| link.on_exit(status));
            }
        });
        Self {
            folder,
            stop,
            wakeups,
            thread: Some(thread),
        }
    }

    fn connect(&self) -> Manager {
        Manager::new(UnixStream::connect(self.folder.path().join("s")).unwrap())
    }

    fn hello(&self) -> Manager {
        let mut manager = self.connect();
        manager.hello();
        manager
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the link must survive whatever managers do");
        }
    }
}

struct Manager {
    stream: UnixStream,
    decoder: Decoder,
}

/// All that a command said, and how it ended.
#[derive(Debug, Default)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    taken: usize,
    status: Option<ExecStatus>,
}

impl Manager {
    fn new(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let decoder = Decoder::new();
        Self { stream, decoder }
    }

    fn send(&mut self, message: &ToAgent) {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
    }

    /// The next message; `None` at the end of the stream.
    fn receive(&mut self) -> Option<ToManager> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no message: {error}"),
            }
        }
    }

    fn hello(&mut self) {
        let version = ABI_VERSION;
        self.send(&ToAgent::Hello { version, pod_id: 1 });
        match self.receive() {
            Some(ToManager::Hello {
                version,
                node,
                generation,
                ..
            }) => assert_eq!((version, node, generation), (ABI_VERSION, 3, 5)),
            other => panic!("{other:?}"),
        }
    }

    fn exec(&mut self, channel: u32, script: &str) {
        self.send(&ToAgent::Exec {
            channel,
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: vec![("OWN".into(), "var".into())],
            cwd: None,
        });
    }

    fn stdin(&mut self, channel: u32, data: &[u8]) {
        let data = data.to_vec();
        self.send(&ToAgent::Stdin { channel, data });
    }

    /// Takes messages of one channel until the command is over, granting credit as it goes.
    fn outcome(&mut self, channel: u32) -> Outcome {
        let mut outcome = Outcome::default();
        while outcome.status.is_none() {
            match self.receive().expect("the agent hung up") {
                ToManager::Started { channel: c, .. } => assert_eq!(c, channel),
                ToManager::Output {
                    channel: c,
                    stderr,
                    data,
                } => {
                    assert_eq!(c, channel);
                    assert!(!data.is_empty() && data.len() <= MAX_CHUNK);
                    let bytes = data.len() as u32;
                    self.send(&ToAgent::Credit { channel, bytes });
                    let to = if stderr {
                        &mut outcome.stderr
                    } else {
                        &mut outcome.stdout
                    };
                    to.extend(data);
                }
                ToManager::Credit { channel: c, bytes } => {
                    assert_eq!(c, channel);
                    outcome.taken += bytes as usize;
                }
                ToManager::Exited { channel: c, status } => {
                    assert_eq!(c, channel);
                    outcome.status = Some(status);
                }
                other => panic!("{other:?}"),
            }
        }
        outcome
    }

    fn run(&mut self, script: &str) -> Outcome {
        self.exec(1, script);
        self.stdin(1, b"");
        self.outcome(1)
    }
}

#[test]
fn a_command_says_all_and_how_it_ended() {
    let linked = Linked::new();
    let mut manager = linked.hello();
    let outcome = manager.run("echo out; echo $OWN $LUPIN_TEST >&2; pwd; exit 7");
    assert_eq!(outcome.status, Some(ExecStatus::Code(7)));
    assert_eq!(outcome.stdout, b"out\n/\n");
    assert_eq!(outcome.stderr, b"var yes\n");
    // Signals that the agent blocks are not blocked for commands.
    let outcome = manager.run("kill -TERM $$; echo alive");
    assert_eq!(outcome.status, Some(ExecStatus::Signal(libc::SIGTERM)));
    let channel = 1;
    let argv = vec!["/nonexistent".into()];
    let (env, cwd) = (vec![], None);
    manager.send(&ToAgent::Exec {
        channel,
        argv,
        env,
        cwd,
    });
    assert!(matches!(
        manager.outcome(1).status,
        Some(ExecStatus::NotStarted(libc::ENOENT, _))
    ));
}

#[test]
fn input_reaches_the_command_and_credit_comes_back() {
    let linked = Linked::new();
    let mut manager = linked.hello();
    manager.exec(4, "cat");
    let input: Vec<u8> = (0..INITIAL_CREDIT).map(|i| (i % 251) as u8).collect();
    for chunk in input.chunks(MAX_CHUNK) {
        manager.stdin(4, chunk);
    }
    manager.stdin(4, b"");
    let outcome = manager.outcome(4);
    assert_eq!(outcome.stdout, input);
    assert_eq!(outcome.taken, input.len());
    assert_eq!(outcome.status, Some(ExecStatus::Code(0)));
    // Input for a command that does not read is taken all the same.
    manager.exec(4, "exec <&-; sleep 0.1");
    manager.stdin(4, &input[..MAX_CHUNK]);
    assert_eq!(manager.outcome(4).status, Some(ExecStatus::Code(0)));
}

#[test]
fn a_stalled_reader_stops_one_command_and_nothing_is_lost() {
    const SIZE: usize = 8 << 20;
    let linked = Linked::new();
    let mut manager = linked.hello();
    manager.exec(1, &format!("head -c {SIZE} /dev/zero | tr '\\0' x"));
    // No credit is granted: exactly the initial credit arrives.
    let mut received = 0;
    while received < INITIAL_CREDIT as usize {
        if let Some(ToManager::Output { data, .. }) = manager.receive() {
            received += data.len();
        }
    }
    assert_eq!(received, INITIAL_CREDIT as usize);
    // Meanwhile another runs to its end.
    manager.exec(2, "echo other");
    manager.stdin(2, b"");
    let other = manager.outcome(2);
    assert_eq!(other.stdout, b"other\n");
    let before = linked.wakeups.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    let idle = linked.wakeups.load(Ordering::Relaxed) - before;
    assert!(idle < 10, "{idle} wake-ups while there is nothing to do");
    let bytes = received as u32;
    manager.send(&ToAgent::Credit { channel: 1, bytes });
    let outcome = manager.outcome(1);
    assert_eq!(received + outcome.stdout.len(), SIZE);
    assert!(outcome.stdout.iter().all(|b| *b == b'x'));
    assert_eq!(outcome.status, Some(ExecStatus::Code(0)));
}

#[test]
fn signals_go_to_the_whole_group() {
    let linked = Linked::new();
    let mut manager = linked.hello();
    manager.exec(1, "sleep 60 & echo ready; wait");
    loop {
        if let Some(ToManager::Output { .. }) = manager.receive() {
            break;
        }
    }
    let (channel, signal) = (1, libc::SIGKILL);
    manager.send(&ToAgent::Signal { channel, signal });
    // The sleeper holds the pipes: their end shows that it is gone as well.
    let start = Instant::now();
    let outcome = manager.outcome(1);
    assert_eq!(outcome.status, Some(ExecStatus::Signal(libc::SIGKILL)));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_background_process_does_not_keep_a_command_from_ending() {
    let linked = Linked::new();
    let mut manager = linked.hello();
    let start = Instant::now();
    let outcome = manager.run("sleep 20 & echo $!");
    assert_eq!(outcome.status, Some(ExecStatus::Code(0)));
    assert!(start.elapsed() < Duration::from_secs(10));
    let pid: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn commands_end_with_their_manager() {
    let linked = Linked::new();
    let mut manager = linked.hello();
    manager.exec(1, "trap '' HUP; echo $$; while :; do sleep 0.05; done");
    let pid: i32 = loop {
        if let Some(ToManager::Output { data, .. }) = manager.receive() {
            break String::from_utf8(data).unwrap().trim().parse().unwrap();
        }
    };
    drop(manager);
    let alive = || nix::sys::signal::kill(Pid::from_raw(pid), None).is_ok();
    assert!(alive(), "it is asked first");
    let start = Instant::now();
    while alive() {
        assert!(start.elapsed() < Duration::from_secs(10), "never killed");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The next manager starts anew, on the same channel.
    assert_eq!(linked.hello().run("echo x").stdout, b"x\n");
}

#[test]
fn the_newest_manager_counts() {
    let linked = Linked::new();
    let mut old = linked.hello();
    let mut new = linked.hello();
    assert!(old.receive().is_none());
    assert_eq!(new.run("echo x").stdout, b"x\n");
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let linked = Linked::new();
    for nonsense in [&[0u8; 64][..], b"LPF1\xff\xff\xff\xff____", &[0xff; 9000]] {
        let mut manager = linked.hello();
        manager.stream.write_all(nonsense).unwrap();
        assert!(manager.receive().is_none());
    }
    // More input than granted.
    let mut manager = linked.hello();
    manager.exec(1, "sleep 60");
    for _ in 0..INITIAL_CREDIT as usize / MAX_CHUNK + 3 {
        let data = vec![0; MAX_CHUNK];
        let frame = encode(&ToAgent::Stdin { channel: 1, data }).unwrap();
        let _ = manager.stream.write_all(&frame);
    }
    while manager.receive().is_some() {}
    // Nothing before Hello is carried out.
    let mut manager = linked.connect();
    manager.exec(1, "echo x");
    manager.hello();
    assert_eq!(manager.run("echo y").stdout, b"y\n");
    // A manager of another version is answered, and ignored.
    let mut manager = linked.connect();
    let version = 99;
    manager.send(&ToAgent::Hello { version, pod_id: 1 });
    assert!(matches!(manager.receive(), Some(ToManager::Hello { .. })));
    manager.exec(1, "echo x");
    manager.hello();
    assert_eq!(manager.run("echo z").stdout, b"z\n");
}

#[test]
fn shutdown_is_passed_on_once() {
    let poller = Poller::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Port(theirs.into(), "/nonexistent".into());
    let mut link = Link::new(Some(endpoint), introduction(), None, &poller).unwrap();
    let mut manager = Manager::new(ours);
    let version = ABI_VERSION;
    link.log("before");
    manager.send(&ToAgent::Hello { version, pod_id: 1 });
    manager.send(&ToAgent::Shutdown { grace_ms: 1500 });
    link.on_stream(&poller);
    let grace = Duration::from_millis(1500);
    assert_eq!(link.take_shutdown(), Some(ShutdownRequest { grace }));
    assert_eq!(link.take_shutdown(), None);
    link.log("a line");
    assert!(matches!(manager.receive(), Some(ToManager::Hello { .. })));
    for line in ["before", "a line"] {
        let message = line.into();
        assert_eq!(manager.receive(), Some(ToManager::Log { message }));
    }
}

#[test]
fn a_port_without_a_host_does_not_burn_the_processor() {
    let poller = Poller::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Port(theirs.into(), "/nonexistent".into());
    let mut link = Link::new(Some(endpoint), introduction(), None, &poller).unwrap();
    // Hung up for good, which epoll shows at every look if it is not asked for edges.
    drop(ours);
    let mut wakeups = 0;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        for _ in poller.wait(Some(Duration::from_millis(20))).unwrap() {
            wakeups += 1;
            link.on_stream(&poller);
        }
        link.tick(&poller, Instant::now());
    }
    assert!(wakeups <= 3, "{wakeups} wake-ups");
    link.log("to nobody");
}

#[test]
fn a_port_that_cannot_be_opened_again_is_tried_until_it_can() {
    let poller = Poller::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Port(theirs.into(), path.clone());
    let mut link = Link::new(Some(endpoint), introduction(), None, &poller).unwrap();
    let mut manager = Manager::new(ours);
    let version = ABI_VERSION;
    manager.send(&ToAgent::Hello { version, pod_id: 1 });
    manager.stream.write_all(b"nonsense nonsense").unwrap();
    link.on_stream(&poller);
    assert!(link.endpoint.is_none());
    link.tick(&poller, Instant::now());
    assert!(link.endpoint.is_none());
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    link.tick(&poller, Instant::now());
    assert!(matches!(link.endpoint, Some(Endpoint::Port(..))));
}
