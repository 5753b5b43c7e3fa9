//! A counting semaphore whose permits outlive their holders.
//!
//! Each permit is a cell that holds its holder's instance, or 0. There is no count beside the
//! cells that could disagree with them, so nothing leaks: to acquire is one compare-and-swap of
//! a cell from 0 to the own instance, to release is one back to 0, and the permit of a dead
//! holder is taken by one from the dead instance to the own one. No death at any instruction
//! leaves a state that needs repair. That the owner word goes straight into the cell is the
//! technique of iceoryx2's robust index sets.
//!
//! ```text
//!              acquire: CAS 0 -> a              release: CAS a -> 0
//!    free --------------------------> held by a --------------------> free
//!                                        | a dies
//!                                        v
//!                                  acquire: CAS a -> b, "reclaimed from a"
//! ```
//!
//! Permits are held: whoever acquired one releases it. A semaphore that one side raises and
//! another lowers (a count of items) cannot tell whose count is lost with whom; a queue can.
//!
//! Waiters are not served in order; a wake-up lets one waiter look.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::sync::semaphore::{Semaphore, SemaphoreError, SemaphoreWords};
//!
//! # fn main() -> Result<(), SemaphoreError> {
//! // In a segment, as a field of a struct there; its users are threads of several nodes.
//! let words = SemaphoreWords::<2>::default();
//! let [one, two, three] = [1, 2, 3].map(|id| InstanceId::new(id, 1));
//!
//! let all_live = |_: InstanceId| true;
//! let disk = Semaphore::new(&words);
//! let permit = disk.acquire(one, &all_live)?;
//! std::mem::forget(disk.acquire(two, &all_live)?);
//! assert!(disk.try_acquire(three, &all_live).is_err());
//!
//! let two_died = |instance| instance != two;
//! let reclaimed = disk.acquire(three, &two_died)?;
//! assert_eq!(reclaimed.reclaimed_from(), Some(two));
//! permit.release()?;
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::{Sleepers, is_instance, wait_until};
use crate::liveness::Liveness;
use crate::mem::{cas64, load64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::{Mapping, ShmError};
use crate::wait::{Parking, deadline_after};

/// Why a permit was not acquired or released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SemaphoreError {
    /// All permits were held all the time.
    #[error("all {permits} permits were held for {waited:?}, one of them by {holder}")]
    Timeout {
        /// How many permits there are.
        permits: usize,
        /// One of the holders.
        holder: InstanceId,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The instance that asks is no instance.
    #[error("{0} cannot hold a permit")]
    NoInstance(InstanceId),
    /// The caller was declared dead while it held the permit, and somebody took it over.
    #[error("the permit was taken over from {0}, which had been declared dead")]
    Lost(InstanceId),
}

/// The part of a semaphore in pod memory before its cells. All zero at first.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SemaphoreHeader {
    /// Futex word of sleepers; its value means nothing.
    wake: AtomicU32,
    /// Not 0 if somebody may be asleep. A hint.
    sleepers: AtomicU32,
    _reserved: [AtomicU64; 7],
}

/// A semaphore of `PERMITS` permits in pod memory. All zero bytes: all permits are free.
#[derive(Debug)]
#[repr(C)]
pub struct SemaphoreWords<const PERMITS: usize> {
    header: SemaphoreHeader,
    /// [`InstanceId`] of the holder, or 0.
    holders: [AtomicU64; PERMITS],
}

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for SemaphoreHeader {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for SemaphoreHeader {}
// SAFETY: `repr(C)`, two fields of atomics, both of alignment 8.
unsafe impl<const PERMITS: usize> PodSafe for SemaphoreWords<PERMITS> {}
// SAFETY: all its fields are atomics.
unsafe impl<const PERMITS: usize> PodShared for SemaphoreWords<PERMITS> {}

impl<const PERMITS: usize> Default for SemaphoreWords<PERMITS> {
    fn default() -> Self {
        Self {
            header: SemaphoreHeader::default(),
            holders: [const { AtomicU64::new(0) }; PERMITS],
        }
    }
}

/// A counting semaphore over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct Semaphore<'a> {
    header: &'a SemaphoreHeader,
    holders: &'a [AtomicU64],
}

impl<'a> Semaphore<'a> {
    /// The semaphore in `words`.
    pub const fn new<const PERMITS: usize>(words: &'a SemaphoreWords<PERMITS>) -> Self {
        Self {
            header: &words.header,
            holders: &words.holders,
        }
    }

    /// The semaphore of `permits` permits at `offset` of `memory`, laid out as
    /// [`SemaphoreWords`]. All its users pass the same number.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`] (to 8 bytes).
    pub fn at(memory: &'a Mapping, offset: u64, permits: u32) -> Result<Self, ShmError> {
        let header: &SemaphoreHeader = memory.get(offset)?;
        // No overflow: the header was found inside of the mapping.
        let cells = offset + size_of::<SemaphoreHeader>() as u64;
        Ok(Self {
            header,
            holders: memory.get_slice(cells, permits.into())?,
        })
    }

    /// How many permits there are, free or held.
    pub const fn permits(&self) -> usize {
        self.holders.len()
    }

    /// Waits for a permit without limit.
    ///
    /// # Errors
    /// [`SemaphoreError::NoInstance`].
    pub fn acquire<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Permit<'a>, SemaphoreError> {
        self.wait(me, judge, None)
    }

    /// Waits for a permit at most `timeout`.
    ///
    /// # Errors
    /// [`SemaphoreError::Timeout`], [`SemaphoreError::NoInstance`].
    pub fn acquire_timeout<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Duration,
    ) -> Result<Permit<'a>, SemaphoreError> {
        self.wait(me, judge, Some(timeout))
    }

    /// Takes a permit if one is free or its holder is dead.
    ///
    /// # Errors
    /// [`SemaphoreError::Timeout`] if there is none, [`SemaphoreError::NoInstance`].
    pub fn try_acquire<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Permit<'a>, SemaphoreError> {
        self.wait(me, judge, Some(Duration::ZERO))
    }

    /// Gives back what an earlier process of this same instance holds; returns how many.
    ///
    /// For a singleton (the agent of a node) that was started again within one life of its
    /// instance: everybody else takes the instance for alive and leaves it its permits.
    pub fn resolve_own(&self, me: InstanceId) -> usize {
        let release = |cell: &&AtomicU64| {
            is_instance(me) && cas64(cell, me.word(), 0, Ordering::Release).is_ok()
        };
        let released = self.holders.iter().filter(release).count();
        if released > 0 {
            self.parking().wake(i32::MAX);
        }
        released
    }

    /// Who holds permits, dead or alive, one entry a permit. A snapshot for people.
    pub fn holders(&self) -> impl Iterator<Item = InstanceId> + use<'a> {
        let held = |cell| match load64(cell, Ordering::Acquire) {
            0 => None,
            word => Some(InstanceId::from_word(word)),
        };
        self.holders.iter().filter_map(held)
    }

    fn wait<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Permit<'a>, SemaphoreError> {
        if !is_instance(me) {
            return Err(SemaphoreError::NoInstance(me));
        }
        // The uncontended path reads no clock and asks no judge.
        if let Some(permit) = self.take_free(me) {
            return Ok(permit);
        }
        if let Some(permit) = self.take_dead(me, judge) {
            return Ok(permit);
        }
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(self.timed_out(Duration::ZERO));
        }
        let start = Instant::now();
        let mut slept = false;
        let deadline = timeout.map(deadline_after);
        let found = wait_until(
            &Sleepers::Announced(self.parking()),
            deadline,
            |before_sleep| {
                slept |= before_sleep;
                Ok(match self.take_free(me) {
                    None if before_sleep => self.take_dead(me, judge),
                    permit => permit,
                })
            },
        )?;
        match found {
            Some(permit) => {
                if slept {
                    self.pass_on();
                }
                Ok(permit)
            }
            None => {
                // A wake-up may have been meant for this one, which does not want it any more.
                self.parking().wake(1);
                Err(self.timed_out(start.elapsed()))
            }
        }
    }

    /// Takes a free permit.
    fn take_free(&self, me: InstanceId) -> Option<Permit<'a>> {
        self.cells_from(me).find_map(|(index, cell)| {
            // Test before test-and-set: held cells stay in everybody's cache.
            if load64(cell, Ordering::Acquire) != 0 {
                return None;
            }
            // Acquire: what the holder before did with its permit happened before.
            cas64(cell, 0, me.word(), Ordering::Acquire).ok()?;
            Some(self.permit(index, me, None))
        })
    }

    /// Takes the permit of a dead holder.
    fn take_dead<J: Liveness>(&self, me: InstanceId, judge: &J) -> Option<Permit<'a>> {
        self.cells_from(me).find_map(|(index, cell)| {
            let word = load64(cell, Ordering::Acquire);
            let holder = InstanceId::from_word(word);
            if word == 0 || holder == me || judge.is_alive(holder) {
                return None;
            }
            // The swap decides between those who saw the same death.
            cas64(cell, word, me.word(), Ordering::Acquire).ok()?;
            Some(self.permit(index, me, Some(holder)))
        })
    }

    /// All cells, from another one on for each instance: neighbours do not meet at the first.
    fn cells_from(&self, me: InstanceId) -> impl Iterator<Item = (usize, &'a AtomicU64)> {
        let start = match self.holders.len() {
            0 => 0,
            permits => me.id() as usize % permits,
        };
        let (before, after) = self.holders.split_at(start);
        let rotated = after.iter().chain(before);
        let permits = self.holders.len();
        rotated
            .enumerate()
            .map(move |(n, cell)| ((start + n) % permits, cell))
    }

    fn permit(&self, index: usize, me: InstanceId, reclaimed: Option<InstanceId>) -> Permit<'a> {
        Permit {
            semaphore: *self,
            cell: &self.holders[index],
            me,
            reclaimed,
            released: false,
        }
    }

    fn parking(&self) -> Parking<'a> {
        Parking {
            flag: &self.header.sleepers,
            word: &self.header.wake,
        }
    }

    /// After a sleep: others may still sleep behind the flag whose lowering woke this one, and
    /// permits may have been released while it was down.
    fn pass_on(&self) {
        self.parking().announce();
        let free = |cell: &AtomicU64| load64(cell, Ordering::Acquire) == 0;
        if self.holders.iter().any(free) {
            self.parking().wake(1);
        }
    }

    fn timed_out(&self, waited: Duration) -> SemaphoreError {
        SemaphoreError::Timeout {
            permits: self.holders.len(),
            holder: self.holders().next().unwrap_or(InstanceId::NONE),
            waited,
        }
    }
}

/// A permit is held. Dropping it releases it.
#[derive(Debug)]
#[must_use = "dropping it releases the permit at once"]
pub struct Permit<'a> {
    semaphore: Semaphore<'a>,
    cell: &'a AtomicU64,
    me: InstanceId,
    reclaimed: Option<InstanceId>,
    released: bool,
}

impl Permit<'_> {
    /// The dead instance that held this permit before, if it did not release it: what the
    /// permit stands for may be in the state that the death left.
    pub const fn reclaimed_from(&self) -> Option<InstanceId> {
        self.reclaimed
    }

    /// Releases the permit, and says if it was no longer the caller's to release.
    ///
    /// # Errors
    /// [`SemaphoreError::Lost`]: the caller was declared dead and somebody else has the permit.
    pub fn release(mut self) -> Result<(), SemaphoreError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), SemaphoreError> {
        if self.released {
            return Ok(());
        }
        self.released = true;
        // A swap and not a store: an instance declared dead must not free another's permit.
        // Release: the next holder sees what was done under the permit.
        match cas64(self.cell, self.me.word(), 0, Ordering::Release) {
            Ok(_) => {
                self.semaphore.parking().wake(1);
                Ok(())
            }
            Err(_) => Err(SemaphoreError::Lost(self.me)),
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        // Without a place to report a lost permit; `release` has one.
        let _ = self.give_back();
    }
}

#[cfg(test)]
#[path = "semaphore_test.rs"]
mod semaphore_test;
