//! The link's thread: connects, greets, and moves frames until the link is closed.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use lupin_abi::ABI_VERSION;
use lupin_abi::port::{self, Decoder, FrameError, ToAgent, ToManager};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::channel::Violation;
use super::greeting::{Greeting, Hello};
use super::hint::{Hint, HintLimit};
use super::receive::receive;
use super::{AgentInfo, LinkEvent, Shared, doorbell};

/// Between attempts to connect.
const RETRY: Duration = Duration::from_millis(100);
/// After this long without an answer the connection is made anew. Long, because there is no hurry:
/// until the guest opens its end the hello waits for it, and an end that closes is noticed.
const GREETING_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes read at once.
const READ_SIZE: usize = 128 << 10;
/// Most log lines of an agent that are passed on within [`LOG_WINDOW`].
const LOG_LINES: u32 = 100;
const LOG_WINDOW: Duration = Duration::from_secs(1);
/// Longest text of an agent that is passed on, in bytes.
const MAX_TEXT: usize = 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the link was closed")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the agent closed the connection")]
    Eof,
    #[error("the agent broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the agent broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the agent does not answer")]
    Silent,
    #[error("the agent speaks version {0} of the protocol, this manager version {ABI_VERSION}")]
    Version(u32),
    #[error("the agent speaks for instance {found}, expected {expected}")]
    Stranger { found: String, expected: String },
}

/// Runs until the link is closed.
pub(super) fn run(shared: &Shared, notify: &dyn Fn(LinkEvent)) {
    let mut told = None;
    loop {
        let Err(lost) = connect(shared, notify, &mut told);
        if matches!(lost, Lost::Closed) {
            return;
        }
        let why = lost.to_string();
        {
            let mut state = shared.lock();
            if state.closed {
                return;
            }
            state.disconnect(&why);
        }
        if told.as_ref() != Some(&why) {
            told = Some(why.clone());
            notify(LinkEvent::Lost(why));
        }
        // Wakes up early if the link is closed.
        let mut fds = [PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
        let _ = poll(
            &mut fds,
            PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::MAX),
        );
    }
}

/// One connection, from connect to loss.
fn connect(
    shared: &Shared,
    notify: &dyn Fn(LinkEvent),
    told: &mut Option<String>,
) -> Result<std::convert::Infallible, Lost> {
    let socket = UnixStream::connect(&shared.target.socket)?;
    socket.set_nonblocking(true)?;
    let mut connection = Connection {
        shared,
        notify,
        socket,
        pending: Vec::new(),
        written: 0,
        log: LogLimit::new(),
        hints: HintLimit::new(Instant::now()),
    };
    let decoder = connection.greet()?;
    *told = None;
    connection.serve(decoder)
}

struct Connection<'a> {
    shared: &'a Shared,
    notify: &'a dyn Fn(LinkEvent),
    socket: UnixStream,
    /// Frames taken from the shared state; the first `written` bytes are gone.
    pending: Vec<u8>,
    written: usize,
    log: LogLimit,
    hints: HintLimit,
}

impl Connection<'_> {
    /// Says hello and waits for the answer.
    fn greet(&mut self) -> Result<Decoder, Lost> {
        let hello = port::encode(&ToAgent::Hello {
            version: ABI_VERSION,
            pod_id: self.shared.target.pod_id,
        })?;
        let mut greeting = Greeting::default();
        let mut doorbell = None;
        let deadline = Instant::now() + GREETING_PATIENCE;
        self.pending.extend_from_slice(&hello);
        let mut buffer = vec![0; READ_SIZE];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Lost::Silent);
            }
            self.flush()?;
            self.wait(Some(left))?;
            let (bytes, mut fds) = match receive(self.socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return Err(Lost::Eof),
                Ok(received) => received,
                Err(e) if is_transient(&e) => continue,
                Err(e) => return Err(e.into()),
            };
            fds.retain(|fd| doorbell::is_eventfd(fd));
            doorbell = fds.pop().or(doorbell);
            if let Some((hello, decoder)) = greeting.push(&buffer[..bytes]) {
                self.accept(hello, doorbell)?;
                return Ok(decoder);
            }
        }
    }

    /// Checks who answered.
    fn accept(&mut self, hello: Hello, doorbell: Option<OwnedFd>) -> Result<(), Lost> {
        let target = &self.shared.target;
        if hello.version != ABI_VERSION {
            return Err(Lost::Version(hello.version));
        }
        if (hello.node, hello.generation) != (target.node.get(), target.generation) {
            return Err(Lost::Stranger {
                found: format!("{}.{}", hello.node, hello.generation),
                expected: format!("{}.{}", target.node, target.generation),
            });
        }
        let info = AgentInfo {
            agent: printable(&hello.agent),
            kernel: printable(&hello.kernel),
        };
        let mut state = self.shared.lock();
        if state.closed {
            return Err(Lost::Closed);
        }
        state.up = Some(info.clone());
        state.doorbell = doorbell;
        state.direct = self.socket.try_clone().ok();
        // The rest of a hello that is half written must go out before anything else.
        state.in_flight = self.pending.len() - self.written;
        drop(state);
        (self.notify)(LinkEvent::Up(info));
        Ok(())
    }

    /// Moves frames until the connection is lost.
    fn serve(&mut self, mut decoder: Decoder) -> Result<std::convert::Infallible, Lost> {
        let mut buffer = vec![0; READ_SIZE];
        loop {
            while let Some(message) = decoder.next_message()? {
                self.dispatch(message)?;
            }
            self.take_outgoing();
            self.flush()?;
            self.wait(None)?;
            match receive(self.socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return Err(Lost::Eof),
                // Descriptors mean something with the hello only.
                Ok((bytes, _)) => decoder.push(&buffer[..bytes]),
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn dispatch(&mut self, message: ToManager) -> Result<(), Lost> {
        let channel = |id: u32| self.shared.lock().channels.get(&id).cloned();
        // A frame for an unknown channel is late, not wrong: the command is over.
        match message {
            // Answer to the hello of an earlier manager.
            ToManager::Hello { .. } => {}
            ToManager::Started { channel: id, pid } => {
                if let Some(channel) = channel(id) {
                    channel.started(pid);
                }
            }
            ToManager::Output {
                channel: id,
                stderr,
                data,
            } => {
                if let Some(channel) = channel(id) {
                    let bytes = channel.output(stderr, data)?;
                    if bytes > 0 {
                        // Refused only if there is no connection any more.
                        let _ = self.shared.send(&ToAgent::Credit { channel: id, bytes });
                    }
                }
            }
            ToManager::Credit { channel: id, bytes } => {
                if let Some(channel) = channel(id) {
                    channel.credit(bytes)?;
                }
            }
            ToManager::Exited {
                channel: id,
                status,
            } => {
                let ended = self.shared.lock().channels.remove(&id);
                if let Some(channel) = ended {
                    channel.end(match status {
                        port::ExecStatus::NotStarted(errno, why) => {
                            port::ExecStatus::NotStarted(errno, printable(&why))
                        }
                        status => status,
                    });
                }
            }
            ToManager::Wake(wake) => self.pass_on(Hint::Wake(wake)),
            ToManager::Deaths => self.pass_on(Hint::Deaths),
            ToManager::Groups => self.pass_on(Hint::Groups),
            ToManager::Log { message } => {
                if let Some(skipped) = self.log.allows() {
                    if skipped > 0 {
                        let text = format!("({skipped} lines of the agent skipped)");
                        (self.notify)(LinkEvent::Log(text));
                    }
                    (self.notify)(LinkEvent::Log(printable(&message)));
                }
            }
        }
        Ok(())
    }

    fn pass_on(&mut self, hint: Hint) {
        if self.hints.allows(Instant::now()) {
            (self.notify)(LinkEvent::Hint(hint));
        }
    }

    fn take_outgoing(&mut self) {
        let mut state = self.shared.lock();
        if self.written == self.pending.len() {
            self.pending.clear();
            self.written = 0;
            std::mem::swap(&mut self.pending, &mut state.outgoing);
        }
        state.in_flight = self.pending.len() - self.written;
    }

    /// Writes as much as the socket takes.
    fn flush(&mut self) -> Result<(), Lost> {
        while self.written < self.pending.len() {
            match (&self.socket).write(&self.pending[self.written..]) {
                Ok(0) => return Err(Lost::Eof),
                Ok(bytes) => self.written += bytes,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.pending.clear();
        self.written = 0;
        Ok(())
    }

    /// Waits until there is something to do, at most for `limit`.
    fn wait(&self, limit: Option<Duration>) -> Result<(), Lost> {
        let writing = self.written < self.pending.len();
        let mut interest = PollFlags::POLLIN;
        interest.set(PollFlags::POLLOUT, writing);
        {
            let mut state = self.shared.lock();
            if state.closed {
                return Err(Lost::Closed);
            }
            state.in_flight = self.pending.len() - self.written;
            if !writing && !state.outgoing.is_empty() {
                return Ok(());
            }
        }
        let mut fds = [
            PollFd::new(self.socket.as_fd(), interest),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(Lost::Io(e.into())),
        }
        // Empty unless it was the one that woke us; the descriptor does not block.
        let _ = self.shared.wake.read();
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A text of the agent, bounded and without control characters.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.trim_end().chars() {
        if out.len() > MAX_TEXT {
            out.push_str("...");
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Limits the log lines of one connection.
struct LogLimit {
    began: Instant,
    lines: u32,
    skipped: u64,
}

impl LogLimit {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            lines: 0,
            skipped: 0,
        }
    }

    /// Whether a line may pass; with how many were skipped since the last one.
    fn allows(&mut self) -> Option<u64> {
        if self.began.elapsed() > LOG_WINDOW {
            self.began = Instant::now();
            self.lines = 0;
        }
        if self.lines >= LOG_LINES {
            self.skipped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.skipped))
    }
}
