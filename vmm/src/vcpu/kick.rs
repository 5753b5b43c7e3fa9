//! Makes a vCPU thread leave the guest, without a window in which the request is lost.
//!
//! A signal alone can arrive just before `KVM_RUN` and change nothing. So the kicker stores 1
//! to `immediate_exit` in the vCPU's run structure first: `KVM_RUN` looks there after it has
//! unmasked signals and returns `EINTR` at once. The signal is for a vCPU that is inside.
//!
//! ```text
//! kicker                         vCPU thread
//! stop = true        (Release)   KVM_RUN returns EINTR
//! immediate_exit = 1 (Release)   immediate_exit.swap(0)  (AcqRel)
//! tgkill                         load stop               (Acquire)
//! ```
//!
//! If the swap takes the kicker's 1, it also sees what the kicker stored before it (`stop`). If it
//! comes before the kicker's store, the 1 stays and the next `KVM_RUN` returns at once.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives the kick signal a handler that does nothing: its arrival alone interrupts.
pub(crate) fn install_signal_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), ignore).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Kernel id of the calling thread.
pub(super) fn current_tid() -> u32 {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() as u32 }
}

/// The vCPU's `immediate_exit` flag, as a kicker may store to it at any time.
fn immediate_exit(fd: &mut VcpuFd) -> NonNull<AtomicU8> {
    NonNull::from(&mut fd.get_kvm_run().immediate_exit).cast()
}

/// Takes back a kick, in the vCPU's own thread, after `KVM_RUN` has returned `EINTR`.
pub(crate) fn clear(fd: &mut VcpuFd) {
    let flag = immediate_exit(fd);
    // SAFETY: `fd` keeps the run structure mapped, and a byte is always aligned.
    unsafe { flag.as_ref() }.swap(0, Ordering::AcqRel);
}

#[derive(Debug)]
struct Target {
    immediate_exit: NonNull<AtomicU8>,
    tid: libc::pid_t,
}

// SAFETY: the pointer is only used for atomic stores, while the vCPU is registered.
unsafe impl Send for Target {}

/// Reaches one vCPU thread from others.
#[derive(Debug, Default)]
pub struct KickHandle(Mutex<Option<Target>>);

impl KickHandle {
    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread, which is about to run `fd`, reachable until the guard drops.
    pub(crate) fn register(&self, fd: &mut VcpuFd) -> Registration<'_> {
        let tid = current_tid() as libc::pid_t;
        *self.target() = Some(Target {
            immediate_exit: immediate_exit(fd),
            tid,
        });
        Registration(self)
    }

    /// Makes the vCPU leave the guest soon. Without effect when its thread is not running it.
    pub fn kick(&self) {
        // Held over both steps, so that the thread (and with it the run structure) stays.
        if let Some(target) = &*self.target() {
            // SAFETY: registered, so the vCPU's descriptor and its mapping are alive.
            unsafe { target.immediate_exit.as_ref() }.store(1, Ordering::Release);
            // SAFETY: plain system call; the thread exists, as it has not unregistered.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), target.tid, SIGRTMIN()) };
        }
    }
}

/// See [`KickHandle::register`].
#[derive(Debug)]
pub(crate) struct Registration<'a>(&'a KickHandle);

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        *self.0.target() = None;
    }
}
