//! Futexes of one kernel, told apart by the classes of nodes.
//!
//! Sleepers and wakers name the class of their node in the bit set of `FUTEX_WAIT_BITSET`. Nodes
//! that share a kernel, as namespace nodes do, thus do not wake each other by accident: they rely
//! on their agents as guests do, and what is tested on them holds for guests.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;

use super::class;
use crate::mem::add32;

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slept {
    /// Somebody woke the sleeper, or had changed the word before.
    Woken,
    /// Its bound was over.
    Whole,
    /// Neither: a signal came, or there was a reason not to sleep.
    Disturbed,
}

/// Sleeps until woken, or `word` no longer holds `seen`, or `bound` is over.
pub(super) fn wait(word: &AtomicU32, seen: u32, bound: Duration) -> Slept {
    let own = class::own();
    if crate::mem::slept(word, seen, own) {
        return Slept::Woken;
    }
    // FUTEX_WAIT_BITSET takes a moment of CLOCK_MONOTONIC, and no duration.
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let nanos = now.tv_nsec as u64 + u64::from(bound.subsec_nanos());
    let seconds = bound.as_secs().saturating_add(nanos / 1_000_000_000);
    let until = libc::timespec {
        tv_sec: now
            .tv_sec
            .saturating_add(libc::time_t::try_from(seconds).unwrap_or(libc::time_t::MAX)),
        tv_nsec: (nanos % 1_000_000_000) as libc::c_long,
    };
    // Not FUTEX_PRIVATE_FLAG: the sleepers are in several processes.
    // SAFETY: both pointers are valid for the call; the kernel only reads through them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET,
            seen,
            &raw const until,
            core::ptr::null::<u32>(),
            own,
        )
    };
    if result != -1 {
        return Slept::Woken;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Slept::Woken,
        Some(libc::ETIMEDOUT) => Slept::Whole,
        Some(libc::EINTR) => Slept::Disturbed,
        _ => {
            // A memory on which this kernel offers no futex: sleep the bound instead of spinning,
            // and no longer than if nobody could wake at all.
            std::thread::sleep(bound.min(super::MAX_SLEEP));
            Slept::Disturbed
        }
    }
}

/// Wakes up to `count` sleepers of this node, who sleep on `word`; how many.
pub(super) fn wake_own(word: &AtomicU32, count: i32) -> usize {
    let own = class::own();
    if let Some(woken) = crate::mem::woke(word, count, own) {
        return woken;
    }
    // SAFETY: the kernel uses the address as a key and does not write to it.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE_BITSET,
            count,
            core::ptr::null::<libc::timespec>(),
            core::ptr::null::<u32>(),
            own,
        )
    };
    usize::try_from(woken).unwrap_or(0)
}

/// Wakes sleepers of other nodes, of those in `classes`: one of each node, or all.
#[cold]
pub(super) fn wake_others(word: &AtomicU32, classes: u32, all: bool) {
    let count = if all { i32::MAX } else { 1 };
    // Each class is a node of its own in a model, and each wakes so many.
    let mut left = classes;
    while left != 0 {
        let lowest = left & left.wrapping_neg();
        if crate::mem::woke(word, count, lowest).is_none() {
            return crate::client::wake::send(word, classes, all);
        }
        left &= !lowest;
    }
}

/// Wakes up to `count` sleepers of this node: changes `word` and tells the kernel.
pub(super) fn wake(word: &AtomicU32, count: i32) {
    add32(word, 1, Ordering::SeqCst);
    wake_own(word, count);
}
