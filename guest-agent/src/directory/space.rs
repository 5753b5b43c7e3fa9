//! The memory of segments: chunks of the pod's allocator, taken and given back together with the
//! directory's words that say so.
//!
//! All of it happens under the directory lock. The allocator has a lock and logs of its own, so
//! that a record that is half applied belongs to whoever died with both locks: whoever repairs the
//! directory settles the allocator first ([`Directory::settle`]), and then reads the entries.

use log::warn;
use lupin::buddy::{BuddyError, BuddySpec, PodAllocator, PodAllocatorSpec};
use lupin::log::Record;
use lupin::shm::Mapping;
use lupin_abi::PodHeader;
use lupin_abi::layout::{ALLOCATOR_AT, GRANULE, Range};
use lupin_abi::system::{SegmentEntry, SegmentState, count_word, extent_word};

use super::{Directory, DirectoryError, LOCK_TIMEOUT};
use crate::crash::crash_point;

/// Most words of the directory in one record: a name and its length.
const WORDS: u32 = 16;

/// The shape of a pod's allocator.
pub(super) fn spec(header: &PodHeader) -> PodAllocatorSpec {
    PodAllocatorSpec {
        nodes: header.node_capacity(),
        chunks: BuddySpec {
            units: u32::try_from(header.pool().size / GRANULE).unwrap_or(u32::MAX),
            unit: GRANULE,
        },
        also: WORDS,
    }
}

impl Directory {
    /// The pod's allocator, created if it is not there. Needs the lock.
    pub(super) fn allocator(&self) -> Result<PodAllocator<'_>, DirectoryError> {
        let spec = spec(self.memory.header());
        let kernel = self.memory.kernel();
        let created = PodAllocator::create(kernel, ALLOCATOR_AT, &spec, self.me(), &self.judge());
        // Nobody alive has its lock who has not the directory's; a node that misbehaves might.
        Ok(created?.with_patience(LOCK_TIMEOUT))
    }

    /// Finishes or gives up the operation of the allocator in which a node died, this node in an
    /// earlier process of this life included. Needs the lock.
    pub(super) fn settle(&self) -> Result<(), DirectoryError> {
        self.allocator()?.recover(self.me(), &self.judge())?;
        Ok(())
    }

    /// Takes `size` bytes more for an entry, in as few pieces as there are. Needs the lock. After
    /// an error, some may be taken.
    pub(super) fn take(&self, index: usize, size: u64) -> Result<(), DirectoryError> {
        let entry = &self.entries()[index];
        let (allocator, tag) = (self.allocator()?, entry.tag(index));
        let no_space = |what: String| DirectoryError::NoSpace { size, what };
        let mut left = size / GRANULE;
        while left > 0 {
            let segment = entry.segment();
            let (taken, ready) = (segment.extents.len(), segment.ready);
            let cell = entry
                .extent_cell(taken)
                .ok_or_else(|| no_space(format!("free only in more than {taken} pieces")))?;
            let mut units = 1u64 << left.ilog2();
            loop {
                let bytes = units * GRANULE;
                let also = |record: &mut Record<'_>, offset| {
                    let extent = extent_word(Range {
                        offset,
                        size: bytes,
                    });
                    self.set(record, cell, extent)?;
                    self.set(record, entry.count_cell(), count_word(taken + 1, ready))
                };
                let judge = self.judge();
                match allocator.alloc_with(self.me(), &judge, bytes, tag, tag, also) {
                    Ok(_) => break,
                    // A power of two, and less than was asked for.
                    Err(BuddyError::NoRoom { largest, .. }) if largest > 0 && largest < units => {
                        units = largest;
                    }
                    Err(BuddyError::NoRoom { .. }) => {
                        let missing = left * GRANULE;
                        return Err(no_space(format!("the pool lacks {missing} bytes")));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            left -= units;
        }
        Ok(())
    }

    /// Gives back all but the first `keep` extents of an entry. Needs the lock. May die anywhere
    /// and be repeated.
    pub(super) fn shrink(&self, index: usize, keep: usize) -> Result<(), DirectoryError> {
        let entry = &self.entries()[index];
        let (allocator, tag) = (self.allocator()?, entry.tag(index));
        loop {
            let segment = entry.segment();
            let taken = segment.extents.len();
            let Some(last) = segment.extents.last().filter(|_| taken > keep) else {
                return Ok(());
            };
            let count = (taken - 1, segment.ready.min(taken - 1));
            let also = |record: &mut Record<'_>| {
                self.set(record, entry.count_cell(), count_word(count.0, count.1))
            };
            let judge = self.judge();
            match allocator.free_with(self.me(), &judge, last.offset, tag, tag, also) {
                Ok(()) => {}
                // A node misbehaved. What is not this entry's is left alone.
                Err(
                    error @ (BuddyError::NotAChunk { .. }
                    | BuddyError::DoubleFree { .. }
                    | BuddyError::Foreign { .. }),
                ) => {
                    warn!("directory: entry {index} ({:?}): {error}", segment.name);
                    entry.set_count(count.0, count.1);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives back all that an entry has, and frees it. Needs the lock. May die anywhere and be
    /// repeated: until its end, the entry stays what it was.
    pub(super) fn give_back(&self, index: usize) -> Result<(), DirectoryError> {
        self.shrink(index, 0)?;
        crash_point();
        self.entries()[index].set_state(SegmentState::Free);
        crash_point();
        Ok(())
    }

    /// Stores another name into an entry, all or nothing. Needs the lock.
    pub(super) fn store_name(&self, index: usize, name: &str) -> Result<(), DirectoryError> {
        let entry: &SegmentEntry = &self.entries()[index];
        let tag = entry.tag(index);
        let judge = self.judge();
        self.allocator()?.change(self.me(), &judge, tag, |record| {
            for (cell, word) in entry.renamed(name) {
                self.set(record, cell, word)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn set(
        &self,
        record: &mut Record<'_>,
        cell: &std::sync::atomic::AtomicU64,
        value: u64,
    ) -> Result<(), BuddyError> {
        let kernel: &Mapping = self.memory.kernel();
        Ok(record.set(kernel.offset_of(cell)?, value)?)
    }
}
