//! The intent of one small allocation or free: a log of one word.
//!
//! ```text
//!   fields, then op = ALLOC(v)  ->  block word v -> v+1  ->  slot = block  ->  op = ALLOCATED
//!   fields, then op = FREE(v)   ->  block word v -> v+1  ->  slot = 0      ->  op = FREED
//! ```
//!
//! The state word of a block only counts: it is even while the block is free and odd while it
//! lives. So the word itself tells whoever comes after a death which of the stores were made: `v`
//! means that nothing happened, `v + 1` that it did, and anything above that it did and others
//! went on with the block. Neither a free that is done twice nor one that is done late can hit a
//! later life of the block. An allocation that died before its first store is undone, everything
//! else is completed.
//!
//! The op word that ends an operation carries the block, so that the outcome stays whole while
//! the fields of the next operation are written.
//!
//! Source: the one-word logs of cxlalloc (ASPLOS '26), which has versions of 16 bits.

use core::sync::atomic::{AtomicU64, Ordering};

use super::Heap;
use super::error::HeapError;
use super::layout::{IntentLine, SpanWord};
use super::{KIND_ALLOC, KIND_FREE};
use crate::mem::{cas64, fill64, load64, store64};

const NONE: u64 = 0;
const ALLOC: u64 = 1;
const FREE: u64 = 2;
/// A free of a block in another participant's slab.
const FREE_FOREIGN: u64 = 3;
const ALLOCATED: u64 = 4;
const FREED: u64 = 5;
/// An allocation that was undone.
const UNDONE: u64 = 6;
const KIND: u64 = 7;
const KIND_BITS: u32 = 3;

/// What became of the operation of an intent line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) kind: u32,
    pub(super) tag: u64,
    /// The block; 0 if nothing happened.
    pub(super) block: u64,
    pub(super) happened: bool,
}

/// Whether the state word is that of a live block.
#[inline]
pub(super) fn is_live(word: u64) -> bool {
    word & 1 == 1
}

impl IntentLine {
    /// Says that a free block is about to move into a slot. Release: the fields before the word
    /// that makes them count; on x86 a plain store.
    #[inline]
    pub(super) fn begin_alloc(&self, slot: u64, block: u64, before: u64) {
        fill64(&self.slot, slot);
        fill64(&self.block, block);
        store64(&self.op, before << KIND_BITS | ALLOC, Ordering::Release);
    }

    #[inline]
    pub(super) fn end_alloc(&self, block: u64) {
        store64(&self.op, block << KIND_BITS | ALLOCATED, Ordering::Release);
    }

    /// Says that the block of a slot, in a slab of the participant's own, is about to be freed.
    #[inline]
    pub(super) fn begin_free(&self, slot: u64, block: u64, before: u64) {
        fill64(&self.slot, slot);
        fill64(&self.block, block);
        store64(&self.op, before << KIND_BITS | FREE, Ordering::Release);
    }

    /// As [`begin_free`](Self::begin_free), for a block in another participant's slab, which may
    /// be put to another use as soon as the block is free: so the use is noted as well.
    pub(super) fn begin_foreign_free(&self, slot: u64, block: u64, before: u64, span: SpanWord) {
        fill64(&self.slot, slot);
        fill64(&self.block, block);
        fill64(&self.span, span.0);
        let op = before << KIND_BITS | FREE_FOREIGN;
        store64(&self.op, op, Ordering::Release);
    }

    #[inline]
    pub(super) fn end_free(&self, block: u64) {
        store64(&self.op, block << KIND_BITS | FREED, Ordering::Release);
    }

    /// Forgets the last operation: what follows is in the log, or is another's.
    pub(super) fn clear(&self) {
        if load64(&self.op, Ordering::Relaxed) != NONE {
            store64(&self.op, NONE, Ordering::Release);
        }
    }

    /// Sets the number of the operations to come; the last one is forgotten, lest it be reported
    /// under a number that is not its own.
    pub(super) fn set_tag(&self, tag: u64) {
        self.clear();
        store64(&self.tag, tag, Ordering::Release);
    }
}

/// Completes or undoes what a dead participant was doing to a block, and says what became of it.
/// Idempotent. For whoever holds the place in the dead one's stead.
pub(super) fn settle(
    heap: &Heap<'_>,
    index: u32,
    line: &IntentLine,
) -> Result<Option<Done>, HeapError> {
    let op = load64(&line.op, Ordering::Acquire);
    let tag = load64(&line.tag, Ordering::Relaxed);
    let (kind, before) = (op & KIND, op >> KIND_BITS);
    let done = |kind, block| {
        Ok(Some(Done {
            kind,
            tag,
            block,
            happened: true,
        }))
    };
    let undone = Ok(Some(Done {
        kind: KIND_ALLOC,
        tag,
        block: 0,
        happened: false,
    }));
    match kind {
        NONE => return Ok(None),
        ALLOCATED => return done(KIND_ALLOC, before),
        FREED => return done(KIND_FREE, before),
        UNDONE => return undone,
        _ => {}
    }
    let at = load64(&line.block, Ordering::Relaxed);
    let slot = heap.memory.get(load64(&line.slot, Ordering::Relaxed))?;
    let span = SpanWord(load64(&line.span, Ordering::Relaxed));
    match kind {
        ALLOC => {
            let block = heap.block(at)?;
            block.must_belong_to(index)?;
            let word = load64(block.word, Ordering::Acquire);
            if word == before {
                store64(&line.op, UNDONE, Ordering::Release);
                return undone;
            }
            if word == before + 1 && load64(slot, Ordering::Acquire) == 0 {
                store64(slot, at, Ordering::Release);
            }
            line.end_alloc(at);
            done(KIND_ALLOC, at)
        }
        FREE => {
            let block = heap.block(at)?;
            block.must_belong_to(index)?;
            // Others may free it now, by a copy of the slot: none of them twice.
            let _ = cas64(block.word, before, before + 1, Ordering::AcqRel);
            end_free(line, slot, at);
            done(KIND_FREE, at)
        }
        FREE_FOREIGN => {
            if let Some(word) = word_in_use(heap, at, span)? {
                let freed = load64(word, Ordering::Acquire) == before
                    // In use again already, if it is another word by the time that the use is
                    // looked at again: versions and uses only go up.
                    && word_in_use(heap, at, span)?.is_some();
                if freed {
                    let _ = cas64(word, before, before + 1, Ordering::AcqRel);
                }
                // Whether or not the dead one came to it.
                heap.tell_owner(at)?;
            }
            end_free(line, slot, at);
            done(KIND_FREE, at)
        }
        _ => Err(HeapError::Damaged {
            what: "an intent",
            at: heap.memory.offset_of(line)?,
        }),
    }
}

fn end_free(line: &IntentLine, slot: &AtomicU64, block: u64) {
    if load64(slot, Ordering::Acquire) == block {
        store64(slot, 0, Ordering::Release);
    }
    line.end_free(block);
}

/// The state word of a block, if its span still has the use that was noted. A span changes its
/// use only when all its blocks are free.
fn word_in_use<'m>(
    heap: &Heap<'m>,
    at: u64,
    noted: SpanWord,
) -> Result<Option<&'m AtomicU64>, HeapError> {
    let (entry, span) = heap.span_of(at)?;
    match heap.span_word(span).is_same_use(noted) {
        true => Ok(Some(heap.block_as(at, entry, span, noted)?.word)),
        false => Ok(None),
    }
}
