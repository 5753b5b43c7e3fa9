//! The processes that use the pod from this node, and what dies with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use log::debug;
use lupin_abi::groups::End;
use lupin_abi::instances::Holder;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;

use super::exit::how_it_ended;
use crate::poll::{Poller, Source};
use crate::segments::LeaseId;
use crate::task::{self, Life, Program};
use crate::threads::Thread;

/// One process.
///
/// Its pidfd becomes readable when its last thread is gone; the kernel takes a process's memory
/// down before that, so no store of it is in flight any more when the agent learns of the end.
#[derive(Debug)]
pub struct Process {
    /// Names this process and no later one with the same pid.
    pub pidfd: OwnedFd,
    /// Connections that it opened.
    pub connections: usize,
    /// Thread instances that it registered.
    pub threads: BTreeSet<Thread>,
    /// Those of them that share the life of one of its threads.
    tasks: BTreeMap<Thread, Task>,
    /// What it ran when it registered the first of them, if that can be watched.
    program: Option<Program>,
    /// Leases of the segments that it opened.
    pub segments: BTreeSet<LeaseId>,
    /// It was served by an earlier agent: it may have opened more segments than are known.
    pub is_adopted: bool,
    /// How it ended, should this agent be its parent and have reaped it.
    pub reaped: Option<End>,
}

impl Process {
    /// A process that has nothing yet.
    pub fn new(pidfd: OwnedFd) -> Self {
        Self {
            pidfd,
            connections: 0,
            threads: BTreeSet::new(),
            tasks: BTreeMap::new(),
            program: None,
            segments: BTreeSet::new(),
            is_adopted: false,
            reaped: None,
        }
    }

    /// Notes a thread instance of this process's.
    pub fn hold(&mut self, poller: &Poller, thread: Thread, holder: Holder) {
        if self.threads.is_empty() {
            self.program = Program::of(holder.pid)
                .inspect_err(|error| debug!("memory of process {}: {error}", holder.pid))
                .ok();
        }
        self.threads.insert(thread);
        if holder.tid != 0 {
            let pidfd = task::pidfd_of_thread(holder.tid).ok().filter(|pidfd| {
                // Edges: what it says lasts, and is looked at once.
                let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                poller.add(pidfd, Source::Task(holder.pid), edges).is_ok()
            });
            self.tasks.insert(thread, Task { holder, pidfd });
        }
    }

    /// Forgets a thread instance.
    pub fn forget(&mut self, thread: &Thread) {
        self.threads.remove(thread);
        self.tasks.remove(thread);
        if self.threads.is_empty() {
            self.program = None;
        }
    }

    /// Thread instances that are over, whether or not the process is.
    pub fn dead_threads(&self) -> Vec<Thread> {
        if self.program.as_ref().is_some_and(Program::is_over) {
            return self.threads.iter().copied().collect();
        }
        let is_over = |(_, task): &(&Thread, &Task)| task::life_of(&task.holder) == Life::Over;
        let dead = self.tasks.iter().filter(is_over);
        dead.map(|(thread, _)| *thread).collect()
    }

    /// A cheap look for threads whose end nobody tells.
    pub fn lacks_a_thread(&self) -> bool {
        self.tasks.values().any(|Task { holder, pidfd }| {
            if holder.tid == holder.pid {
                // Stays, as a zombie, as long as the process does.
                task::life_of(holder) == Life::Over
            } else {
                pidfd.is_none() && task::has_vanished(holder)
            }
        })
    }

    /// Whether nothing is left to remember of it.
    pub fn is_idle(&self) -> bool {
        self.connections == 0 && self.threads.is_empty() && self.segments.is_empty()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// How it ended, once it has. `pid` is its number.
    pub fn end(&self, pid: u32) -> End {
        self.reaped
            .unwrap_or_else(|| how_it_ended(self.pidfd.as_fd(), pid))
    }
}

/// A thread of the operating system on whose life an instance depends.
#[derive(Debug)]
struct Task {
    holder: Holder,
    /// Tells of its end, where the kernel has such descriptors.
    pidfd: Option<OwnedFd>,
}

/// The processes by pid.
pub type Processes = HashMap<u32, Process>;

/// A descriptor of the process that opened a connection.
///
/// Linux 6.5 answers for exactly that process. Before, the pid is looked up: should its process
/// have died and the pid been given away since it connected, the new one is watched in its place.
///
/// # Errors
/// `ESRCH` if the process is gone.
pub fn pidfd_of_peer(socket: BorrowedFd<'_>, pid: u32) -> Result<OwnedFd, Errno> {
    /// Not yet in the libc crate for every target.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` and `len` are writable and of the size that is said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &mut len,
        )
    };
    match Errno::result(result) {
        // SAFETY: the kernel has just made this descriptor for this process.
        Ok(_) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(Errno::ENOPROTOOPT) => pidfd_open(pid),
        Err(error) => Err(error),
        Ok(_) => Err(Errno::ESRCH),
    }
}

/// A descriptor of a process.
///
/// # Errors
/// `ESRCH` if there is none with this pid.
pub fn pidfd_open(pid: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: a system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen_before_it_is_reaped() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "read x"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::new(pidfd_open(child.id()).unwrap());
        assert!(!process.has_ended());
        child.kill().unwrap();
        for _ in 0..1000 {
            if process.has_ended() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(process.has_ended());
        child.wait().unwrap();
        assert!(process.has_ended() && process.is_idle());
    }
}
