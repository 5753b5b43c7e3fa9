//! A heap in a segment, shared by threads of any number of nodes, that no death corrupts.
//!
//! Whoever uses the heap joins it as a [`Participant`] and gets one of its *places*: a lock that
//! it holds for life, a line that says what it is doing, a log, and a few private slots. Blocks
//! are never handed out as addresses that a death could lose, but moved into a *slot*, an aligned
//! word of shared memory that owns the block: [`Participant::alloc_into`] and
//! [`Participant::free_from`] change slot and block together, whatever happens in between.
//!
//! ```text
//!   participant 3's place             span table                   spans (64 KiB)
//!   lock: held by 17.2                slab of 64 B, owner 3 ------> [block words][b][b][b][b]...
//!   intent: alloc block b, slot s     slab of 4 KiB, owner 1 -----> [    b    ][    b    ]...
//!   holds, limbo, log                 run of 4 spans -------------> [           b           ]
//! ```
//!
//! * **Small blocks** (up to 32 KiB) lie in *slabs*: spans of blocks of one size. A slab belongs
//!   to one participant, and only that one hands out its blocks, so allocating needs no atomic
//!   read-modify-write. Each block has a state word that counts: even is free, odd is live.
//!   Anybody may free a block, by one compare-and-swap of that word if the slab is another's.
//! * **Large blocks** are runs of spans, up to half a segment. They change hands by one record of
//!   the participant's [`Log`](crate::log::Log), under the heap's one lock.
//! * **After a death** anybody who comes by ([`Heap::recover`], [`Heap::join`], or
//!   [`Participant::lock`] on the lock that the dead one held) settles its place: completes or
//!   undoes what it was doing, by its log and the intent line, and remembers the outcome
//!   ([`Heap::outcome_of`]). Nobody else stops for that. Its slabs are adopted by others.
//!
//! What a process keeps in its own memory (which of its slabs have free blocks) is a hint that is
//! rebuilt from the state words; it dies with it, and nothing depends on it.
//!
//! # Which operations the last one was
//! [`Participant::tag`] numbers the operations to come. After a death [`Heap::outcome_of`] tells
//! the kind, the tag and the result of the dead one's last operation and whether it happened: the
//! dead one's successor learns it, and so does any survivor, without waiting for the successor.
//!
//! # Locks
//! The heap's lock is taken before the lock of another's place, and nobody waits for it with such
//! a place in hand: so those who settle the dead never wait for each other in a circle.
//!
//! # Sources
//! Slabs with an owner and remote frees: Hoard (ASPLOS 2000) and mimalloc (APLAS 2019). Recovery
//! by versions and a one-word intent: cxlalloc (ASPLOS '26). Slots that own blocks, so that a
//! block never hangs in the air: the `alloc`-into-a-pointer of PMDK's `pmemobj`. Settlement by
//! survivors and the rules of the locks are this library's own.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::heap::{Heap, HeapSpec};
//! use lupin::shm::{Access, Mapping};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(4 << 20)?;
//! let memory = Mapping::new(&file, 0, 4 << 20, Access::ReadWrite)?;
//! let me = InstanceId::new(1, 1);
//! let judge = |instance: InstanceId| instance == me; // `pod.threads_alive()` in a pod
//!
//! let heap = Heap::create(&memory, &HeapSpec::default(), me, &judge)?;
//! let mut participant = heap.join(me, judge)?;
//! let root = heap.root(0)?;
//! let block = participant.alloc_into(root, 100)?;
//! memory.copy_in(block, b"found again by whoever opens the heap")?;
//! participant.free_from(root)?;
//! participant.leave()?;
//! assert_eq!(heap.audit()?.live_blocks, 0);
//! # Ok(())
//! # }
//! ```

mod audit;
mod class;
mod create;
mod error;
mod intent;
mod large;
pub(crate) mod layout;
mod participant;
mod refill;
mod settle;
mod slab;
mod spans;

use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::buddy::Buddy;
use crate::log::Log;
use crate::mem::{load64, store64};
use crate::shm::Mapping;
use class::geometry;
use layout::{
    Header, LOG_AT, LOG_ENTRIES, PLACE, PLACES_AT, Place, Places, SpanEntry, SpanWord, Use,
};

pub use audit::HeapAudit;
pub use class::{LARGEST_SMALL, SPAN};
pub use create::HeapSpec;
pub use error::HeapError;
pub use layout::{HOLDS, LIMBO, MAX_PARTICIPANTS, ROOTS};
pub use participant::Participant;

/// Kind of a record or an outcome: an allocation. Its result is the block.
pub const KIND_ALLOC: u32 = 0xffff_0001;
/// Kind of a record or an outcome: a free. Its result is the block that was freed.
pub const KIND_FREE: u32 = 0xffff_0002;
/// What the heap does on the way to an operation or after it; its outcome is nobody's.
const KIND_CHORE: u32 = 0xffff_0003;
/// Kinds from here on are the heap's.
const KINDS_RESERVED: u32 = 0xffff_0000;

/// A heap, as a view of the memory in which it lies. Copies are the same heap.
#[derive(Clone, Copy)]
pub struct Heap<'m> {
    memory: &'m Mapping,
    header: &'m Header,
    words: &'m [AtomicU64],
    table: &'m [SpanEntry],
    places: Places,
    buddy: Buddy<'m>,
}

/// A block, found by its offset.
#[derive(Clone, Copy)]
struct Block<'m> {
    /// Its state word.
    word: &'m AtomicU64,
    at: u64,
    class: usize,
    owner: u32,
    span: SpanWord,
}

impl Block<'_> {
    /// Checks that the slab belongs to the participant of this place.
    fn must_belong_to(&self, place: u32) -> Result<(), HeapError> {
        match self.owner == place {
            true => Ok(()),
            false => Err(HeapError::Damaged {
                what: "an intent that is about another's slab",
                at: self.at,
            }),
        }
    }
}

impl<'m> Heap<'m> {
    fn view(memory: &'m Mapping, places: Places, buddy: Buddy<'m>) -> Result<Self, HeapError> {
        Ok(Self {
            memory,
            header: memory.get(0)?,
            words: memory.get_slice(places.words, places.spans.into())?,
            table: memory.get_slice(places.table, places.spans.into())?,
            places,
            buddy,
        })
    }

    /// The memory in which the heap lies.
    pub fn memory(&self) -> &'m Mapping {
        self.memory
    }

    /// The offset of a root slot. Roots belong to the application, which agrees with itself on
    /// who changes them, under which lock.
    ///
    /// # Errors
    /// [`HeapError::NoSuch`] from [`ROOTS`] on.
    pub fn root(&self, index: u32) -> Result<u64, HeapError> {
        if index >= ROOTS {
            return Err(no_such("root", index, ROOTS));
        }
        Ok(self.memory.offset_of(&self.header.roots[index as usize])?)
    }

    /// Places for participants.
    pub fn participants(&self) -> u32 {
        self.places.participants
    }

    /// Bytes of the largest block that can be allocated from a heap of this size.
    pub fn largest_block(&self) -> u64 {
        SPAN << self.places.spans.ilog2()
    }

    pub(crate) fn header(&self) -> &'m Header {
        self.header
    }

    pub(crate) fn place(&self, index: u32) -> Result<&'m Place, HeapError> {
        if index >= self.places.participants {
            return Err(no_such("place", index, self.places.participants));
        }
        Ok(self.memory.get(self.place_at(index))?)
    }

    fn place_at(&self, index: u32) -> u64 {
        PLACES_AT + u64::from(index) * PLACE
    }

    fn hold_at(&self, index: u32, n: usize) -> u64 {
        self.place_at(index) + (offset_of!(Place, holds) + n * 8) as u64
    }

    fn log_of(&self, index: u32) -> Result<Log<'m>, HeapError> {
        let at = self.place_at(index) + LOG_AT;
        Ok(Log::new(self.memory, at, LOG_ENTRIES)?)
    }

    fn span_start(&self, span: u32) -> u64 {
        self.places.first_span + u64::from(span) * SPAN
    }

    /// The span in which an offset lies.
    fn span_of(&self, at: u64) -> Result<(&'m SpanEntry, u32), HeapError> {
        let foreign = HeapError::Foreign { block: at };
        let Some(within) = at.checked_sub(self.places.first_span) else {
            return Err(foreign);
        };
        match self.table.get((within / SPAN) as usize) {
            Some(entry) => Ok((entry, (within / SPAN) as u32)),
            None => Err(foreign),
        }
    }

    /// The small block at an offset.
    fn block(&self, at: u64) -> Result<Block<'m>, HeapError> {
        let (entry, span) = self.span_of(at)?;
        // Acquire: whoever made the span a slab has set the words of its blocks.
        self.block_as(at, entry, span, self.span_word(span))
    }

    /// The small block at an offset in a span of the given use.
    fn block_as(
        &self,
        at: u64,
        entry: &'m SpanEntry,
        span: u32,
        word: SpanWord,
    ) -> Result<Block<'m>, HeapError> {
        let foreign = HeapError::Foreign { block: at };
        let Some(Use::Slab { class, owner }) = word.usage() else {
            return Err(foreign);
        };
        let within = (at - self.span_start(span)) as u32;
        let Some(index) = geometry(class).and_then(|geometry| geometry.index_of(within)) else {
            return Err(foreign);
        };
        Ok(Block {
            word: &self.words(entry, span, class)?[index as usize],
            at,
            class,
            owner,
            span: word,
        })
    }

    /// The state words of the blocks of a slab.
    fn words(
        &self,
        entry: &'m SpanEntry,
        span: u32,
        class: usize,
    ) -> Result<&'m [AtomicU64], HeapError> {
        let Some(geometry) = geometry(class) else {
            return Err(no_such("size class", class as u32, class::CLASSES as u32));
        };
        let count = geometry.count as usize;
        match geometry.size >= class::OUTSIDE {
            true => Ok(&entry.blocks[..count]),
            false => Ok(self.memory.get_slice(self.span_start(span), count as u64)?),
        }
    }

    /// Tells the owner of a slab that somebody else freed a block of it.
    fn tell_owner(&self, at: u64) -> Result<(), HeapError> {
        let (entry, span) = self.span_of(at)?;
        raise(&entry.remote.word);
        // Asked again: the slab may have been adopted meanwhile.
        if let Some(Use::Slab { owner, .. }) = self.span_word(span).usage()
            && let Ok(place) = self.place(owner)
        {
            raise(&place.remote.word);
        }
        Ok(())
    }
}

/// Raises a hint, if nobody has.
///
/// SeqCst: the free before it and this look at the hint, against the owner's clearing of the hint
/// and its look at the blocks. One of the two sees the other; and should both miss, the block is
/// found when the owner is about to run out of memory.
fn raise(hint: &AtomicU64) {
    if load64(hint, Ordering::SeqCst) == 0 {
        store64(hint, 1, Ordering::SeqCst);
    }
}

fn no_such(what: &'static str, index: u32, count: u32) -> HeapError {
    HeapError::NoSuch {
        what,
        index: index.into(),
        count: count.into(),
    }
}

impl fmt::Debug for Heap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Heap");
        out.field("participants", &self.places.participants);
        out.field("spans", &self.places.spans)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "crash_test.rs"]
mod crash_test;
#[cfg(test)]
#[path = "growth_test.rs"]
mod growth_test;
#[cfg(test)]
#[path = "heap_test.rs"]
mod heap_test;
