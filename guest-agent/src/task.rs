//! Processes and threads as the kernel tells of them, and which of them are over.
//!
//! A number alone names nobody: it is used again. What an agent must find again after its own
//! restart it remembers with the time of its start ([`Holder`]).
//!
//! A thread is over once `/proc/PID/task/TID` is gone or shows a zombie: the kernel takes its
//! address space away before either, so no store of it is in flight then. A descriptor of the
//! thread (Linux 6.9) or the process connector tell sooner that one should look; they decide
//! nothing.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use lupin_abi::instances::Holder;
use nix::errno::Errno;
use nix::sys::uio::pread;

/// What can be said of a task's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It can still store to memory.
    Alive,
    /// It cannot, and never will.
    Over,
    /// The kernel did not tell. Nothing may be concluded.
    Unknown,
}

/// `PF_EXITING` of the kernel: the task is on its way out.
const EXITING: u32 = 0x4;
/// `SIGKILL` in a mask of signals.
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// A line of `/proc/.../stat`, as far as it matters here.
struct Stat {
    state: u8,
    flags: u32,
    started: u64,
}

impl Stat {
    fn read(path: &str) -> io::Result<Self> {
        let line = fs::read_to_string(path)?;
        Self::parse(&line).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(line: &str) -> Option<Self> {
        // The name is in parentheses and may hold anything, parentheses as well.
        let (_, fields) = line.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        // Fields are counted from 1: the state is the 3rd, the flags are the 9th, the start the 22nd.
        Some(Self {
            state: *fields.next()?.as_bytes().first()?,
            flags: fields.nth(5)?.parse().ok()?,
            started: fields.nth(12)?.parse().ok()?,
        })
    }

    fn is_over(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ESRCH | libc::ENOTDIR)
    )
}

/// Whether a holder lives. A process counts as alive here until it was reaped: its pidfd knows
/// better, and is not to be had for one that is over.
pub fn life_of(holder: &Holder) -> Life {
    let Holder { pid, tid, started } = *holder;
    let path = match tid {
        0 => format!("/proc/{pid}/stat"),
        tid => format!("/proc/{pid}/task/{tid}/stat"),
    };
    match Stat::read(&path) {
        Err(error) if is_gone(&error) => Life::Over,
        Err(_) => Life::Unknown,
        Ok(stat) if started != 0 && stat.started != started => Life::Over,
        Ok(stat) if tid != 0 && stat.is_over() => Life::Over,
        Ok(_) => Life::Alive,
    }
}

/// Whether a thread is surely gone: a cheap look, for often. A zombie, and another thread with the
/// number, are not told apart from the living.
pub fn has_vanished(holder: &Holder) -> bool {
    // SAFETY: a system call without pointers; signal 0 is never delivered.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, holder.pid, holder.tid, 0) };
    Errno::result(result) == Err(Errno::ESRCH)
}

/// A process as a holder.
pub fn process(pid: u32) -> Holder {
    let started = Stat::read(&format!("/proc/{pid}/stat")).map_or(0, |stat| stat.started);
    let tid = 0;
    Holder { pid, tid, started }
}

/// The thread of a process that calls itself `tid`, perhaps in a PID namespace of its own; `None`
/// if the process has none.
pub fn thread(pid: u32, tid: u32) -> Option<Holder> {
    let is_it = |task: u32| own_number(pid, task).is_some_and(|own| own == tid);
    let tid = if is_it(tid) {
        tid
    } else {
        tasks(pid).find(|task| is_it(*task))?
    };
    let stat = Stat::read(&format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let started = stat.started;
    (!stat.is_over()).then_some(Holder { pid, tid, started })
}

/// The threads of a process.
fn tasks(pid: u32) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// How a thread numbers itself: the last of its numbers, from our namespace inwards.
fn own_number(pid: u32, tid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    match field(&status, "NSpid:") {
        Some(numbers) => numbers.split_whitespace().next_back()?.parse().ok(),
        // A kernel without PID namespaces.
        None => Some(tid),
    }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}

/// Whether any thread of a process is going to go on. False while the whole process is dying,
/// which its pidfd will tell, with how it ended.
pub fn goes_on(pid: u32) -> bool {
    tasks(pid).any(|tid| {
        let folder = format!("/proc/{pid}/task/{tid}");
        let Ok(stat) = Stat::read(&format!("{folder}/stat")) else {
            return false;
        };
        if stat.is_over() || stat.flags & EXITING != 0 {
            return false;
        }
        let status = fs::read_to_string(format!("{folder}/status")).unwrap_or_default();
        let pending = |name| {
            let mask = field(&status, name).map(str::trim);
            mask.and_then(|mask| u64::from_str_radix(mask, 16).ok())
        };
        // A killed process dies thread by thread.
        matches!((pending("SigPnd:"), pending("ShdPnd:")), (Some(a), Some(b)) if (a | b) & KILL == 0)
    })
}

/// The program that a process runs: its address space, which `exec` replaces.
#[derive(Debug)]
pub struct Program(File);

impl Program {
    /// The program that process `pid` runs now.
    ///
    /// # Errors
    /// If the process is gone, or its memory is none of this agent's business.
    pub fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/mem")).map(Self)
    }

    /// Whether nobody runs it any more. Not before the last thread in it is gone or has left it,
    /// so no store of it is in flight then.
    pub fn is_over(&self) -> bool {
        // The descriptor belongs to the address space, not to the process. Nothing is mapped at
        // address 0 (EIO), but of an address space without users there is nothing at all to read.
        pread(&self.0, &mut [0], 0) == Ok(0)
    }
}

/// A descriptor of a thread, which becomes readable when the thread ends. Of a process's first
/// thread newer kernels tell only when all others ended as well.
///
/// # Errors
/// `EINVAL` before Linux 6.9.
pub fn pidfd_of_thread(tid: u32) -> Result<OwnedFd, Errno> {
    /// `PIDFD_THREAD` of the kernel.
    const THREAD: libc::c_int = libc::O_EXCL;
    // SAFETY: a system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, THREAD) };
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Whether this kernel has descriptors of threads.
pub fn has_thread_pidfds() -> bool {
    pidfd_of_thread(nix::unistd::gettid().as_raw().cast_unsigned()).is_ok()
}

#[cfg(test)]
#[path = "task_test.rs"]
mod task_test;
