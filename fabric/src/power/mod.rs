//! Power control: how a node is started, fenced, rung and killed.
//!
//! The manager knows nodes only through these traits. [`PowerControl`] starts nodes or finds
//! running ones again; [`Instance`] is one life of a node.
//!
//! | module | backend |
//! |---|---|
//! | [`vmm`] | `kvm`: a VMM process with a KVM guest |
//! | [`namespace`] | `namespace`: a process tree in namespaces of its own |

pub mod namespace;
pub mod vmm;

use std::fmt::Display;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lupin_abi::event::FencePath;
use lupin_abi::{Cause, Generation};

use crate::memory::PodMemory;
use crate::podfile::Node;
use crate::runtime::{NodeFolder, NodeRecord, RuntimeError};
use crate::sys::process::{Ended, ProcessName};
use crate::sys::threads::ThreadTimes;

/// What a backend needs to know to start one life of a node.
#[derive(Debug)]
pub struct StartRequest<'a> {
    /// The node.
    pub node: &'a Node,
    /// The generation that it shall run as.
    pub generation: Generation,
    /// Its runtime folder, cleaned of earlier lives.
    pub folder: &'a NodeFolder,
    /// The pod memory.
    pub memory: &'a PodMemory,
    /// Between two beats of its agent.
    pub heartbeat_period: Duration,
}

/// Starts nodes, or finds them again.
pub trait PowerControl: Send + Sync {
    /// Makes the node's process, but does not let it run: it must be on record first.
    ///
    /// # Errors
    /// If the process cannot be made. Nothing is left behind then.
    fn prepare(&self, request: &StartRequest<'_>) -> Result<Box<dyn Prepared>, StartError>;

    /// Finds a running node that an earlier manager started; `None` if it is gone.
    ///
    /// # Errors
    /// If it cannot be told whether it is gone.
    fn adopt(
        &self,
        request: &StartRequest<'_>,
        record: &NodeRecord,
    ) -> io::Result<Option<Arc<dyn Instance>>>;

    /// Why a process is gone that an earlier manager started, as far as it left word.
    fn last_words(&self, _folder: &NodeFolder, _record: &NodeRecord) -> Exit {
        Exit::unknown()
    }
}

/// A process that waits to be let go. Dropping it ends it without having run.
pub trait Prepared {
    /// Who it is: for the record.
    fn process(&self) -> ProcessName;

    /// Lets it run.
    ///
    /// # Errors
    /// If its program cannot be executed; the process is gone then.
    fn release(self: Box<Self>) -> Result<Arc<dyn Instance>, StartError>;
}

/// One life of a node.
///
/// Called from the manager's thread, except [`fence`](Self::fence), which has a thread of its
/// own and may run beside all others.
pub trait Instance: Send + Sync {
    /// Its process: VMM, or init of the namespaces.
    fn process(&self) -> ProcessName;

    /// Readable when the process is gone.
    fn watch(&self) -> Option<BorrowedFd<'_>>;

    /// Whether the process, all its threads, and all processes of the node are gone.
    fn is_gone(&self) -> bool;

    /// Returns when no store of this life can reach pod memory any more, and not before. It blocks
    /// for as long as that takes, a process's death or the reset of a machine, but is bounded: a
    /// minute at most. Idempotent: the manager tries again until it succeeds, with growing pauses,
    /// and another manager may. A backend that has harsher means than its first uses them then.
    ///
    /// # Errors
    /// If it could not be done, or not be seen to be done: "the reset was accepted" is no success.
    /// The caller does not raise the generation then.
    fn fence(&self) -> io::Result<Fence>;

    /// A second look, independent of the answer to [`fence`](Self::fence), that the life is
    /// fenced: for power that is switched by somebody else's firmware, its power state read back.
    /// Bounded as `fence` is. Backends whose fence is itself the proof need not look twice.
    ///
    /// # Errors
    /// If it is not fenced, or cannot be seen to be. The manager goes on as if `fence` had failed.
    fn confirm_fence(&self, _fence: &Fence) -> io::Result<()> {
        Ok(())
    }

    /// Makes all code of the node stand still; when it returns, it does. For a thread of its own:
    /// it may take seconds, but is bounded. Idempotent, also across managers.
    ///
    /// # Errors
    /// If something of the node may still run. The caller calls [`resume`](Self::resume) then.
    fn pause(&self) -> io::Result<()>;

    /// Lets the node run on, as before the pause. For a thread of its own, bounded, idempotent.
    ///
    /// # Errors
    /// If something of the node may still stand. The caller tries again.
    fn resume(&self) -> io::Result<()>;

    /// Asks what is left after the fence to end. Never blocks.
    fn quit(&self);

    /// Tells the process to die at once. Never blocks; [`is_gone`](Self::is_gone) tells when.
    fn kill(&self);

    /// Rings the node; `false` if it has no bell yet, which loses nothing: a node reads
    /// generation table and events when it starts. Never blocks.
    fn ring(&self) -> bool;

    /// Hands over the bell that the node's agent sent, for a life that was adopted. Rings it: what
    /// happened while it was not known went unheard.
    fn learn_doorbell(&self, _doorbell: OwnedFd) {}

    /// Why the process is gone. To be called once it is.
    fn exit(&self) -> Exit;

    /// The accounts of the threads that run the node's code, virtual CPUs or the agent's threads;
    /// empty if there are none. `None` if this host has no means left to look at them: a silence
    /// of the node does not count then.
    fn thread_times(&self) -> Option<Vec<ThreadTimes>>;
}

/// How a life was fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// By which way.
    pub path: FencePath,
    /// How long it took, in nanoseconds.
    pub nanos: u64,
    /// Memslots deleted.
    pub slots: u32,
}

/// Why a process is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The cause, as peers learn it.
    pub cause: Cause,
    /// Exit code and signal, 0 where unknown.
    pub evidence: [u64; 2],
    /// Whether the next life would end in the same way: wrong arguments, no KVM.
    pub permanent: bool,
    /// For people.
    pub detail: String,
}

impl Exit {
    /// The exit of a process that is nobody's child any more and left no word.
    pub fn unknown() -> Self {
        Self {
            cause: Cause::VmmExit,
            evidence: [0, 0],
            permanent: false,
            detail: "the process is gone and left no word".into(),
        }
    }

    /// The exit of a process without a word of its own.
    pub fn of_process(ended: Option<Ended>) -> Self {
        match ended {
            None => Self::unknown(),
            Some(Ended::Code(code)) => Self {
                evidence: [code as u32 as u64, 0],
                detail: format!("the process exited with code {code}"),
                ..Self::unknown()
            },
            Some(Ended::Signal(signal)) => Self {
                evidence: [0, signal as u32 as u64],
                detail: format!("the process was killed by signal {signal}"),
                ..Self::unknown()
            },
        }
    }
}

/// Why a life could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StartError {
    /// What went wrong and what to do.
    pub message: String,
    /// The error number of the host's system call that failed; 0 if none did.
    pub errno: i32,
    /// Whether trying again would fail in the same way.
    pub permanent: bool,
}

impl StartError {
    /// Something that is wrong with what was asked, and stays so.
    pub fn permanent(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            errno: 0,
            permanent: true,
        }
    }

    /// Something that this host cannot do now, and perhaps later.
    pub fn of_host(action: impl Display, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or_default();
        Self {
            message: format!("cannot {action}: {error}{}", advice(errno)),
            errno,
            permanent: false,
        }
    }

    /// A program that is not there.
    pub(crate) fn no_program(message: String) -> Self {
        Self {
            errno: libc::ENOENT,
            ..Self::permanent(message)
        }
    }

    /// A program that could not be executed.
    pub(crate) fn of_program(program: &Path, error: &io::Error) -> Self {
        // What only a change of the file or of its folders can mend.
        let permanent = matches!(
            error.raw_os_error(),
            Some(libc::ENOENT | libc::EACCES | libc::ENOEXEC | libc::ENOTDIR | libc::ELOOP)
        );
        Self {
            permanent,
            ..Self::of_host(format_args!("execute {}", program.display()), error)
        }
    }
}

impl From<RuntimeError> for StartError {
    /// A record that could not be written, or a folder that could not be made.
    fn from(error: RuntimeError) -> Self {
        Self {
            message: error.to_string(),
            errno: error.errno(),
            permanent: false,
        }
    }
}

/// What to do about what a host lacks.
fn advice(errno: i32) -> &'static str {
    match errno {
        libc::EAGAIN => "; a limit of processes is reached (ulimit -u, pids.max of a cgroup)",
        libc::EMFILE => "; the manager has too many files open (ulimit -n)",
        libc::ENFILE => "; the host has too many files open (fs.file-max)",
        libc::ENOMEM => "; the host, or the manager's cgroup, has no memory left",
        libc::ENOEXEC => "; it is no program for this machine",
        _ => "",
    }
}

/// How long a killed process may take to be gone before that is reported, and tried again.
const KILL_BOUND_S: u32 = 30;

/// Kills a process and waits until it is gone: nothing but its end fences it now.
///
/// # Errors
/// If it cannot be killed, or is not gone after [`KILL_BOUND_S`].
pub(crate) fn kill_and_wait(process: &crate::sys::process::Process) -> io::Result<()> {
    process.kill()?;
    let mut waited = 0u32;
    while !process.wait_gone(Some(Duration::from_secs(5))) {
        waited += 5;
        log::warn!(
            "process {} was killed {waited} s ago and is not gone yet",
            process.name().pid
        );
        if waited >= KILL_BOUND_S {
            let pid = process.name().pid;
            let why = format!("process {pid} was killed {waited} s ago and is not gone");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    }
    Ok(())
}
