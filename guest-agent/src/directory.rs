//! The segment directory: which ranges of the pool are segments, and whose.
//!
//! All agents of the pod share it, under one recoverable lock. The entries in use *are* the
//! allocation: there is no free list that a crash could leave out of step. An entry lives
//!
//! ```text
//!   Free --fill, then one store--> Preparing --scrubbed, one store--> Live
//!     ^                                |  ^                             |
//!     |   creator dead: whoever comes  |  |  being removed: same as     |
//!     +--------------------------------+  +--being prepared ------------+
//! ```
//!
//! Long work (scrubbing, taking a device away) happens between two short critical sections,
//! while the entry is `Preparing` and its extent taken. If the agent dies there, its node's next
//! generation makes it a dead creator.

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use lupin::liveness::{Liveness, NodeLiveness};
use lupin::lock::{LockError, LockGuard, RecoverableLock};
use lupin_abi::layout::GRANULE;
use lupin_abi::socket::RefusalCode;
use lupin_abi::system::{MAX_SEGMENT_NAME, Segment, SegmentEntry, SegmentState};
use lupin_abi::{InstanceId, NodeId};

use crate::crash::crash_point;
use crate::memory::{Extent, Owner, PodMemory};

/// How long the agent waits for the directory lock. A holder that hangs for longer is found
/// dead by the fabric manager; till then this node must be able to answer its own manager.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Why something could not be done with segments or thread ids.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The name breaks a rule.
    #[error("segment name {0:?} is not 1 to 64 bytes of [A-Za-z0-9._-] without a leading dot")]
    Name(String),
    /// The size breaks a rule.
    #[error("a segment of {size} bytes is not possible: the pool has {pool}")]
    Size {
        /// Bytes asked for.
        size: u64,
        /// Bytes of the pool.
        pool: u64,
    },
    /// The name is taken.
    #[error("segment {0:?} exists")]
    Exists(String),
    /// No such segment.
    #[error("there is no segment {0:?}")]
    NotFound(String),
    /// Another node is not done with it.
    #[error("segment {name:?} is in use: {by}")]
    Busy {
        /// Which segment.
        name: String,
        /// By whom.
        by: String,
    },
    /// The pool or the directory is full.
    #[error("no room for {size} bytes: {what}")]
    NoSpace {
        /// Bytes asked for.
        size: u64,
        /// What there is.
        what: String,
    },
    /// The caller may not do that.
    #[error("segment {name:?} belongs to {uid}:{gid} with mode {mode:04o}")]
    Permission {
        /// Which segment.
        name: String,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Permission bits.
        mode: u32,
    },
    /// The entry makes no sense.
    #[error("segment {0:?} has an entry that makes no sense; its extent is not in the pool")]
    Damaged(String),
    /// A thread id is out of range, taken, or used up.
    #[error("thread id {id}: {what}")]
    Thread {
        /// The id.
        id: u32,
        /// For programs.
        code: RefusalCode,
        /// What is wrong with it.
        what: String,
    },
    /// The lock could not be had.
    #[error("directory lock: {0}")]
    Lock(#[from] LockError),
    /// The generation table no longer names this life of the node.
    #[error("this node was declared dead; it must not change the pod any more")]
    Fenced,
}

impl DirectoryError {
    /// The kind of refusal that this is for a client.
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Name(_) | Self::Size { .. } => RefusalCode::Invalid,
            Self::Exists(_) => RefusalCode::Exists,
            Self::NotFound(_) => RefusalCode::NotFound,
            Self::Busy { .. } => RefusalCode::Busy,
            Self::NoSpace { .. } => RefusalCode::NoSpace,
            Self::Permission { .. } => RefusalCode::Permission,
            Self::Thread { code, .. } => *code,
            Self::Damaged(_) | Self::Lock(_) | Self::Fenced => RefusalCode::Failed,
        }
    }
}

/// An entry of the directory that this node holds on to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which entry.
    pub index: usize,
    /// What it said when it was taken.
    pub segment: Segment,
}

impl Held {
    /// Its range of the pool.
    pub fn extent(&self) -> Extent {
        extent(&self.segment)
    }

    /// Whom it belongs to.
    pub fn owner(&self) -> Owner {
        Owner {
            uid: self.segment.uid,
            gid: self.segment.gid,
            mode: self.segment.mode,
        }
    }
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

    fn entries(&self) -> &[SegmentEntry] {
        self.memory.system().segments()
    }

    /// Takes the lock over directory and thread ids, and repairs what a dead holder left.
    ///
    /// # Errors
    /// [`DirectoryError::Lock`], and [`DirectoryError::Fenced`] if this node is no longer one.
    pub fn lock(&self) -> Result<LockGuard<'_>, DirectoryError> {
        if !self.memory.is_current() {
            return Err(DirectoryError::Fenced);
        }
        let lock = RecoverableLock::new(self.memory.system().directory_lock());
        let judge = NodeLiveness::new(self.memory.fabric());
        lock.lock_timeout(self.me(), &judge, LOCK_TIMEOUT)?
            .or_repair(|previous| {
                info!("directory: node instance {previous} died with the lock; repairing");
                self.sweep();
                Ok::<_, DirectoryError>(())
            })
    }

    /// Frees what dead creators were preparing. Needs the lock. Each entry is one store: the
    /// sweep may die anywhere and be repeated.
    fn sweep(&self) {
        let judge = NodeLiveness::new(self.memory.fabric());
        for entry in self.entries() {
            if entry.state() == SegmentState::Preparing {
                let segment = entry.segment();
                if !judge.is_alive(segment.creator) {
                    info!(
                        "directory: segment {:?} of dead creator {} is freed",
                        segment.name, segment.creator
                    );
                    entry.set_state(SegmentState::Free);
                }
            }
        }
    }

    /// Begins this agent's use of the directory: resolves what an earlier agent of this node
    /// left. Of a new life nothing is left; within the same life (`restarted`) the segments that
    /// this node still has in use are returned.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock).
    pub fn begin(&self, restarted: bool) -> Result<Vec<Held>, DirectoryError> {
        let lock = RecoverableLock::new(self.memory.system().directory_lock());
        let judge = NodeLiveness::new(self.memory.fabric());
        if let Some(orphan) = lock.resolve_own(self.me(), &judge)? {
            info!("directory: an earlier agent of this node died with the lock; repairing");
            self.sweep();
            let _guard = orphan.repaired()?;
        }
        let _guard = self.lock()?;
        let mut held = Vec::new();
        for (index, entry) in self.entries().iter().enumerate() {
            let state = entry.state();
            if state == SegmentState::Preparing && entry.segment().creator == self.me() {
                entry.set_state(SegmentState::Free);
            } else if state == SegmentState::Live && entry.is_user(self.node()) {
                if restarted {
                    let segment = entry.segment();
                    held.push(Held { index, segment });
                } else {
                    entry.remove_user(self.node());
                }
            }
        }
        Ok(held)
    }

    /// Takes an extent for a new segment, used by this node. It is found by others once
    /// [`publish`](Self::publish) says that it is scrubbed.
    ///
    /// # Errors
    /// [`DirectoryError`]: `Name`, `Size`, `Exists`, `NoSpace`, or those of `lock`.
    pub fn create(&self, name: &str, size: u64, owner: Owner) -> Result<Held, DirectoryError> {
        if !name_is_valid(name) {
            return Err(DirectoryError::Name(name.chars().take(80).collect()));
        }
        let pool = self.memory.header().pool().size;
        let rounded = size
            .checked_next_multiple_of(GRANULE)
            .filter(|s| *s > 0 && *s <= pool)
            .ok_or(DirectoryError::Size { size, pool })?;
        let _guard = self.lock()?;
        self.sweep();
        let mut free = None;
        let mut taken = Vec::new();
        for (index, entry) in self.entries().iter().enumerate() {
            if entry.state() == SegmentState::Free {
                free = free.or(Some(index));
                continue;
            }
            let segment = entry.segment();
            if segment.name == name {
                return Err(DirectoryError::Exists(name.into()));
            }
            if in_pool(&segment, pool) {
                taken.push(extent(&segment));
            } else {
                warn!("directory: entry {index} ({:?}) is damaged", segment.name);
            }
        }
        let no_space = |what: String| DirectoryError::NoSpace { size, what };
        let index = free.ok_or_else(|| no_space("the directory is full".into()))?;
        let offset = first_fit(&mut taken, rounded, pool).ok_or_else(|| {
            let used: u64 = taken.iter().map(|e| e.size).sum();
            let left = pool.saturating_sub(used);
            no_space(format!("{left} of {pool} bytes are free, not in one piece"))
        })?;
        let segment = Segment {
            name: name.into(),
            offset,
            size: rounded,
            uid: owner.uid,
            gid: owner.gid,
            mode: owner.mode,
            creator: self.me(),
        };
        let entry = &self.entries()[index];
        crash_point();
        entry.fill(&segment);
        crash_point();
        entry.add_user(self.node());
        crash_point();
        entry.set_state(SegmentState::Preparing);
        crash_point();
        Ok(Held { index, segment })
    }

    /// Makes a created segment one that others can open.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock), and `NotFound` if it was taken away meanwhile.
    pub fn publish(&self, held: &Held) -> Result<(), DirectoryError> {
        let _guard = self.lock()?;
        self.own_preparing(held)?.set_state(SegmentState::Live);
        crash_point();
        Ok(())
    }

    /// Opens a segment for this node if `may` allows it.
    ///
    /// # Errors
    /// [`DirectoryError`]: `NotFound`, `Busy` while it is prepared or removed, `Permission`,
    /// `Damaged`, or those of `lock`.
    pub fn open(
        &self,
        name: &str,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        let held = self.find(name, may)?;
        self.entries()[held.index].add_user(self.node());
        crash_point();
        Ok(held)
    }

    /// Begins to remove a segment that no other living node uses: nobody can open it from here
    /// on. [`forget`](Self::forget) ends it.
    ///
    /// # Errors
    /// [`DirectoryError`]: `NotFound`, `Busy`, `Permission`, `Damaged`, or those of `lock`.
    pub fn begin_remove(
        &self,
        name: &str,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Held, DirectoryError> {
        let _guard = self.lock()?;
        let mut held = self.find(name, may)?;
        let entry = &self.entries()[held.index];
        let users: Vec<String> = entry
            .users()
            .filter(|node| *node != self.node() && self.may_live(*node))
            .map(|node| format!("node {node}"))
            .collect();
        if !users.is_empty() {
            let (name, by) = (name.into(), users.join(", "));
            return Err(DirectoryError::Busy { name, by });
        }
        // This node takes it over first, so that an extent whose creator is dead is not given
        // away while processes here still have it mapped. Nothing but creator and users change.
        held.segment.creator = self.me();
        crash_point();
        entry.fill(&held.segment);
        crash_point();
        entry.set_state(SegmentState::Preparing);
        crash_point();
        Ok(held)
    }

    /// Frees an entry that this node is preparing or removing.
    ///
    /// # Errors
    /// Those of [`lock`](Self::lock), and `NotFound` if it was taken away meanwhile.
    pub fn forget(&self, held: &Held) -> Result<(), DirectoryError> {
        let _guard = self.lock()?;
        self.own_preparing(held)?.set_state(SegmentState::Free);
        crash_point();
        Ok(())
    }

    /// This node no longer uses a segment.
    pub fn let_go(&self, held: &Held) {
        let entry = &self.entries()[held.index];
        // While this node's bit is set nobody else removes the segment, so the entry is still
        // the one that was opened; after a fence, the stores of this node reach nothing.
        entry.remove_user(self.node());
    }

    /// The segments in use. A snapshot, without the lock.
    pub fn list(&self) -> Vec<Segment> {
        self.entries()
            .iter()
            .filter(|entry| entry.state() == SegmentState::Live)
            .map(SegmentEntry::segment)
            .collect()
    }

    fn find(&self, name: &str, may: impl FnOnce(&Segment) -> bool) -> Result<Held, DirectoryError> {
        for (index, entry) in self.entries().iter().enumerate() {
            let state = entry.state();
            if state == SegmentState::Free {
                continue;
            }
            let segment = entry.segment();
            if segment.name != name {
                continue;
            }
            if !may(&segment) {
                return Err(DirectoryError::Permission {
                    name: segment.name,
                    uid: segment.uid,
                    gid: segment.gid,
                    mode: segment.mode,
                });
            }
            if state == SegmentState::Preparing {
                let judge = NodeLiveness::new(self.memory.fabric());
                if !judge.is_alive(segment.creator) {
                    entry.set_state(SegmentState::Free);
                    break;
                }
                return Err(DirectoryError::Busy {
                    name: segment.name,
                    by: format!("node {} prepares or removes it", segment.creator.id()),
                });
            }
            if !in_pool(&segment, self.memory.header().pool().size) {
                return Err(DirectoryError::Damaged(segment.name));
            }
            return Ok(Held { index, segment });
        }
        Err(DirectoryError::NotFound(name.chars().take(80).collect()))
    }

    /// Needs the lock.
    fn own_preparing(&self, held: &Held) -> Result<&SegmentEntry, DirectoryError> {
        let entry = &self.entries()[held.index];
        if entry.state() == SegmentState::Preparing && entry.segment() == held.segment {
            Ok(entry)
        } else {
            Err(DirectoryError::NotFound(held.segment.name.clone()))
        }
    }

    /// Whether stores of a node may still reach the pool: up to the raise of its generation,
    /// and again from its next start on.
    fn may_live(&self, node: NodeId) -> bool {
        self.memory.fabric().entry(node).state().may_store()
    }
}

/// Whether a segment may have this name.
pub fn name_is_valid(name: &str) -> bool {
    (1..=MAX_SEGMENT_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn extent(segment: &Segment) -> Extent {
    Extent {
        offset: segment.offset,
        size: segment.size,
    }
}

fn in_pool(segment: &Segment, pool: u64) -> bool {
    segment.offset.is_multiple_of(GRANULE)
        && segment.size.is_multiple_of(GRANULE)
        && segment.size > 0
        && segment
            .offset
            .checked_add(segment.size)
            .is_some_and(|end| end <= pool)
}

/// The lowest offset at which `size` bytes are free. Sorts `taken`.
fn first_fit(taken: &mut [Extent], size: u64, pool: u64) -> Option<u64> {
    taken.sort_unstable_by_key(|e| e.offset);
    let mut at = 0u64;
    for extent in taken {
        if extent.offset >= at && extent.offset - at >= size {
            return Some(at);
        }
        // Extents do not overlap unless a node misbehaved; then the longer one counts.
        at = at.max(extent.offset + extent.size);
    }
    (pool.checked_sub(at)? >= size).then_some(at)
}

#[cfg(test)]
#[path = "directory_test.rs"]
mod directory_test;
