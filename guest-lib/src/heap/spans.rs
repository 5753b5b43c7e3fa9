//! Spans: who has which, and blocks that are whole runs of them.

use core::sync::atomic::Ordering;

use lupin_abi::InstanceId;

use super::Heap;
use super::error::HeapError;
use super::layout::{SpanWord, Use};
use crate::liveness::Liveness;
use crate::log::Record;
use crate::mem::load64;

impl Heap<'_> {
    /// Brings all-zero memory into the state in which all spans are free.
    pub(super) fn create_spans<J: Liveness>(
        &self,
        _me: InstanceId,
        _judge: &J,
    ) -> Result<(), HeapError> {
        Ok(())
    }

    pub(super) fn open_spans<J: Liveness>(&self, _judge: &J) -> Result<(), HeapError> {
        Ok(())
    }

    /// The word of a span.
    pub(super) fn span_word(&self, span: u32) -> SpanWord {
        SpanWord(load64(&self.words[span as usize], Ordering::Acquire))
    }

    /// Takes a run of `1 << order` spans, as part of a record and under the heap's lock; `None`
    /// if there is none.
    pub(super) fn take_in(
        &self,
        record: &mut Record<'_>,
        order: u32,
        usage: Use,
    ) -> Result<Option<u32>, HeapError> {
        let wanted = 1u32 << order;
        let mut span = 0;
        let mut free = 0;
        while span < self.places.spans {
            let step = match self.span_word(span).usage() {
                Some(Use::Free) => {
                    free += 1;
                    1
                }
                Some(Use::Run { order }) => {
                    free = 0;
                    1u32 << order.min(24)
                }
                _ => {
                    free = 0;
                    1
                }
            };
            span += step;
            if free == wanted {
                let first = span - wanted;
                self.set_use(record, first, usage)?;
                return Ok(Some(first));
            }
        }
        Ok(None)
    }

    /// Gives a slab or a run back, as part of a record and under the heap's lock.
    pub(super) fn give_in(&self, record: &mut Record<'_>, first: u32) -> Result<(), HeapError> {
        self.set_use(record, first, Use::Free)
    }

    fn set_use(&self, record: &mut Record<'_>, span: u32, usage: Use) -> Result<(), HeapError> {
        let next = self.span_word(span).next(usage);
        let at = self.memory.offset_of(&self.words[span as usize])?;
        Ok(record.set(at, next.0)?)
    }
}
