//! Counting everything.

use core::sync::atomic::Ordering;
use std::collections::BTreeMap;

use super::class::geometry;
use super::error::HeapError;
use super::intent::is_live;
use super::layout::{LIMBO, ROOTS, Use};
use super::{Heap, SPAN};
use crate::mem::load64;

/// What [`Heap::audit`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeapAudit {
    /// Spans of the heap.
    pub spans: u32,
    /// Spans that are free.
    pub free_spans: u32,
    /// Spans that are slabs.
    pub slabs: u32,
    /// Spans that are parts of large blocks.
    pub run_spans: u32,
    /// Blocks of slabs that are free.
    pub free_blocks: u64,
    /// Blocks that live, large ones included.
    pub live_blocks: u64,
    /// Bytes of the live blocks, as rounded up.
    pub live_bytes: u64,
    /// Live blocks that are owned by a root, a hold or a limbo entry.
    pub held_blocks: u64,
    /// Live blocks that no slot owns; only if all owners were told.
    pub leaked: Vec<u64>,
    /// Blocks that two slots own.
    pub shared: Vec<u64>,
    /// Slots of the heap, or owners told, whose word is not a live block.
    pub dangling: Vec<u64>,
}

impl HeapAudit {
    /// Whether everything adds up.
    pub fn is_clean(&self) -> bool {
        self.free_spans + self.slabs + self.run_spans == self.spans
            && self.leaked.is_empty()
            && self.shared.is_empty()
            && self.dangling.is_empty()
    }
}

impl Heap<'_> {
    /// Counts spans and blocks, and checks what roots, holds and limbo own. For a heap that
    /// nobody changes meanwhile.
    ///
    /// # Errors
    /// [`HeapError::Damaged`].
    pub fn audit(&self) -> Result<HeapAudit, HeapError> {
        self.count().map(|(audit, _)| audit)
    }

    /// As [`audit`](Self::audit), and finds leaks: `owned` are all blocks that the application's
    /// slots own, besides roots, holds and limbo.
    ///
    /// # Errors
    /// [`HeapError::Damaged`].
    pub fn audit_with(&self, owned: impl IntoIterator<Item = u64>) -> Result<HeapAudit, HeapError> {
        let (mut audit, mut live) = self.count()?;
        for block in owned {
            own(&mut live, &mut audit, block);
        }
        let orphans = live.iter().filter(|(_, owners)| **owners == 0);
        audit.leaked = orphans.map(|(block, _)| *block).collect();
        Ok(audit)
    }

    /// Counts, and returns the live blocks with how many slots of the heap own them.
    fn count(&self) -> Result<(HeapAudit, BTreeMap<u64, u32>), HeapError> {
        let mut audit = HeapAudit {
            spans: self.places.spans,
            ..HeapAudit::default()
        };
        // That the free and the used add up, for the allocator of spans by itself.
        self.buddy.audit()?;
        let mut live = BTreeMap::new();
        let mut span = 0;
        while span < self.places.spans {
            let at = self.span_start(span);
            let mut step = 1;
            let usage = self.usage_of(at)?;
            let chunk = self.buddy.chunk(span).map(|chunk| chunk.order);
            let expected = match usage {
                Use::Free => None,
                Use::Slab { .. } => Some(0),
                Use::Run { order } => Some(order),
            };
            if chunk != expected {
                let what = "a span whose use is not what it was taken for,";
                return Err(HeapError::Damaged { what, at });
            }
            match usage {
                Use::Free => audit.free_spans += 1,
                Use::Run { order } => {
                    step = 1u32.checked_shl(order).unwrap_or(u32::MAX);
                    if step > self.places.spans - span {
                        let what = "a run of spans beyond the end";
                        return Err(HeapError::Damaged { what, at });
                    }
                    audit.run_spans += step;
                    audit.live_bytes += SPAN << order;
                    live.insert(at, 0);
                }
                Use::Slab { class, owner } => {
                    let what = "the class or the owner of a slab";
                    let damaged = HeapError::Damaged { what, at };
                    let Some(geometry) = geometry(class) else {
                        return Err(damaged);
                    };
                    if owner >= self.places.participants {
                        return Err(damaged);
                    }
                    audit.slabs += 1;
                    let words = self.words(&self.table[span as usize], span, class)?;
                    for (index, word) in words.iter().enumerate() {
                        match is_live(load64(word, Ordering::Acquire)) {
                            true => {
                                live.insert(at + geometry.offset_of(index as u32), 0);
                                audit.live_bytes += u64::from(geometry.size);
                            }
                            false => audit.free_blocks += 1,
                        }
                    }
                }
            }
            span += step;
        }
        audit.live_blocks = live.len() as u64;
        self.own_by_slots(&mut audit, &mut live)?;
        Ok((audit, live))
    }

    /// Counts what the heap's own slots own.
    fn own_by_slots(
        &self,
        audit: &mut HeapAudit,
        live: &mut BTreeMap<u64, u32>,
    ) -> Result<(), HeapError> {
        let mut slots: Vec<_> = self.header.roots[..ROOTS as usize].iter().collect();
        for index in 0..self.places.participants {
            let place = self.place(index)?;
            slots.extend(&place.holds);
            slots.extend(place.limbo[..LIMBO].iter().map(|entry| &entry.block));
        }
        for slot in slots {
            let block = load64(slot, Ordering::Acquire);
            if block != 0 {
                audit.held_blocks += 1;
                own(live, audit, block);
            }
        }
        Ok(())
    }
}

fn own(live: &mut BTreeMap<u64, u32>, audit: &mut HeapAudit, block: u64) {
    match live.get_mut(&block) {
        None => audit.dangling.push(block),
        Some(owners) => {
            *owners += 1;
            if *owners == 2 {
                audit.shared.push(block);
            }
        }
    }
}
