//! Waiting for another node: a short spin, then sleeps of bounded length.
//!
//! A futex wakes sleepers of one kernel. Whoever waits for something that happens on another
//! node therefore never sleeps longer than [`MAX_SLEEP`] without looking again; that is also the
//! longest time by which a waiter can miss that the owner died.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::time::Instant;

/// The longest sleep between two looks.
pub const MAX_SLEEP: Duration = Duration::from_millis(4);
/// The first sleep; each further one is twice as long, up to [`MAX_SLEEP`].
pub const FIRST_SLEEP: Duration = Duration::from_micros(50);
/// Looks before the first sleep. With the pauses between them some microseconds: about what a
/// short critical section on another node takes.
const SPINS: u32 = 64;

/// The moment `timeout` from now. A timeout beyond the range of the clock is a century.
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + CENTURY)
}

/// Paces one wait.
// Hidden and not private, as all of it: the peers of the benchmarks wait by the same policy.
#[doc(hidden)]
#[derive(Debug)]
pub struct Pacer {
    spins: u32,
    sleep: Duration,
    deadline: Option<Instant>,
}

/// The deadline has passed.
#[doc(hidden)]
#[derive(Debug, PartialEq, Eq)]
pub struct TimedOut;

impl Pacer {
    /// A wait that ends at `deadline`, or never.
    pub fn new(deadline: Option<Instant>) -> Self {
        Self {
            spins: 0,
            sleep: FIRST_SLEEP,
            deadline,
        }
    }

    /// Pauses a moment on the processor; false once the time for that is used up.
    pub fn spin(&mut self) -> bool {
        if self.spins >= SPINS || crate::mem::is_modelled() {
            return false;
        }
        // 1, 2, 4, ... 16 pauses: the line of the lock is left alone for ever longer.
        for _ in 0..1u32 << (self.spins / 12).min(4) {
            core::hint::spin_loop();
        }
        self.spins += 1;
        true
    }

    /// Sleeps until `word` is woken, or no longer holds `seen`, or this sleep's bound is over.
    pub fn sleep_on(&mut self, word: &AtomicU32, seen: u32) -> Result<(), TimedOut> {
        let mut bound = self.sleep;
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut);
            }
            bound = bound.min(left);
        }
        self.sleep = (self.sleep * 2).min(MAX_SLEEP);
        futex_wait(word, seen, bound);
        Ok(())
    }

    /// Sleeps this sleep's bound.
    pub fn sleep(&mut self) -> Result<(), TimedOut> {
        let nobody_wakes = AtomicU32::new(0);
        self.sleep_on(&nobody_wakes, 0)
    }
}

fn futex_wait(word: &AtomicU32, seen: u32, bound: Duration) {
    if crate::mem::slept(word, seen) {
        return;
    }
    let timeout = libc::timespec {
        tv_sec: bound.as_secs() as libc::time_t,
        tv_nsec: bound.subsec_nanos().into(),
    };
    // Not FUTEX_PRIVATE_FLAG: the sleepers are in several processes.
    // SAFETY: both pointers are valid for the call; the kernel only reads through them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
    if result == -1 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        if !matches!(errno, Some(libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT)) {
            // A memory on which this kernel offers no futex: sleep the bound instead of spinning.
            std::thread::sleep(bound);
        }
    }
}

/// Wakes up to `count` sleepers of this node.
#[doc(hidden)]
pub fn wake(word: &AtomicU32, count: i32) {
    crate::mem::add32(word, 1, Ordering::SeqCst);
    if crate::mem::woke(word, count) {
        return;
    }
    // SAFETY: the kernel uses the address as a key and does not write to it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
}
