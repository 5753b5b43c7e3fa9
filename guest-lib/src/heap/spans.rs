//! Spans: who has which.

use core::sync::atomic::Ordering;

use super::Heap;
use super::error::HeapError;
use super::layout::{SpanWord, Use};
use crate::buddy::BuddyError;
use crate::log::Record;
use crate::mem::load64;

/// The one owner of all chunks, as the allocator of spans sees it. Who owns a slab is in its span
/// word, where it can change without that allocator's lock.
const OWNER: u64 = 1;

impl Heap<'_> {
    /// The word of a span.
    pub(super) fn span_word(&self, span: u32) -> SpanWord {
        SpanWord(load64(&self.words[span as usize], Ordering::Acquire))
    }

    /// Takes a run of `1 << order` spans for a use, as part of a record and under the heap's
    /// lock; `None` if there is none.
    pub(super) fn take_in(
        &self,
        record: &mut Record<'_>,
        order: u32,
        usage: Use,
    ) -> Result<Option<u32>, HeapError> {
        let first = match self.buddy.alloc_in(record, 1 << order, OWNER) {
            Ok(first) => first,
            Err(BuddyError::NoRoom { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        self.set_use(record, first, usage)?;
        Ok(Some(first))
    }

    /// Gives a slab or a run back, as part of a record and under the heap's lock.
    pub(super) fn give_in(&self, record: &mut Record<'_>, first: u32) -> Result<(), HeapError> {
        self.buddy.free_in(record, first, OWNER)?;
        self.set_use(record, first, Use::Free)
    }

    fn set_use(&self, record: &mut Record<'_>, span: u32, usage: Use) -> Result<(), HeapError> {
        let next = self.span_word(span).next(usage);
        let at = self.memory.offset_of(&self.words[span as usize])?;
        Ok(record.set(at, next.0)?)
    }
}
