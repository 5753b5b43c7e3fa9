//! A process that is watched, told to die, and never mistaken for another.
//!
//! A pid is a number that the kernel gives to the next process sooner or later. A pidfd is not,
//! but it dies with the manager. Across managers a process is therefore named by its pid *and*
//! the time at which it started, in ticks since boot.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};

/// A process across managers of one boot of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessName {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

/// How a process ended, as its parent learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// A process that this manager watches.
#[derive(Debug)]
pub struct Process {
    name: ProcessName,
    pidfd: OwnedFd,
}

impl Process {
    /// A child that was just made, of which the kernel gave both pid and pidfd.
    pub(super) fn of_child(name: ProcessName, pidfd: OwnedFd) -> Self {
        Self { name, pidfd }
    }

    /// Finds a process by name; `None` if it is gone.
    ///
    /// # Errors
    /// Of `pidfd_open`, other than "no such process".
    pub fn find(name: ProcessName) -> io::Result<Option<Self>> {
        // The order matters: the pidfd first. If the pid is given to another process between the
        // two steps, that one started at another time, and the pidfd is dropped.
        let pidfd = match pidfd_open(name.pid) {
            Ok(pidfd) => pidfd,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        let process = Self { name, pidfd };
        let same = start_time(name.pid).is_some_and(|found| found == name.start_time);
        Ok((same && !process.is_gone()).then_some(process))
    }

    /// Pid and start time.
    pub fn name(&self) -> ProcessName {
        self.name
    }

    /// Whether the process has ended, and with it every one of its threads: a pidfd becomes
    /// readable when the last thread of the group is gone, and the memory of a thread is
    /// unmapped before that. No store of it can happen any more.
    pub fn is_gone(&self) -> bool {
        self.wait_gone(Some(Duration::ZERO))
    }

    /// Waits until the process has ended; `false` if it has not after `bound` (`None`: for ever).
    pub fn wait_gone(&self, bound: Option<Duration>) -> bool {
        let until = bound.map(|bound| Instant::now() + bound);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                // Rounded up, so that the last wait is not a busy one.
                let millis = left.as_micros().div_ceil(1000);
                PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return false,
                Ok(0) | Err(Errno::EINTR | Errno::EAGAIN) => {}
                Ok(_) => return true,
                // A pidfd can always be polled; if it cannot, nothing is known: do not claim.
                Err(_) => return false,
            }
        }
    }

    /// SIGKILL. A process that is gone already is no error.
    ///
    /// # Errors
    /// Of `pidfd_send_signal`.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Sends a signal. A process that is gone already is no error.
    ///
    /// # Errors
    /// Of `pidfd_send_signal`.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: plain system call on a descriptor that `self` owns; a null siginfo is allowed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// How the process ended, and takes it from the kernel's table if it was our child. `None` for
    /// a process that is not gone, and before Linux 6.15 for the child of another manager.
    pub fn reap(&self) -> Option<Ended> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        loop {
            match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
                Ok(WaitStatus::Exited(_, code)) => return Some(Ended::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    return Some(Ended::Signal(signal as i32));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return self.exit_info(),
                Ok(_) | Err(_) => return None,
            }
        }
    }
}

impl Process {
    /// What a pidfd that was open when the process ended still knows of it.
    fn exit_info(&self) -> Option<Ended> {
        let mut info = PidfdInfo {
            mask: PIDFD_INFO_EXIT,
            rest: [0; 13],
            exit_code: 0,
        };
        // SAFETY: the request's number holds the size of the structure that it fills, and `info`
        // has this size; a kernel without it fails with ENOTTY.
        let result = unsafe { libc::ioctl(self.pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
        if result != 0 || info.mask & PIDFD_INFO_EXIT == 0 {
            return None;
        }
        let status = info.exit_code;
        if libc::WIFEXITED(status) {
            Some(Ended::Code(libc::WEXITSTATUS(status)))
        } else {
            libc::WIFSIGNALED(status).then(|| Ended::Signal(libc::WTERMSIG(status)))
        }
    }
}

/// `struct pidfd_info` of the kernel, in its first published size.
#[repr(C)]
struct PidfdInfo {
    mask: u64,
    /// Cgroup, ids, credentials: not asked for.
    rest: [u32; 13],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// Ask for the exit code of a process that is gone.
const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// `_IOWR(0xff, 11, struct pidfd_info)`.
const PIDFD_GET_INFO: libc::Ioctl = (3 << 30) | (64 << 16) | (0xff << 8) | 11;

impl AsFd for Process {
    /// The pidfd: readable when the process is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; flags 0, and the result is checked before it is owned.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just gave us this descriptor, close-on-exec; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// When a process started, in clock ticks since boot; `None` if there is no such process.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22, counted from 1; the fields after the command's closing parenthesis begin with 3.
    stat_fields(&stat)?.nth(19)?.parse().ok()
}

/// The fields of a `/proc/PID/stat` line from the third (the state) on. The second field is the
/// command, which may itself hold spaces and parentheses.
pub(super) fn stat_fields(stat: &str) -> Option<impl Iterator<Item = &str>> {
    let (_, after) = stat.rsplit_once(')')?;
    Some(after.split_ascii_whitespace())
}

/// The id of this boot of the host: a pid and a start time mean nothing across boots.
pub fn host_boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().into())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_found_by_pid_and_start_time_only() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let name = ProcessName {
            pid: child.id(),
            start_time: start_time(child.id()).unwrap(),
        };
        let process = Process::find(name).unwrap().unwrap();
        assert!(!process.is_gone());
        let other = ProcessName {
            start_time: name.start_time + 1,
            ..name
        };
        assert!(Process::find(other).unwrap().is_none());
        process.kill().unwrap();
        assert!(process.wait_gone(None));
        // A zombie is gone, though its pid still has an entry in /proc.
        assert!(start_time(name.pid).is_some());
        assert!(Process::find(name).unwrap().is_none());
        assert_eq!(process.reap(), Some(Ended::Signal(9)));
        // Taken; newer kernels still tell.
        assert!(matches!(process.reap(), None | Some(Ended::Signal(9))));
        process.kill().unwrap();
        assert!(Process::find(name).unwrap().is_none());
        let _ = child.wait();
    }

    #[test]
    fn the_end_of_a_process_that_is_not_our_child_is_known_where_the_kernel_tells() {
        let mut parent = Command::new("sh")
            .args([
                "-c",
                "exec 3<&0; sh -c 'read x <&3; exit 7' & echo $!; wait",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut reader = std::io::BufReader::new(parent.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
        let pid = line.trim().parse().unwrap();
        let name = ProcessName {
            pid,
            start_time: start_time(pid).unwrap(),
        };
        let process = Process::find(name).unwrap().unwrap();
        assert_eq!(process.reap(), None, "it is not gone");
        drop(parent.stdin.take());
        parent.wait().unwrap();
        assert!(process.wait_gone(None));
        let ended = process.reap();
        assert!(matches!(ended, None | Some(Ended::Code(7))), "{ended:?}");
    }

    #[test]
    fn commands_with_spaces_and_parentheses_do_not_shift_fields() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4711 9 9";
        let mut fields = stat_fields(line).unwrap();
        assert_eq!(fields.next(), Some("S"));
        assert_eq!(stat_fields(line).unwrap().nth(19), Some("4711"));
        assert!(stat_fields("garbage").is_none());
    }
}
