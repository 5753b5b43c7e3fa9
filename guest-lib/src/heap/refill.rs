//! Where slabs with free blocks come from, and where slabs without live ones go.

use core::sync::atomic::Ordering;

use super::KIND_CHORE;
use super::class::geometry;
use super::error::HeapError;
use super::layout::Use;
use super::participant::Participant;
use super::slab::{Cache, NO_SLAB, take_hint};
use crate::liveness::Liveness;
use crate::mem::{fill64, load64, store64};

/// Slabs adopted at a time: each costs a look at all its blocks.
const ADOPTED_AT_ONCE: usize = 16;

impl<'m, J: Liveness> Participant<'m, J> {
    /// Finds a run of free blocks for a class.
    pub(super) fn refill(&mut self, class: usize) -> Result<(), HeapError> {
        if self.cache.advance(class) {
            return Ok(());
        }
        if take_hint(&self.place.remote.word) {
            self.cache.rescan(&self.heap, false);
            if self.cache.advance(class) {
                return Ok(());
            }
        }
        if self.may_adopt(class) {
            self.adopt(Some(class))?;
            self.give_spares_back(class)?;
            if self.cache.advance(class) {
                return Ok(());
            }
        }
        if self.grow(class)? {
            return Ok(());
        }
        self.reclaim(Some(class))?;
        if self.cache.advance(class) || self.grow(class)? {
            return Ok(());
        }
        let bytes = geometry(class).map_or(0, |geometry| geometry.size.into());
        Err(HeapError::OutOfMemory { bytes })
    }

    /// Whether places became vacant since the last look.
    fn may_adopt(&self, class: usize) -> bool {
        let vacated = load64(&self.heap.header.vacated.word, Ordering::Acquire);
        self.cache.classes[class].seen_vacated != Some(vacated)
    }

    /// Takes over slabs, of one class or of any, whose participants have left or died and been
    /// settled, and loads those that this place had in an earlier life.
    fn adopt(&mut self, class: Option<usize>) -> Result<(), HeapError> {
        let heap = self.heap;
        let vacated = load64(&heap.header.vacated.word, Ordering::Acquire);
        // Nobody takes a place while this one holds the heap's lock: vacant ones stay vacant.
        let guard = heap.lock(self.me, &self.judge)?;
        let mut adopted = 0;
        for (span, entry) in heap.table.iter().enumerate() {
            let word = heap.span_word(span as u32);
            let Some(Use::Slab {
                class: found,
                owner,
            }) = word.usage()
            else {
                continue;
            };
            if class.is_some_and(|class| class != found) {
                continue;
            }
            if owner != self.index {
                let place = heap.place(owner)?;
                if load64(&place.lock.owner, Ordering::Acquire) != 0 {
                    continue;
                }
                store64(
                    &heap.words[span],
                    word.with_owner(self.index).0,
                    Ordering::Release,
                );
            } else if self.cache.by_span[span] != NO_SLAB {
                continue;
            }
            self.cache.load(&heap, entry, span as u32, found)?;
            adopted += 1;
            if class.is_some() && adopted == ADOPTED_AT_ONCE {
                break;
            }
        }
        if let Some(class) = class
            && adopted < ADOPTED_AT_ONCE
        {
            self.cache.classes[class].seen_vacated = Some(vacated);
        }
        Ok(guard.unlock()?)
    }

    /// Loads the slabs that this participant has, as if it had made them.
    #[cfg(feature = "crash-points")]
    pub(super) fn load_own(&mut self) -> Result<(), HeapError> {
        let heap = self.heap;
        for (span, entry) in heap.table.iter().enumerate() {
            if let Some(Use::Slab { class, owner }) = heap.span_word(span as u32).usage()
                && owner == self.index
            {
                self.cache.load(&heap, entry, span as u32, class)?;
            }
        }
        self.cache.nothing_vacated();
        Ok(())
    }

    /// Makes a free span a slab; false if there is none.
    fn grow(&mut self, class: usize) -> Result<bool, HeapError> {
        let heap = self.heap;
        let owner = self.index;
        let (mut record, guard) = self.begin_locked(KIND_CHORE)?;
        let span = heap.take_in(&mut record, 0, Use::Slab { class, owner })?;
        if let Some(span) = span {
            let entry = &heap.table[span as usize];
            // Before the commit: nobody looks at the words of a span that is no slab.
            for word in heap.words(entry, span, class)? {
                fill64(word, 0);
            }
            record.commit(0)?;
            guard.unlock()?;
            let id = self.cache.load(&heap, entry, span, class)?;
            debug_assert!(self.cache.slabs[id as usize].is_empty());
            return Ok(self.cache.advance(class));
        }
        drop(record);
        guard.unlock()?;
        Ok(false)
    }

    /// Gives a slab without live blocks back.
    pub(super) fn shrink(&mut self, id: u32) -> Result<(), HeapError> {
        let heap = self.heap;
        let span = self.cache.slabs[id as usize].span;
        let (mut record, guard) = self.begin_locked(KIND_CHORE)?;
        heap.give_in(&mut record, span)?;
        record.commit(0)?;
        guard.unlock()?;
        self.cache.unload(id);
        Ok(())
    }

    /// Gives slabs of a class without live blocks back, but for one. After an adoption: those who
    /// died early leave many, and nobody else could use what is hoarded here.
    fn give_spares_back(&mut self, class: usize) -> Result<(), HeapError> {
        let Cache { slabs, classes, .. } = &self.cache;
        let all = classes[class].all.iter().copied();
        let empty = all.filter(|id| slabs[*id as usize].is_empty());
        for id in empty.skip(1).collect::<Vec<_>>() {
            self.shrink(id)?;
        }
        Ok(())
    }

    /// Gives all slabs of this participant back that have no live blocks, also those in which
    /// others have freed the last one; [`Heap::audit`] counts slabs. Before a long pause: while a
    /// participant lives nobody else can use an empty slab of it, and it keeps up to two for each
    /// size class that it has used, besides those that others have emptied since it last looked.
    ///
    /// # Errors
    /// Those of the heap's lock and of the log.
    pub fn trim(&mut self) -> Result<(), HeapError> {
        self.cache.rescan(&self.heap, true);
        while let Some(id) = self.cache.empty(None) {
            self.shrink(id)?;
        }
        Ok(())
    }

    /// Called when a slab has no live block any more: one is kept for each class.
    #[cold]
    #[inline(never)]
    pub(super) fn on_empty(&mut self, id: u32) -> Result<(), HeapError> {
        let Cache { slabs, classes, .. } = &mut self.cache;
        let number = slabs[id as usize].class;
        let class = &mut classes[number];
        if class.current == id || class.spare == id {
            return Ok(());
        }
        let spare = &slabs[class.spare as usize];
        if spare.class == number && spare.is_empty() && class.current != class.spare {
            return self.shrink(id);
        }
        class.spare = id;
        Ok(())
    }

    /// Looks for memory everywhere: settles the dead, frees what they had retired, adopts what they
    /// had, finds what others freed, and gives all slabs without live blocks back, except those of
    /// one class.
    #[cold]
    pub(super) fn reclaim(&mut self, keep: Option<usize>) -> Result<(), HeapError> {
        // What is damaged in one place must not keep this participant from its own memory.
        let _ = self.heap.recover(self.me, &self.judge);
        let guard = self.heap.lock(self.me, &self.judge)?;
        let collected = self.heap.collect_vacant(self.index, &self.judge);
        guard.unlock()?;
        collected?;
        self.adopt(None)?;
        self.cache.rescan(&self.heap, true);
        while let Some(id) = self.cache.empty(keep) {
            self.shrink(id)?;
        }
        Ok(())
    }
}
