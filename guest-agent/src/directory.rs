//! The segment directory: which segments there are, whose they are, and where they lie.
//!
//! All agents of the pod share it, under one recoverable lock. A segment is a list of extents,
//! chunks of the pod's allocator, whose own table names the directory's entry as their owner. So
//! a chunk is taken or given back by one record of the allocator's redo log, which changes the
//! entry's list as well: see [`space`]. An entry lives
//!
//! ```text
//!   Free --one store--> Preparing --extents, scrubbed, one store--> Live --removed--> Condemned
//!     ^                     |                                       ^  |                  |
//!     |    worker dead:     |                     grown: extents,   +--+                  |
//!     |    whoever comes    |                     scrubbed,                               |
//!     +---------------------+                     one store            users let it go:   |
//!     +------------------------------------------- whoever comes -------------------------+
//! ```
//!
//! Long work (scrubbing, taking a device away) happens between two short critical sections. If
//! the agent dies there, its node's next generation makes it a dead worker, and every survivor
//! that hears of it tries to end what it began ([`Directory::bury_nodes`]).

mod error;
mod leftovers;
mod space;

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use lupin::liveness::{Liveness, NodeLiveness};
use lupin::lock::{LockGuard, RecoverableLock};
use lupin_abi::groups::GroupId;
use lupin_abi::layout::{GRANULE, Range};
use lupin_abi::socket::{Lifetime, SegmentName};
use lupin_abi::system::{MAX_SEGMENT_NAME, Segment, SegmentEntry, SegmentState};
use lupin_abi::{InstanceId, NodeId};

use crate::crash::crash_point;
use crate::memory::{Extent, Owner, PodMemory};
pub use error::DirectoryError;

/// How long the agent waits for the directory lock. A holder that hangs for longer is found
/// dead by the fabric manager; till then this node must be able to answer its own manager.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Segments that one user may have at a time; root may have all.
pub const SEGMENTS_PER_USER: usize = 128;

/// An entry of the directory that this node holds on to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which entry.
    pub index: usize,
    /// In which of its uses.
    pub uses: u32,
    /// What it said when it was taken.
    pub segment: Segment,
}

impl Held {
    /// Its ranges of the pool that are for everybody.
    pub fn ready(&self) -> impl Iterator<Item = Extent> {
        self.segment.extents[..self.segment.ready]
            .iter()
            .map(extent)
    }

    /// Its ranges of the pool that are still to be scrubbed.
    pub fn unready(&self) -> impl Iterator<Item = Extent> {
        self.segment.extents[self.segment.ready..]
            .iter()
            .map(extent)
    }

    /// All of its ranges of the pool.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        self.segment.extents.iter().map(extent)
    }

    /// Whom its devices belong to. A group's are root's alone: its members get descriptors.
    pub fn owner(&self) -> Owner {
        match self.segment.group {
            None => Owner {
                uid: self.segment.uid,
                gid: self.segment.gid,
                mode: self.segment.mode,
            },
            Some(_) => Owner {
                uid: 0,
                gid: 0,
                mode: 0o600,
            },
        }
    }
}

fn extent(range: &Range) -> Extent {
    let (offset, size) = (range.offset, range.size);
    Extent { offset, size }
}

/// What a new segment is to be.
#[derive(Clone, Copy, Debug)]
pub struct NewSegment<'a> {
    /// Its name.
    pub name: &'a SegmentName,
    /// Bytes, to be rounded up to a multiple of 2 MiB.
    pub size: u64,
    /// Who creates it, and for whom.
    pub owner: Owner,
    /// How long it stays.
    pub lifetime: Lifetime,
}

/// This node's view of the directory.
#[derive(Clone, Debug)]
pub struct Directory {
    memory: Arc<PodMemory>,
}

impl Directory {
    /// The directory in `memory`.
    pub fn new(memory: Arc<PodMemory>) -> Self {
        Self { memory }
    }

    /// The memory that it is in.
    pub fn memory(&self) -> &Arc<PodMemory> {
        &self.memory
    }

    fn me(&self) -> InstanceId {
        self.memory.identity().instance()
    }

    fn node(&self) -> NodeId {
        self.memory.identity().node
    }

    fn judge(&self) -> NodeLiveness<'_> {
        NodeLiveness::new(self.memory.fabric())
    }

    fn entries(&self) -> &[SegmentEntry] {
        self.memory.system().segments()
    }

    /// Takes the lock over directory and thread ids, and repairs what a dead holder left.
    ///
    /// # Errors
    /// [`DirectoryError::Lock`], and [`DirectoryError::Fenced`] if this node is no longer one.
    pub fn lock(&self) -> Result<LockGuard<'_>, DirectoryError> {
        self.lock_within(LOCK_TIMEOUT)
    }

    fn lock_within(&self, timeout: Duration) -> Result<LockGuard<'_>, DirectoryError> {
        if !self.memory.is_current() {
            return Err(DirectoryError::Fenced);
        }
        let lock = RecoverableLock::new(self.memory.system().directory_lock());
        lock.lock_timeout(self.me(), &self.judge(), timeout)?
            .or_repair(|previous| {
                info!("directory: node instance {previous} died with the lock; repairing");
                self.repair()
            })
    }

    /// Ends what a dead holder of the lock was doing. Needs the lock. May die anywhere and be
    /// repeated.
    fn repair(&self) -> Result<(), DirectoryError> {
        match self.settle().and_then(|()| self.sweep()) {
            // Threads live and die without the allocator; what it cannot do, it says again to
            // whoever wants a segment.
            Err(DirectoryError::Allocator(error)) => {
                warn!("the pool's allocator cannot be repaired: {error}");
                Ok(())
            }
            result => result,
        }
    }

    /// Begins this agent's use of the directory: resolves what an earlier agent of this node
    /// left. Of a new life nothing is left; within the same life (`restarted`) the segments that
    /// this node still has in use are returned.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock), and [`DirectoryError::Allocator`].
    pub fn begin(&self, restarted: bool) -> Result<Vec<Held>, DirectoryError> {
        let lock = RecoverableLock::new(self.memory.system().directory_lock());
        if let Some(orphan) = lock.resolve_own(self.me(), &self.judge())? {
            info!("directory: an earlier agent of this node died with the lock; repairing");
            self.repair()?;
            let _guard = orphan.repaired()?;
        }
        let _guard = self.lock()?;
        // Creates the allocator in a pod that was just formatted.
        self.settle()?;
        let mut held = Vec::new();
        for (index, entry) in self.entries().iter().enumerate() {
            let state = entry.state();
            if state == SegmentState::Free {
                continue;
            }
            let segment = entry.segment();
            if segment.worker == self.me() {
                if state == SegmentState::Preparing {
                    self.give_back(index)?;
                    continue;
                }
                self.shrink(index, segment.ready)?;
            }
            if entry.is_user(self.node()) {
                if restarted {
                    held.push(self.held(index));
                } else {
                    entry.remove_user(self.node());
                }
            }
        }
        self.sweep()?;
        Ok(held)
    }

    fn held(&self, index: usize) -> Held {
        let entry = &self.entries()[index];
        Held {
            index,
            uses: entry.uses(),
            segment: entry.segment(),
        }
    }

    /// Begins a new segment, used by this node. It is found by others once
    /// [`publish`](Self::publish) says that it is scrubbed.
    ///
    /// # Errors
    /// [`DirectoryError`]: `Name`, `Size`, `Exists`, `Quota`, `TooMany`, `NoSpace`, `NoMembers`,
    /// `Allocator`, or those of `lock`. Nothing is left of the segment then.
    pub fn create(&self, new: &NewSegment<'_>) -> Result<Held, DirectoryError> {
        let name = &new.name.name;
        if !name_is_valid(name) {
            return Err(DirectoryError::Name(shown(name)));
        }
        if new.name.group.is_none() && new.lifetime == Lifetime::Members {
            return Err(DirectoryError::NoMembers(name.clone()));
        }
        let size = self.rounded(new.size)?;
        let _guard = self.lock()?;
        self.sweep()?;
        let (mut free, mut of_user) = (None, 0);
        for (index, entry) in self.entries().iter().enumerate() {
            let state = entry.state();
            if state == SegmentState::Free {
                free = free.or(Some(index));
                continue;
            }
            let segment = entry.segment();
            if state != SegmentState::Condemned && is_named(&segment, new.name) {
                return Err(DirectoryError::Exists(name.clone()));
            }
            of_user += usize::from(segment.uid == new.owner.uid);
        }
        if new.owner.uid != 0 && of_user >= SEGMENTS_PER_USER {
            return Err(DirectoryError::TooMany(SEGMENTS_PER_USER));
        }
        self.check_quota(new.name.group, size)?;
        let index = free.ok_or_else(|| DirectoryError::NoSpace {
            size,
            what: "the directory is full".into(),
        })?;
        let segment = Segment {
            name: name.clone(),
            group: new.name.group,
            lifetime: new.lifetime,
            extents: Vec::new(),
            ready: 0,
            uid: new.owner.uid,
            gid: new.owner.gid,
            mode: new.owner.mode,
            worker: self.me(),
        };
        let entry = &self.entries()[index];
        entry.begin(&segment, crash_point);
        if let Err(error) = self.take(index, size) {
            self.give_back(index)?;
            return Err(error);
        }
        entry.add_user(self.node());
        crash_point();
        Ok(self.held(index))
    }

    /// Appends to a segment until it has `size` bytes. What is appended is there once
    /// [`publish`](Self::publish) says that it is scrubbed; if the segment is large enough,
    /// nothing of what is returned is [unready](Held::unready). This node uses it in any case.
    ///
    /// # Errors
    /// [`DirectoryError`]: those of [`open`](Self::open), `Busy` while it grows, `Size`, `Quota`,
    /// `NoSpace`, `Allocator`. The segment is as it was then.
    pub fn grow(
        &self,
        name: &SegmentName,
        size: u64,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Held, DirectoryError> {
        let size = self.rounded(size)?;
        let _guard = self.lock()?;
        self.sweep()?;
        let index = self.find(name, may)?;
        let entry = &self.entries()[index];
        let segment = entry.segment();
        check_settled(&segment)?;
        let more = size.saturating_sub(segment.size());
        if more > 0 {
            self.check_quota(segment.group, more)?;
            crash_point();
            entry.set_worker(self.me());
            crash_point();
            if let Err(error) = self.take(index, more) {
                self.shrink(index, segment.ready)?;
                return Err(error);
            }
        }
        entry.add_user(self.node());
        crash_point();
        Ok(self.held(index))
    }

    /// Makes what this node has created, or appended, something that others can open.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock), and `NotFound` if it was removed meanwhile.
    pub fn publish(&self, held: &Held) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        let entry = self.own_work(held)?;
        let taken = entry.segment().extents.len();
        crash_point();
        entry.set_count(taken, taken);
        crash_point();
        if entry.state() == SegmentState::Preparing {
            entry.set_state(SegmentState::Live);
            crash_point();
        }
        Ok(self.held(held.index))
    }

    /// Gives back what this node has created, or appended, and not published.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock), and `Allocator`.
    pub fn abandon(&self, held: &Held) -> Result<(), DirectoryError> {
        let _guard = self.lock()?;
        match self.own_work(held) {
            Ok(entry) if entry.state() == SegmentState::Preparing => self.give_back(held.index),
            Ok(entry) => self.shrink(held.index, entry.segment().ready),
            Err(_) => Ok(()),
        }
    }

    /// Opens a segment for this node if `may` allows it.
    ///
    /// # Errors
    /// [`DirectoryError`]: `NotFound`, `Busy` while it is prepared, `Permission`, `Damaged`, or
    /// those of `lock`.
    pub fn open(
        &self,
        name: &SegmentName,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        let index = self.find(name, may)?;
        self.entries()[index].add_user(self.node());
        crash_point();
        Ok(self.held(index))
    }

    /// Opens, once more for this node, the very segment that had number `index` in its `uses`-th
    /// use, if `may` allows it.
    ///
    /// # Errors
    /// [`DirectoryError::NotFound`], also if `may` does not allow it; those of `lock`.
    pub fn reopen(
        &self,
        index: usize,
        uses: u32,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        let entry = self.entries().get(index);
        let entry = entry.filter(|e| e.state() == SegmentState::Live && e.uses() == uses);
        let pool = self.memory.header().pool().size;
        let is_allowed = |entry: &&SegmentEntry| {
            let segment = entry.segment();
            in_pool(&segment, pool) && may(&segment)
        };
        let Some(entry) = entry.filter(is_allowed) else {
            return Err(DirectoryError::NotFound(format!("number {index}.{uses}")));
        };
        entry.add_user(self.node());
        crash_point();
        Ok(self.held(index))
    }

    /// Gives a segment another name, in the same group.
    ///
    /// # Errors
    /// [`DirectoryError`]: those of [`open`](Self::open), `Name`, `Exists`, `Allocator`.
    pub fn rename(
        &self,
        name: &SegmentName,
        to: &str,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<(), DirectoryError> {
        if !name_is_valid(to) {
            return Err(DirectoryError::Name(shown(to)));
        }
        let _guard = self.lock()?;
        self.sweep()?;
        let index = self.find(name, may)?;
        let (group, new) = (name.group, to.to_owned());
        let taken = self.index_of(&SegmentName { group, name: new });
        if taken.is_some_and(|other| other != index) {
            return Err(DirectoryError::Exists(to.into()));
        }
        self.store_name(index, to)
    }

    /// Removes a segment: nobody can open it from here on, and its name is free. Nodes that use
    /// it let it go as they can, and its memory is given back when none uses it any more.
    ///
    /// # Errors
    /// [`DirectoryError`]: those of [`open`](Self::open), and `Busy` while it grows or, unless
    /// it is to be `revoke`d, while another living node uses it or `is_busy` says of the entry's
    /// number that others do on this node.
    pub fn condemn(
        &self,
        name: &SegmentName,
        revoke: bool,
        may: impl FnOnce(&Segment) -> bool,
        is_busy: impl FnOnce(usize) -> bool,
    ) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        self.sweep()?;
        let index = self.find(name, may)?;
        let entry = &self.entries()[index];
        check_settled(&entry.segment())?;
        let mut users: Vec<String> = entry
            .users()
            .filter(|node| *node != self.node() && self.may_live(*node))
            .map(|node| format!("node {node}"))
            .collect();
        if is_busy(index) {
            users.push("other processes of this node".into());
        }
        if !users.is_empty() && !revoke {
            return Err(DirectoryError::Busy {
                name: name.name.clone(),
                by: users.join(", "),
            });
        }
        crash_point();
        entry.set_state(SegmentState::Condemned);
        crash_point();
        Ok(self.held(index))
    }

    /// This node no longer uses a segment.
    pub fn let_go(&self, held: &Held) {
        let entry = &self.entries()[held.index];
        // While this node's bit is set nobody else frees the entry, so it is still the one that
        // was opened; after a fence, the stores of this node reach nothing.
        if entry.uses() == held.uses {
            entry.remove_user(self.node());
            crash_point();
        }
    }

    /// Whether a segment that this node holds was removed.
    pub fn is_condemned(&self, held: &Held) -> bool {
        let entry = &self.entries()[held.index];
        entry.state() == SegmentState::Condemned && entry.uses() == held.uses
    }

    /// The segments in use. A snapshot, without the lock.
    pub fn list(&self) -> Vec<Segment> {
        let entries = self.entries().iter();
        entries.filter_map(SegmentEntry::snapshot).collect()
    }

    fn index_of(&self, name: &SegmentName) -> Option<usize> {
        self.entries().iter().position(|entry| {
            matches!(entry.state(), SegmentState::Preparing | SegmentState::Live)
                && is_named(&entry.segment(), name)
        })
    }

    /// The live segment of this name. Needs the lock.
    fn find(
        &self,
        name: &SegmentName,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<usize, DirectoryError> {
        let not_found = || DirectoryError::NotFound(shown(&name.name));
        let index = self.index_of(name).ok_or_else(not_found)?;
        let entry = &self.entries()[index];
        let segment = entry.segment();
        if !may(&segment) {
            return Err(DirectoryError::Permission {
                name: segment.name,
                uid: segment.uid,
                gid: segment.gid,
                mode: segment.mode,
            });
        }
        if entry.state() == SegmentState::Preparing {
            if !self.judge().is_alive(segment.worker) {
                self.give_back(index)?;
                return Err(not_found());
            }
            return Err(DirectoryError::Busy {
                name: segment.name,
                by: format!("node {} prepares it", segment.worker.id()),
            });
        }
        if !in_pool(&segment, self.memory.header().pool().size) {
            return Err(DirectoryError::Damaged(segment.name));
        }
        Ok(index)
    }

    /// The entry that this node is at work on. Needs the lock.
    fn own_work(&self, held: &Held) -> Result<&SegmentEntry, DirectoryError> {
        let entry = &self.entries()[held.index];
        let is_open = matches!(entry.state(), SegmentState::Preparing | SegmentState::Live);
        if is_open && entry.uses() == held.uses && entry.segment().worker == self.me() {
            Ok(entry)
        } else {
            Err(DirectoryError::NotFound(held.segment.name.clone()))
        }
    }

    fn rounded(&self, size: u64) -> Result<u64, DirectoryError> {
        let pool = self.memory.header().pool().size;
        size.checked_next_multiple_of(GRANULE)
            .filter(|rounded| *rounded > 0 && *rounded <= pool)
            .ok_or(DirectoryError::Size { size, pool })
    }

    /// Needs the lock.
    fn check_quota(&self, group: Option<GroupId>, asked: u64) -> Result<(), DirectoryError> {
        let Some(group) = group else {
            return Ok(());
        };
        let Some(entry) = self.memory.groups().group(group) else {
            return Err(DirectoryError::NotFound(group.to_string()));
        };
        let Some(quota) = entry.quota() else {
            return Ok(());
        };
        let mut used = 0u64;
        for entry in self.entries() {
            if entry.state() != SegmentState::Free {
                let segment = entry.segment();
                if segment.group == Some(group) {
                    used = used.saturating_add(segment.taken());
                }
            }
        }
        match used.checked_add(asked) {
            Some(sum) if sum <= quota => Ok(()),
            _ => Err(DirectoryError::Quota {
                group,
                quota,
                used,
                asked,
            }),
        }
    }

    /// Whether stores of a node may still reach the pool: up to the raise of its generation,
    /// and again from its next start on.
    fn may_live(&self, node: NodeId) -> bool {
        self.memory.fabric().entry(node).state().may_store()
    }
}

/// Refuses while a segment grows: whoever lives and is at it ends soon.
fn check_settled(segment: &Segment) -> Result<(), DirectoryError> {
    match segment.ready < segment.extents.len() {
        false => Ok(()),
        true => Err(DirectoryError::Busy {
            name: segment.name.clone(),
            by: format!("node {} makes it grow", segment.worker.id()),
        }),
    }
}

fn is_named(segment: &Segment, name: &SegmentName) -> bool {
    segment.group == name.group && segment.name == name.name
}

fn shown(name: &str) -> String {
    name.chars().take(80).collect()
}

/// Whether a segment may have this name.
pub fn name_is_valid(name: &str) -> bool {
    (1..=MAX_SEGMENT_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn in_pool(segment: &Segment, pool: u64) -> bool {
    let is_inside = |extent: &Range| {
        let end = extent.offset.checked_add(extent.size);
        extent.size > 0 && end.is_some_and(|end| end <= pool)
    };
    segment.ready > 0 && segment.extents.iter().all(is_inside)
}

#[cfg(test)]
#[path = "directory_test.rs"]
mod directory_test;
