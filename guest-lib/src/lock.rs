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
//!                 CAS owner 0 -> me                      CAS owner me -> 0
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
//!
//! One instance is one thread of control: threads that share an instance (an agent's) put a
//! process-local mutex around their use of the lock.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;
use lupin_abi::system::LockWords;

use crate::liveness::Liveness;
use crate::mem::{cas64, store32, swap32};
use crate::wait::{Pacer, deadline_after, wake};

/// Why a lock was not acquired or released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// The lock was held all the time.
    #[error("the lock was held by {holder} for all of {waited:?}")]
    Timeout {
        /// Who holds it, or repairs it.
        holder: InstanceId,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The lock is held by the instance that asks for it.
    #[error(
        "{0} already holds this lock: either a deadlock, or what an earlier process of the same \
         instance left, which resolve_own() repairs"
    )]
    Deadlock(InstanceId),
    /// The instance that asks is no instance.
    #[error("{0} cannot own a lock")]
    NoInstance(InstanceId),
    /// The caller was declared dead while it held the lock, and somebody took it over.
    #[error("the lock was taken over from {0}, which had been declared dead")]
    Lost(InstanceId),
}

/// A recoverable lock over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct RecoverableLock<'a> {
    words: &'a LockWords,
}

/// What the new holder of a lock finds.
#[derive(Debug)]
#[must_use = "dropping it releases the lock at once"]
pub enum Acquired<'a> {
    /// The last holder released it.
    Clean(LockGuard<'a>),
    /// A holder died inside: the protected data may be half changed.
    Orphaned(OrphanGuard<'a>),
}

impl<'a> Acquired<'a> {
    /// The guard of consistent data, after `repair` if a holder died inside.
    ///
    /// `repair` is told the dead holder and must be repeatable: its caller may die, and the next
    /// one runs it again.
    ///
    /// # Errors
    /// Those of `repair` (the lock is then released and stays orphaned), and
    /// [`LockError::Lost`].
    pub fn or_repair<E: From<LockError>>(
        self,
        repair: impl FnOnce(InstanceId) -> Result<(), E>,
    ) -> Result<LockGuard<'a>, E> {
        match self {
            Self::Clean(guard) => Ok(guard),
            Self::Orphaned(orphan) => {
                repair(orphan.previous())?;
                Ok(orphan.repaired()?)
            }
        }
    }
}

impl<'a> RecoverableLock<'a> {
    /// The lock in `words`. All-zero words are a free lock.
    pub const fn new(words: &'a LockWords) -> Self {
        Self { words }
    }

    /// Waits for the lock without limit; a dead holder is noticed within
    /// [`MAX_SLEEP`](crate::wait::MAX_SLEEP) after `judge` knows of the death.
    ///
    /// # Errors
    /// [`LockError::Deadlock`], [`LockError::NoInstance`].
    pub fn lock<J: Liveness>(&self, me: InstanceId, judge: &J) -> Result<Acquired<'a>, LockError> {
        self.acquire(me, judge, None)
    }

    /// Waits for the lock at most `timeout`.
    ///
    /// # Errors
    /// [`LockError::Timeout`], [`LockError::Deadlock`], [`LockError::NoInstance`].
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
        if self.words.owner.load(Ordering::Acquire) != own
            && self.words.recoverer.load(Ordering::Acquire) != own
        {
            return Ok(None);
        }
        let all_but_me = |instance| instance != me && judge.is_alive(instance);
        Ok(self.recover(me, &all_but_me))
    }

    /// Who holds the lock or repairs it, and which dead holder waits for repair. A snapshot for
    /// people.
    pub fn inspect<J: Liveness>(&self, judge: &J) -> LockState {
        let owner = InstanceId::from_word(self.words.owner.load(Ordering::Acquire));
        let recoverer = InstanceId::from_word(self.words.recoverer.load(Ordering::Acquire));
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

    fn acquire<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Acquired<'a>, LockError> {
        check(me)?;
        // The uncontended path makes one compare-and-swap and reads no clock.
        // Acquire: pairs with the release of the holder before.
        if cas64(&self.words.owner, 0, me.word(), Ordering::Acquire).is_ok() {
            return Ok(Acquired::Clean(self.guard(me, false)));
        }
        let start = Instant::now();
        let mut pacer = Pacer::new(timeout.map(deadline_after));
        let mut slept = false;
        loop {
            // Test before test-and-set: waiters share the line until it changes. Acquire: a dead
            // owner's word leads to the judge's tables.
            let owner = InstanceId::from_word(self.words.owner.load(Ordering::Acquire));
            if owner.is_none() {
                if cas64(&self.words.owner, 0, me.word(), Ordering::Acquire).is_ok() {
                    return Ok(Acquired::Clean(self.guard(me, slept)));
                }
                continue;
            }
            // Held, or held in a dead owner's place, by the caller itself.
            if owner == me || self.words.recoverer.load(Ordering::Relaxed) == me.word() {
                return Err(LockError::Deadlock(me));
            }
            if !judge.is_alive(owner)
                && let Some(orphan) = self.recover(me, judge)
            {
                return Ok(Acquired::Orphaned(orphan));
            }
            if timeout.is_some_and(|timeout| timeout.is_zero()) {
                return Err(self.timed_out(start));
            }
            if pacer.spin() {
                continue;
            }
            // SeqCst here and in `release`: either the releaser sees this flag, or the owner
            // read below is the released word. Both sides store one word and load the other, so
            // nothing weaker decides who sees whom.
            store32(&self.words.waiters, 1, Ordering::SeqCst);
            let seen = self.words.wake.load(Ordering::SeqCst);
            if self.words.owner.load(Ordering::SeqCst) != owner.word() {
                continue;
            }
            slept = true;
            if pacer.sleep_on(&self.words.wake, seen).is_err() {
                return Err(self.timed_out(start));
            }
        }
    }

    /// Takes charge of a dead owner's lock, unless somebody alive has done so or there is none.
    fn recover<J: Liveness>(&self, me: InstanceId, judge: &J) -> Option<OrphanGuard<'a>> {
        let recoverer = self.words.recoverer.load(Ordering::Acquire);
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
        // From here on only this instance can move a dead owner, so what is dead now stays.
        let owner = InstanceId::from_word(self.words.owner.load(Ordering::Acquire));
        if owner.is_none() || judge.is_alive(owner) {
            self.let_go(me);
            return None;
        }
        Some(OrphanGuard {
            lock: *self,
            me,
            previous: owner,
        })
    }

    fn let_go(&self, me: InstanceId) {
        // Release: the next recoverer sees what this one did. Fails only for an instance that
        // was declared dead meanwhile, whose place is taken.
        let _ = cas64(&self.words.recoverer, me.word(), 0, Ordering::AcqRel);
        self.wake_one();
    }

    fn wake_one(&self) {
        // SeqCst: see `acquire`. The load keeps the uncontended release free of a store.
        if self.words.waiters.load(Ordering::SeqCst) != 0 {
            // Cleared, not counted down: a count would stay too high for ever after the death of
            // a sleeper. Whoever has slept sets it again when its turn to release comes.
            swap32(&self.words.waiters, 0, Ordering::SeqCst);
            wake(&self.words.wake, 1);
        }
    }

    fn guard(&self, me: InstanceId, slept: bool) -> LockGuard<'a> {
        if slept {
            // Others may still be asleep behind the flag that woke this one.
            store32(&self.words.waiters, 1, Ordering::Relaxed);
        }
        LockGuard {
            lock: *self,
            me,
            released: false,
        }
    }

    fn timed_out(&self, start: Instant) -> LockError {
        let owner = self.words.owner.load(Ordering::Relaxed);
        let recoverer = self.words.recoverer.load(Ordering::Relaxed);
        let holder = if recoverer == 0 { owner } else { recoverer };
        LockError::Timeout {
            holder: InstanceId::from_word(holder),
            waited: start.elapsed(),
        }
    }
}

fn check(me: InstanceId) -> Result<(), LockError> {
    if me.id() == 0 || me.generation() == 0 {
        return Err(LockError::NoInstance(me));
    }
    Ok(())
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

/// The lock is held, and what it protects is consistent. Dropping it releases the lock.
#[derive(Debug)]
pub struct LockGuard<'a> {
    lock: RecoverableLock<'a>,
    me: InstanceId,
    released: bool,
}

impl LockGuard<'_> {
    /// Releases the lock, and says if it was no longer the caller's to release.
    ///
    /// # Errors
    /// [`LockError::Lost`]: the caller was declared dead and somebody else was let in. What it
    /// changed since then may be mixed with another's changes.
    pub fn unlock(mut self) -> Result<(), LockError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), LockError> {
        if self.released {
            return Ok(());
        }
        self.released = true;
        let words = self.lock.words;
        // A swap and not a store: an instance declared dead must not free another's hold.
        // SeqCst: releases the critical section, and see `acquire` for the flag.
        let released = cas64(&words.owner, self.me.word(), 0, Ordering::SeqCst);
        self.lock.wake_one();
        match released {
            Ok(_) => Ok(()),
            Err(_) => Err(LockError::Lost(self.me)),
        }
    }
}

impl Drop for LockGuard<'_> {
    fn drop(&mut self) {
        // Without a place to report a lost lock; `unlock` has one.
        let _ = self.release();
    }
}

/// The lock is held in a dead holder's place; what it protects may be half changed.
///
/// Dropping it lets the lock go unrepaired: the next to come gets it orphaned again.
#[derive(Debug)]
pub struct OrphanGuard<'a> {
    lock: RecoverableLock<'a>,
    me: InstanceId,
    previous: InstanceId,
}

impl<'a> OrphanGuard<'a> {
    /// The holder that died.
    pub fn previous(&self) -> InstanceId {
        self.previous
    }

    /// Declares the protected data consistent; the lock stays held.
    ///
    /// # Errors
    /// [`LockError::Lost`]: the caller was itself declared dead, and another repairs or did.
    pub fn repaired(self) -> Result<LockGuard<'a>, LockError> {
        let words = self.lock.words;
        // Release: whoever takes the lock after the caller's death sees the repair.
        let moved = cas64(
            &words.owner,
            self.previous.word(),
            self.me.word(),
            Ordering::AcqRel,
        );
        // Dropping `self` now lets go of the recoverer word, after the owner word has moved: a
        // death in between leaves a hold of this instance, not a lock without an owner.
        match moved {
            Ok(_) => Ok(self.lock.guard(self.me, false)),
            Err(_) => Err(LockError::Lost(self.me)),
        }
    }
}

impl Drop for OrphanGuard<'_> {
    fn drop(&mut self) {
        self.lock.let_go(self.me);
    }
}

#[cfg(test)]
#[path = "lock_test.rs"]
mod lock_test;
