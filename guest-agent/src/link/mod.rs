//! The stream to the fabric manager.
//!
//! In a guest it is the virtio port `org.lupin.agent`; in a namespace node, connections to a
//! listening socket that the manager made, of which the newest counts. Either way the manager may
//! vanish and another may come at any time; commands of the one that is gone are ended.

pub mod exec;
pub mod framing;
mod outbox;
pub mod port;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use lupin_abi::port::{ToAgent, ToManager, Wake};
use lupin_abi::{ABI_VERSION, Generation};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{SockFlag, accept4};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, read};

use crate::poll::{EDGES, Poller, Source};
use exec::Commands;
use framing::FrameReader;
use outbox::Outbox;

/// Bytes taken from the stream before others get their turn.
const BYTES_PER_TURN: usize = 256 << 10;
/// Hints kept until the agent looks at them, which it does after each turn.
const HINTS: usize = 1024;
/// Bytes read at once.
const READ: usize = 64 << 10;

/// Where the stream comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// A virtio port, open for reading and writing, non-blocking, and its path.
    Port(OwnedFd, PathBuf),
    /// A listening UNIX stream socket.
    Listener(OwnedFd),
}

/// Who the agent says it is.
#[derive(Clone, Debug)]
pub struct Introduction {
    /// Node number; 0 if the agent does not know.
    pub node: u32,
    /// Generation; 0 if the agent does not know.
    pub generation: Generation,
    /// `uname -r`.
    pub kernel: String,
    /// Variables that commands get beside the agent's own and those of their request.
    pub environment: Vec<(String, String)>,
}

/// What the manager wants of the agent as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownRequest {
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
}

/// What another node tells this one, which may be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Wake sleepers.
    Wake(Wake),
    /// Threads died.
    Deaths,
    /// There are notifications of groups.
    Groups,
}

/// The link and the commands run over it.
#[derive(Debug)]
pub struct Link {
    endpoint: Option<Endpoint>,
    /// The accepted connection of a listener.
    accepted: Option<OwnedFd>,
    introduction: Introduction,
    /// Sent along with every Hello.
    doorbell: Option<OwnedFd>,
    reader: FrameReader,
    buffer: Vec<u8>,
    out: Outbox,
    commands: Commands,
    /// A manager said Hello and has not gone since.
    greeted: bool,
    /// There may be more to read than the last turn took.
    unread: bool,
    /// Bytes have come through the port since it was opened.
    used: bool,
    /// A port that could not be opened again yet.
    closed: Option<PathBuf>,
    /// What no manager was there to hear.
    unheard: Option<String>,
    shutdown: Option<ShutdownRequest>,
    /// Not looked at yet.
    hints: Vec<Hint>,
}

impl Link {
    /// Begins to serve an endpoint; without one, there is no manager to talk to.
    ///
    /// # Errors
    /// If the endpoint cannot be watched.
    pub fn new(
        endpoint: Option<Endpoint>,
        introduction: Introduction,
        doorbell: Option<OwnedFd>,
        poller: &Poller,
    ) -> Result<Self, Errno> {
        match &endpoint {
            Some(Endpoint::Port(fd, _)) => poller.add(fd, Source::Link, EDGES)?,
            Some(Endpoint::Listener(fd)) => {
                let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
                fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
                poller.add(fd, Source::LinkListener, EpollFlags::EPOLLIN)?;
            }
            None => {}
        }
        Ok(Self {
            endpoint,
            accepted: None,
            introduction,
            doorbell,
            reader: FrameReader::default(),
            buffer: Vec::new(),
            out: Outbox::default(),
            commands: Commands::default(),
            greeted: false,
            unread: false,
            used: false,
            closed: None,
            unheard: None,
            shutdown: None,
            hints: Vec::new(),
        })
    }

    fn stream(&self) -> Option<&OwnedFd> {
        stream(&self.endpoint, &self.accepted)
    }

    /// A manager connects: it takes the place of the one before.
    pub fn on_listener(&mut self, poller: &Poller) {
        loop {
            let Some(Endpoint::Listener(listener)) = &self.endpoint else {
                return;
            };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = match accept4(listener.as_raw_fd(), flags) {
                // SAFETY: the kernel has just made this descriptor for this process.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(error) => {
                    warn!("manager link: accept: {error}");
                    return;
                }
            };
            self.lost("a new manager connects");
            if let Err(error) = poller.add(&fd, Source::Link, EDGES) {
                warn!("manager link: {error}");
                continue;
            }
            self.accepted = Some(fd);
            self.on_stream(poller);
        }
    }

    /// Something happened on the stream.
    pub fn on_stream(&mut self, poller: &Poller) {
        self.receive(poller);
        self.flush();
    }

    fn receive(&mut self, poller: &Poller) {
        // Kept: to make it is more work than a hint is.
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(READ, 0);
        self.receive_into(poller, &mut buffer);
        self.buffer = buffer;
    }

    fn receive_into(&mut self, poller: &Poller, buffer: &mut [u8]) {
        let mut budget = BYTES_PER_TURN;
        self.unread = false;
        while let Some(stream) = self.stream() {
            if budget == 0 {
                self.unread = true;
                return;
            }
            match read(stream, &mut *buffer) {
                Ok(0) => {
                    self.lost("the manager hung up");
                    return self.end_session(poller);
                }
                Ok(count) => {
                    self.used = true;
                    budget = budget.saturating_sub(count);
                    self.reader.push(&buffer[..count], Instant::now());
                    self.take_messages(poller);
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(error) => return self.lost(&error.to_string()),
            }
        }
    }

    fn take_messages(&mut self, poller: &Poller) {
        loop {
            match self.reader.next_message() {
                Ok(Some(message)) => {
                    if let Err(reason) = self.on_message(poller, message) {
                        self.damaged(poller, &reason);
                    }
                }
                Ok(None) => return,
                Err(error) => self.damaged(poller, &error.to_string()),
            }
        }
    }

    fn on_message(&mut self, poller: &Poller, message: ToAgent) -> Result<(), String> {
        if let ToAgent::Hello { version, .. } = message {
            if self.greeted {
                info!("manager link: another manager took over");
                self.hang_up();
            }
            self.out.push_with_fd(
                &ToManager::Hello {
                    version: ABI_VERSION,
                    node: self.introduction.node,
                    generation: self.introduction.generation,
                    agent: env!("CARGO_PKG_VERSION").into(),
                    kernel: self.introduction.kernel.clone(),
                },
                self.doorbell.as_ref().and_then(|fd| fd.try_clone().ok()),
            );
            // A manager of another version gets its answer, and nothing that it says later is
            // understood.
            self.greeted = version == ABI_VERSION;
            if let Some(message) = self.unheard.take_if(|_| self.greeted) {
                self.out.push(&ToManager::Log { message });
            }
            if !self.greeted {
                warn!("manager link: manager speaks version {version}, agent {ABI_VERSION}");
            }
            return Ok(());
        }
        if !self.greeted {
            debug!("manager link: a message before Hello is ignored");
            return Ok(());
        }
        let (commands, out) = (&mut self.commands, &mut self.out);
        let result = match message {
            ToAgent::Hello { .. } => Ok(()),
            ToAgent::Exec {
                channel,
                argv,
                env,
                cwd,
            } => {
                let mut variables = self.introduction.environment.clone();
                variables.extend(env);
                commands.exec(poller, out, channel, &argv, variables, cwd)
            }
            ToAgent::Stdin { channel, data } => commands.input(out, channel, &data),
            ToAgent::Signal { channel, signal } => {
                commands.signal(channel, signal);
                Ok(())
            }
            ToAgent::Credit { channel, bytes } => {
                commands.credit(out, channel, bytes);
                Ok(())
            }
            ToAgent::Shutdown { grace_ms } => {
                let grace = Duration::from_millis(grace_ms.into());
                self.shutdown = Some(ShutdownRequest { grace });
                Ok(())
            }
            ToAgent::Wake(wake) => {
                self.hint(Hint::Wake(wake));
                Ok(())
            }
            ToAgent::Deaths => {
                self.hint(Hint::Deaths);
                Ok(())
            }
            ToAgent::Groups => {
                self.hint(Hint::Groups);
                Ok(())
            }
        };
        result.map_err(|violation| violation.to_string())
    }

    /// The manager is gone.
    fn lost(&mut self, reason: &str) {
        if self.greeted || self.accepted.is_some() {
            info!("manager link: {reason}");
        }
        self.accepted = None;
        self.reader.clear();
        self.hang_up();
    }

    /// The manager talks nonsense, and is shown that the stream is closed.
    fn damaged(&mut self, poller: &Poller, reason: &str) {
        let Some(Endpoint::Port(..)) = &self.endpoint else {
            return self.lost(reason);
        };
        if !self.greeted {
            // Remains of a stream whose loss was noticed already; the next Hello is in what
            // the reader still has, or to come.
            return debug!("manager link: {reason}");
        }
        warn!("manager link: {reason}");
        self.hang_up();
        self.reopen(poller);
    }

    /// The host's end of the port is closed. The VMM lets the next manager in only after it has
    /// seen a used port closed, so that no byte of one manager's session reaches another.
    fn end_session(&mut self, poller: &Poller) {
        if self.used && matches!(self.endpoint, Some(Endpoint::Port(..))) {
            self.reopen(poller);
        }
    }

    fn reopen(&mut self, poller: &Poller) {
        // A port has one opener, so it is closed first.
        if let Some(Endpoint::Port(fd, path)) = self.endpoint.take() {
            drop(fd);
            self.open(poller, path);
        }
    }

    /// Opens the port; if that fails, the next tick tries again.
    fn open(&mut self, poller: &Poller, path: PathBuf) {
        self.used = false;
        let opened =
            port::open_port(&path).and_then(|fd| poller.add(&fd, Source::Link, EDGES).map(|()| fd));
        match opened {
            Ok(fd) => self.endpoint = Some(Endpoint::Port(fd, path)),
            Err(error) => {
                error!("manager link: {}: {error}", path.display());
                self.closed = Some(path);
            }
        }
    }

    fn hang_up(&mut self) {
        self.greeted = false;
        self.out.clear();
        self.commands.hang_up(Instant::now());
    }

    /// A pipe of a command became ready.
    pub fn on_command(&mut self, id: u32) {
        self.commands.on_ready(&mut self.out, id);
        self.flush();
    }

    /// Processes whose end the link wants to know.
    pub fn pids(&self) -> Vec<Pid> {
        self.commands.pids()
    }

    /// A process has ended; it is not reaped yet.
    pub fn on_exit(&mut self, status: WaitStatus) {
        self.commands.reaped(&mut self.out, status);
        self.flush();
    }

    /// A line for the manager's log. Without a manager the last line waits for the next one.
    pub fn log(&mut self, message: &str) {
        let message = message.chars().take(4096).collect();
        if self.greeted {
            self.out.push(&ToManager::Log { message });
            self.flush();
        } else {
            self.unheard = Some(message);
        }
    }

    fn hint(&mut self, hint: Hint) {
        // One that is not looked at yet tells of all that happened since.
        let is_news = !matches!(hint, Hint::Wake(_));
        let is_known = is_news && self.hints.contains(&hint);
        if !is_known && self.hints.len() < HINTS {
            self.hints.push(hint);
        }
    }

    /// What other nodes told since the last call.
    pub fn take_hints(&mut self) -> Vec<Hint> {
        std::mem::take(&mut self.hints)
    }

    /// Sends hints, if there is a manager and room.
    pub fn send_hints(&mut self, hints: impl Iterator<Item = ToManager>) {
        let mut sent = false;
        for hint in hints {
            if self.greeted && !self.out.is_full() {
                self.out.push(&hint);
                sent = true;
            }
        }
        if sent {
            self.flush();
        }
    }

    /// What the manager asked for; once.
    pub fn take_shutdown(&mut self) -> Option<ShutdownRequest> {
        self.shutdown.take()
    }

    /// Whether [`work`](Self::work) has something to do.
    pub fn has_work(&self) -> bool {
        self.unread
    }

    /// Goes on where the last turn ended.
    pub fn work(&mut self, poller: &Poller) {
        if self.unread {
            self.on_stream(poller);
        }
    }

    /// Does what is due. Also reads the stream, should a wake-up have been lost.
    pub fn tick(&mut self, poller: &Poller, now: Instant) {
        if self.reader.drop_stalled(now) {
            debug!("manager link: a frame stalled and is dropped");
            self.take_messages(poller);
        }
        self.commands.tick(&mut self.out, now);
        if let Some(path) = self.closed.take() {
            self.open(poller, path);
        }
        self.on_stream(poller);
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.commands.next_deadline()
    }

    /// Sends what the stream takes; commands go on when there is room again.
    fn flush(&mut self) {
        loop {
            let Some(stream) = stream(&self.endpoint, &self.accepted) else {
                return self.out.clear();
            };
            let was_full = self.out.is_full();
            if let Err(error) = self.out.send(stream.as_fd()) {
                return self.lost(&error.to_string());
            }
            if !was_full || self.out.is_full() {
                return;
            }
            self.commands.pump_all(&mut self.out);
        }
    }
}

fn stream<'a>(
    endpoint: &'a Option<Endpoint>,
    accepted: &'a Option<OwnedFd>,
) -> Option<&'a OwnedFd> {
    match endpoint {
        Some(Endpoint::Port(fd, _)) => Some(fd),
        _ => accepted.as_ref(),
    }
}

#[cfg(test)]
#[path = "link_test.rs"]
mod link_test;
