//! Changes of the groups: lists of stores that happen all or none.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::entry::{Group, GroupEntry, MemberEntry, MemberState, Row};
use super::notice::{End, GroupId, Notification, What};
use super::{GroupSection, NOTICE_SLOTS};
use crate::id::NodeId;

/// Most stores of one change.
pub const MAX_STORES: usize = 120;

/// The stores of the change that is under way, as they lie in memory.
#[repr(C)]
#[derive(Debug)]
pub struct Intent {
    /// How many stores are committed; 0 if no change is under way.
    count: AtomicU64,
    _pad: AtomicU64,
    stores: [[AtomicU64; 2]; MAX_STORES],
    _gap: [AtomicU64; (0x1000 - 0x40 - 16 - MAX_STORES * 16) / 8],
}

impl Intent {
    pub(super) fn write(&self, stores: &[(usize, u64)], step: &mut impl FnMut()) {
        for (cells, (word, value)) in self.stores.iter().zip(stores) {
            step();
            cells[0].store(*word as u64, Ordering::Relaxed);
            cells[1].store(*value, Ordering::Relaxed);
        }
        step();
        // Release: whoever finds the number finds the stores. This is the commit.
        self.count.store(stores.len() as u64, Ordering::Release);
        step();
    }

    /// The number of committed stores, if any; one that no program wrote counts as none.
    pub(super) fn count(&self) -> Option<usize> {
        // Acquire: pairs with the commit.
        let count = self.count.load(Ordering::Acquire) as usize;
        (1..=MAX_STORES).contains(&count).then_some(count)
    }

    pub(super) fn store(&self, index: usize) -> (usize, u64) {
        let cells = &self.stores[index];
        let word = cells[0].load(Ordering::Relaxed) as usize;
        (word, cells[1].load(Ordering::Relaxed))
    }

    pub(super) fn clear(&self) {
        // Release: the stores are done before nobody does them again.
        self.count.store(0, Ordering::Release);
    }
}

/// A change that is being put together.
///
/// It tells of what it changes: every method that changes a member or a node's place in a group
/// appends the notification, and one change has one at most.
#[derive(Debug)]
pub struct Change<'a> {
    section: &'a GroupSection,
    stores: Vec<(usize, u64)>,
}

impl<'a> Change<'a> {
    pub(super) fn new(section: &'a GroupSection) -> Self {
        let stores = Vec::with_capacity(MAX_STORES);
        Self { section, stores }
    }

    pub(super) fn stores(&self) -> &[(usize, u64)] {
        // By construction no change is longer; the intent has no room for more.
        &self.stores[..self.stores.len().min(MAX_STORES)]
    }

    pub(super) fn put(&mut self, cell: &AtomicU64, value: u64) {
        self.stores.push((self.section.number(cell), value));
    }

    /// Makes a free entry a group.
    pub fn create(mut self, entry: &GroupEntry, group: &Group) -> Self {
        entry.put_all(&mut self, group);
        self
    }

    /// Gives a group the rule of `group`, whose name is the same.
    pub fn admit(mut self, entry: &GroupEntry, group: &Group) -> Self {
        entry.put_rule(&mut self, group);
        self
    }

    /// Frees a group's entry. Its members' entries become free with it.
    pub fn remove(mut self, entry: &GroupEntry) -> Self {
        entry.put_freed(&mut self);
        self
    }

    /// Makes a member of a group, and tells of it: in place of `previous`, its own former life,
    /// if there is one.
    pub fn join(mut self, group: GroupId, slot: &MemberEntry, row: &Row, what: What) -> Self {
        let Some(entry) = self.section.group(group) else {
            return self;
        };
        let seq = self.tell(group, entry, what);
        slot.put_all(
            &mut self,
            &Row {
                joined: seq,
                ..*row
            },
        );
        if let Some(node) = row.member.node.node() {
            entry.put_known(&mut self, node);
            entry.put_up(&mut self, node, true);
        }
        self
    }

    /// Ends a membership in an orderly way, and tells of it.
    pub fn leave(mut self, slot: &MemberEntry) -> Self {
        let row = slot.row();
        let Some(entry) = self.section.group(row.group) else {
            slot.put_state(&mut self, MemberState::Free, End::Unknown);
            return self;
        };
        let member = row.member;
        self.tell(row.group, entry, What::Left { member });
        slot.put_state(&mut self, MemberState::Free, End::Unknown);
        self
    }

    /// Ends a membership because user `by` wants it so, and tells of it.
    pub fn expel(mut self, slot: &MemberEntry, by: u32) -> Self {
        let row = slot.row();
        if let Some(entry) = self.section.group(row.group) {
            let member = row.member;
            self.tell(row.group, entry, What::Expelled { member, by });
        }
        // After the notification: the member's own agent, which has no part in this change, ends
        // the member's stream once it sees this, and the stream holds the notification by then.
        slot.put_state(&mut self, MemberState::Expelled, End::Unknown);
        self
    }

    /// Frees the entry of an expelled member.
    pub fn free(mut self, slot: &MemberEntry) -> Self {
        slot.put_state(&mut self, MemberState::Free, End::Unknown);
        self
    }

    /// Records the death of a member, and tells of it.
    pub fn die(mut self, slot: &MemberEntry, end: End) -> Self {
        let row = slot.row();
        let Some(entry) = self.section.group(row.group) else {
            slot.put_state(&mut self, MemberState::Free, end);
            return self;
        };
        let member = row.member;
        self.tell(row.group, entry, What::Died { member, end });
        slot.put_state(&mut self, MemberState::Dead, end);
        self
    }

    /// Records that a node is gone from a group or back in it, and tells of it.
    pub fn node(mut self, group: GroupId, node: NodeId, up: bool, what: What) -> Self {
        if let Some(entry) = self.section.group(group) {
            self.tell(group, entry, what);
            entry.put_up(&mut self, node, up);
        }
        self
    }

    /// Appends a notification; gives its number in the group.
    fn tell(&mut self, group: GroupId, entry: &GroupEntry, what: What) -> u64 {
        let section = self.section;
        let (seq, position) = (entry.seq() + 1, section.head() + 1);
        let slot = &section.tables.ring[(position % NOTICE_SLOTS as u64) as usize];
        self.put(&slot.position, 0);
        self.put(&slot.group, group.word());
        let words = Notification { seq, what }.to_words();
        for (cell, word) in slot.words.iter().zip(words) {
            self.put(cell, word);
        }
        self.put(&slot.position, position);
        self.put(&section.tables.head, position);
        entry.put_seq(self, seq);
        seq
    }
}
