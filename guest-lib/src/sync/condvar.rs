//! A condition variable for what a recoverable lock protects.
//!
//! ```text
//!   waiter, holding the lock:  s := word; unlock; sleep while word = s; lock again
//!   notifier:                  change the data under the lock; word += 1; wake
//! ```
//!
//! The waiter reads the word while it holds the lock. So a change of the data that it has not
//! seen comes after that, and so does the notification of that change: the word no longer has
//! the value that the sleep asks for, and no wake-up is lost. (The construction is that of
//! futex condition variables in general; Drepper, *Futexes Are Tricky*, section 5, explains it
//! for events.)
//!
//! There is no list of waiters, so a dead waiter leaves nothing behind; if it died of a wake-up
//! that was meant for one, the others see at their next look that the word has changed. A
//! notifier that dies between its change and its notification is why no wait is longer than
//! [`RECHECK`]: a waiter then takes the lock and looks for itself, and finds the lock orphaned if
//! the notifier died inside.
//!
//! So wake-ups may come without a reason, as with every condition variable: check the data, or
//! let [`Condvar::wait_while`] do so. `notify_one` wakes one sleeper at once; others may wake at
//! their next look as well.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::abi::system::LockWords;
//! use lupin::lock::{LockError, RecoverableLock};
//! use lupin::sync::condvar::{Condvar, CondvarWords};
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! # fn main() -> Result<(), LockError> {
//! // In a segment, as fields of a struct there; their users are threads of several nodes.
//! let (lock, changed, items) = (LockWords::default(), CondvarWords::default(), AtomicU64::new(0));
//! let (lock, changed) = (RecoverableLock::new(&lock), Condvar::new(&changed));
//! let [producer, consumer] = [1, 2].map(|id| InstanceId::new(id, 1));
//! let all_live = |_: InstanceId| true;
//! // One word: a death leaves nothing to repair.
//! let repair = |_: InstanceId| Ok::<_, LockError>(());
//!
//! std::thread::scope(|scope| {
//!     scope.spawn(|| {
//!         let guard = lock.lock(producer, &all_live)?.or_repair(repair)?;
//!         items.store(1, Ordering::Relaxed);
//!         guard.unlock()?;
//!         changed.notify_one();
//!         Ok::<_, LockError>(())
//!     });
//!     let guard = lock.lock(consumer, &all_live)?.or_repair(repair)?;
//!     let none = || items.load(Ordering::Relaxed) == 0;
//!     let guard = changed.wait_while(guard, &all_live, none, repair)?;
//!     items.store(0, Ordering::Relaxed);
//!     guard.unlock()
//! })
//! # }
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use crate::liveness::Liveness;
use crate::lock::{Acquired, LockError, LockGuard};
use crate::mem::load32;
use crate::pod_safe::{PodSafe, PodShared};
use crate::wait::{BACKSTOP, Bell, Pacer, deadline_after};

/// The longest time for which a waiter relies on being notified: by then it looks at the data
/// itself. That is how long the death of a notifier can delay it. A waiter that is told of deaths
/// (see [`wait`](crate::wait)) looks then, and else after [`BACKSTOP`].
pub const RECHECK: Duration = Duration::from_millis(50);

/// A condition variable in pod memory. All zero bytes at first; there is no other state.
#[derive(Debug, Default)]
#[repr(C)]
pub struct CondvarWords {
    /// Futex word of sleepers, changed by each notification.
    wake: AtomicU32,
    /// Of which nodes somebody may sleep. A hint.
    sleepers: AtomicU32,
    _reserved: [AtomicU64; 7],
}

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for CondvarWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for CondvarWords {}

/// A condition variable over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct Condvar<'a> {
    words: &'a CondvarWords,
}

/// How a wait with a timeout ended. The lock is held again.
#[derive(Debug)]
#[must_use = "dropping it releases the lock at once"]
pub struct Woken<'l> {
    /// The lock, as any `lock` gives it: somebody may have died inside meanwhile.
    pub acquired: Acquired<'l>,
    /// Whether the time was over and there was no notification.
    pub timed_out: bool,
}

impl<'a> Condvar<'a> {
    /// The condition variable in `words`.
    pub const fn new(words: &'a CondvarWords) -> Self {
        Self { words }
    }

    /// Releases the lock, waits for a notification, and takes the lock again.
    ///
    /// Returns also without a notification, after at most [`RECHECK`]. All waiters at the same
    /// time must have locked the same lock.
    ///
    /// # Errors
    /// [`LockError::Lost`]: the caller had been declared dead. It has not waited then.
    pub fn wait<'l, J: Liveness>(
        &self,
        guard: LockGuard<'l>,
        judge: &J,
    ) -> Result<Acquired<'l>, LockError> {
        Ok(self.sleep(guard, judge, None)?.acquired)
    }

    /// As [`wait`](Self::wait), for at most `timeout`; the lock is then taken again without a
    /// limit of time.
    ///
    /// # Errors
    /// [`LockError::Lost`], as [`wait`](Self::wait).
    pub fn wait_timeout<'l, J: Liveness>(
        &self,
        guard: LockGuard<'l>,
        judge: &J,
        timeout: Duration,
    ) -> Result<Woken<'l>, LockError> {
        self.sleep(guard, judge, Some(deadline_after(timeout)))
    }

    /// Waits while `condition` holds, which is asked with the lock held.
    ///
    /// `repair` is told each holder that died inside the lock meanwhile, as by
    /// [`Acquired::or_repair`], before `condition` is asked.
    ///
    /// # Errors
    /// Those of `repair`, and [`LockError::Lost`].
    pub fn wait_while<'l, J: Liveness, E: From<LockError>>(
        &self,
        mut guard: LockGuard<'l>,
        judge: &J,
        mut condition: impl FnMut() -> bool,
        mut repair: impl FnMut(InstanceId) -> Result<(), E>,
    ) -> Result<LockGuard<'l>, E> {
        while condition() {
            guard = self.wait(guard, judge)?.or_repair(&mut repair)?;
        }
        Ok(guard)
    }

    /// Wakes one waiter, if there is one.
    ///
    /// With or without the lock held; the change that it tells of was made under the lock.
    pub fn notify_one(&self) {
        self.bell().ring_one();
    }

    /// Wakes all waiters. As [`notify_one`](Self::notify_one).
    pub fn notify_all(&self) {
        self.bell().ring();
    }

    fn bell(&self) -> Bell<'a> {
        Bell {
            classes: &self.words.sleepers,
            word: &self.words.wake,
        }
    }

    fn sleep<'l, J: Liveness>(
        &self,
        guard: LockGuard<'l>,
        judge: &J,
        deadline: Option<Instant>,
    ) -> Result<Woken<'l>, LockError> {
        let (lock, me) = (guard.lock(), guard.owner());
        let word = &self.words.wake;
        // With the lock held: any notification of a change that the caller has not seen comes
        // after this. Relaxed: the release of the lock keeps it before whatever the next holder
        // does, and the sleep asks for this very value.
        let seen = load32(word, Ordering::Relaxed);
        guard.unlock()?;
        let recheck = deadline_after(match crate::client::wake::reaches(word) {
            true => BACKSTOP,
            false => RECHECK,
        });
        let mut pacer = Pacer::new(Some(deadline.map_or(recheck, |end| end.min(recheck))));
        // Relaxed: the lock orders what the notifier did before what the caller does next.
        let notified = loop {
            if load32(word, Ordering::Relaxed) != seen {
                break true;
            }
            if pacer.spin() {
                continue;
            }
            self.bell().announce();
            if pacer.sleep_on(word, seen).is_err() {
                break false;
            }
        };
        let acquired = lock.lock(me, judge)?;
        Ok(Woken {
            acquired,
            timed_out: !notified && deadline.is_some_and(|end| end <= Instant::now()),
        })
    }
}

#[cfg(test)]
#[path = "condvar_test.rs"]
mod condvar_test;
