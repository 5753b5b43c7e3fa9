//! Waiting for somebody who may be on another node: a short spin, then sleeps of bounded length.
//!
//! # Spin, then sleep
//!
//! A waiter looks a few times, with pauses that double: so the line that it waits for is left to
//! whoever holds it, and what is short is over before a sleep would have begun. Then it sleeps in
//! a futex. A holder that is itself descheduled thus costs its waiters some microseconds once,
//! and not a processor. A waiter that was woken spins again before it sleeps again: it was woken
//! because its turn is near.
//!
//! # No wake-up is lost within a node
//!
//! Before it sleeps, a waiter raises a flag and looks again; whoever ends the wait stores its
//! end and looks at the flag. Each side stores one word and loads the other, which needs a full
//! barrier between the two on both sides, and the one that ends a wait is the fast path of every
//! lock. So the barrier is made by the waiter for both, with `membarrier(2)`
//! (`MEMBARRIER_CMD_GLOBAL_EXPEDITED`, for all processes of the node that are registered, as this
//! library does before it first relies on that). Where the kernel has no such thing, both sides
//! make their own.
//!
//! # Across nodes
//!
//! A futex wakes sleepers of one kernel. So nobody sleeps longer than [`MAX_SLEEP`] without
//! looking again: that bounds what a waiter can miss of another node's release, and of the death
//! of whoever it waits for.

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering, compiler_fence};
use core::time::Duration;
use std::time::Instant;

use crate::mem::{cas32, fence, load32, store32, swap32};

/// The longest sleep between two looks. Thirty waiters that all sleep so long use some percent of
/// one processor for their looks.
pub const MAX_SLEEP: Duration = Duration::from_millis(8);
/// The first sleep; each further one is twice as long, up to [`MAX_SLEEP`].
pub const FIRST_SLEEP: Duration = Duration::from_micros(50);
/// Looks before a sleep. The pauses between them double, which is some ten microseconds in all:
/// about what a short critical section on another node takes.
const SPINS: u32 = 5;
/// Pauses before the first of these looks: some tenths of a microsecond. Every look takes the
/// line away from the holder and costs it several times what a lock and unlock without company
/// costs, so looks are few.
const FIRST_PAUSE: u32 = 16;

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
        for _ in 0..FIRST_PAUSE << self.spins {
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
        if futex_wait(word, seen, bound) {
            self.spins = 0;
        }
        Ok(())
    }

    /// Sleeps this sleep's bound.
    pub fn sleep(&mut self) -> Result<(), TimedOut> {
        let nobody_wakes = AtomicU32::new(0);
        self.sleep_on(&nobody_wakes, 0)
    }
}

/// Sleeps; true if somebody woke the caller, or had done so before.
fn futex_wait(word: &AtomicU32, seen: u32, bound: Duration) -> bool {
    if crate::mem::slept(word, seen) {
        return true;
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
    if result != -1 {
        return true;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => true,
        Some(libc::EINTR | libc::ETIMEDOUT) => false,
        _ => {
            // A memory on which this kernel offers no futex: sleep the bound instead of spinning.
            std::thread::sleep(bound);
            false
        }
    }
}

/// Wakes up to `count` sleepers of this node: changes `word` and tells the kernel.
#[doc(hidden)]
pub fn wake(word: &AtomicU32, count: i32) {
    crate::mem::add32(word, 1, Ordering::SeqCst);
    if crate::mem::woke(word, count) {
        return;
    }
    // SAFETY: the kernel uses the address as a key and does not write to it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
}

/// Nobody sleeps, as far as the flag knows.
const NOBODY: u32 = 0;
/// Somebody may sleep.
const RAISED: u32 = 1;
/// Somebody may sleep, and every processor of the node knows it: who finds this needs no barrier.
const KNOWN: u32 = 2;

/// Where those wait who share a flag and a futex word; the module documentation says how.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Parking<'a> {
    /// Not 0 if somebody may sleep.
    pub flag: &'a AtomicU32,
    /// The futex word.
    pub word: &'a AtomicU32,
}

impl Parking<'_> {
    /// Announces a sleeper. The caller looks once more at what it waits for, with at least
    /// `Acquire`, and then sleeps on `word` with the value returned.
    pub fn announce(&self) -> u32 {
        // Before the flag: whoever lowers the flag after this one raised it changes the word
        // after that, so that the sleep does not begin.
        let seen = load32(self.word, Ordering::Acquire);
        if load32(self.flag, Ordering::Acquire) != KNOWN {
            store32(self.flag, RAISED, Ordering::SeqCst);
            barrier_for_both();
            // Release: who finds the flag known may rely on this one's barrier. Fails if somebody
            // lowered it meanwhile, who has changed the word or will.
            let _ = cas32(self.flag, RAISED, KNOWN, Ordering::AcqRel);
        }
        seen
    }

    /// Says that there may be further sleepers, by one whom [`wake`](Self::wake) woke.
    pub fn pass_on(&self) {
        store32(self.flag, RAISED, Ordering::Relaxed);
    }

    /// Wakes up to `count` sleepers, if any, after the store that ends their wait.
    #[inline(always)]
    pub fn wake(&self, count: i32) {
        half_barrier();
        if load32(self.flag, Ordering::Relaxed) != NOBODY {
            self.wake_now(count);
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_now(self, count: i32) {
        // Lowered, not counted down: a count would stay too high for ever after the death of a
        // sleeper. Whoever has slept raises it again when its own turn to wake comes.
        swap32(self.flag, NOBODY, Ordering::AcqRel);
        wake(self.word, count);
    }
}

/// `membarrier(2)`: unknown, usable, or not.
static EXPEDITED: AtomicU8 = AtomicU8::new(0);
const USABLE: u8 = 1;
const UNUSABLE: u8 = 2;

/// From `linux/membarrier.h`; libc has the names for some targets only.
const MEMBARRIER_CMD_GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
const MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: orders memory accesses and touches none.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// The cheap half of a pair of barriers; the other is [`barrier_for_both`].
#[inline(always)]
pub(crate) fn half_barrier() {
    if cfg!(any(test, feature = "crash-points")) {
        // What the pair is meant to be, for model checkers.
        fence(Ordering::SeqCst);
    } else if EXPEDITED.load(Ordering::Relaxed) == USABLE {
        compiler_fence(Ordering::SeqCst);
    } else {
        half_barrier_unregistered();
    }
}

#[cold]
fn half_barrier_unregistered() {
    if EXPEDITED.load(Ordering::Relaxed) != UNUSABLE {
        let usable = membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED);
        EXPEDITED.store(if usable { USABLE } else { UNUSABLE }, Ordering::Relaxed);
    }
    fence(Ordering::SeqCst);
}

/// The dear half: a full barrier here, and one on every thread of the node that runs a process
/// with [`half_barrier`]s.
#[cold]
pub(crate) fn barrier_for_both() {
    fence(Ordering::SeqCst);
    if !cfg!(any(test, feature = "crash-points")) {
        // Where the kernel refuses, the other side's half is a whole one, if it was refused too.
        let _ = membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
    }
}
