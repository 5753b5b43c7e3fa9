//! How a process ended, as far as somebody who is not its parent can tell.
//!
//! The kernel keeps the status for the parent. Others find it in `/proc/PID/stat` while the process
//! is a zombie, and since Linux 6.15 through its pidfd once it was reaped. What falls between the
//! two on older kernels is [`End::Unknown`], unless somebody remembered it (see
//! [`Process::reaped`](super::process::Process::reaped)).

use std::os::fd::{AsRawFd, BorrowedFd};

use lupin_abi::groups::End;
use nix::errno::Errno;

/// Asks how the process of a pidfd that is readable has ended. `pid` is its number.
pub fn how_it_ended(pidfd: BorrowedFd<'_>, pid: u32) -> End {
    let status = reaped_status(pidfd)
        .or_else(|| zombie_status(pidfd, pid))
        // It may have been reaped between the two.
        .or_else(|| reaped_status(pidfd));
    status.map_or(End::Unknown, End::from_wait_status)
}

fn zombie_status(pidfd: BorrowedFd<'_>, pid: u32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = status_of(&stat)?;
    // If the process can still be signalled, it was not reaped, and what was read was its own
    // and not a successor's with the same number.
    // SAFETY: a system call whose pointer argument may be null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            0,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).ok().map(|_| status)
}

/// The exit status in a line of `/proc/PID/stat`, of a zombie.
fn status_of(stat: &str) -> Option<i32> {
    // The name is in parentheses and may hold anything, parentheses as well.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    // Fields are counted from 1: the state is the 3rd, the exit code the 52nd and last.
    let status = fields.nth(48)?.parse().ok()?;
    matches!(state, "Z" | "X").then_some(status)
}

/// `struct pidfd_info` of the kernel, in its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;
nix::ioctl_readwrite!(pidfd_get_info, 0xff, 11, PidfdInfo);

fn reaped_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the kernel writes at most the structure whose size the request's number says.
    unsafe { pidfd_get_info(pidfd.as_raw_fd(), &raw mut info) }.ok()?;
    (info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    use super::super::process::{Process, pidfd_open};
    use super::*;

    #[test]
    fn a_zombie_tells_how_it_ended() {
        for (script, end) in [
            ("read x; exit 7", End::Exited(7)),
            ("read x; exit 0", End::Exited(0)),
            ("read x; kill -9 $$", End::Killed(9)),
        ] {
            let mut child = Command::new("/bin/sh")
                .args(["-c", script])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let process = Process::new(pidfd_open(child.id()).unwrap());
            drop(child.stdin.take());
            for _ in 0..2000 {
                if process.has_ended() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            assert_eq!(how_it_ended(process.pidfd.as_fd(), child.id()), end);
            child.wait().unwrap();
            // Reaped: known from Linux 6.15 on, and else not made up.
            let later = how_it_ended(process.pidfd.as_fd(), child.id());
            assert!(later == end || later == End::Unknown, "{later:?}");
        }
    }

    #[test]
    fn names_of_processes_may_be_anything() {
        let fields = vec!["1"; 48].join(" ");
        let line = |state| format!("5 (a) R b) {state} {fields} 9");
        assert_eq!(status_of(&line("Z")), Some(9));
        assert_eq!(status_of(&line("R")), None);
        for bad in ["", ")", "1 (x) Z", "1 (x) Z 1 2 3"] {
            assert_eq!(status_of(bad), None);
        }
    }
}
