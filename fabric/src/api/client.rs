//! The client's side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use lupin_abi::Event;
use lupin_abi::port::{
    Decoder, ExecStatus, FrameError, INITIAL_CREDIT, MAX_CHUNK, ToAgent, ToManager, encode,
};

use super::CONTROL_SOCKET;
use super::control::{ControlError, Difference, NodeAction, PodStatus};
use super::wire::{Reply, Request};
use crate::agent_link::{ExecMessage, ExecSpec};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No manager listens: the pod does not run.
    #[error("no manager listens on {}: {error}", socket.display())]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The manager refused.
    #[error("{0}")]
    Refused(#[from] ControlError),
    /// The manager closed the connection: it ended, or was ended.
    #[error("the manager closed the connection")]
    Closed,
    /// The connection failed.
    #[error("connection to the manager: {0}")]
    Io(#[from] io::Error),
    /// The manager does not speak this protocol.
    #[error("the manager sent what is not a reply: {0}")]
    Protocol(String),
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// A connection to a pod's manager.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the manager of the pod whose runtime folder this is.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`] if nobody listens there.
    pub fn connect(runtime_folder: &Path) -> Result<Self, ClientError> {
        let socket = runtime_folder.join(CONTROL_SOCKET);
        match UnixStream::connect(&socket) {
            Ok(stream) => Ok(Self {
                reader: BufReader::new(stream),
            }),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NotRunning { socket, error }
                }
                _ => error.into(),
            }),
        }
    }

    /// A snapshot of the pod.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&mut self) -> Result<PodStatus, ClientError> {
        self.send(&Request::Status {})?;
        match self.reply()? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends this life of a node.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn kill(&mut self, node: &str) -> Result<(), ClientError> {
        self.send(&Request::Kill { node: node.into() })?;
        self.done()
    }

    /// Does something else to a node.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn steer(&mut self, node: &str, action: NodeAction) -> Result<(), ClientError> {
        self.send(&Request::Steer {
            node: node.into(),
            action,
        })?;
        self.done()
    }

    /// Takes a node of the pod file into the pod.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn add(&mut self, node: &str) -> Result<(), ClientError> {
        self.send(&Request::Add { node: node.into() })?;
        self.done()
    }

    /// Applies what has changed in the pod file, and returns what differs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn reload(&mut self, dry_run: bool) -> Result<Vec<Difference>, ClientError> {
        self.send(&Request::Reload { dry_run })?;
        match self.reply()? {
            Reply::Reloaded(differences) => Ok(differences),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins to bring the pod down; [`wait_end`](Self::wait_end) waits until it is.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn down(&mut self, grace: Duration) -> Result<(), ClientError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.send(&Request::Down { grace_ms })?;
        self.done()
    }

    /// Begins to replace the manager's program; [`wait_end`](Self::wait_end) waits until the old
    /// one is gone.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn upgrade(&mut self, program: Option<&Path>) -> Result<(), ClientError> {
        let program = program.map(Path::to_owned);
        self.send(&Request::Upgrade { program })?;
        self.done()
    }

    /// Waits until the manager closes the connection, which it does when it exits; whether it
    /// did so within `limit`.
    ///
    /// # Errors
    /// Of the connection.
    pub fn wait_end(&mut self, limit: Duration) -> Result<bool, ClientError> {
        let limit = limit.max(Duration::from_millis(1));
        self.reader.get_ref().set_read_timeout(Some(limit))?;
        let ended = match self.reader.fill_buf() {
            Ok(bytes) => Ok(bytes.is_empty()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(true),
            Err(e) => Err(e.into()),
        };
        self.reader.get_ref().set_read_timeout(None)?;
        ended
    }

    /// Asks for events from sequence number `from` on (the oldest if `None`).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn events(mut self, from: Option<u64>, follow: bool) -> Result<EventStream, ClientError> {
        self.send(&Request::Events { from, follow })?;
        Ok(EventStream { client: self })
    }

    /// Runs a command inside a node.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn exec(mut self, node: &str, spec: ExecSpec) -> Result<ExecStream, ClientError> {
        self.send(&Request::Exec {
            node: node.into(),
            argv: spec.argv,
            env: spec.env,
            cwd: spec.cwd,
        })?;
        match self.reply()? {
            Reply::Exec {} => {
                let mut decoder = Decoder::new();
                decoder.push(self.reader.buffer());
                Ok(ExecStream {
                    input: ExecInput {
                        stream: Mutex::new(self.reader.get_ref().try_clone()?),
                        credit: Mutex::new(Some(INITIAL_CREDIT as usize)),
                        granted: Condvar::new(),
                    },
                    output: Mutex::new((self.reader.into_inner(), decoder)),
                })
            }
            other => Err(unexpected(&other)),
        }
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        match self.reader.get_mut().write_all(&line) {
            // Whoever closed the connection may have said why before.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    fn reply(&mut self) -> Result<Reply, ClientError> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => return Err(ClientError::Closed),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ClientError::Closed);
            }
            Err(e) => return Err(e.into()),
        }
        match serde_json::from_slice(&line) {
            Ok(Reply::Error(refusal)) => Err(refusal.into()),
            Ok(reply) => Ok(reply),
            Err(e) => Err(ClientError::Protocol(e.to_string())),
        }
    }

    fn done(&mut self) -> Result<(), ClientError> {
        match self.reply()? {
            Reply::Done {} => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Protocol(format!("{reply:?}"))
}

/// One item of an event stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamItem {
    /// An event.
    Event(Event),
    /// Events from `from` up to, not including, `resume` were overwritten before they came.
    Lost {
        /// First sequence number lost.
        from: u64,
        /// Next sequence number to come.
        resume: u64,
    },
}

/// A stream of events.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
}

impl EventStream {
    /// Waits for the next item; `None` at the end of a stream that does not follow.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Closed`] once the manager ends.
    pub fn next_item(&mut self) -> Result<Option<StreamItem>, ClientError> {
        match self.client.reply()? {
            Reply::Event(event) => Ok(Some(StreamItem::Event(event))),
            Reply::EventsLost { from, resume } => Ok(Some(StreamItem::Lost { from, resume })),
            Reply::Done {} => Ok(None),
            other => Err(unexpected(&other)),
        }
    }
}

/// A command that runs inside a node. Shared by reference between the threads that feed it and
/// the one that reads it. Dropping it before its end ends the command.
#[derive(Debug)]
pub struct ExecStream {
    /// What goes to the command.
    pub input: ExecInput,
    output: Mutex<(UnixStream, Decoder)>,
}

/// The way to a command: standard input and signals.
#[derive(Debug)]
pub struct ExecInput {
    stream: Mutex<UnixStream>,
    /// Bytes that may be sent; `None` once the command is over.
    credit: Mutex<Option<usize>>,
    granted: Condvar,
}

impl ExecStream {
    /// Waits for the next message. After [`ExecMessage::Exited`], or with an error, the command
    /// is over. If the connection is lost, the manager is gone, and the command has most likely
    /// survived it until the next one takes over.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn recv(&self) -> Result<ExecMessage, ClientError> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, decoder) = &mut *output;
        let received = loop {
            match decoder.next_message() {
                Ok(Some(ToManager::Started { pid, .. })) => break Ok(ExecMessage::Started { pid }),
                Ok(Some(ToManager::Output { stderr, data, .. })) => {
                    break Ok(ExecMessage::Output { stderr, data });
                }
                Ok(Some(ToManager::Credit { bytes, .. })) => {
                    self.input.grant(bytes as usize);
                    break Ok(ExecMessage::Credit { bytes });
                }
                Ok(Some(ToManager::Exited { status, .. })) => {
                    break Ok(ExecMessage::Exited(status));
                }
                Ok(Some(other)) => break Err(ClientError::Protocol(format!("{other:?}"))),
                Ok(None) => {}
                Err(e) => break Err(e.into()),
            }
            let mut buffer = [0; 64 << 10];
            match stream.read(&mut buffer) {
                Ok(0) => break Err(ClientError::Closed),
                Ok(bytes) => decoder.push(&buffer[..bytes]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    break Err(ClientError::Closed);
                }
                Err(e) => break Err(e.into()),
            }
        };
        if matches!(received, Err(_) | Ok(ExecMessage::Exited(_))) {
            self.input.end();
        }
        received
    }

    /// Reads to the end: collects what the command wrote, for programs with short outputs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn collect(&self) -> Result<(Vec<u8>, Vec<u8>, ExecStatus), ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.recv()? {
                ExecMessage::Output { stderr: true, data } => stderr.extend(data),
                ExecMessage::Output { data, .. } => stdout.extend(data),
                ExecMessage::Exited(status) => return Ok((stdout, stderr, status)),
                ExecMessage::Started { .. } | ExecMessage::Credit { .. } => {}
            }
        }
    }
}

impl ExecInput {
    /// Sends standard input; waits for credit, which another thread's
    /// [`recv`](ExecStream::recv) takes in. Whether all of it was sent: not if the command ended.
    ///
    /// # Errors
    /// Of the connection.
    pub fn write(&self, data: &[u8]) -> Result<bool, ClientError> {
        let mut rest = data;
        while !rest.is_empty() {
            let credit = self.credit.lock().unwrap_or_else(PoisonError::into_inner);
            let mut credit = self
                .granted
                .wait_while(credit, |credit| *credit == Some(0))
                .unwrap_or_else(PoisonError::into_inner);
            let Some(left) = credit.as_mut() else {
                return Ok(false);
            };
            let bytes = rest.len().min(*left).min(MAX_CHUNK);
            *left -= bytes;
            drop(credit);
            let (chunk, tail) = rest.split_at(bytes);
            let data = chunk.into();
            self.send(&ToAgent::Stdin { channel: 0, data })?;
            rest = tail;
        }
        Ok(true)
    }

    /// Closes the command's standard input.
    ///
    /// # Errors
    /// Of the connection.
    pub fn close(&self) -> Result<(), ClientError> {
        let data = Vec::new();
        self.send(&ToAgent::Stdin { channel: 0, data })
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// Of the connection.
    pub fn signal(&self, signal: i32) -> Result<(), ClientError> {
        self.send(&ToAgent::Signal { channel: 0, signal })
    }

    fn send(&self, message: &ToAgent) -> Result<(), ClientError> {
        let frame = encode(message)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(stream.write_all(&frame)?)
    }

    fn grant(&self, bytes: usize) {
        let mut credit = self.credit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(credit) = credit.as_mut() {
            *credit = credit.saturating_add(bytes);
        }
        self.granted.notify_all();
    }

    fn end(&self) {
        *self.credit.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.granted.notify_all();
    }
}
