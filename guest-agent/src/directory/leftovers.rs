//! What the dead leave: work that is not ended, and segments that nobody may want any more.
//!
//! A segment that belongs to a group ends with the group; one that was created to live as long as
//! the group's members ends when none of them lives any more, on whatever node. Nobody has the
//! task of seeing to it: every agent looks now and then, and the first one that gets the lock does
//! it. What is given back is scrubbed when it is taken the next time, before anybody gets it.

use std::collections::BTreeSet;
use std::time::Duration;

use log::{info, warn};
use lupin::liveness::Liveness;
use lupin::lock::{LockError, LockState, RecoverableLock};
use lupin_abi::groups::{GroupId, MemberState};
use lupin_abi::socket::Lifetime;
use lupin_abi::system::{Segment, SegmentState};

use super::{Directory, DirectoryError};
use crate::crash::crash_point;

impl Directory {
    /// Ends what dead workers began, and gives back what was removed and is used no more. Needs
    /// the lock. May die anywhere and be repeated.
    pub(super) fn sweep(&self) -> Result<(), DirectoryError> {
        for index in 0..self.entries().len() {
            let Some(task) = self.task(index) else {
                continue;
            };
            let segment = self.entries()[index].segment();
            match task {
                Task::GiveBack => {
                    info!("directory: segment {:?} is given back", segment.name);
                    self.give_back(index)?;
                }
                Task::Shrink => {
                    let (name, worker) = (&segment.name, segment.worker);
                    info!("directory: segment {name:?} does not grow: {worker} died over it");
                    self.shrink(index, segment.ready)?;
                }
            }
        }
        Ok(())
    }

    /// What is to be done with an entry, whoever does it.
    fn task(&self, index: usize) -> Option<Task> {
        let entry = &self.entries()[index];
        let has_died = |segment: &Segment| !self.judge().is_alive(segment.worker);
        match entry.state() {
            SegmentState::Free => None,
            SegmentState::Preparing => has_died(&entry.segment()).then_some(Task::GiveBack),
            SegmentState::Live => {
                let segment = entry.segment();
                let is_growing = segment.ready < segment.extents.len();
                (is_growing && has_died(&segment)).then_some(Task::Shrink)
            }
            SegmentState::Condemned => {
                let is_used = entry.users().any(|node| self.may_live(node));
                (!is_used).then_some(Task::GiveBack)
            }
        }
    }

    /// Ends what a node that died was doing with the directory or the allocator, unless another
    /// survivor is at it. Returns quickly if there is nothing.
    ///
    /// Every agent calls it when it hears of a death, and now and then in case that it did not
    /// hear; the first to get the lock does the work, and should it die over it, the next one
    /// does.
    pub fn bury_nodes(&self) {
        let lock = RecoverableLock::new(self.memory.system().directory_lock());
        let state = lock.inspect(&self.judge());
        let is_orphaned = matches!(state, LockState::Orphaned { .. });
        let has_task = || (0..self.entries().len()).any(|index| self.task(index).is_some());
        if self.memory.is_current() && (is_orphaned || has_task()) {
            self.try_locked(Self::sweep);
        }
    }

    /// Removes the segments whose group is gone, or whose members all are.
    pub fn collect(&self) {
        if self.memory.is_current() && self.leftovers().next().is_some() {
            self.try_locked(|directory| {
                for index in directory.leftovers().collect::<Vec<_>>() {
                    let entry = &directory.entries()[index];
                    info!("segment {:?} ends with its group", entry.segment().name);
                    crash_point();
                    entry.set_state(SegmentState::Condemned);
                    crash_point();
                }
                directory.sweep()
            });
        }
    }

    /// Does something under the lock. Not waited for: whoever has it does the same before long,
    /// or dies; the next tick looks again.
    fn try_locked(&self, act: impl FnOnce(&Self) -> Result<(), DirectoryError>) {
        let done = self
            .lock_within(Duration::ZERO)
            .and_then(|_guard| act(self));
        match done {
            Ok(()) | Err(DirectoryError::Lock(LockError::Timeout { .. })) => {}
            Err(DirectoryError::Fenced) => {}
            Err(error) => warn!("directory: leftovers stay for now: {error}"),
        }
    }

    /// Live segments that nobody may want any more. Those that grow are left to their worker.
    fn leftovers(&self) -> impl Iterator<Item = usize> {
        let of_groups = self
            .entries()
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| {
                let segment = (entry.state() == SegmentState::Live).then(|| entry.segment())?;
                let is_settled = segment.ready == segment.extents.len();
                Some((index, segment.group?, segment.lifetime)).filter(|_| is_settled)
            });
        let of_groups: Vec<(usize, GroupId, Lifetime)> = of_groups.collect();
        let needs_members = |(_, _, lifetime): &(_, _, Lifetime)| *lifetime == Lifetime::Members;
        let peopled = match of_groups.iter().any(needs_members) {
            true => self.peopled(),
            false => BTreeSet::new(),
        };
        of_groups
            .into_iter()
            .filter(move |(_, group, lifetime)| {
                self.memory.groups().group(*group).is_none()
                    || *lifetime == Lifetime::Members && !peopled.contains(group)
            })
            .map(|(index, _, _)| index)
    }

    /// The groups with living members.
    fn peopled(&self) -> BTreeSet<GroupId> {
        let members = self.memory.groups().members().iter();
        let alive = members.filter(|entry| entry.state() == MemberState::Alive);
        alive.map(|entry| entry.row().group).collect()
    }
}

/// What is to be done with an entry.
enum Task {
    GiveBack,
    Shrink,
}
