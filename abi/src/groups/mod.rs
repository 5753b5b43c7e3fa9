//! Control groups (CxlCG): which groups there are, who is a member, and what happened to whom.
//!
//! One granule of the system section, after the segment directory's. Agents alone map it.
//!
//! ```text
//! 0x000000  lock               recoverable, owner = node instance
//! 0x000040  intent             the stores of the one change that is under way
//! 0x001000  head               position of the newest notification
//! 0x002000  nodes              1024 words: the life of each node that the groups believe in
//! 0x004000  groups             512 entries of 512 B
//! 0x044000  members            8192 entries of 64 B
//! 0x100000  notifications      ring of 16384 slots of 64 B
//! ```
//!
//! # Crashes
//!
//! Every change is a list of stores ([`Change`]). Under the lock they are written into the intent,
//! committed with the one store of their number, carried out, and the intent is cleared
//! ([`GroupSection::commit`]). Whoever finds a committed intent carries it out again
//! ([`GroupSection::redo`]): the stores are constants, so that doing them twice is doing them once. A
//! member's new state and the notification that tells of it belong to one change: both happen or
//! none.
//!
//! Readers take no lock. A slot of the ring is guarded by its position, as in
//! [`fabric`](crate::fabric); each group numbers its own notifications, so that a reader knows by
//! the numbers whether it has lost any.

mod change;
mod entry;
mod notice;
mod stores;

use core::sync::atomic::{AtomicU64, Ordering, fence};

pub use change::Change;
pub use entry::{
    Group, GroupEntry, HASH_SIZE, MAX_GROUP_NAME, MAX_RULES, MemberEntry, MemberState, Row,
    SALT_SIZE,
};
pub use notice::{
    Admission, End, GroupId, GroupInfo, GroupReply, GroupRequest, Leftover, Member, MemberInfo,
    Notification, Secret, What,
};
pub use stores::{Intent, MAX_STORES};

use crate::id::{InstanceId, MAX_NODES, NodeId};
use crate::layout::GRANULE;
use crate::system::LockWords;

/// Entries of the group table.
pub const MAX_GROUPS: usize = 512;
/// Entries of the member table.
pub const MAX_MEMBERS: usize = 8192;
/// Slots of the ring of notifications. A reader that falls this far behind learns that it did.
pub const NOTICE_SLOTS: usize = 16384;

const TABLES_AT: usize = 0x1000;

/// One slot of the ring, guarded by its position.
#[repr(C, align(64))]
#[derive(Debug)]
struct Slot {
    /// 0 while it is being written.
    position: AtomicU64,
    group: AtomicU64,
    words: [AtomicU64; notice::WORDS],
}

/// What a change may store to: words only, so that a store is named by the number of its word.
#[repr(C)]
#[derive(Debug)]
struct Tables {
    head: AtomicU64,
    _gap: [AtomicU64; 0x1000 / 8 - 1],
    nodes: [AtomicU64; MAX_NODES as usize],
    groups: [GroupEntry; MAX_GROUPS],
    members: [MemberEntry; MAX_MEMBERS],
    _gap2: [AtomicU64; (0x10_0000 - 0xc_4000) / 8],
    ring: [Slot; NOTICE_SLOTS],
}

/// The groups as they lie in memory.
#[repr(C)]
#[derive(Debug)]
pub struct GroupSection {
    lock: LockWords,
    intent: Intent,
    tables: Tables,
}

const WORDS: usize = size_of::<Tables>() / 8;

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<GroupEntry>() == 512);
    assert!(size_of::<MemberEntry>() == 64);
    assert!(size_of::<Slot>() == 64);
    assert!(offset_of!(GroupSection, intent) == 0x40);
    assert!(offset_of!(GroupSection, tables) == TABLES_AT);
    assert!(TABLES_AT + offset_of!(Tables, nodes) == 0x2000);
    assert!(TABLES_AT + offset_of!(Tables, groups) == 0x4000);
    assert!(TABLES_AT + offset_of!(Tables, members) == 0x4_4000);
    assert!(TABLES_AT + offset_of!(Tables, ring) == 0x10_0000);
    assert!(size_of::<GroupSection>() as u64 == GRANULE);
};

/// What a reader finds at a position of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoticeRead {
    /// The notification, and whose it is.
    Notice(GroupId, Notification),
    /// A notification of another version, which the attach check excludes. To be skipped.
    Unknown,
    /// Nothing is there yet, or its writer is not done. Look again later.
    NotYet,
    /// The position was overwritten.
    Lost {
        /// The oldest position that still holds a notification.
        oldest: u64,
    },
}

impl GroupSection {
    /// Views mapped memory as the groups.
    ///
    /// # Safety
    /// `base` points to at least one granule that stays mapped for `'a`, is page aligned, and
    /// this process accesses those bytes through this crate's atomics only.
    pub unsafe fn from_ptr<'a>(base: *const u8) -> &'a Self {
        // SAFETY: the caller vouches for size, alignment and life time; every field is an atomic.
        unsafe { &*base.cast::<Self>() }
    }

    /// The lock over everything here.
    pub fn lock(&self) -> &LockWords {
        &self.lock
    }

    /// The group table.
    pub fn groups(&self) -> &[GroupEntry] {
        &self.tables.groups
    }

    /// The entry of a group, if it is there; it may be another one's by now.
    pub fn group(&self, id: GroupId) -> Option<&GroupEntry> {
        let entry = self.tables.groups.get(id.index()?)?;
        (entry.id(id.index()?) == Some(id)).then_some(entry)
    }

    /// The member table.
    pub fn members(&self) -> &[MemberEntry] {
        &self.tables.members
    }

    /// The life of a node that the groups believe in: its failure is told when it is over.
    pub fn node(&self, node: NodeId) -> InstanceId {
        InstanceId::from_word(self.tables.nodes[node.index()].load(Ordering::Acquire))
    }

    /// Records which life of a node the groups believe in. For the holder of the lock.
    pub fn set_node(&self, node: NodeId, instance: InstanceId) {
        self.tables.nodes[node.index()].store(instance.word(), Ordering::Release);
    }

    /// The position of the newest notification of all groups; 0 if there is none.
    ///
    /// `Acquire`: the slots up to it are complete.
    pub fn head(&self) -> u64 {
        self.tables.head.load(Ordering::Acquire)
    }

    /// Whether a change is under way, by whoever holds the lock, or has died with it.
    ///
    /// Asked after [`head`](Self::head), and denied, it says that all is done that belongs to the
    /// notifications up to there: `Acquire`, and the stores of a change come before its end.
    pub fn is_changing(&self) -> bool {
        self.intent.count().is_some()
    }

    /// Begins a change. For the holder of the lock, who has called [`redo`](Self::redo).
    pub fn change(&self) -> Change<'_> {
        Change::new(self)
    }

    /// Carries out a change, whole or not at all. For the holder of the lock. `step` is called
    /// between any two stores, for tests.
    pub fn commit(&self, change: &Change<'_>, mut step: impl FnMut()) {
        self.intent.write(change.stores.list(), &mut step);
        self.redo(step);
    }

    /// Carries out the change that a holder of the lock left committed, if there is one; gives
    /// whether there was. For the holder of the lock, before anything else.
    pub fn redo(&self, mut step: impl FnMut()) -> bool {
        let Some(count) = self.intent.count() else {
            return false;
        };
        for index in 0..count {
            let (word, value) = self.intent.store(index);
            // Beyond the tables only if a node misbehaved: then it is no store of this version.
            if let Some(cell) = self.words().get(word) {
                step();
                // Release: a reader of the ring that sees this word also sees the 0 that was
                // stored to the slot's position before it, and what is committed by a state.
                cell.store(value, Ordering::Release);
            }
        }
        step();
        self.intent.clear();
        step();
        true
    }

    /// Reads the notification at `position` (from 1).
    pub fn read(&self, position: u64) -> NoticeRead {
        let head = self.head();
        if position > head {
            return NoticeRead::NotYet;
        }
        let slot = &self.tables.ring[(position % NOTICE_SLOTS as u64) as usize];
        // Acquire: pairs with the Release store in `redo`.
        let found = slot.position.load(Ordering::Acquire);
        if position == 0 || found > position || (found == 0 && oldest(head) > position) {
            let oldest = oldest(self.head());
            return NoticeRead::Lost { oldest };
        }
        if found != position {
            // Being written: for a later position, or once more by whoever redoes the change.
            return NoticeRead::NotYet;
        }
        let group = slot.group.load(Ordering::Relaxed);
        let words = core::array::from_fn(|i| slot.words[i].load(Ordering::Relaxed));
        // Acquire fence: if a word above came from a later notification, the load below sees
        // that one's 0 or position (Boehm, MSPC 2012).
        fence(Ordering::Acquire);
        if slot.position.load(Ordering::Relaxed) != position {
            return NoticeRead::NotYet;
        }
        match Notification::from_words(words) {
            Some(notice) => NoticeRead::Notice(GroupId::from_word(group), notice),
            None => NoticeRead::Unknown,
        }
    }

    /// The oldest position that still holds a notification, and is not about to be overwritten.
    pub fn oldest(&self) -> u64 {
        oldest(self.head())
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: `Tables` is repr(C) and consists of AtomicU64 without padding (its size is the
        // sum of its fields', which the assertions above check), so that it is an array of them.
        unsafe { &*(&raw const self.tables).cast::<[AtomicU64; WORDS]>() }
    }

    /// The number of a word of the tables.
    fn number(&self, cell: &AtomicU64) -> usize {
        (core::ptr::from_ref(cell).addr() - (&raw const self.tables).addr()) / 8
    }
}

fn oldest(head: u64) -> u64 {
    (head + 2).saturating_sub(NOTICE_SLOTS as u64).max(1)
}

#[cfg(test)]
#[path = "groups_test.rs"]
mod groups_test;
