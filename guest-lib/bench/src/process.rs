//! Other processes of the pod, and their deaths.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A child process. Dropping it kills it, at whatever instruction it is, and waits until it is
/// gone.
pub struct Child {
    pid: libc::pid_t,
}

impl Child {
    /// Forks a process that runs `work`. Its shared mappings are the parent's; everything else
    /// is a copy. For a parent without other threads, which might hold locks of the process.
    pub fn fork(work: impl FnOnce()) -> io::Result<Self> {
        // SAFETY: the parent has one thread, so the child may do anything that it could do.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: takes no pointers. A child must not outlive a benchmark that is
                // interrupted.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                let ended = catch_unwind(AssertUnwindSafe(work));
                // SAFETY: ends the process without the parent's destructors and buffers.
                unsafe { libc::_exit(ended.is_err().into()) }
            }
            pid => Ok(Self { pid }),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of this process that was not waited for, so the number is its own.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
