//! Control groups (CxlCG): who belongs together, and who is told of whose death.
//!
//! All agents of the pod share the tables, under one recoverable lock. Each change, a member's
//! new state together with the notification that tells of it, happens whole or not at all: see
//! [`lupin_abi::groups`]. Nobody coordinates:
//!
//! ```text
//!   a process dies   its own agent sees the pidfd, ends its threads, and then tells; through the
//!                    manager it lets the other agents look at once
//!   a node dies      every survivor sees the generation, tries the lock, and the first tells;
//!                    if it dies over that, the next goes on where it stopped
//!   an agent dies    its next life tells of the deaths of its own members that it missed
//! ```
//!
//! What remains to be told is read from the tables themselves: a member's entry that says
//! "alive" on a life of a node that is over, a node's bit in a group. So the telling may stop at
//! any instruction, and nothing is told twice.

mod admission;
mod deaths;
mod drain;
mod error;
mod expulsion;
mod watch;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use log::info;
use lupin::liveness::{Liveness, NodeLiveness};
use lupin::lock::{LockGuard, RecoverableLock};
use lupin_abi::InstanceId;
use lupin_abi::groups::{
    Admission, Change, End, Group, GroupEntry, GroupId, GroupInfo, GroupSection, Member,
    MemberEntry, MemberInfo, MemberState, Row, Secret, What,
};

use crate::crash::crash_point;
use crate::directory::{LOCK_TIMEOUT, name_is_valid};
use crate::memory::PodMemory;
use crate::peer::Peer;
use crate::threads::Thread;
pub use error::GroupError;
pub use expulsion::Expelled;
pub use watch::{Watch, Watched};

/// Groups that one user may have at a time; root may have all.
pub const GROUPS_PER_USER: usize = 64;
/// Living members that one user may have in the pod at a time; root may have all.
pub const MEMBERS_PER_USER: usize = 4096;
/// Members in one list: as many as surely fit into a packet.
pub const LISTED: usize = 1024;

/// A living member on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Own {
    group: GroupId,
    /// Its entry of the member table.
    row: usize,
}

/// This node's part in the pod's groups.
#[derive(Debug)]
pub struct Groups {
    memory: Arc<PodMemory>,
    /// Living members on this node. Their entries are nobody else's to change, unless it expels them.
    own: BTreeMap<Thread, Vec<Own>>,
    /// The tables changed here: readers are to be told.
    changed: Cell<bool>,
    /// The ring's head when members of this node that were expelled were looked for.
    seen: Option<u64>,
    /// Whether this node can take a mapping away from a process.
    revocable: bool,
}

/// What a list of members is.
#[derive(Debug)]
pub struct Listed {
    /// Number of the newest notification that the list takes into account.
    pub seq: u64,
    /// The members.
    pub members: Vec<MemberInfo>,
    /// Where the next list begins.
    pub more: Option<u32>,
}

impl Groups {
    /// The groups in `memory`; whether this node can take a mapping away from a process.
    pub fn new(memory: Arc<PodMemory>, revocable: bool) -> Self {
        Self {
            memory,
            own: BTreeMap::new(),
            changed: Cell::new(false),
            seen: None,
            revocable,
        }
    }

    fn section(&self) -> &GroupSection {
        self.memory.groups()
    }

    fn me(&self) -> InstanceId {
        self.memory.identity().instance()
    }

    fn is_alive(&self, node: InstanceId) -> bool {
        NodeLiveness::new(self.memory.fabric()).is_alive(node)
    }

    /// Takes the lock, finishes what a dead holder had committed, and tells of nodes that failed:
    /// whatever the caller is about to change comes after that.
    fn lock(&self, timeout: Duration) -> Result<LockGuard<'_>, GroupError> {
        if !self.memory.is_current() {
            return Err(GroupError::Fenced);
        }
        let lock = RecoverableLock::new(self.section().lock());
        let judge = NodeLiveness::new(self.memory.fabric());
        let guard = lock
            .lock_timeout(self.me(), &judge, timeout)?
            .or_repair(|previous| {
                info!("groups: node instance {previous} died with the lock");
                self.section().redo(crash_point);
                Ok::<_, GroupError>(())
            })?;
        // Nothing, unless this process was thrown out of the middle of a change.
        self.section().redo(crash_point);
        self.sweep();
        Ok(guard)
    }

    /// Carries out a change. Needs the lock.
    fn commit(&self, change: &Change<'_>) {
        crash_point();
        self.section().commit(change, crash_point);
    }

    /// Begins this agent's use of the groups: resolves what an earlier agent of this life left,
    /// and lets the groups know that the node is back.
    ///
    /// # Errors
    /// Those of the lock.
    pub fn begin(&mut self) -> Result<(), GroupError> {
        let lock = RecoverableLock::new(self.section().lock());
        let judge = NodeLiveness::new(self.memory.fabric());
        if let Some(orphan) = lock.resolve_own(self.me(), &judge)? {
            info!("groups: an earlier agent of this node died with the lock");
            self.section().redo(crash_point);
            let _guard = orphan.repaired()?;
        }
        self.adopt()?;
        self.arrive()?;
        self.changed.set(true);
        Ok(())
    }

    /// Whether the tables were changed here since the last call.
    pub fn take_changed(&self) -> bool {
        self.changed.take()
    }

    /// Whether [`take_changed`](Self::take_changed) would say so.
    pub fn has_changed(&self) -> bool {
        self.changed.get()
    }

    fn find(&self, name: &str) -> Option<(GroupId, &GroupEntry, Group)> {
        let entries = self.section().groups().iter().enumerate();
        let mut live = entries.filter_map(|(index, entry)| Some((entry.id(index)?, entry)));
        live.find_map(|(id, entry)| {
            let group = entry.group();
            (group.name == name).then_some((id, entry, group))
        })
    }

    fn rows(&self) -> impl Iterator<Item = (usize, &MemberEntry)> {
        self.section().members().iter().enumerate()
    }

    fn living(&self, group: GroupId) -> impl Iterator<Item = Row> {
        self.rows()
            .filter(|(_, entry)| entry.state() == MemberState::Alive)
            .map(|(_, entry)| entry.row())
            .filter(move |row| row.group == group)
    }

    /// Creates a group, whose segments may have `quota` bytes together.
    ///
    /// # Errors
    /// [`GroupError`]: `Name`, `Rules`, `Exists`, `Full`, `Quota`, and those of the lock.
    pub fn create(
        &mut self,
        name: &str,
        admission: &Admission,
        quota: Option<u64>,
        peer: &Peer,
    ) -> Result<GroupId, GroupError> {
        if !name_is_valid(name) {
            return Err(GroupError::Name(shown(name)));
        }
        let secret = admission::checked(admission)?;
        let guard = self.lock(LOCK_TIMEOUT)?;
        if self.find(name).is_some() {
            return Err(GroupError::Exists(name.into()));
        }
        let entries = self.section().groups();
        let of_user = entries
            .iter()
            .filter(|entry| entry.is_live() && entry.uid() == peer.uid)
            .count();
        if peer.uid != 0 && of_user >= GROUPS_PER_USER {
            return Err(GroupError::Quota(format!("{GROUPS_PER_USER} groups")));
        }
        let (index, entry) = entries
            .iter()
            .enumerate()
            .find(|(_, entry)| !entry.is_live())
            .ok_or(GroupError::Full("groups"))?;
        let group = Group {
            name: name.into(),
            creator: self.me(),
            uid: peer.uid,
            gid: peer.gid,
            uids: admission.uids.clone(),
            gids: admission.gids.clone(),
            secret,
            quota,
        };
        self.commit(&self.section().change().create(entry, &group));
        let id = entry.id(index).ok_or(GroupError::Full("groups"))?;
        drop(guard);
        info!("group {name:?}: created by user {}", peer.uid);
        Ok(id)
    }

    /// Changes who may join a group from now on; who is a member stays one.
    ///
    /// # Errors
    /// [`GroupError`]: `NotFound`, `Denied`, `Rules`, and those of the lock.
    pub fn set_admission(
        &mut self,
        name: &str,
        admission: &Admission,
        peer: &Peer,
    ) -> Result<(), GroupError> {
        let secret = admission::checked(admission)?;
        let guard = self.lock(LOCK_TIMEOUT)?;
        let (_, entry, group) = self.find(name).ok_or_else(|| not_found(name))?;
        if peer.uid != 0 && peer.uid != group.uid {
            return Err(GroupError::Denied {
                name: name.into(),
                why: "only its creator's user and root may change its rule",
            });
        }
        let group = Group {
            uids: admission.uids.clone(),
            gids: admission.gids.clone(),
            secret,
            ..group
        };
        self.commit(&self.section().change().admit(entry, &group));
        drop(guard);
        info!("group {name:?}: another rule, by user {}", peer.uid);
        Ok(())
    }

    /// Removes a group without living members.
    ///
    /// # Errors
    /// [`GroupError`]: `NotFound`, `Denied`, `Busy`, and those of the lock.
    pub fn remove(&mut self, name: &str, peer: &Peer) -> Result<(), GroupError> {
        let guard = self.lock(LOCK_TIMEOUT)?;
        let (id, entry, group) = self.find(name).ok_or_else(|| not_found(name))?;
        if peer.uid != 0 && peer.uid != group.uid {
            return Err(GroupError::Denied {
                name: name.into(),
                why: "only its creator's user and root may remove it",
            });
        }
        let members = self.living(id).count();
        if members > 0 {
            let name = name.into();
            return Err(GroupError::Busy { name, members });
        }
        self.commit(&self.section().change().remove(entry));
        drop(guard);
        self.changed.set(true);
        info!("group {name:?}: removed by user {}", peer.uid);
        Ok(())
    }

    /// The groups whose rule a user meets, the secret left aside. A snapshot, without the lock.
    pub fn list(&self, peer: &Peer) -> Vec<GroupInfo> {
        let mut living: HashMap<GroupId, u32> = HashMap::new();
        for (_, entry) in self.rows() {
            if entry.state() == MemberState::Alive {
                *living.entry(entry.row().group).or_default() += 1;
            }
        }
        let entries = self.section().groups().iter().enumerate();
        entries
            .filter_map(|(index, entry)| Some((entry.id(index)?, entry.group())))
            .filter(|(_, group)| peer.uid == group.uid || admission::rule_admits(group, peer))
            .map(|(id, group)| GroupInfo {
                name: group.name,
                members: living.get(&id).copied().unwrap_or(0),
                uid: group.uid,
                secret: group.secret.is_some(),
            })
            .collect()
    }

    /// Makes threads of a process of this node members, those that are members already excepted.
    /// Gives the number of the newest notification before.
    ///
    /// The caller has checked that the threads are the process's own.
    ///
    /// # Errors
    /// [`GroupError`]: `NotFound`, `Denied`, `Full`, `Quota`, and those of the lock.
    pub fn join(
        &mut self,
        name: &str,
        secret: Option<&Secret>,
        threads: &[Thread],
        peer: &Peer,
    ) -> Result<(GroupId, u64), GroupError> {
        if self.draining().is_some() {
            return Err(GroupError::Draining);
        }
        let guard = self.lock(LOCK_TIMEOUT)?;
        let (id, entry, group) = self.find(name).ok_or_else(|| not_found(name))?;
        admission::admit(&group, secret, peer)?;
        let before = entry.seq();
        let mut places = self.places(id, threads, peer)?;
        let mut joined = Vec::new();
        for thread in threads {
            let instance = InstanceId::of_thread(thread.id, thread.generation);
            let known = places.known.get(&thread.id.get()).copied();
            let (index, previous) = match known.map(|index| (index, self.row(index))) {
                // A repeated request: the client lost the answer.
                Some((_, row)) if is_life(&row, instance) => continue,
                Some((index, row)) => {
                    if row.state == MemberState::Alive {
                        // Its agent has not told yet. The id was given out anew, so that it is
                        // dead; nobody may hear of its return before that.
                        let slot = &self.section().members()[index];
                        self.commit(&self.section().change().die(slot, End::Unknown));
                    }
                    (index, Some(row.member.thread.generation()))
                }
                None => (places.free.pop().ok_or(GroupError::Full("members"))?, None),
            };
            let member = Member {
                thread: instance,
                node: self.me(),
                pid: peer.pid,
            };
            let row = Row {
                state: MemberState::Alive,
                group: id,
                member,
                uid: peer.uid,
                end: End::Unknown,
                joined: 0,
                revocable: self.revocable,
            };
            let what = match previous {
                Some(previous) => What::Rejoined { member, previous },
                None => What::Joined { member },
            };
            let slot = &self.section().members()[index];
            self.commit(&self.section().change().join(id, slot, &row, what));
            joined.push((*thread, index));
        }
        drop(guard);
        for (thread, row) in joined {
            let own = Own { group: id, row };
            self.own.entry(thread).or_default().push(own);
            self.changed.set(true);
        }
        Ok((id, before))
    }

    fn row(&self, index: usize) -> Row {
        self.section().members()[index].row()
    }

    /// Where threads can become members. Needs the lock.
    fn places(
        &self,
        group: GroupId,
        threads: &[Thread],
        peer: &Peer,
    ) -> Result<Places, GroupError> {
        let mut places = Places::default();
        let (mut of_user, mut dead) = (0, Vec::new());
        for (index, entry) in self.rows() {
            let state = entry.state();
            if state == MemberState::Free {
                places.free.push(index);
                continue;
            }
            let row = entry.row();
            if self.section().group(row.group).is_none() {
                places.free.push(index);
                continue;
            }
            if state == MemberState::Expelled {
                // Its agent is not done with it. Who joins anew does so in another entry.
                continue;
            }
            let wanted = threads.iter().any(|t| t.id.get() == row.member.thread.id());
            if row.group == group && wanted {
                places.known.insert(row.member.thread.id(), index);
            } else if state == MemberState::Dead {
                dead.push((row.joined, index));
            }
            of_user += usize::from(state == MemberState::Alive && row.uid == peer.uid);
        }
        if peer.uid != 0 && of_user + threads.len() > MEMBERS_PER_USER {
            return Err(GroupError::Quota(format!("{MEMBERS_PER_USER} members")));
        }
        if places.free.len() < threads.len() {
            // The dead make room, those that joined last first: `pop` takes from the end.
            dead.sort_unstable();
            places
                .free
                .splice(0..0, dead.into_iter().map(|(_, index)| index));
        }
        // Before the first change: a request is carried out for all of its threads or refused.
        let needed = threads.len().saturating_sub(places.known.len());
        if places.free.len() < needed {
            return Err(GroupError::Full("members"));
        }
        Ok(places)
    }

    /// Ends memberships of threads of this node, in one group or in all, in an orderly way.
    ///
    /// # Errors
    /// Those of the lock; nothing is ended then.
    pub fn leave(&mut self, group: Option<GroupId>, threads: &[Thread]) -> Result<(), GroupError> {
        self.end_own(group, threads, |section, slot| section.change().leave(slot))
    }

    /// Ends memberships of threads of this node: each row by the change that `how` makes.
    fn end_own(
        &mut self,
        group: Option<GroupId>,
        threads: &[Thread],
        how: impl for<'a> Fn(&'a GroupSection, &MemberEntry) -> Change<'a>,
    ) -> Result<(), GroupError> {
        let is_meant = |own: &Own| group.is_none_or(|group| group == own.group);
        let has_any = |thread: &Thread| {
            let own = self.own.get(thread);
            own.is_some_and(|own| own.iter().any(is_meant))
        };
        if !threads.iter().any(has_any) {
            return Ok(());
        }
        let guard = self.lock(LOCK_TIMEOUT)?;
        for thread in threads {
            let instance = InstanceId::of_thread(thread.id, thread.generation);
            let own = self.own.get(thread).map_or(&[][..], Vec::as_slice);
            for own in own.iter().filter(|own| is_meant(own)) {
                let slot = &self.section().members()[own.row];
                let row = slot.row();
                // Somebody who thought this node dead may have told already.
                if is_life(&row, instance) && row.group == own.group {
                    self.commit(&how(self.section(), slot));
                }
            }
        }
        drop(guard);
        let members = self.memory.groups().members();
        for thread in threads {
            let instance = InstanceId::of_thread(thread.id, thread.generation);
            if let Some(own) = self.own.get_mut(thread) {
                // Who was expelled before is still to be found by `take_expelled`.
                own.retain(|own| {
                    !is_meant(own) || expulsion::is_due(&members[own.row], instance, own.group)
                });
                if own.is_empty() {
                    self.own.remove(thread);
                }
            }
        }
        self.changed.set(true);
        Ok(())
    }

    /// Whether any of these threads of this node is a living member of a group.
    pub fn is_member<'a>(
        &self,
        group: GroupId,
        threads: impl IntoIterator<Item = &'a Thread>,
    ) -> bool {
        self.section().group(group).is_some()
            && threads.into_iter().any(|thread| {
                let own = self.own.get(thread);
                // The entry is the truth: another agent may have expelled it.
                let is_it = |own: &Own| own.group == group && self.is_own(thread, group, own.row);
                own.is_some_and(|own| own.iter().any(is_it))
            })
    }

    /// Members of a group, beginning with entry number `after`.
    ///
    /// # Errors
    /// [`GroupError::NotFound`], and those of the lock.
    pub fn members(&self, group: GroupId, after: u32) -> Result<Listed, GroupError> {
        let _guard = self.lock(LOCK_TIMEOUT)?;
        let entry = self.section().group(group).ok_or_else(|| gone(group))?;
        let mut members = Vec::new();
        let mut more = None;
        for (index, entry) in self.rows().skip(after as usize) {
            if !matches!(entry.state(), MemberState::Alive | MemberState::Dead) {
                continue;
            }
            let row = entry.row();
            if row.group != group {
                continue;
            }
            if members.len() == LISTED {
                more = u32::try_from(index).ok();
                break;
            }
            let end = (row.state == MemberState::Dead).then_some(row.end);
            let member = row.member;
            members.push(MemberInfo { member, end });
        }
        let seq = entry.seq();
        Ok(Listed { seq, members, more })
    }
}

#[derive(Default)]
struct Places {
    /// Entries of the wanted threads, by thread id.
    known: HashMap<u32, usize>,
    /// Entries that may be taken.
    free: Vec<usize>,
}

/// Whether a row is a living member's in exactly this life.
fn is_life(row: &Row, thread: InstanceId) -> bool {
    row.state == MemberState::Alive && row.member.thread == thread
}

fn shown(name: &str) -> String {
    name.chars().take(80).collect()
}

fn not_found(name: &str) -> GroupError {
    GroupError::NotFound(shown(name))
}

fn gone(group: GroupId) -> GroupError {
    GroupError::NotFound(group.to_string())
}
#[cfg(test)]
#[path = "groups_test.rs"]
mod groups_test;
