//! Blocks that are whole runs of spans.

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use super::class::SPAN;
use super::error::HeapError;
use super::layout::{Place, Use};
use super::participant::Participant;
use super::{Heap, KIND_ALLOC, KIND_CHORE};
use crate::liveness::Liveness;
use crate::lock::LockGuard;
use crate::log::Record;
use crate::mem::load64;

/// The order of the run that holds `bytes` bytes.
pub(super) fn order_of(bytes: u64) -> u32 {
    bytes.div_ceil(SPAN).next_power_of_two().trailing_zeros()
}

impl<'m> Heap<'m> {
    /// Frees whatever a slot owns, in the place of a participant that the caller holds, without
    /// that being the participant's last operation; under the heap's lock.
    pub(crate) fn free_chore(&self, index: u32, place: &Place, slot: u64) -> Result<(), HeapError> {
        let cell: &AtomicU64 = self.memory.get(slot)?;
        let at = load64(cell, Ordering::Acquire);
        if let Use::Slab { .. } = self.usage_of(at)? {
            let block = self.block(at)?;
            return self.free_small(index, &place.chore, (slot, cell), block);
        }
        let log = self.log_of(index)?;
        place.save_last(log)?;
        let life = InstanceId::from_word(load64(&place.life, Ordering::Relaxed));
        self.free_run_in(log.begin(life, KIND_CHORE, 0)?, slot, at)
    }

    /// The use of the span in which an offset lies.
    pub(super) fn usage_of(&self, at: u64) -> Result<Use, HeapError> {
        let (_, span) = self.span_of(at)?;
        let what = "the use of a span";
        self.span_word(span)
            .usage()
            .ok_or(HeapError::Damaged { what, at })
    }

    /// Frees the run at `at`, which `slot` owns, under the heap's lock.
    fn free_run_in(&self, mut record: Record<'m>, slot: u64, at: u64) -> Result<(), HeapError> {
        let (_, span) = self.span_of(at)?;
        let is_start = at == self.span_start(span);
        match self.span_word(span).usage() {
            Some(Use::Run { .. }) if is_start => {}
            Some(Use::Free) if is_start => return Err(HeapError::DoubleFree { slot, block: at }),
            _ => return Err(HeapError::Foreign { block: at }),
        }
        self.give_in(&mut record, span)?;
        record.set(slot, 0)?;
        Ok(record.commit(at)?)
    }
}

impl<'m, J: Liveness> Participant<'m, J> {
    /// Begins a record of the heap's own, and takes the heap's lock for it.
    pub(super) fn begin_locked(
        &mut self,
        kind: u32,
    ) -> Result<(Record<'m>, LockGuard<'m>), HeapError> {
        let mut record = match kind {
            KIND_CHORE => self.begin_chore()?,
            _ => self.begin_any(kind)?,
        };
        let lock = self.heap.memory.offset_of(&self.heap.header.lock)?;
        record.intend(lock);
        let guard = self.heap.lock(self.me, &self.judge)?;
        record.held(lock);
        Ok((record, guard))
    }

    pub(super) fn alloc_run(&mut self, slot: u64, bytes: u64) -> Result<u64, HeapError> {
        let largest = self.heap.largest_block();
        if bytes == 0 || bytes > largest {
            return Err(HeapError::Size { bytes, largest });
        }
        let order = order_of(bytes);
        for is_last_try in [false, true] {
            let (mut record, guard) = self.begin_locked(KIND_ALLOC)?;
            if let Some(span) = self.heap.take_in(&mut record, order, Use::Run { order })? {
                let block = self.heap.span_start(span);
                record.set(slot, block)?;
                record.commit(block)?;
                guard.unlock()?;
                return Ok(block);
            }
            drop(record);
            guard.unlock()?;
            if !is_last_try {
                self.reclaim(None)?;
            }
        }
        Err(HeapError::OutOfMemory { bytes })
    }

    pub(super) fn free_run(&mut self, slot: u64, at: u64, kind: u32) -> Result<(), HeapError> {
        let (record, guard) = self.begin_locked(kind)?;
        let result = self.heap.free_run_in(record, slot, at);
        guard.unlock()?;
        result
    }
}
