//! Pinning and retiring, for participants of a heap.

use core::sync::atomic::Ordering;
use core::time::Duration;

use lupin_abi::InstanceId;

use super::{Epochs, GRACE, Reader};
use crate::heap::layout::{LimboEntry, Place};
use crate::heap::{Heap, HeapError, LIMBO, Participant};
use crate::liveness::Liveness;
use crate::log::Record;
use crate::mem::{load64, store64};
use crate::wait::{Pacer, deadline_after};

/// How long [`Participant::make_room`] waits for a living reader.
const PATIENCE: Duration = Duration::from_secs(1);

/// While it exists, no block is freed that its owner can reach. Short, please: what others
/// retire meanwhile stays.
#[derive(Debug)]
#[must_use = "dropping it unpins at once"]
pub struct Pin<'p> {
    epochs: Epochs<'p>,
    line: &'p core::sync::atomic::AtomicU64,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.epochs.unpin(self.line);
    }
}

impl<'m> Heap<'m> {
    fn epochs(&self) -> Epochs<'m> {
        Epochs::new(&self.header().epoch.word)
    }

    fn readers(&self) -> impl Iterator<Item = Reader<'m>> + use<'m> {
        let heap = *self;
        (0..heap.participants())
            .filter_map(move |index| heap.place(index).ok())
            .map(|place| Reader {
                owner: &place.lock.owner,
                line: &place.epoch.word,
            })
    }
}

impl<'m, J: Liveness> Participant<'m, J> {
    /// Pins the epoch: blocks that the caller finds from here on, in a structure of this heap,
    /// stay what they are until the pin is dropped, also if others retire them.
    pub fn pin(&mut self) -> Pin<'_> {
        let (epochs, line) = (self.heap().epochs(), &self.place().epoch.word);
        epochs.pin(line);
        Pin { epochs, line }
    }

    /// Retires a block in the record that unlinks it: once the record is committed the block
    /// belongs to this participant's limbo, and [`collect`](Self::collect) frees it when no
    /// reader can see it any more.
    ///
    /// # Errors
    /// [`HeapError::LimboFull`] (see [`make_room`](Self::make_room)), [`HeapError::Log`].
    pub fn retire_in(&mut self, record: &mut Record<'m>, block: u64) -> Result<(), HeapError> {
        for entry in &self.place().limbo {
            let slot = self.memory().offset_of(&entry.block)?;
            if record.get(slot)? == 0 {
                return Ok(record.set(slot, block)?);
            }
        }
        Err(HeapError::LimboFull {
            reader: InstanceId::NONE,
        })
    }

    /// Frees those retired blocks that no living reader can see any more; returns how many.
    ///
    /// A block that is retired now is free after three calls, if nobody is pinned.
    ///
    /// # Errors
    /// Those of [`free_from`](Self::free_from).
    pub fn collect(&mut self) -> Result<usize, HeapError> {
        Ok(self.collect_or_name()?.0)
    }

    /// Sees to it that some blocks can be retired. Waits, at most a second, while a living reader
    /// keeps all that this participant has retired.
    ///
    /// # Errors
    /// [`HeapError::LimboFull`] with the reader; those of [`free_from`](Self::free_from).
    pub fn make_room(&mut self) -> Result<(), HeapError> {
        // Entries are taken from the lowest on, so one in the middle tells whether half are.
        let half_full =
            |this: &Self| load64(&this.place().limbo[LIMBO / 2].block, Ordering::Relaxed) != 0;
        if !half_full(self) {
            return Ok(());
        }
        let mut pacer: Option<Pacer> = None;
        loop {
            let (_, reader) = self.collect_or_name()?;
            let last = &self.place().limbo[LIMBO - ROOM..];
            let is_free = |entry: &LimboEntry| load64(&entry.block, Ordering::Relaxed) == 0;
            if last.iter().all(is_free) {
                return Ok(());
            }
            let Some(reader) = reader else {
                continue;
            };
            let pacer = pacer.get_or_insert_with(|| Pacer::new(Some(deadline_after(PATIENCE))));
            if pacer.sleep().is_err() {
                return Err(HeapError::LimboFull { reader });
            }
        }
    }

    /// Collects; also returns who keeps the epoch from moving on.
    fn collect_or_name(&mut self) -> Result<(usize, Option<InstanceId>), HeapError> {
        let (heap, place) = (self.heap(), self.place());
        let epochs = heap.epochs();
        let (mut freed, mut kept, mut now) = (0, 0, None);
        for entry in &place.limbo {
            if load64(&entry.block, Ordering::Acquire) == 0 {
                continue;
            }
            let stamp = load64(&entry.stamp, Ordering::Relaxed);
            if epochs.is_over(stamp) {
                // First: an entry without a block has no stamp, and a block without a stamp gets
                // a new one.
                store64(&entry.stamp, 0, Ordering::Release);
                // Not the application's operation: the outcome of its last one stays.
                self.free_chore_from(heap.memory().offset_of(&entry.block)?)?;
                freed += 1;
                continue;
            }
            kept += 1;
            if stamp == 0 {
                let now = *now.get_or_insert_with(|| epochs.stamp());
                store64(&entry.stamp, now, Ordering::Release);
            }
        }
        let mut blocked = None;
        if kept > 0 {
            blocked = epochs.advance(heap.readers(), self.judge()).err();
        }
        Ok((freed, blocked))
    }
}

impl<'m> Heap<'m> {
    /// Frees what those have retired who have left or died since, in the place of a participant
    /// that the caller holds; under the heap's lock, so that vacant places stay vacant.
    ///
    /// # Errors
    /// Those of [`free_from`](Participant::free_from).
    pub(crate) fn collect_vacant(
        &self,
        index: u32,
        judge: &impl Liveness,
    ) -> Result<(), HeapError> {
        let (epochs, own) = (self.epochs(), self.place(index)?);
        let is_vacant = |place: &Place| load64(&place.lock.owner, Ordering::Acquire) == 0;
        let places = || {
            let places = (0..self.participants()).filter_map(|other| self.place(other).ok());
            let entries = places.filter(|place| is_vacant(place));
            entries.flat_map(|place| &place.limbo)
        };
        let is_used = |entry: &&LimboEntry| load64(&entry.block, Ordering::Acquire) != 0;
        for entry in places().filter(is_used) {
            if load64(&entry.stamp, Ordering::Relaxed) == 0 {
                store64(&entry.stamp, epochs.stamp(), Ordering::Release);
            }
        }
        // As far as living readers let it move: without any, all that was stamped is over.
        for _ in 0..GRACE {
            let _ = epochs.advance(self.readers(), judge);
        }
        for entry in places().filter(is_used) {
            if epochs.is_over(load64(&entry.stamp, Ordering::Relaxed)) {
                store64(&entry.stamp, 0, Ordering::Release);
                self.free_chore(index, own, self.memory().offset_of(&entry.block)?)?;
            }
        }
        Ok(())
    }
}

/// Entries of the limbo that `make_room` leaves free: more than any one record retires.
const ROOM: usize = 8;

#[cfg(test)]
#[path = "reclaim_test.rs"]
mod reclaim_test;
