//! Expulsion: memberships that the group's owner ends.
//!
//! Whoever expels changes an entry of a living member, which otherwise its own agent alone does.
//! The entry then says so ([`MemberState::Expelled`]) until that agent has taken the group's memory
//! from the process, so that an agent that dies over that is followed by one that knows:
//!
//! ```text
//!   Alive --one change, told to all, by any agent--> Expelled --memory taken, by its own--> Free
//! ```

use log::info;
use lupin::liveness::{Liveness, ThreadLiveness};
use lupin_abi::InstanceId;
use lupin_abi::groups::{GroupId, Leftover, MemberEntry, MemberState, Row};

use super::{GroupError, Groups, is_life, not_found};
use crate::crash::crash_point;
use crate::directory::LOCK_TIMEOUT;
use crate::peer::Peer;
use crate::threads::Thread;

/// A member of this node that was expelled, and whose process still has the group's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expelled {
    /// From which group.
    pub group: GroupId,
    /// Its process.
    pub pid: u32,
    thread: InstanceId,
    row: usize,
}

impl Groups {
    /// Ends the membership of a thread, or of all threads of its `process`, and tells of it. Gives
    /// how many there were, and what becomes of the memory that the process has mapped.
    ///
    /// # Errors
    /// [`GroupError`]: `NotFound`, `Denied`, `NoMember`, `Own`, and those of the lock. Nothing is
    /// changed then.
    pub fn expel(
        &mut self,
        name: &str,
        thread: InstanceId,
        process: bool,
        peer: &Peer,
    ) -> Result<(u32, Leftover), GroupError> {
        let guard = self.lock(LOCK_TIMEOUT)?;
        let (id, _, group) = self.find(name).ok_or_else(|| not_found(name))?;
        if peer.uid != 0 && peer.uid != group.uid {
            return Err(GroupError::Denied {
                name: group.name,
                why: "only its creator's user and root may expel members",
            });
        }
        // Who is dead is told of as dead, by its agent.
        let judge = ThreadLiveness::new(self.memory.fabric(), self.memory.instances());
        let is_meant = |row: &Row| row.group == id && judge.is_alive(row.member.thread);
        let rows: Vec<(usize, Row)> = self.rows_in(MemberState::Alive, is_meant).collect();
        let named = rows.iter().find(|(_, row)| row.member.thread == thread);
        let Some((_, named)) = named.copied() else {
            let name = group.name;
            return Err(GroupError::NoMember { name, thread });
        };
        if (named.member.node, named.member.pid) == (self.me(), peer.pid) {
            return Err(GroupError::Own);
        }
        let of_process =
            |row: &Row| (row.member.node, row.member.pid) == (named.member.node, named.member.pid);
        let (mut ended, mut stays) = (0, false);
        for (index, row) in rows.iter().filter(|(_, row)| of_process(row)) {
            if !process && row.member.thread != thread {
                stays = true;
                continue;
            }
            let slot = &self.section().members()[*index];
            self.commit(&self.section().change().expel(slot, peer.uid));
            ended += 1;
        }
        drop(guard);
        self.changed.set(true);
        let (member, uid) = (named.member, peer.uid);
        info!(
            "group {name:?}: {ended} members of process {} of node {} expelled by user {uid}",
            member.pid,
            member.node.id()
        );
        let leftover = match (stays, named.revocable) {
            (true, _) => Leftover::Membership,
            (false, true) => Leftover::Nothing,
            (false, false) => Leftover::Mappings,
        };
        Ok((ended, leftover))
    }

    /// Members of this node that were expelled since the last call. The caller takes the group's
    /// memory from their processes, and says so to [`settle`](Self::settle).
    pub fn take_expelled(&mut self) -> Vec<Expelled> {
        // Both before the look at the entries, in this order: what is told later is looked at later,
        // and what is not yet done once more.
        let head = self.section().head();
        let seen = (!self.section().is_changing()).then_some(head);
        if seen.is_some() && self.seen == seen {
            return Vec::new();
        }
        self.seen = seen;
        let mut expelled = Vec::new();
        let section = self.memory.groups();
        self.own.retain(|thread, own| {
            own.retain(|own| {
                let row = section.members()[own.row].row();
                let thread = InstanceId::of_thread(thread.id, thread.generation);
                if is_due(&section.members()[own.row], thread, own.group) {
                    expelled.push(of_row(own.row, &row));
                }
                is_life(&row, thread) && row.group == own.group
            });
            !own.is_empty()
        });
        expelled
    }

    /// Members of this node that an earlier agent of this life has left expelled.
    pub fn left_expelled(&self) -> Vec<Expelled> {
        let is_own = |row: &Row| row.member.node == self.me();
        let rows = self.rows_in(MemberState::Expelled, is_own);
        rows.map(|(index, row)| of_row(index, &row)).collect()
    }

    /// The memory has been taken, as far as this node can.
    ///
    /// # Errors
    /// Those of the lock; to be tried again then.
    pub fn settle(&mut self, expelled: &[Expelled]) -> Result<(), GroupError> {
        let guard = self.lock(LOCK_TIMEOUT)?;
        for one in expelled {
            let slot = &self.section().members()[one.row];
            let row = slot.row();
            if row.state == MemberState::Expelled && of_row(one.row, &row) == *one {
                self.commit(&self.section().change().free(slot));
            }
        }
        crash_point();
        drop(guard);
        Ok(())
    }

    /// Whether the thread of this node is a living member through `row` of the table.
    pub(super) fn is_own(&self, thread: &Thread, group: GroupId, row: usize) -> bool {
        let row = self.row(row);
        let thread = InstanceId::of_thread(thread.id, thread.generation);
        is_life(&row, thread) && row.group == group
    }

    fn rows_in(
        &self,
        state: MemberState,
        is_meant: impl Fn(&Row) -> bool,
    ) -> impl Iterator<Item = (usize, Row)> {
        self.rows()
            .filter(move |(_, entry)| entry.state() == state)
            .map(|(index, entry)| (index, entry.row()))
            .filter(move |(_, row)| row.state == state && is_meant(row))
    }
}

/// Whether a member was expelled, and its agent is not done with that.
pub(super) fn is_due(entry: &MemberEntry, thread: InstanceId, group: GroupId) -> bool {
    let row = entry.row();
    row.state == MemberState::Expelled && (row.member.thread, row.group) == (thread, group)
}

fn of_row(index: usize, row: &Row) -> Expelled {
    Expelled {
        group: row.group,
        pid: row.member.pid,
        thread: row.member.thread,
        row: index,
    }
}

#[cfg(test)]
#[path = "expulsion_test.rs"]
mod expulsion_test;
