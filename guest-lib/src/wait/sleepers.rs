//! The long sleeps of this process, and who interrupts them.
//!
//! A sleeper that relies on being woken is told of two things besides the end of its wait: that
//! somebody died, whom it may be waiting for, and that wake-ups of other nodes reach this process
//! no longer. Both are rare, and both go to all sleepers: each looks again.
//!
//! A sleeper is listed before it looks at the count of deaths for the last time, and whoever
//! announces a death counts it before it walks the list. So one of the two sees the other, and a
//! listed sleeper's word is changed before it is woken, so that a sleep that has not begun does
//! not begin.

use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::futex::{self, Slept};

/// Deaths, and losses of the way to other nodes, that this process was told of.
static INTERRUPTIONS: AtomicU32 = AtomicU32::new(0);

/// Addresses of the words on which somebody sleeps long. Each stays mapped while it is listed:
/// its sleeper holds a reference to it.
static LISTED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn listed() -> MutexGuard<'static, Vec<usize>> {
    // A panic leaves no list half changed.
    LISTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many interruptions there were. A sleeper asks before it asks whoever judges the living.
pub(super) fn interruptions() -> u32 {
    // Acquire: what the agents stored of a death before they told of it.
    INTERRUPTIONS.load(Ordering::Acquire)
}

/// Makes `sleep` on `word`, unless there was an interruption since there were `known`.
pub(super) fn interruptible(word: &AtomicU32, known: u32, sleep: impl FnOnce() -> Slept) -> Slept {
    struct Listed(usize);
    impl Drop for Listed {
        fn drop(&mut self) {
            let mut listed = listed();
            if let Some(index) = listed.iter().position(|word| *word == self.0) {
                listed.swap_remove(index);
            }
        }
    }
    let address = word.as_ptr().expose_provenance();
    listed().push(address);
    let _listed = Listed(address);
    // Counted under the list's lock: what was counted before this one was listed shows here, and
    // whoever counts later finds it on the list.
    if interruptions() != known {
        return Slept::Disturbed;
    }
    sleep()
}

/// Wakes everybody who is listed.
pub(crate) fn interrupt_all() {
    let listed = listed();
    INTERRUPTIONS.fetch_add(1, Ordering::AcqRel);
    for address in listed.iter() {
        // SAFETY: the word is alive: its sleeper holds a reference, and takes it off the list
        // before it gives that up, which the list's lock keeps it from meanwhile.
        let word = unsafe { &*core::ptr::with_exposed_provenance::<AtomicU32>(*address) };
        // As any wake-up does; a word's value means nothing but that it changed.
        futex::wake(word, i32::MAX);
    }
}
