//! A recoverable readers-writer lock.
//!
//! The writer's side is a [`RecoverableLock`]. Each reader stores its whole instance id into a
//! slot of its own, so that a dead reader is known as one, which a count of readers could not
//! tell:
//!
//! ```text
//!   reader                                   writer
//!     slot := me                               lock the writer's side
//!     is the writer's side free? then in       wait until each slot is empty or names a dead
//!     else slot := 0, wait for it, again       one; then in
//! ```
//!
//! Each side stores one word and then loads the other's, with a full barrier between: of a
//! reader and a writer that come at once, at least one sees the other (Dekker's argument), and the
//! reader gives way. Slots instead of a count are from Hsieh and Weihl, "Scalable reader-writer
//! locks for parallel systems" (IPPS 1992); the take-over of a dead writer is that of [`tatas`](super::tatas).
//!
//! * **Writers go first.** From the moment that a writer has locked its side, no reader comes in any more;
//!   it waits only for those who are in. Among writers there is no order. Writers without a
//!   pause between them can keep readers out.
//! * **A dead reader** changed nothing: its slot counts as empty, and whoever needs one takes it.
//! * **A dead writer** leaves the lock orphaned, for the next to come, reader or writer, who
//!   then has it alone, until the repair is declared and after. This also holds for a writer that
//!   died before it was let in; the repair then finds nothing to do.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;
use lupin_abi::system::LockWords;

use super::sealed::Hold;
use super::{Acquired, LockError, LockGuard, LockState, OrphanGuard, RecoverableLock, check};
use crate::liveness::Liveness;
use crate::mem::{cas64, fence, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::wait::{Pacer, Parking, TimedOut, deadline_after};

/// Readers that can be in at once. One more waits until a slot is empty.
pub const MAX_READERS: usize = 48;

/// The words of a readers-writer lock. All zero is a free lock.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct RwLockWords {
    writer: LockWords,
    /// Not 0 if a writer may sleep until the readers are out.
    draining: AtomicU32,
    /// Futex word of that writer.
    drained: AtomicU32,
    _reserved: [AtomicU64; 7],
    /// [`InstanceId`] of a reader that is in, or looks whether it may be; 0 if empty.
    readers: [AtomicU64; MAX_READERS],
}

const _: () = assert!(size_of::<RwLockWords>() == 512);
// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for RwLockWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for RwLockWords {}

/// A recoverable readers-writer lock over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct RwLock<'a> {
    words: &'a RwLockWords,
}

/// What a reader finds.
#[derive(Debug)]
#[must_use = "dropping it releases the lock at once"]
pub enum ReadAcquired<'a> {
    /// The reader is in, maybe among others.
    Shared(ReadGuard<'a>),
    /// A writer died: the protected data may be half changed, and the caller has it alone.
    Orphaned(OrphanGuard<'a, RwLock<'a>>),
}

impl<'a> ReadAcquired<'a> {
    /// The guard of a reader, after `repair` if a writer died. See [`Acquired::or_repair`].
    ///
    /// # Errors
    /// Those of `repair` (the lock is then released and stays orphaned), and [`LockError::Lost`].
    pub fn or_repair<E: From<LockError>>(
        self,
        judge: &impl Liveness,
        repair: impl FnOnce(InstanceId) -> Result<(), E>,
    ) -> Result<ReadGuard<'a>, E> {
        match self {
            Self::Shared(guard) => Ok(guard),
            Self::Orphaned(orphan) => {
                repair(orphan.previous())?;
                Ok(RwLock::downgrade(orphan.repaired()?, judge)?)
            }
        }
    }
}

impl<'a> RwLock<'a> {
    /// The lock in `words`. All-zero words are a free lock.
    pub const fn new(words: &'a RwLockWords) -> Self {
        Self { words }
    }

    /// Waits to be the only one, without limit.
    ///
    /// # Errors
    /// [`LockError::Deadlock`] if the caller's instance is in already, as writer or reader;
    /// [`LockError::NoInstance`].
    pub fn write<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Acquired<'a, Self>, LockError> {
        self.acquire_write(me, judge, None)
    }

    /// Waits to be the only one, at most `timeout`.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`write`](Self::write).
    pub fn write_timeout<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Duration,
    ) -> Result<Acquired<'a, Self>, LockError> {
        self.acquire_write(me, judge, Some(timeout))
    }

    /// Takes the lock for writing if that is possible without waiting.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`write`](Self::write).
    pub fn try_write<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Acquired<'a, Self>, LockError> {
        self.acquire_write(me, judge, Some(Duration::ZERO))
    }

    /// Waits until no writer is in, without limit. One instance may read more than once at a
    /// time, but not if a writer may come in between: that is found and is a deadlock.
    ///
    /// # Errors
    /// [`LockError::Deadlock`] if the caller's instance is the writer, or waits for a writer that
    /// waits for it; [`LockError::NoInstance`].
    pub fn read<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<ReadAcquired<'a>, LockError> {
        self.acquire_read(me, judge, None)
    }

    /// Waits until no writer is in, at most `timeout`.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`read`](Self::read).
    pub fn read_timeout<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Duration,
    ) -> Result<ReadAcquired<'a>, LockError> {
        self.acquire_read(me, judge, Some(timeout))
    }

    /// Takes the lock for reading if that is possible without waiting.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`read`](Self::read).
    pub fn try_read<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<ReadAcquired<'a>, LockError> {
        self.acquire_read(me, judge, Some(Duration::ZERO))
    }

    /// Lets other readers in beside a writer, who goes on as a reader. No writer comes in between.
    ///
    /// # Errors
    /// [`LockError::Lost`]: the caller was declared dead, and another has the lock.
    pub fn downgrade(
        guard: LockGuard<'a, Self>,
        judge: &impl Liveness,
    ) -> Result<ReadGuard<'a>, LockError> {
        let (lock, me) = (guard.hold, guard.owner());
        // While a writer is in, slots are only used by readers that come and give way.
        let mut pacer = Pacer::new(None);
        let slot = loop {
            match lock.take_slot(me, judge) {
                Some(slot) => break slot,
                None if pacer.spin() => {}
                None => pacer.sleep().unwrap_or_default(),
            }
        };
        let reader = ReadGuard { lock, me, slot };
        guard.unlock()?;
        Ok(reader)
    }

    /// The writer's side: who holds it or died with it. A snapshot for people.
    pub fn inspect<J: Liveness>(&self, judge: &J) -> LockState {
        self.side().inspect(judge)
    }

    /// The living readers that are in, or look whether they may be. A snapshot for people.
    pub fn readers<J: Liveness>(&self, judge: &J) -> Vec<InstanceId> {
        let reader = |slot| InstanceId::from_word(load64(slot, Ordering::Acquire));
        let lives = |reader: &InstanceId| !reader.is_none() && judge.is_alive(*reader);
        self.words
            .readers
            .iter()
            .map(reader)
            .filter(lives)
            .collect()
    }

    fn side(&self) -> RecoverableLock<'a> {
        RecoverableLock::new(&self.words.writer)
    }

    /// Where a writer sleeps until the readers are out.
    fn drain_parking(&self) -> Parking<'a> {
        Parking {
            flag: &self.words.draining,
            word: &self.words.drained,
        }
    }

    fn acquire_write<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Acquired<'a, Self>, LockError> {
        let start = Instant::now();
        // Guards of the whole lock from here on, so that giving up wakes readers too.
        let acquired = match self.side().acquire(me, judge, timeout)? {
            Acquired::Clean(side) => {
                core::mem::forget(side);
                Acquired::Clean(LockGuard::new(*self, me))
            }
            Acquired::Orphaned(side) => {
                let previous = side.previous();
                core::mem::forget(side);
                Acquired::Orphaned(OrphanGuard::new(*self, me, previous))
            }
        };
        self.drain(me, judge, timeout, start)?;
        Ok(acquired)
    }

    /// Waits until no living reader is in. The caller has the writer's side.
    fn drain<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
        start: Instant,
    ) -> Result<(), LockError> {
        // Between the swap of the writer's side and the looks at the slots: see the module.
        fence(Ordering::SeqCst);
        let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
        let mut pacer = Pacer::new(left.map(deadline_after));
        for slot in &self.words.readers {
            loop {
                // Acquire: pairs with the Release by which a reader goes out.
                let word = load64(slot, Ordering::Acquire);
                let reader = InstanceId::from_word(word);
                if word == 0 {
                    break;
                }
                if reader == me {
                    return Err(LockError::Deadlock(me));
                }
                if !judge.is_alive(reader) {
                    // Whoever took the slot since that look gives way. Fails if somebody did.
                    let _ = cas64(slot, word, 0, Ordering::AcqRel);
                    break;
                }
                let timed_out = || LockError::Timeout {
                    holder: reader,
                    waited: start.elapsed(),
                };
                if timeout.is_some_and(|timeout| timeout.is_zero()) {
                    return Err(timed_out());
                }
                if pacer.spin() {
                    continue;
                }
                let parking = self.drain_parking();
                let seen = parking.announce();
                if load64(slot, Ordering::Acquire) == word
                    && pacer.sleep_on(parking.word, seen).is_err()
                {
                    return Err(timed_out());
                }
            }
        }
        Ok(())
    }

    fn acquire_read<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<ReadAcquired<'a>, LockError> {
        check(me)?;
        let writer = &self.words.writer;
        let mut wait = None;
        loop {
            // Acquire: pairs with the release of the writer before.
            if load64(&writer.owner, Ordering::Acquire) == 0
                && let Some(slot) = self.take_slot(me, judge)
            {
                // SeqCst, as the swap of the slot: see the module.
                if load64(&writer.owner, Ordering::SeqCst) == 0 {
                    return Ok(ReadAcquired::Shared(ReadGuard {
                        lock: *self,
                        me,
                        slot,
                    }));
                }
                self.empty_slot(slot);
            }
            let (start, pacer) = wait.get_or_insert_with(|| {
                let deadline = timeout.map(deadline_after);
                (Instant::now(), Pacer::new(deadline))
            });
            let owner = InstanceId::from_word(load64(&writer.owner, Ordering::Acquire));
            if owner == me || load64(&writer.recoverer, Ordering::Relaxed) == me.word() {
                return Err(LockError::Deadlock(me));
            }
            if !owner.is_none()
                && !judge.is_alive(owner)
                && let Some(previous) = self.side().recover(me, judge)
            {
                let orphan = OrphanGuard::new(*self, me, previous);
                self.drain(me, judge, timeout, *start)?;
                return Ok(ReadAcquired::Orphaned(orphan));
            }
            let waited = |start: &Instant| start.elapsed();
            if timeout.is_some_and(|timeout| timeout.is_zero()) {
                return Err(self.side().timed_out(waited(start)));
            }
            if pacer.spin() {
                continue;
            }
            let slept = if owner.is_none() {
                // No slot was empty.
                pacer.sleep()
            } else {
                if self.holds_slot(me) {
                    return Err(LockError::Deadlock(me));
                }
                let seen = self.side().parking().announce();
                if load64(&writer.owner, Ordering::Acquire) != owner.word() {
                    continue;
                }
                let slept = pacer.sleep_on(&writer.wake, seen);
                // A reader takes nothing from the others that wait: whoever was woken by a
                // wake-up for one passes it on.
                self.side().parking().pass_on();
                if load64(&writer.owner, Ordering::Acquire) == 0 {
                    self.side().parking().wake(i32::MAX);
                }
                slept
            };
            if let Err(TimedOut) = slept {
                return Err(self.side().timed_out(waited(start)));
            }
        }
    }

    /// Takes an empty slot, or a dead reader's.
    fn take_slot<J: Liveness>(&self, me: InstanceId, judge: &J) -> Option<&'a AtomicU64> {
        let slots = &self.words.readers;
        // Each instance begins elsewhere, so that few meet on one line.
        let from = (me.id() as usize).wrapping_mul(11) % MAX_READERS;
        let all = || slots[from..].iter().chain(&slots[..from]);
        let take = |slot: &AtomicU64, old| {
            // SeqCst: the load of the writer's side comes after it, for all.
            cas64(slot, old, me.word(), Ordering::SeqCst).is_ok()
        };
        let empty = |slot: &&'a AtomicU64| load64(slot, Ordering::Relaxed) == 0 && take(slot, 0);
        let dead = |slot: &&'a AtomicU64| {
            let word = load64(slot, Ordering::Acquire);
            word != 0 && !judge.is_alive(InstanceId::from_word(word)) && take(slot, word)
        };
        all().find(empty).or_else(|| all().find(dead))
    }

    fn holds_slot(&self, me: InstanceId) -> bool {
        let mut slots = self.words.readers.iter();
        slots.any(|slot| load64(slot, Ordering::Relaxed) == me.word())
    }

    fn empty_slot(&self, slot: &AtomicU64) {
        // A store without a look, as the release of `tatas`. Release: the writer that waits for
        // this reader stores after what it has read.
        store64(slot, 0, Ordering::Release);
        self.drain_parking().wake(1);
    }
}

impl Hold for RwLock<'_> {
    fn is_held(&self, me: InstanceId) -> bool {
        self.side().is_owned_by(me)
    }

    fn release(&self, _me: InstanceId) {
        // All: any number of readers may come in.
        self.side().release_to(i32::MAX);
    }

    fn adopt(&self, me: InstanceId, previous: InstanceId) -> Result<(), LockError> {
        self.side().adopt(me, previous)
    }

    fn let_go(&self, me: InstanceId) {
        self.side().let_go_to(me, i32::MAX);
    }
}

/// The lock is held for reading. Dropping it releases the lock.
#[derive(Debug)]
pub struct ReadGuard<'a> {
    lock: RwLock<'a>,
    me: InstanceId,
    slot: &'a AtomicU64,
}

impl ReadGuard<'_> {
    /// Who reads.
    pub fn owner(&self) -> InstanceId {
        self.me
    }

    /// Releases the lock as dropping the guard does, but looks first if it still is the caller's to
    /// release.
    ///
    /// # Errors
    /// [`LockError::Lost`]: a judge called the caller dead, who is not, and a writer may have been
    /// let in since. Nothing is released.
    pub fn unlock(self) -> Result<(), LockError> {
        let this = core::mem::ManuallyDrop::new(self);
        if load64(this.slot, Ordering::Relaxed) != this.me.word() {
            return Err(LockError::Lost(this.me));
        }
        this.lock.empty_slot(this.slot);
        Ok(())
    }
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        self.lock.empty_slot(self.slot);
    }
}

#[cfg(test)]
#[path = "rwlock_test.rs"]
mod rwlock_test;
