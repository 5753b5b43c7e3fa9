//! A death at every machine instruction.
//!
//! The operation runs in a process that is stepped (`PTRACE_SINGLESTEP`) from one breakpoint to
//! another, over shared memory that the tracer looks at after each step. A death at an instruction
//! leaves what is in the shared memory then, and nothing else: so each distinct contents is copied
//! once, and recovered, checked and used by a process of its own. A system call is one step; an
//! iteration of a `rep` instruction is one as well.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};

use crate::SuiteError;
use crate::case::{Case, World};
use crate::memory::{Shared, difference, hash};
use crate::process::{Child, describe};
use crate::square::{Extent, Square, prepared, recovered};
use crate::symbols::Symbols;
use crate::worker::{Counts, Worker};

/// How much of an operation is stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// All of it.
    Full,
    /// So many instructions; then it runs freely to its end, whose state is looked at as well.
    AtMost(u64),
}

/// A stop of the tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It made an instruction; the address of the next one.
    At(u64),
    /// It came to the end of what is stepped.
    Returned,
    /// It is gone: ended itself, or was ended by a signal.
    Gone(WaitStatus),
}

/// A process that is stepped through a piece of code.
pub(crate) struct Tracee {
    child: Child,
    mark: u64,
    gone: bool,
}

impl Tracee {
    /// Starts a process that runs `body`, stopped right before it.
    pub(crate) fn start(body: impl FnOnce()) -> Result<Self, SuiteError> {
        if !cfg!(target_arch = "x86_64") {
            return Err(SuiteError::Architecture);
        }
        let child = Child::start(|_| {
            if ptrace::traceme().is_ok() {
                breakpoint();
                body();
                breakpoint();
            }
        })?;
        let mut tracee = Self {
            child,
            mark: 0,
            gone: false,
        };
        match tracee.wait()? {
            Stop::At(mark) => tracee.mark = mark,
            Stop::Returned => {}
            Stop::Gone(status) => return Err(SuiteError::Tracee(describe(status))),
        }
        ptrace::setoptions(tracee.child.pid, ptrace::Options::PTRACE_O_EXITKILL)?;
        Ok(tracee)
    }

    /// One instruction.
    pub(crate) fn step(&mut self) -> Result<Stop, SuiteError> {
        ptrace::step(self.child.pid, None)?;
        self.wait()
    }

    /// Everything up to the end.
    pub(crate) fn run(&mut self) -> Result<Stop, SuiteError> {
        ptrace::cont(self.child.pid, None)?;
        self.wait()
    }

    fn wait(&mut self) -> Result<Stop, SuiteError> {
        loop {
            match waitpid(self.child.pid, None)? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    let next = instruction_pointer(self.child.pid)?;
                    // Only the breakpoints leave it behind theirs.
                    return Ok(match next == self.mark {
                        true => Stop::Returned,
                        false => Stop::At(next),
                    });
                }
                // Its own trouble: a fault, or an abort. What the default action makes of it.
                WaitStatus::Stopped(pid, signal) => ptrace::cont(pid, signal)?,
                status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                    self.gone = true;
                    return Ok(Stop::Gone(status));
                }
                _ => {}
            }
        }
    }

    /// Ends it; what it said (a panic), if it is gone already.
    pub(crate) fn end(self) -> String {
        use std::io::Read;
        let mut text = String::new();
        match self.gone {
            true => {
                let mut pipe = self.child.pipe;
                let _ = pipe.read_to_string(&mut text);
            }
            false => {
                let _ = self.child.end();
            }
        }
        text
    }
}

#[cfg(target_arch = "x86_64")]
fn instruction_pointer(pid: nix::unistd::Pid) -> Result<u64, SuiteError> {
    let at =
        std::mem::offset_of!(libc::user, regs) + std::mem::offset_of!(libc::user_regs_struct, rip);
    let pointer = core::ptr::without_provenance_mut(at);
    Ok(ptrace::read_user(pid, pointer)? as u64)
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_pointer(_: nix::unistd::Pid) -> Result<u64, SuiteError> {
    Err(SuiteError::Architecture)
}

/// Stops under a tracer, always behind the same instruction.
#[inline(never)]
fn breakpoint() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a breakpoint changes no register and no memory; the tracer goes on behind it.
    unsafe {
        core::arch::asm!("int3");
    }
}

/// Steps through one case in one state, and reports to `worker`. Recovery, check and further use
/// of one state may take `limit`.
///
/// # Errors
/// [`SuiteError`] if there is no memory, no process, or no tracing to be had.
pub fn explore(
    case: &dyn Case,
    state: &str,
    depth: Depth,
    limit: Duration,
    worker: &Worker<'_>,
) -> Result<(), SuiteError> {
    let memory = prepared(case, state)?;
    let base = memory.image();
    let mut stepper = Stepper {
        case,
        state,
        worker,
        limit,
        copy: Shared::new(case.bytes())?,
        sites: None,
        base: &base,
    };
    let mut tracee = Tracee::start(|| case.run(memory.mapping(), state))?;
    let mut now = base.clone();
    let mut sum = hash(&now);
    let mut seen = HashSet::from([sum]);
    stepper.try_state(&now, false, "before the first instruction")?;
    let mut made = 0u64;
    let mut address = 0;
    let ended = loop {
        let stop = match depth {
            Depth::AtMost(most) if made >= most => tracee.run()?,
            _ => tracee.step()?,
        };
        let next = match stop {
            Stop::At(next) => next,
            other => break other,
        };
        made += 1;
        if made.is_multiple_of(1024) {
            worker.tick();
        }
        if memory.follow(&mut now, &mut sum) && seen.insert(sum) {
            let place = format!("after instruction {made} at {}", Address(address));
            stepper.try_state(&now, false, &place)?;
        }
        address = next;
    };
    worker.count(Counts {
        points: made,
        ..Counts::default()
    });
    memory.follow(&mut now, &mut sum);
    if let Stop::Gone(status) = ended {
        let said = tracee.end();
        let what = format!("bad {state}: run {}: {said}", describe(status));
        worker.say(&what);
        return Ok(());
    }
    tracee.end();
    stepper.try_state(&now, true, "after it returned")
}

struct Stepper<'a> {
    case: &'a dyn Case,
    state: &'a str,
    worker: &'a Worker<'a>,
    limit: Duration,
    copy: Shared,
    base: &'a [u64],
    sites: Option<BTreeMap<u64, lupin::crash::Site>>,
}

impl Stepper<'_> {
    /// Recovers from `image` in another process.
    fn try_state(&mut self, image: &[u64], returned: bool, place: &str) -> Result<(), SuiteError> {
        self.worker.tick();
        self.worker.count(Counts {
            states: 1,
            ..Counts::default()
        });
        self.copy.restore(image);
        let world = World::after_victim(returned);
        let child = Child::start(|pipe| {
            use std::io::Write;
            if let Err(what) = recovered(self.case, &self.copy, self.state, &world) {
                let _ = pipe.write_all(what.as_bytes());
            }
        })?;
        let what = match child.finish(self.limit)? {
            None => Some(format!("hangs: not over after {:?}", self.limit)),
            Some(ending) => ending.complaint(),
        };
        if let Some(what) = what {
            let next = self.next_site(hash(image))?;
            let changed = difference(self.base, image);
            let state = self.state;
            self.worker
                .say(&format!("bad {state}: {place}{next}: {what} ({changed})"));
        }
        Ok(())
    }

    /// Names the store that was about to happen.
    fn next_site(&mut self, sum: u64) -> Result<String, SuiteError> {
        if self.sites.is_none() {
            let square = Square {
                case: self.case,
                state: self.state,
                extent: Extent::Full,
            };
            self.sites = Some(square.next_sites(self.base)?);
        }
        let site = self.sites.as_ref().and_then(|sites| sites.get(&sum));
        Ok(site.map_or_else(String::new, |(file, line, _)| {
            format!(", before the store of {file}:{line}")
        }))
    }
}

/// An address in this program, as a symbol and an offset.
struct Address(u64);

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Symbols::of_this_program().and_then(|symbols| symbols.name(self.0)) {
            Some(name) => write!(f, "{name}"),
            None => write!(f, "{:#x}", self.0),
        }
    }
}
