//! A recoverable test-and-test-and-set lock.
//!
//! The lock stores who holds it. When the holder dies, whoever comes next can see that, takes
//! charge of the repair, and declares it done; if the repairer dies as well, the next one is told
//! of the same dead holder. Nobody has to walk the locks of a dead node, and no death leaves a
//! lock that nobody can take.
//!
//! Two words decide, `owner` and `recoverer` (their layout is [`LockWords`]):
//!
//! ```text
//!                 CAS owner 0 -> me                      store owner 0
//!   free ------------------------------> held by me ----------------------------> free
//!                                           | dies
//!                                           v
//!                                  owner is dead: inconsistent  <--------------------+
//!                                           |                                        |
//!                       CAS recoverer (0 or a dead one) -> b                         | b dies, or
//!                                           v                                        | lets it go
//!                                  b repairs in the owner's place -------------------+
//!                                           |
//!                       repaired(): CAS owner dead -> b, then CAS recoverer b -> 0
//!                                           v
//!                                       held by b
//! ```
//!
//! A dead owner's name stays in `owner` until the repair is declared, so that it cannot get lost
//! between two recoverers; a log kept under that name can be found by any of them. After every
//! single store of these transitions the lock is in one of the states above.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;
use lupin_abi::system::LockWords;

use super::sealed::Hold;
use super::{Acquired, LockError, LockGuard, OrphanGuard, check};
use crate::liveness::Liveness;
use crate::mem::{cas64, load64, store64};
use crate::wait::{Pacer, Parking, deadline_after};

/// A recoverable lock over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct RecoverableLock<'a> {
    words: &'a LockWords,
}

impl<'a> RecoverableLock<'a> {
    /// The lock in `words`. All-zero words are a free lock.
    pub const fn new(words: &'a LockWords) -> Self {
        Self { words }
    }

    /// Waits for the lock without limit; a dead holder is noticed as [`wait`](crate::wait) says.
    ///
    /// # Errors
    /// [`LockError::Deadlock`], [`LockError::NoInstance`].
    #[inline]
    pub fn lock<J: Liveness>(&self, me: InstanceId, judge: &J) -> Result<Acquired<'a>, LockError> {
        self.acquire(me, judge, None)
    }

    /// Waits for the lock at most `timeout`.
    ///
    /// # Errors
    /// [`LockError::Timeout`], [`LockError::Deadlock`], [`LockError::NoInstance`].
    #[inline]
    pub fn lock_timeout<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Duration,
    ) -> Result<Acquired<'a>, LockError> {
        self.acquire(me, judge, Some(timeout))
    }

    /// Takes the lock if that is possible without waiting.
    ///
    /// # Errors
    /// [`LockError::Timeout`] if it is held, [`LockError::Deadlock`], [`LockError::NoInstance`].
    #[inline]
    pub fn try_lock<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Acquired<'a>, LockError> {
        self.acquire(me, judge, Some(Duration::ZERO))
    }

    /// Finds what an earlier process of this same instance left behind.
    ///
    /// For a singleton (the agent of a node) that was started again within one life of its
    /// instance: everybody else takes the instance for alive and waits, so the new process must
    /// look at its own holds before it uses the lock. `None` if there are none.
    ///
    /// # Errors
    /// [`LockError::NoInstance`].
    pub fn resolve_own<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Option<OrphanGuard<'a>>, LockError> {
        check(me)?;
        let own = me.word();
        if load64(&self.words.owner, Ordering::Acquire) != own
            && load64(&self.words.recoverer, Ordering::Acquire) != own
        {
            return Ok(None);
        }
        let all_but_me = |instance| instance != me && judge.is_alive(instance);
        let dead = self.recover(me, &all_but_me);
        Ok(dead.map(|dead| OrphanGuard::new(*self, me, dead)))
    }

    /// Who holds the lock or repairs it, and which dead holder waits for repair. A snapshot for
    /// people.
    pub fn inspect<J: Liveness>(&self, judge: &J) -> LockState {
        let owner = InstanceId::from_word(load64(&self.words.owner, Ordering::Acquire));
        let recoverer = InstanceId::from_word(load64(&self.words.recoverer, Ordering::Acquire));
        if owner.is_none() {
            LockState::Free
        } else if judge.is_alive(owner) {
            LockState::Held(owner)
        } else {
            LockState::Orphaned {
                previous: owner,
                recoverer: (!recoverer.is_none() && judge.is_alive(recoverer)).then_some(recoverer),
            }
        }
    }

    #[inline(always)]
    pub(super) fn acquire<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Acquired<'a>, LockError> {
        check(me)?;
        // The uncontended path makes one compare-and-swap and reads no clock.
        // Acquire: pairs with the release of the holder before.
        if cas64(&self.words.owner, 0, me.word(), Ordering::Acquire).is_ok() {
            return Ok(Acquired::Clean(LockGuard::new(*self, me)));
        }
        match self.wait(me, judge, timeout) {
            End::Clean => Ok(Acquired::Clean(LockGuard::new(*self, me))),
            End::Orphaned(dead) => Ok(Acquired::Orphaned(OrphanGuard::new(*self, me, dead))),
            End::Deadlock => Err(LockError::Deadlock(me)),
            End::TimedOut(nanos) => Err(self.timed_out(Duration::from_nanos(nanos))),
        }
    }

    /// The path of everybody who must wait, or succeed the dead. Out of line, and its result in
    /// registers: a guard that comes back through memory costs the path that does not wait as
    /// much as the lock itself.
    #[cold]
    #[inline(never)]
    fn wait<J: Liveness>(self, me: InstanceId, judge: &J, timeout: Option<Duration>) -> End {
        // Who waits without limit is never told how long it was, and reads no clock.
        let start = timeout.map(|_| Instant::now());
        let is_try = timeout.is_some_and(|timeout| timeout.is_zero());
        let mut pacer = Pacer::new(timeout.map(deadline_after));
        let (mut looked, mut slept) = (false, false);
        loop {
            // Test before test-and-set: waiters share the line until it changes. Acquire: a dead
            // owner's word leads to the judge's tables.
            let owner = InstanceId::from_word(load64(&self.words.owner, Ordering::Acquire));
            if owner.is_none() {
                if cas64(&self.words.owner, 0, me.word(), Ordering::Acquire).is_ok() {
                    if slept {
                        // Others may still be asleep behind the flag that woke this one.
                        self.parking().pass_on();
                    }
                    return End::Clean;
                }
                continue;
            }
            // Most waits are over before anybody would have to be asked who lives.
            if !looked && !is_try && pacer.spin() {
                looked = true;
                continue;
            }
            // Held, or held in a dead owner's place, by the caller itself.
            if owner == me || load64(&self.words.recoverer, Ordering::Relaxed) == me.word() {
                return End::Deadlock;
            }
            if !judge.is_alive(owner)
                && let Some(dead) = self.recover(me, judge)
            {
                if slept {
                    self.parking().pass_on();
                }
                return End::Orphaned(dead);
            }
            if is_try {
                return End::timed_out(start);
            }
            if pacer.spin() {
                continue;
            }
            let seen = self.parking().announce();
            // Whoever holds it by now will see the flag, or is found dead after this sleep.
            if load64(&self.words.owner, Ordering::Acquire) == 0 {
                continue;
            }
            slept = true;
            if pacer.sleep_on(&self.words.wake, seen).is_err() {
                // A wake-up may have been meant for this one, which does not want it any more:
                // raise the flag that it lowered, and pass it on if the lock is free.
                self.parking().announce();
                if load64(&self.words.owner, Ordering::Acquire) == 0 {
                    self.parking().wake(1);
                }
                return End::timed_out(start);
            }
        }
    }

    /// Takes charge of a dead owner's lock, unless somebody alive has done so or there is none;
    /// returns the dead owner.
    pub(super) fn recover<J: Liveness>(&self, me: InstanceId, judge: &J) -> Option<InstanceId> {
        let recoverer = load64(&self.words.recoverer, Ordering::Acquire);
        if recoverer != 0 && judge.is_alive(InstanceId::from_word(recoverer)) {
            return None;
        }
        // Acquire: pairs with the Release by which the recoverer before let go, and orders the
        // look at `owner` after it. What a dead recoverer stored is visible by the judge's verdict.
        cas64(
            &self.words.recoverer,
            recoverer,
            me.word(),
            Ordering::AcqRel,
        )
        .ok()?;
        // The owner may have been repaired and replaced between the caller's look and the swap.
        loop {
            let owner = InstanceId::from_word(load64(&self.words.owner, Ordering::Acquire));
            if owner.is_none() || judge.is_alive(owner) {
                self.let_go(me);
                return None;
            }
            // It may also have released the lock and died between that look and the verdict. All
            // its stores are visible by the verdict, so a look after it is the truth: from here
            // on only this instance can move a dead owner, and what is dead now stays.
            if load64(&self.words.owner, Ordering::Relaxed) == owner.word() {
                return Some(owner);
            }
        }
    }

    pub(super) fn parking(&self) -> Parking<'a> {
        Parking {
            flag: &self.words.waiters,
            word: &self.words.wake,
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn timed_out(self, waited: Duration) -> LockError {
        let owner = load64(&self.words.owner, Ordering::Relaxed);
        let recoverer = load64(&self.words.recoverer, Ordering::Relaxed);
        let holder = if recoverer == 0 { owner } else { recoverer };
        LockError::Timeout {
            holder: InstanceId::from_word(holder),
            waited,
        }
    }
}

/// How a wait ended.
enum End {
    Clean,
    /// In this dead holder's place.
    Orphaned(InstanceId),
    Deadlock,
    /// After so many nanoseconds.
    TimedOut(u64),
}

impl End {
    fn timed_out(start: Option<Instant>) -> Self {
        let nanos = start.map_or(0, |start| start.elapsed().as_nanos());
        Self::TimedOut(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// The state of a lock, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// Nobody holds it.
    Free,
    /// A living instance holds it.
    Held(InstanceId),
    /// Its holder died.
    Orphaned {
        /// The dead holder.
        previous: InstanceId,
        /// Who repairs, if somebody alive does.
        recoverer: Option<InstanceId>,
    },
}

impl<'a> RecoverableLock<'a> {
    /// Releases, and wakes up to `sleepers`.
    #[inline(always)]
    pub(super) fn release_to(&self, sleepers: i32) {
        // A store, at half the price of a swap, and without a look: only a dead owner's name is
        // replaced by others, and the caller is not dead. A load before it would fetch the line
        // from the waiters twice, to read it and then to write it. Release: the next holder sees
        // the critical section.
        store64(&self.words.owner, 0, Ordering::Release);
        self.parking().wake(sleepers);
    }

    /// Whether `me` is the owner.
    #[inline(always)]
    pub(super) fn is_owned_by(&self, me: InstanceId) -> bool {
        load64(&self.words.owner, Ordering::Relaxed) == me.word()
    }

    /// Lets a dead holder's lock go unrepaired, and wakes up to `sleepers`.
    #[inline(never)]
    pub(super) fn let_go_to(&self, me: InstanceId, sleepers: i32) {
        // Release: the next recoverer sees what this one did. Fails only for an instance that
        // was declared dead meanwhile, whose place is taken.
        let _ = cas64(&self.words.recoverer, me.word(), 0, Ordering::AcqRel);
        self.parking().wake(sleepers);
    }
}

impl Hold for RecoverableLock<'_> {
    #[inline(always)]
    fn is_held(&self, me: InstanceId) -> bool {
        self.is_owned_by(me)
    }

    #[inline(always)]
    fn release(&self, _me: InstanceId) {
        self.release_to(1);
    }

    fn adopt(&self, me: InstanceId, previous: InstanceId) -> Result<(), LockError> {
        // Release: whoever takes the lock after the caller's death sees the repair.
        let moved = cas64(
            &self.words.owner,
            previous.word(),
            me.word(),
            Ordering::AcqRel,
        );
        // After the owner word has moved: a death in between leaves a hold of this instance, not
        // a lock without an owner.
        self.let_go(me);
        match moved {
            Ok(_) => Ok(()),
            Err(_) => Err(LockError::Lost(me)),
        }
    }

    fn let_go(&self, me: InstanceId) {
        self.let_go_to(me, 1);
    }
}

#[cfg(test)]
#[path = "tatas_test.rs"]
mod tatas_test;
