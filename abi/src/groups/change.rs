//! Changes of the groups: lists of stores that happen all or none.

use super::entry::{Group, GroupEntry, MemberEntry, MemberState, Row};
use super::notice::{End, GroupId, Notification, What};
use super::stores::Stores;
use super::{GroupSection, NOTICE_SLOTS};
use crate::id::NodeId;

/// A change that is being put together.
///
/// It tells of what it changes: every method that changes a member or a node's place in a group
/// appends the notification, and one change has one at most.
#[derive(Debug)]
pub struct Change<'a> {
    pub(super) stores: Stores<'a>,
}

impl<'a> Change<'a> {
    pub(super) fn new(section: &'a GroupSection) -> Self {
        let stores = Stores::new(section);
        Self { stores }
    }

    /// Makes a free entry a group.
    pub fn create(mut self, entry: &GroupEntry, group: &Group) -> Self {
        entry.put_all(&mut self.stores, group);
        self
    }

    /// Gives a group the rule of `group`, whose name is the same.
    pub fn admit(mut self, entry: &GroupEntry, group: &Group) -> Self {
        entry.put_rule(&mut self.stores, group);
        self
    }

    /// Frees a group's entry. Its members' entries become free with it.
    pub fn remove(mut self, entry: &GroupEntry) -> Self {
        entry.put_freed(&mut self.stores);
        self
    }

    /// Makes a member of a group, and tells of it: in place of `previous`, its own former life,
    /// if there is one.
    pub fn join(mut self, group: GroupId, slot: &MemberEntry, row: &Row, what: What) -> Self {
        let Some(entry) = self.stores.section().group(group) else {
            return self;
        };
        let seq = self.tell(group, entry, what);
        slot.put_all(
            &mut self.stores,
            &Row {
                joined: seq,
                ..*row
            },
        );
        if let Some(node) = row.member.node.node() {
            entry.put_known(&mut self.stores, node);
            entry.put_up(&mut self.stores, node, true);
        }
        self
    }

    /// Ends a membership in an orderly way, and tells of it.
    pub fn leave(mut self, slot: &MemberEntry) -> Self {
        let row = slot.row();
        let Some(entry) = self.stores.section().group(row.group) else {
            slot.put_state(&mut self.stores, MemberState::Free, End::Unknown);
            return self;
        };
        let member = row.member;
        self.tell(row.group, entry, What::Left { member });
        slot.put_state(&mut self.stores, MemberState::Free, End::Unknown);
        self
    }

    /// Ends a membership because user `by` wants it so, and tells of it.
    pub fn expel(mut self, slot: &MemberEntry, by: u32) -> Self {
        let row = slot.row();
        if let Some(entry) = self.stores.section().group(row.group) {
            let member = row.member;
            self.tell(row.group, entry, What::Expelled { member, by });
        }
        // After the notification: the member's own agent, which has no part in this change, ends
        // the member's stream once it sees this, and the stream holds the notification by then.
        slot.put_state(&mut self.stores, MemberState::Expelled, End::Unknown);
        self
    }

    /// Frees the entry of an expelled member.
    pub fn free(mut self, slot: &MemberEntry) -> Self {
        slot.put_state(&mut self.stores, MemberState::Free, End::Unknown);
        self
    }

    /// Records the death of a member, and tells of it.
    pub fn die(mut self, slot: &MemberEntry, end: End) -> Self {
        let row = slot.row();
        let Some(entry) = self.stores.section().group(row.group) else {
            slot.put_state(&mut self.stores, MemberState::Free, end);
            return self;
        };
        let member = row.member;
        self.tell(row.group, entry, What::Died { member, end });
        slot.put_state(&mut self.stores, MemberState::Dead, end);
        self
    }

    /// Records that a node is gone from a group or back in it, and tells of it.
    pub fn node(mut self, group: GroupId, node: NodeId, up: bool, what: What) -> Self {
        if let Some(entry) = self.stores.section().group(group) {
            self.tell(group, entry, what);
            entry.put_up(&mut self.stores, node, up);
        }
        self
    }

    /// Appends a notification; gives its number in the group.
    fn tell(&mut self, group: GroupId, entry: &GroupEntry, what: What) -> u64 {
        let section = self.stores.section();
        let (seq, position) = (entry.seq() + 1, section.head() + 1);
        let slot = &section.tables.ring[(position % NOTICE_SLOTS as u64) as usize];
        self.stores.put(&slot.position, 0);
        self.stores.put(&slot.group, group.word());
        let words = Notification { seq, what }.to_words();
        for (cell, word) in slot.words.iter().zip(words) {
            self.stores.put(cell, word);
        }
        self.stores.put(&slot.position, position);
        self.stores.put(&section.tables.head, position);
        entry.put_seq(&mut self.stores, seq);
        seq
    }
}
