//! The system section beyond the instances: what the agents of all nodes share.
//!
//! ```text
//! 0x00000  section header
//! 0x00040  directory lock        recoverable, owner = node instance
//! 0x10000  segment directory     512 entries of 512 B
//! 2 MiB    groups                a granule of their own: see [`groups`](crate::groups)
//! 4 MiB    allocator             of the pool, with a redo log for each node: the library's
//! ```
//!
//! A segment is a list of extents, each a chunk of the allocator, whose table names the entry as
//! the chunk's owner ([`SegmentEntry::tag`]). A chunk is taken or freed by one record of the
//! allocator's redo log that changes the entry's list as well: both or none. Everything else is
//! committed with the one store of a state, or a count.

use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::event::wire_enum;
use crate::groups::GroupId;
use crate::id::{InstanceId, MAX_NODES, NodeId};
use crate::layout::{GRANULE, Range, SECTION_HEADER_SIZE};
use crate::socket::Lifetime;
use crate::words::{load_bytes, store_bytes};

/// Entries of the segment directory.
pub const MAX_SEGMENTS: usize = 512;
/// Longest name of a segment, in bytes of UTF-8.
pub const MAX_SEGMENT_NAME: usize = 64;
/// Most extents of a segment.
pub const MAX_EXTENTS: usize = 24;

/// The words of a recoverable lock; the algorithm is the library's.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct LockWords {
    /// [`InstanceId`] of the holder; 0 when free. A dead holder stays here until somebody declares
    /// its work repaired: a dead owner is what "inconsistent" means.
    pub owner: AtomicU64,
    /// [`InstanceId`] of whoever repairs the work of a dead holder; 0 if nobody does. It holds the
    /// lock in the dead holder's place, whose name is therefore never lost.
    pub recoverer: AtomicU64,
    /// Not 0 if somebody may be asleep on the lock. A hint.
    pub waiters: AtomicU32,
    /// Futex word of sleepers; its value means nothing.
    pub wake: AtomicU32,
    _reserved: [AtomicU64; 5],
}

wire_enum! {
    /// The state of an entry of the segment directory.
    SegmentState {
        /// Unused.
        Free = 0 => "free",
        /// Being created by its worker: it gets extents, and they are scrubbed. Or it gives its
        /// extents back. If the worker is dead, whoever comes gives them back.
        Preparing = 1 => "preparing",
        /// In use.
        Live = 2 => "live",
        /// Removed: nobody opens it any more. Nodes that use it let it go, and whoever sees that
        /// none is left gives its extents back.
        Condemned = 3 => "condemned",
    }
}

/// One segment.
#[repr(C, align(512))]
#[derive(Debug)]
pub struct SegmentEntry {
    /// [`SegmentState`] in the low half, how often the entry was used in the high half.
    state: AtomicU64,
    /// How many extents it has in the low half; in the high half, how many of them are ready.
    count: AtomicU64,
    /// The node instance that prepares it, or makes it grow.
    worker: AtomicU64,
    /// User id in the low half, group id in the high half.
    owner: AtomicU64,
    /// Permission bits in the low half, [`Lifetime`] in the high half.
    mode: AtomicU64,
    /// [`GroupId`], or 0.
    group: AtomicU64,
    name_len: AtomicU64,
    name: [AtomicU64; MAX_SEGMENT_NAME / 8],
    /// First granule of the pool in the low half, number of granules in the high half.
    extents: [AtomicU64; MAX_EXTENTS],
    _reserved: [AtomicU64; 9],
    /// One bit a node: that node may have a device or mapping of this segment.
    users: [AtomicU64; MAX_NODES as usize / 64],
}

/// A segment, decoded. All ranges in bytes from the start of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its name, unique among the segments of its group.
    pub name: String,
    /// The group that it belongs to.
    pub group: Option<GroupId>,
    /// How long it stays.
    pub lifetime: Lifetime,
    /// Where it lies, piece after piece.
    pub extents: Vec<Range>,
    /// How many of the extents, from the first, are scrubbed and for everybody.
    pub ready: usize,
    /// The user who created it.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
    /// Permission bits, as for a file. For a segment of no group.
    pub mode: u32,
    /// The node instance that prepares it, or made it grow last.
    pub worker: InstanceId,
}

impl Segment {
    /// Bytes that everybody may use.
    pub fn size(&self) -> u64 {
        let ready = self.extents.iter().take(self.ready);
        ready.fold(0, |sum, extent| sum.saturating_add(extent.size))
    }

    /// Bytes of the pool that it takes.
    pub fn taken(&self) -> u64 {
        let all = self.extents.iter();
        all.fold(0, |sum, extent| sum.saturating_add(extent.size))
    }
}

/// An extent as the entry's word for it.
pub const fn extent_word(extent: Range) -> u64 {
    (extent.offset / GRANULE) & 0xffff_ffff | (extent.size / GRANULE) << 32
}

/// The extent for which a word stands. Both ends fit into 64 bits, whatever the word.
const fn extent_of(word: u64) -> Range {
    Range {
        offset: (word & 0xffff_ffff) * GRANULE,
        size: (word >> 32) * GRANULE,
    }
}

/// The number of extents and of those that are ready, as the entry's word for them.
pub const fn count_word(taken: usize, ready: usize) -> u64 {
    taken as u64 | (ready as u64) << 32
}

impl SegmentEntry {
    /// The entry's state; an unknown number counts as in use, so that nothing is overwritten.
    pub fn state(&self) -> SegmentState {
        // Acquire: pairs with the Release of `set_state`; the fields belong to the state.
        let raw = self.state.load(Ordering::Acquire) as u32;
        SegmentState::from_raw(raw).unwrap_or(SegmentState::Live)
    }

    /// How often the entry was used: which segment of several that had it is meant.
    pub fn uses(&self) -> u32 {
        (self.state.load(Ordering::Acquire) >> 32) as u32
    }

    /// What the allocator calls the owner of the segment's chunks. `index` is the entry's number.
    pub fn tag(&self, index: usize) -> u64 {
        u64::from(self.uses()) << 32 | (index as u64 + 1)
    }

    /// Commits a state. For the holder of the directory lock.
    pub fn set_state(&self, state: SegmentState) {
        let uses = self.state.load(Ordering::Relaxed) & !0xffff_ffff;
        self.state.store(uses | state as u64, Ordering::Release);
    }

    /// Commits how many extents are ready. For the holder of the directory lock.
    pub fn set_count(&self, taken: usize, ready: usize) {
        self.count
            .store(count_word(taken, ready), Ordering::Release);
    }

    /// Says who prepares the entry or makes it grow. For the holder of the directory lock.
    pub fn set_worker(&self, worker: InstanceId) {
        self.worker.store(worker.word(), Ordering::Release);
    }

    /// The entry's fields. Under the directory lock they are exact; without it, a hint.
    pub fn segment(&self) -> Segment {
        let mut bytes = [0u8; MAX_SEGMENT_NAME];
        load_bytes(&self.name, &mut bytes);
        let len = (self.name_len.load(Ordering::Relaxed) as usize).min(MAX_SEGMENT_NAME);
        // Acquire: pairs with the Release of `set_count`; the extents belong to the count.
        let count = self.count.load(Ordering::Acquire);
        let taken = (count as u32 as usize).min(MAX_EXTENTS);
        let extents = self.extents[..taken].iter();
        let extents = extents.map(|cell| extent_of(cell.load(Ordering::Relaxed)));
        let owner = self.owner.load(Ordering::Relaxed);
        let mode = self.mode.load(Ordering::Relaxed);
        let group = self.group.load(Ordering::Relaxed);
        Segment {
            name: String::from_utf8_lossy(&bytes[..len]).into_owned(),
            group: (group != 0).then(|| GroupId::from_word(group)),
            lifetime: match mode >> 32 {
                0 => Lifetime::Kept,
                _ => Lifetime::Members,
            },
            extents: extents.collect(),
            ready: ((count >> 32) as usize).min(taken),
            uid: owner as u32,
            gid: (owner >> 32) as u32,
            mode: mode as u32,
            worker: InstanceId::from_word(self.worker.load(Ordering::Relaxed)),
        }
    }

    /// The segment that has the entry, without the lock: `None` if it is not in use, or changed
    /// while it was read.
    pub fn snapshot(&self) -> Option<Segment> {
        let before = self.state.load(Ordering::Acquire);
        let name = self.name_len.load(Ordering::Acquire);
        let segment = (before as u32 == SegmentState::Live as u32).then(|| self.segment())?;
        // Acquire fence: if a field above is of a later use, the load below sees that one's
        // state (Boehm, MSPC 2012).
        fence(Ordering::Acquire);
        let after = self.state.load(Ordering::Relaxed);
        (before == after && name == self.name_len.load(Ordering::Relaxed)).then_some(segment)
    }

    /// Where in the pool the byte at `offset` of the segment lies. Without the directory lock a
    /// hint: nobody may store there for it.
    pub fn place(&self, offset: u64) -> Option<u64> {
        if self.state() == SegmentState::Free {
            return None;
        }
        let taken = self.count.load(Ordering::Acquire) as u32 as usize;
        let mut left = offset;
        for cell in &self.extents[..taken.min(MAX_EXTENTS)] {
            let extent = extent_of(cell.load(Ordering::Relaxed));
            match left.checked_sub(extent.size) {
                Some(rest) => left = rest,
                None => return Some(extent.offset + left),
            }
        }
        None
    }

    /// Begins a use of a free entry, without extents. For the holder of the directory lock. The
    /// one store of the state commits it. `step` is called between any two stores, for tests.
    ///
    /// Names longer than [`MAX_SEGMENT_NAME`] bytes are the caller's error and are cut. Extents
    /// and the number of those that are ready are not looked at.
    pub fn begin(&self, segment: &Segment, mut step: impl FnMut()) {
        let name = &segment.name.as_bytes()[..segment.name.len().min(MAX_SEGMENT_NAME)];
        let owner = u64::from(segment.uid) | u64::from(segment.gid) << 32;
        let mode = u64::from(segment.mode) | (segment.lifetime as u64) << 32;
        let group = segment.group.map_or(0, GroupId::word);
        let fields = [
            (&self.count, 0),
            (&self.worker, segment.worker.word()),
            (&self.owner, owner),
            (&self.mode, mode),
            (&self.group, group),
            (&self.name_len, name.len() as u64),
        ];
        let users = self.users.iter().map(|cell| (cell, 0));
        // Of a free entry: nobody reads these before the state says so.
        for (cell, value) in fields.into_iter().chain(users) {
            step();
            cell.store(value, Ordering::Relaxed);
        }
        store_bytes(&self.name, name);
        step();
        let uses = (self.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        let state = uses << 32 | SegmentState::Preparing as u64;
        self.state.store(state, Ordering::Release);
        step();
    }

    /// The word with the numbers of extents ([`count_word`]), for a record of the allocator.
    pub fn count_cell(&self) -> &AtomicU64 {
        &self.count
    }

    /// The word of an extent ([`extent_word`]), for a record of the allocator.
    pub fn extent_cell(&self, index: usize) -> Option<&AtomicU64> {
        self.extents.get(index)
    }

    /// The words of a name, and what a record must store to them for another one.
    pub fn renamed(&self, name: &str) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let name = &name.as_bytes()[..name.len().min(MAX_SEGMENT_NAME)];
        let words = self.name.iter().enumerate().map(|(index, cell)| {
            let mut word = [0; 8];
            let rest = name.get(index * 8..).unwrap_or_default();
            let len = rest.len().min(8);
            word[..len].copy_from_slice(&rest[..len]);
            (cell, u64::from_le_bytes(word))
        });
        words.chain([(&self.name_len, name.len() as u64)])
    }

    /// Records that a node may have the segment mapped. For the holder of the directory lock.
    pub fn add_user(&self, node: NodeId) {
        self.users[node.index() / 64].fetch_or(1 << (node.index() % 64), Ordering::AcqRel);
    }

    /// Records that a node has let the segment go.
    pub fn remove_user(&self, node: NodeId) {
        self.users[node.index() / 64].fetch_and(!(1 << (node.index() % 64)), Ordering::AcqRel);
    }

    /// Whether a node may have the segment mapped.
    pub fn is_user(&self, node: NodeId) -> bool {
        self.users[node.index() / 64].load(Ordering::Acquire) & (1 << (node.index() % 64)) != 0
    }

    /// The nodes that may have the segment mapped.
    pub fn users(&self) -> impl Iterator<Item = NodeId> + '_ {
        (1..=MAX_NODES)
            .filter_map(NodeId::new)
            .filter(|node| self.is_user(*node))
    }
}

/// The system section, beyond the instances, as it lies in memory.
#[repr(C)]
#[derive(Debug)]
pub struct SystemSection {
    header: [AtomicU64; SECTION_HEADER_SIZE / 8],
    directory_lock: LockWords,
    _gap: [AtomicU64; (0x10000 - 128) / 8],
    segments: [SegmentEntry; MAX_SEGMENTS],
}

const _: () = {
    assert!(size_of::<LockWords>() == 64);
    assert!(size_of::<SegmentEntry>() == 512);
    assert!(core::mem::offset_of!(SystemSection, directory_lock) == 64);
    assert!(core::mem::offset_of!(SystemSection, segments) == 0x10000);
    assert!(size_of::<SystemSection>() as u64 <= crate::layout::GRANULE);
};

impl SystemSection {
    /// Views mapped memory as the system section beyond the instances.
    ///
    /// # Safety
    /// `base` points to at least one granule that stays mapped for `'a`, is page aligned, and
    /// this process accesses those bytes through this crate's atomics only.
    pub unsafe fn from_ptr<'a>(base: *const u8) -> &'a Self {
        // SAFETY: the caller vouches for size, alignment and life time; every field is an atomic.
        unsafe { &*base.cast::<Self>() }
    }

    /// The words of the section header.
    pub fn header_words(&self) -> &[AtomicU64] {
        &self.header
    }

    /// The lock over the segment directory and the thread instances.
    pub fn directory_lock(&self) -> &LockWords {
        &self.directory_lock
    }

    /// The segment directory.
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.segments
    }
}
