//! The system section beyond the instances: what the agents of all nodes share.
//!
//! ```text
//! 0x00000  section header
//! 0x00040  directory lock        recoverable, owner = node instance
//! 0x10000  segment directory     512 entries of 512 B
//! 2 MiB    groups                a granule of their own: see [`groups`](crate::groups)
//! ```
//!
//! The directory is its own allocator: the extents of its used entries are what is taken, so
//! there is no second structure that a crash could leave out of step. A writer holds the lock,
//! fills an entry, and commits it with the one store of its state.

use alloc::string::String;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::event::wire_enum;
use crate::id::{InstanceId, MAX_NODES, NodeId};
use crate::layout::SECTION_HEADER_SIZE;
use crate::words::{load_bytes, store_bytes};

/// Entries of the segment directory.
pub const MAX_SEGMENTS: usize = 512;
/// Longest name of a segment, in bytes of UTF-8.
pub const MAX_SEGMENT_NAME: usize = 64;

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
        /// Being created: its extent is taken, its contents are being scrubbed. If its creator
        /// is dead, the next holder of the directory lock frees it.
        Preparing = 1 => "preparing",
        /// In use.
        Live = 2 => "live",
    }
}

/// One segment.
#[repr(C, align(512))]
#[derive(Debug)]
pub struct SegmentEntry {
    state: AtomicU32,
    name_len: AtomicU32,
    name: [AtomicU64; MAX_SEGMENT_NAME / 8],
    offset: AtomicU64,
    size: AtomicU64,
    uid: AtomicU32,
    gid: AtomicU32,
    mode: AtomicU32,
    _pad: AtomicU32,
    creator: AtomicU64,
    /// One bit a node: that node may have a device or mapping of this segment.
    users: [AtomicU64; MAX_NODES as usize / 64],
}

/// A segment, decoded. All sizes in bytes, the offset from the start of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its name, unique in the pod.
    pub name: String,
    /// Where it begins in the pool.
    pub offset: u64,
    /// How long it is.
    pub size: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, as for a file.
    pub mode: u32,
    /// The node instance that created it.
    pub creator: InstanceId,
}

impl SegmentEntry {
    /// The entry's state; an unknown number counts as in use, so that nothing is overwritten.
    pub fn state(&self) -> SegmentState {
        // Acquire: pairs with the Release of `set_state`; the fields belong to the state.
        SegmentState::from_raw(self.state.load(Ordering::Acquire)).unwrap_or(SegmentState::Live)
    }

    /// Commits a state. For the holder of the directory lock.
    pub fn set_state(&self, state: SegmentState) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// The entry's fields. Under the directory lock they are exact; without it, a hint.
    pub fn segment(&self) -> Segment {
        let mut bytes = [0u8; MAX_SEGMENT_NAME];
        load_bytes(&self.name, &mut bytes);
        let len = (self.name_len.load(Ordering::Relaxed) as usize).min(MAX_SEGMENT_NAME);
        Segment {
            name: String::from_utf8_lossy(&bytes[..len]).into_owned(),
            offset: self.offset.load(Ordering::Relaxed),
            size: self.size.load(Ordering::Relaxed),
            uid: self.uid.load(Ordering::Relaxed),
            gid: self.gid.load(Ordering::Relaxed),
            mode: self.mode.load(Ordering::Relaxed),
            creator: InstanceId::from_word(self.creator.load(Ordering::Relaxed)),
        }
    }

    /// Fills the fields of a free entry. For the holder of the directory lock, before
    /// [`set_state`](Self::set_state).
    ///
    /// Names longer than [`MAX_SEGMENT_NAME`] bytes are the caller's error and are cut.
    pub fn fill(&self, segment: &Segment) {
        let name = &segment.name.as_bytes()[..segment.name.len().min(MAX_SEGMENT_NAME)];
        store_bytes(&self.name, name);
        self.name_len.store(name.len() as u32, Ordering::Relaxed);
        self.offset.store(segment.offset, Ordering::Relaxed);
        self.size.store(segment.size, Ordering::Relaxed);
        self.uid.store(segment.uid, Ordering::Relaxed);
        self.gid.store(segment.gid, Ordering::Relaxed);
        self.mode.store(segment.mode, Ordering::Relaxed);
        self.creator
            .store(segment.creator.word(), Ordering::Relaxed);
        for word in &self.users {
            word.store(0, Ordering::Relaxed);
        }
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
