//! `lupin-supervise`: a control process that begins a program's lives, one after the other.
//!
//! ```text
//!   begin -> runs -- exit 0 -------------------------> end, with its status
//!     ^       | \--- SIGTERM to the supervisor: pass on, grace, SIGKILL --> end
//!     |       | fails
//!     +-- pause, unless it failed too often --------> end, 124
//! ```
//!
//! It needs no agent: that the former life is over is the kernel's word, and a program that registers
//! its thread ids again is told by its agent when their former lives are.

mod cli;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use log::{info, warn};
use lupin::supervise::Backoff;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getpid, getppid};

pub use cli::{IDS_ENV, Ids, LIFE_ENV, Options, Restart};

use crate::notify::notify;

/// Exit status: the program failed too often.
pub const GAVE_UP: u8 = 124;
/// Exit status: the supervisor itself failed.
pub const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Signals that are the program's business.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
    Signal::SIGWINCH,
];
/// Signals that end it all.
const STOPS: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];

/// Why there is nothing to supervise.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// Arguments that contradict each other.
    #[error("{0}")]
    Arguments(String),
    /// The program cannot be started.
    #[error("{program}: {source}")]
    Program {
        /// Its name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl SuperviseError {
    /// The exit status that says it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Program { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Program { .. } => NOT_EXECUTABLE,
            Self::Arguments(_) | Self::Os { .. } => FAILED,
        }
    }
}

fn os<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> SuperviseError {
    move |source| {
        let source = source.into();
        SuperviseError::Os { what, source }
    }
}

/// Supervises a program to its end, and gives the exit status that tells of it.
///
/// # Errors
/// [`SuperviseError`], of which [`SuperviseError::exit_code`] says the exit status.
pub fn run(options: &Options) -> Result<u8, SuperviseError> {
    let mut backoff = Backoff::new(options.policy()?);
    let mut signals = Signals::take()?;
    for life in 1u64.. {
        let begun = Instant::now();
        let mut child = match begin(options, life) {
            Ok(child) => child,
            // In a later life the file may be being replaced: that passes.
            Err(error) if life == 1 => return Err(error),
            Err(error) => {
                warn!("{error}");
                if !pause(&mut signals, &mut backoff, begun)? {
                    return Ok(GAVE_UP);
                }
                if signals.stop.is_some() {
                    return Ok(0);
                }
                continue;
            }
        };
        notify(&format!(
            "READY=1\nSTATUS=life {life}, process {}",
            child.id()
        ));
        let status = signals.guard(&mut child, Duration::from_millis(options.grace_ms))?;
        if signals.stop.is_some() {
            info!("stopped; the program: {status}");
            return Ok(if obeyed(status) { 0 } else { code_of(status) });
        }
        let again = match options.restart {
            Restart::Never => false,
            Restart::Always => true,
            Restart::OnFailure => !status.success(),
        };
        if !again {
            return Ok(code_of(status));
        }
        warn!("life {life} of the program ended: {status}");
        notify(&format!("STATUS=life {life} ended: {status}"));
        if !pause(&mut signals, &mut backoff, begun)? {
            return Ok(GAVE_UP);
        }
        if signals.stop.is_some() {
            return Ok(0);
        }
    }
    Ok(GAVE_UP)
}

fn begin(options: &Options, life: u64) -> Result<Child, SuperviseError> {
    let supervisor = getpid();
    let ids: Vec<String> = options.threads.0.iter().map(u32::to_string).collect();
    let mut command = Command::new(&options.program[0]);
    command.args(&options.program[1..]);
    command.env(LIFE_ENV, life.to_string());
    // The service manager listens to the supervisor alone.
    command.env_remove("NOTIFY_SOCKET");
    if !ids.is_empty() {
        command.env(IDS_ENV, ids.join(","));
    }
    let tied = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // It may have died before that.
        if getppid() != supervisor {
            return Err(io::Error::from(Errno::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only, which are safe after a fork.
    unsafe { command.pre_exec(tied) };
    command.spawn().map_err(|source| {
        let program = options.program[0].to_string_lossy().into_owned();
        SuperviseError::Program { program, source }
    })
}

/// Pauses after a failure; false if there shall be no other life.
fn pause(
    signals: &mut Signals,
    backoff: &mut Backoff,
    begun: Instant,
) -> Result<bool, SuperviseError> {
    let Some(pause) = backoff.failed(begun.elapsed()) else {
        let failures = backoff.failures();
        warn!("{failures} failures in a row: given up");
        notify(&format!("STATUS=given up after {failures} failures"));
        return Ok(false);
    };
    let until = Instant::now() + pause;
    while signals.stop.is_none() && Instant::now() < until {
        // Nobody is there to have the others.
        signals.next(Some(until))?;
    }
    Ok(true)
}

/// Whether a program did as it was told by SIGTERM.
fn obeyed(status: ExitStatus) -> bool {
    status.success() || status.signal() == Some(Signal::SIGTERM as i32)
}

fn code_of(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, signal) => 128 + signal.unwrap_or(0) as u8,
    }
}

/// The supervisor's signals, taken from a queue.
struct Signals {
    queue: SignalFd,
    /// The one that asked for the end.
    stop: Option<Signal>,
}

impl Signals {
    fn take() -> Result<Self, SuperviseError> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        for signal in PASSED_ON.into_iter().chain(STOPS) {
            set.add(signal);
        }
        // The standard library empties the mask of a child.
        set.thread_block().map_err(os("block signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let queue = SignalFd::with_flags(&set, flags).map_err(os("signalfd"))?;
        Ok(Self { queue, stop: None })
    }

    /// The next signal, or `None` at the deadline.
    fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Signal>, SuperviseError> {
        loop {
            if let Some(info) = self.queue.read_signal().map_err(os("signalfd"))? {
                let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) else {
                    continue;
                };
                if STOPS.contains(&signal) {
                    self.stop = Some(signal);
                }
                return Ok(Some(signal));
            }
            let timeout = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    let ms = left.as_millis() + 1;
                    PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut fds = [PollFd::new(self.queue.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(os("poll")(error)),
            }
        }
    }

    /// Waits for the end of a program, passes signals on, and ends it when told to.
    fn guard(&mut self, child: &mut Child, grace: Duration) -> Result<ExitStatus, SuperviseError> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut deadline = None;
        loop {
            // Not reaped yet, so the number is still the program's.
            if let Some(status) = child.try_wait().map_err(os("wait"))? {
                return Ok(status);
            }
            match self.next(deadline)? {
                Some(Signal::SIGCHLD) => {}
                Some(signal) if STOPS.contains(&signal) => {
                    if deadline.is_none() {
                        notify("STOPPING=1");
                        send(pid, Signal::SIGTERM);
                        // The stopped do not act on a signal before they go on.
                        send(pid, Signal::SIGCONT);
                        deadline = Some(Instant::now() + grace);
                    }
                }
                Some(signal) => send(pid, signal),
                None => {
                    warn!("the program did not end within {grace:?}: killed");
                    send(pid, Signal::SIGKILL);
                    deadline = None;
                }
            }
        }
    }
}

fn send(pid: Pid, signal: Signal) {
    if let Err(error) = kill(pid, signal) {
        warn!("{signal} to process {pid}: {error}");
    }
}
