//! The processes that use the pod from this node, and what dies with them.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use lupin_abi::groups::End;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::exit::how_it_ended;
use crate::segments::LeaseId;
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
    /// Leases of the segments that it opened.
    pub segments: BTreeSet<LeaseId>,
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
            segments: BTreeSet::new(),
            reaped: None,
        }
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
