//! Slabs: what a process knows about those of its participant, and frees of small blocks.
//!
//! Everything that is private to the process is here: per slab a bitmap of the blocks that were
//! free when it last looked, per class a stack of slabs with such blocks and the *run* that blocks
//! are taken from: up to 64 neighbours, one word of a bitmap. Since only the owner of a slab hands
//! out its blocks, a block that was free once is free until it does; what others freed meanwhile
//! is found by [`rescan`](Slab::rescan).

use core::sync::atomic::{AtomicU64, Ordering};

use super::class::{CLASSES, Geometry, geometry};
use super::error::HeapError;
use super::intent::is_live;
use super::layout::{IntentLine, SpanEntry};
use super::{Block, Heap};
use crate::mem::{cas64, load64, store64};

/// No slab: an index of the stand-in that never has a free block.
pub(super) const NO_SLAB: u32 = 0;

/// A slab of the participant's own, as the process knows it.
#[derive(Clone)]
pub(super) struct Slab<'m> {
    pub(super) span: u32,
    pub(super) class: usize,
    pub(super) geometry: Geometry,
    /// Offset of the span.
    pub(super) start: u64,
    pub(super) words: &'m [AtomicU64],
    /// A bit for each block that is free.
    free: Box<[u64]>,
    pub(super) free_count: u32,
    /// The word of `free` to look at first.
    cursor: u32,
    /// Whether it is on its class's stack.
    is_listed: bool,
    /// Where it is among all of its class.
    position: u32,
}

/// The slabs of a participant, as its process knows them.
#[derive(Clone)]
pub(super) struct Cache<'m> {
    /// By the index that all others use; the first is [`NO_SLAB`].
    pub(super) slabs: Vec<Slab<'m>>,
    /// Indices in `slabs` that are not in use.
    unused: Vec<u32>,
    /// By span; [`NO_SLAB`] for spans that are not the participant's, or not loaded yet.
    pub(super) by_span: Box<[u32]>,
    pub(super) classes: [ClassCache<'m>; CLASSES],
    /// The class from which a block was taken last.
    pub(super) last: usize,
}

/// The slabs of one class.
#[derive(Clone, Default)]
pub(super) struct ClassCache<'m> {
    pub(super) run: Run<'m>,
    /// The slab that the run is part of.
    pub(super) current: u32,
    /// Others that may have free blocks.
    pub(super) partial: Vec<u32>,
    /// All.
    pub(super) all: Vec<u32>,
    /// One without live blocks that is kept; others are given back.
    pub(super) spare: u32,
    /// The heap's count of vacancies up to which slabs were adopted.
    pub(super) seen_vacated: Option<u64>,
}

/// Up to 64 neighbours of a slab, from which blocks are taken.
#[derive(Clone, Default)]
pub(super) struct Run<'m> {
    /// Those that are free and not noted as free in the slab, from the lowest bit on.
    bits: u64,
    /// Their words.
    words: &'m [AtomicU64],
    /// Offset of the first block, and bytes from one to the next.
    first: u64,
    size: u64,
    /// As that of the class's [`Geometry`].
    reciprocal: u64,
}

impl<'m> Slab<'m> {
    fn none() -> Self {
        Self {
            span: u32::MAX,
            class: CLASSES,
            geometry: Geometry::default(),
            start: 0,
            words: &[],
            free: Box::default(),
            free_count: 0,
            cursor: 0,
            is_listed: false,
            position: 0,
        }
    }

    /// Takes a run of free blocks: which of the 64 they are, and the index of the first of those.
    fn take_run(&mut self) -> Option<(u64, usize)> {
        // The one in which a block was freed last: it is in the processor's cache.
        let (after, before) = (
            self.cursor as usize..self.free.len(),
            0..self.cursor as usize,
        );
        let at = after.chain(before).find(|at| self.free[*at] != 0)?;
        let bits = core::mem::take(&mut self.free[at]);
        self.free_count -= bits.count_ones();
        Some((bits, at * 64))
    }

    /// Notes that a block is free.
    #[inline]
    pub(super) fn put(&mut self, index: u32) {
        self.cursor = index / 64;
        self.free[index as usize / 64] |= 1 << (index % 64);
        self.free_count += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free_count == self.geometry.count
    }

    /// Looks which blocks are free.
    fn rescan(&mut self) {
        self.free.fill(0);
        self.free_count = 0;
        for (index, word) in self.words.iter().enumerate() {
            // Acquire: what whoever freed the block did in it is over.
            if !is_live(load64(word, Ordering::Acquire)) {
                self.free[index / 64] |= 1 << (index % 64);
                self.free_count += 1;
            }
        }
    }
}

impl<'m> Cache<'m> {
    pub(super) fn new(spans: u32) -> Self {
        Self {
            slabs: vec![Slab::none()],
            unused: Vec::new(),
            by_span: vec![NO_SLAB; spans as usize].into_boxed_slice(),
            classes: core::array::from_fn(|_| ClassCache::default()),
            last: 0,
        }
    }

    /// Notes that there is nothing to adopt, unless a place becomes vacant.
    pub(super) fn nothing_vacated(&mut self) {
        for class in &mut self.classes {
            class.seen_vacated = Some(0);
        }
    }

    /// Loads a slab that belongs to the participant.
    pub(super) fn load(
        &mut self,
        heap: &Heap<'m>,
        entry: &'m SpanEntry,
        span: u32,
        class: usize,
    ) -> Result<u32, HeapError> {
        let words = heap.words(entry, span, class)?;
        let Some(geometry) = geometry(class) else {
            return Err(super::no_such("size class", class as u32, CLASSES as u32));
        };
        let mut slab = Slab {
            span,
            class,
            geometry: *geometry,
            start: heap.span_start(span),
            words,
            free: vec![0; words.len().div_ceil(64)].into_boxed_slice(),
            position: self.classes[class].all.len() as u32,
            ..Slab::none()
        };
        slab.rescan();
        let id = match self.unused.pop() {
            Some(id) => {
                self.slabs[id as usize] = slab;
                id
            }
            None => {
                self.slabs.push(slab);
                self.slabs.len() as u32 - 1
            }
        };
        self.by_span[span as usize] = id;
        self.classes[class].all.push(id);
        self.list(id);
        Ok(id)
    }

    /// Forgets a slab that does not belong to the participant any more.
    pub(super) fn unload(&mut self, id: u32) {
        let slab = core::mem::replace(&mut self.slabs[id as usize], Slab::none());
        let class = &mut self.classes[slab.class];
        class.all.swap_remove(slab.position as usize);
        if let Some(moved) = class.all.get(slab.position as usize) {
            self.slabs[*moved as usize].position = slab.position;
        }
        if class.current == id {
            class.current = NO_SLAB;
            class.run = Run::default();
        }
        self.by_span[slab.span as usize] = NO_SLAB;
        self.unused.push(id);
    }

    /// Puts a slab on its class's stack, if it has something to give.
    pub(super) fn list(&mut self, id: u32) {
        let slab = &mut self.slabs[id as usize];
        let class = &mut self.classes[slab.class];
        if slab.free_count > 0 && !slab.is_listed && class.current != id {
            slab.is_listed = true;
            class.partial.push(id);
        }
    }

    /// Finds a run of free blocks for a class, in slabs that are known; false if there is none.
    pub(super) fn advance(&mut self, number: usize) -> bool {
        let class = &mut self.classes[number];
        if class.run.bits != 0 {
            return true;
        }
        let mut id = class.current;
        loop {
            let slab = &mut self.slabs[id as usize];
            // An index on the stack may stand for another slab since.
            if slab.class == number
                && let Some((bits, first)) = slab.take_run()
            {
                let end = slab.words.len().min(first + 64);
                class.run = Run {
                    bits,
                    words: &slab.words[first..end],
                    first: slab.start + slab.geometry.offset_of(first as u32),
                    size: slab.geometry.size.into(),
                    reciprocal: slab.geometry.reciprocal.into(),
                };
                class.current = id;
                return true;
            }
            let Some(next) = class.partial.pop() else {
                return false;
            };
            id = next;
            self.slabs[id as usize].is_listed = false;
        }
    }

    /// Finds what others have freed: in slabs of which they said so, or in all.
    pub(super) fn rescan(&mut self, heap: &Heap<'m>, in_all: bool) {
        for id in 1..self.slabs.len() as u32 {
            let slab = &mut self.slabs[id as usize];
            let Some(entry) = heap.table.get(slab.span as usize) else {
                continue;
            };
            if take_hint(&entry.remote.word) || in_all {
                slab.rescan();
                let class = &mut self.classes[slab.class];
                if class.current == id {
                    // The run is among what was found.
                    class.run.bits = 0;
                }
                self.list(id);
            }
        }
    }

    /// A slab without live blocks, except of one class.
    pub(super) fn empty(&self, except: Option<usize>) -> Option<u32> {
        let classes = self.classes.iter().enumerate();
        let classes = classes.filter(|(class, _)| Some(*class) != except);
        let mut all = classes.flat_map(|(_, class)| &class.all);
        all.find(|id| self.slabs[**id as usize].is_empty()).copied()
    }
}

impl<'m> Run<'m> {
    /// Takes a free block: its offset and its word.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u64, &'m AtomicU64)> {
        let index = self.bits.trailing_zeros();
        // Index 64, of an empty run, is beyond the end.
        let word = self.words.get(index as usize)?;
        self.bits &= self.bits - 1;
        Some((self.first + u64::from(index) * self.size, word))
    }

    /// The index and the word of the block at an offset, if it is one of the run.
    #[inline]
    pub(super) fn find(&self, at: u64) -> Option<(u64, &'m AtomicU64)> {
        let within = at.wrapping_sub(self.first);
        // Exact for the blocks of a slab; whatever else it gives for other offsets, the product
        // shows.
        let index = within.wrapping_mul(self.reciprocal) >> 32;
        let word = self.words.get(index as usize)?;
        (index * self.size == within).then_some((index, word))
    }

    /// Notes that a block that was [found](Self::find) is free.
    #[inline]
    pub(super) fn put(&mut self, index: u64) {
        self.bits |= 1 << (index & 63);
    }
}

/// Takes a hint back; whether it was raised. SeqCst: see [`raise`](super::raise).
pub(super) fn take_hint(hint: &AtomicU64) -> bool {
    load64(hint, Ordering::Relaxed) != 0 && crate::mem::swap64(hint, 0, Ordering::SeqCst) != 0
}

/// Frees a block, given by its offset and its word, of a slab that the owner of `line` has; false
/// if it is free already.
///
/// A private slot is one from which nobody else may free: then a plain store will do. That two
/// who may meet know which of them freed a block takes a read-modify-write on both sides
/// (Attiya et al., *Laws of Order*, POPL 2011), and that costs as much as the rest of a free.
#[inline]
pub(super) fn free_own(
    line: &IntentLine,
    (slot, cell): (u64, &AtomicU64),
    (block, word): (u64, &AtomicU64),
    is_private: bool,
) -> bool {
    let before = load64(word, Ordering::Relaxed);
    if !is_live(before) {
        return false;
    }
    line.begin_free(slot, block, before);
    // Release, each: in this order for whoever comes after a death, at any instruction.
    if is_private {
        store64(word, before + 1, Ordering::Release);
    } else if cas64(word, before, before + 1, Ordering::Release).is_err() {
        line.clear();
        return false;
    }
    store64(cell, 0, Ordering::Release);
    line.end_free(block);
    true
}

impl<'m> Heap<'m> {
    /// Frees a small block that `slot` owns, in the place of a participant.
    pub(super) fn free_small(
        &self,
        index: u32,
        line: &IntentLine,
        slot: (u64, &AtomicU64),
        block: Block<'m>,
    ) -> Result<(), HeapError> {
        let (at, cell) = slot;
        let double = HeapError::DoubleFree {
            slot: at,
            block: block.at,
        };
        if block.owner == index {
            let is_private = self.place(index)?.contains(cell);
            return match free_own(line, slot, (block.at, block.word), is_private) {
                true => Ok(()),
                false => Err(double),
            };
        }
        let before = load64(block.word, Ordering::Acquire);
        if !is_live(before) {
            return Err(double);
        }
        line.begin_foreign_free(at, block.at, before, block.span);
        // Release: what the caller did in the block is over. SeqCst for `tell_owner`.
        if cas64(block.word, before, before + 1, Ordering::SeqCst).is_err() {
            line.clear();
            return Err(double);
        }
        self.tell_owner(block.at)?;
        store64(cell, 0, Ordering::Release);
        line.end_free(block.at);
        Ok(())
    }
}
