//! Other processes: where a case may panic, hang, or end its process, and only loses itself.

use std::any::Any;
use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::SuiteError;

thread_local! {
    /// The message of the last panic, where panics are caught.
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static CATCHES: RefCell<u32> = const { RefCell::new(0) };
}

/// Makes panics inside [`guarded`] silent; others are shown as always. Before the first fork: a
/// child of a program with threads must not touch the hook.
pub(crate) fn keep_panics_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if CATCHES.with_borrow(|depth| *depth == 0) {
                return shown(info);
            }
            let what = text_of(info.payload());
            let place = info.location().map(|at| format!(" at {at}"));
            let message = format!("panic: {what}{}", place.unwrap_or_default());
            LAST_PANIC.set(Some(message));
        }));
    });
}

fn text_of(payload: &dyn Any) -> String {
    match (payload.downcast_ref::<String>(), payload.downcast_ref()) {
        (Some(text), _) => text.clone(),
        (None, Some(text)) => <&str>::to_string(text),
        _ => "of an unknown kind".into(),
    }
}

/// Runs `body`; a panic becomes an error with its message and place.
pub(crate) fn guarded<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    CATCHES.with_borrow_mut(|depth| *depth += 1);
    let result = catch_unwind(AssertUnwindSafe(body));
    CATCHES.with_borrow_mut(|depth| *depth -= 1);
    result.map_err(|payload| {
        let known = LAST_PANIC.take();
        known.unwrap_or_else(|| format!("panic: {}", text_of(&*payload)))
    })
}

/// A child process and the pipe by which it tells.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) pipe: File,
}

impl Child {
    /// Forks a child that runs `body`, which may write to the pipe, and then ends with status 0;
    /// with status 101 after a panic. It does not outlive its parent.
    pub(crate) fn start(body: impl FnOnce(&mut File)) -> Result<Self, SuiteError> {
        let (reader, writer): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the child runs this program's own code with the thread that forked as its
        // only one. It takes no lock that another thread could have held: the allocator of the C
        // library is usable after a fork, the panic hook is set before it, and nothing is printed.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                pipe: reader.into(),
            }),
            ForkResult::Child => {
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                drop(reader);
                let mut pipe = File::from(writer);
                let status = match guarded(|| body(&mut pipe)) {
                    Ok(()) => 0,
                    Err(message) => {
                        let _ = pipe.write_all(message.as_bytes());
                        101
                    }
                };
                drop(pipe);
                // SAFETY: ends the process without the parent's exit handlers and destructors.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// Everything the child writes, and how it ended; `None` if that took longer than `limit`,
    /// after which it is gone too.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<Option<Ending>, SuiteError> {
        let start = Instant::now();
        let mut text = Vec::new();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                self.end()?;
                return Ok(None);
            }
            if wait_readable(&mut [&self.pipe], left)?.is_empty() {
                continue;
            }
            let mut buffer = [0; 4096];
            match self.pipe.read(&mut buffer)? {
                0 => break,
                n => text.extend_from_slice(&buffer[..n]),
            }
        }
        let status = waitpid(self.pid, None)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(Some(Ending { text, status }))
    }

    /// Kills it, and waits until it is gone.
    pub(crate) fn end(self) -> Result<WaitStatus, SuiteError> {
        let _ = kill(self.pid, Signal::SIGKILL);
        Ok(waitpid(self.pid, None)?)
    }
}

/// How a child ended.
#[derive(Debug)]
pub(crate) struct Ending {
    /// What it wrote.
    pub(crate) text: String,
    /// How it ended.
    pub(crate) status: WaitStatus,
}

impl Ending {
    /// In words, if it did not end by itself with status 0 and without a word.
    pub(crate) fn complaint(self) -> Option<String> {
        match self.status {
            WaitStatus::Exited(_, 0) if self.text.is_empty() => None,
            WaitStatus::Exited(_, _) => Some(self.text),
            status => Some(describe(status)),
        }
    }
}

/// How a process ended, in words.
pub(crate) fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, status) => format!("ended with status {status}"),
        WaitStatus::Signaled(_, signal, _) => format!("was ended by {signal}"),
        other => format!("{other:?}"),
    }
}

/// Waits until some pipes can be read (or are closed); their indices. None after `limit`.
pub(crate) fn wait_readable(
    pipes: &mut [&File],
    limit: Duration,
) -> Result<Vec<usize>, SuiteError> {
    let mut fds: Vec<_> = pipes
        .iter()
        .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN))
        .collect();
    let millis = limit.as_millis().clamp(1, 1000) as u16;
    match poll(&mut fds, PollTimeout::from(millis)) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    }
    let ready = fds.iter().enumerate();
    let ready = ready.filter(|(_, fd)| fd.any().unwrap_or(false));
    Ok(ready.map(|(index, _)| index).collect())
}

/// Keeps this process and its children on one processor: a tracer and its tracee hand over to
/// each other at each instruction, which is several times faster without a second processor.
pub(crate) fn stay_on_one_processor(slot: usize) {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        return;
    };
    let usable: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .collect();
    let mut one = CpuSet::new();
    if let Some(cpu) = usable.get(slot % usable.len().max(1))
        && one.set(*cpu).is_ok()
    {
        // Only speed depends on it.
        let _ = sched_setaffinity(Pid::from_raw(0), &one);
    }
}
