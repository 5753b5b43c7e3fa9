//! How a heap lies in its segment.
//!
//! ```text
//! 0x0000  header: identity, seal, the heap's lock, the epoch, 64 roots
//! 0x1000  places, one a participant, 8 KiB each
//!         span words, 8 bytes a span
//!         span table, an entry of 576 bytes a span
//!         metadata of the allocator of spans
//!         spans, 64 KiB each
//! ```

use core::mem::offset_of;
use core::sync::atomic::AtomicU64;

use lupin_abi::system::LockWords;

use super::class::{SPAN, TABLE_WORDS};
use super::error::HeapError;
use crate::buddy::{BuddySpec, metadata_size};
use crate::log::log_size;
use crate::pod_safe::{PodSafe, PodShared};

/// First word of a heap: `LUPINHEA` in little-endian bytes.
pub(super) const HEAP_MAGIC: u64 = u64::from_le_bytes(*b"LUPINHEA");
/// Version of this layout.
pub(super) const HEAP_VERSION: u64 = 1;
/// Root slots of a heap.
pub const ROOTS: u32 = 64;
/// Private slots of a participant.
pub const HOLDS: usize = 16;
/// Blocks that a participant may have retired and not yet freed.
pub const LIMBO: usize = 128;
/// Lives of a place whose last operation is remembered.
pub(super) const LIVES: usize = 8;
/// Most participants of a heap.
pub const MAX_PARTICIPANTS: u32 = 4096;
/// Most spans of a heap.
pub(super) const MAX_SPANS: u64 = 1 << 24;
/// Words that one record of a participant's log may change.
pub const LOG_ENTRIES: u32 = 192;

/// Bytes of a place.
pub(super) const PLACE: u64 = 8192;
/// Where the log of a place lies, in bytes from its start.
pub(super) const LOG_AT: u64 = 4096;
/// Where the places lie.
pub(super) const PLACES_AT: u64 = 4096;

/// The constant fields of a heap, as words: version, participants, spans, bytes.
pub(super) const FIELDS: usize = 4;

/// A word that has a cache line of its own.
#[repr(C, align(64))]
pub(crate) struct Line {
    pub(crate) word: AtomicU64,
    _pad: [AtomicU64; 7],
}

/// The start of a heap.
#[repr(C, align(64))]
pub(crate) struct Header {
    pub(super) magic: AtomicU64,
    /// Who creates the heap, or did.
    pub(super) creator: AtomicU64,
    /// 0 until the heap is complete; then the checksum of the fields.
    pub(super) seal: AtomicU64,
    pub(super) fields: [AtomicU64; FIELDS],
    _gap: AtomicU64,
    /// Protects the allocator of spans, and who holds which place.
    pub(super) lock: LockWords,
    /// The global epoch; its rule is in [`crate::epoch`].
    pub(crate) epoch: Line,
    /// Raised whenever a place becomes vacant: there may be slabs to adopt.
    pub(super) vacated: Line,
    _gap2: [Line; 3],
    pub(super) roots: [AtomicU64; ROOTS as usize],
}

/// What a participant is about to do to one block: a log of one operation.
#[repr(C, align(64))]
pub(super) struct IntentLine {
    /// Kind in the low three bits; above them the state word of the block before the operation,
    /// or, once it is over, the block.
    pub(super) op: AtomicU64,
    pub(super) slot: AtomicU64,
    pub(super) block: AtomicU64,
    /// The word of the span that the block lies in; for blocks of others only.
    pub(super) span: AtomicU64,
    /// The application's number of the operation.
    pub(super) tag: AtomicU64,
    _pad: [AtomicU64; 3],
}

/// How the last operation of a former life ended.
#[repr(C, align(64))]
pub(super) struct OutcomeLine {
    /// Whose; stored last.
    pub(super) owner: AtomicU64,
    pub(super) seq: AtomicU64,
    /// Kind in the low half; whether it happened in bit 32.
    pub(super) kind: AtomicU64,
    pub(super) tag: AtomicU64,
    pub(super) result: AtomicU64,
    _pad: [AtomicU64; 3],
}

/// A retired block.
#[repr(C)]
pub(crate) struct LimboEntry {
    /// The slot that owns the block.
    pub(crate) block: AtomicU64,
    /// When it was out of sight of new readers, by [`crate::epoch`]; 0 if that is not known yet.
    pub(crate) stamp: AtomicU64,
}

/// What a participant keeps in the heap.
#[repr(C, align(64))]
pub(crate) struct Place {
    /// Held for life. A dead owner is a participant whose work is not yet settled.
    pub(crate) lock: LockWords,
    /// The epoch that the participant has pinned; see [`crate::epoch`].
    pub(crate) epoch: Line,
    pub(super) intent: IntentLine,
    /// The instance that takes part here, or the last one that did.
    pub(super) life: AtomicU64,
    /// How many lives there were.
    pub(super) lives: AtomicU64,
    _gap: [AtomicU64; 6],
    /// Not 0 if others may have freed blocks of this participant's slabs. A hint.
    pub(super) remote: Line,
    /// Private slots.
    pub(super) holds: [AtomicU64; HOLDS],
    pub(super) outcomes: [OutcomeLine; LIVES],
    /// The outcome of the last operation, if the log has gone on to a chore.
    pub(super) last: OutcomeLine,
    /// As `intent`, for frees that are not the application's operations.
    pub(super) chore: IntentLine,
    pub(crate) limbo: [LimboEntry; LIMBO],
}

/// What belongs to a span, besides the [`SpanWord`] that says what it is used for.
#[repr(C, align(64))]
pub(super) struct SpanEntry {
    /// Not 0 if others than the owner may have freed blocks here. A hint.
    pub(super) remote: Line,
    /// The words of the blocks, of classes that keep them here.
    pub(super) blocks: [AtomicU64; TABLE_WORDS],
}

const _: () = {
    assert!(offset_of!(Header, lock) == 0x40);
    assert!(offset_of!(Header, epoch) == 0x80);
    assert!(offset_of!(Header, roots) == 0x1c0);
    assert!(size_of::<Header>() as u64 <= PLACES_AT);
    assert!(offset_of!(Place, intent) == 0x80);
    assert!(offset_of!(Place, remote) == 0x100);
    assert!(offset_of!(Place, holds) == 0x140);
    assert!(offset_of!(Place, outcomes) == 0x1c0);
    assert!(offset_of!(Place, limbo) == 0x440);
    assert!(size_of::<Place>() as u64 <= LOG_AT);
    assert!(LOG_AT + log_size(LOG_ENTRIES) <= PLACE);
    assert!(size_of::<SpanEntry>() == 576);
};

/// Both promises for structs of atomics.
macro_rules! pod {
    ($($type:ty),*) => {$(
        // SAFETY: `repr(C)` of atomics, without padding that is ever read.
        unsafe impl PodSafe for $type {}
        // SAFETY: all fields are atomics.
        unsafe impl PodShared for $type {}
    )*};
}
pod!(Header, Place, SpanEntry);

/// What a span is used for.
///
/// `kind:2 | class or log2 of the run's spans:6 | owner:16 | version:40`; a free span is of kind
/// 0. The version is raised at each change of use, so that a word of an earlier use is never
/// taken for the current one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SpanWord(pub(super) u64);

/// The uses of a span.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    /// None, or the inside of a run.
    Free,
    /// Blocks of one class, handed out by one participant.
    Slab { class: usize, owner: u32 },
    /// The first of a run of `1 << order` spans that is one block.
    Run { order: u32 },
}

impl SpanWord {
    const OWNER: u64 = 0xffff << 8;

    /// The use; `None` for a word that cannot be.
    #[inline]
    pub(super) fn usage(self) -> Option<Use> {
        let (detail, owner) = (self.0 >> 2 & 63, self.0 >> 8 & 0xffff);
        match self.0 & 3 {
            0 => Some(Use::Free),
            1 => Some(Use::Slab {
                class: detail as usize,
                owner: owner as u32,
            }),
            2 => Some(Use::Run {
                order: detail as u32,
            }),
            _ => None,
        }
    }

    /// The word after this one, for a new use.
    pub(super) fn next(self, usage: Use) -> Self {
        let version = (self.0 >> 24).wrapping_add(1) << 24;
        Self(
            version
                | match usage {
                    Use::Free => 0,
                    Use::Slab { class, owner } => {
                        1 | (class as u64 & 63) << 2 | (u64::from(owner) & 0xffff) << 8
                    }
                    Use::Run { order } => 2 | u64::from(order & 63) << 2,
                },
        )
    }

    /// The same use by another participant.
    pub(super) fn with_owner(self, owner: u32) -> Self {
        Self(self.0 & !Self::OWNER | u64::from(owner) << 8)
    }

    /// Whether both are the same use, whoever owns it.
    #[inline]
    pub(super) fn is_same_use(self, other: Self) -> bool {
        self.0 & !Self::OWNER == other.0 & !Self::OWNER
    }
}

/// Where the parts of a heap lie, in bytes from the start of the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) participants: u32,
    pub(super) spans: u32,
    pub(super) words: u64,
    pub(super) table: u64,
    pub(super) buddy: u64,
    pub(super) first_span: u64,
}

impl Places {
    /// The layout of a heap that fills `bytes` bytes.
    pub(super) fn fit(participants: u32, bytes: u64) -> Result<Self, HeapError> {
        if participants == 0 || participants > MAX_PARTICIPANTS {
            return Err(HeapError::Spec {
                what: "number of participants",
                value: participants.into(),
                allowed: "1..=4096",
            });
        }
        let smallest = Self::of(participants, 1);
        if smallest.end() > bytes {
            return Err(HeapError::TooSmall {
                needed: smallest.end(),
                available: bytes,
            });
        }
        let most = (bytes - smallest.words) / (SPAN + size_of::<SpanEntry>() as u64);
        let mut spans = most.min(MAX_SPANS) as u32;
        // The metadata and the alignment of the spans cost some more.
        while spans > 1 && Self::of(participants, spans).end() > bytes {
            spans -= 1;
        }
        Ok(Self::of(participants, spans))
    }

    /// The layout for given numbers, both in their ranges.
    pub(super) fn of(participants: u32, spans: u32) -> Self {
        let words = PLACES_AT + u64::from(participants) * PLACE;
        let table = (words + u64::from(spans) * 8).next_multiple_of(64);
        let buddy = table + u64::from(spans) * size_of::<SpanEntry>() as u64;
        let first_span = buddy + metadata_size(&buddy_spec(spans));
        Self {
            participants,
            spans,
            words,
            table,
            buddy,
            first_span: first_span.next_multiple_of(4096),
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.first_span + u64::from(self.spans) * SPAN
    }
}

/// What the allocator of spans hands out.
pub(super) const fn buddy_spec(spans: u32) -> BuddySpec {
    BuddySpec {
        units: spans,
        unit: SPAN,
    }
}
