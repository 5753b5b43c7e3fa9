//! The allocator of a whole pod: one lock for all, one log for each node.
//!
//! ```text
//! 0x00   header                  magic, creator, seal; version, nodes, units, unit
//! 0x40   lock                    recoverable; owners are node instances
//! 0x80   one log for each node   in the order of node ids
//!        buddy                   see `mod.rs`
//! ```
//!
//! An operation writes its record into its own node's log while it holds the lock, and retires it
//! before it releases the lock. So the only record that can be half applied is that of the lock's
//! owner: whoever finds the owner dead settles that one log and declares the lock repaired. There
//! is nothing else to look for, whatever else died.
//!
//! A node's log serves all of its lives. A life's first record is begun only after the lock was
//! once acquired: from then on nobody is settling the log for the life before.

use core::time::Duration;

use lupin_abi::system::LockWords;
use lupin_abi::{InstanceId, NodeId};

use super::audit::BuddyAudit;
use super::header::{Claimed, FIELDS, Header};
use super::tree::Tree;
use super::{Buddy, BuddyError, BuddySpec, Chunk, metadata_size, writable};
use crate::liveness::Liveness;
use crate::lock::{LockGuard, LockState, RecoverableLock};
use crate::log::{Log, Outcome, Record, log_size};
use crate::shm::Mapping;
use crate::wait::{Pacer, deadline_after};

const MAGIC: u64 = u64::from_le_bytes(*b"LUPINPAL");
const VERSION: u64 = 1;
const LOCK_AT: u64 = 0x40;
const LOGS_AT: u64 = 0x80;
/// The most words of the caller's.
const MAX_ALSO: u32 = 1024;

/// The shape of a pod's allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAllocatorSpec {
    /// The largest node id that may use it, 1 to 1024.
    pub nodes: u32,
    /// What it hands out.
    pub chunks: BuddySpec,
    /// The most words of its caller's that one operation changes together with a chunk.
    pub also: u32,
}

impl PodAllocatorSpec {
    /// Bytes of its words, which lie apart from what it hands out; a multiple of 64.
    pub const fn metadata_size(&self) -> u64 {
        self.buddy_at() + metadata_size(&self.chunks)
    }

    const fn buddy_at(&self) -> u64 {
        LOGS_AT + self.nodes as u64 * log_size(self.entries())
    }

    /// Entries of each log.
    const fn entries(&self) -> u32 {
        self.chunks.entries() + self.also
    }

    fn fields(&self) -> [u64; FIELDS] {
        let nodes = self.nodes.into();
        [
            VERSION,
            nodes,
            self.chunks.units.into(),
            self.chunks.unit,
            self.also.into(),
        ]
    }

    fn check(&self) -> Result<Tree, BuddyError> {
        if self.nodes == 0 || self.nodes > lupin_abi::id::MAX_NODES {
            return Err(BuddyError::Spec {
                what: "the number of nodes",
                value: self.nodes.into(),
                allowed: "1 to 1024",
            });
        }
        if self.also > MAX_ALSO {
            return Err(BuddyError::Spec {
                what: "the number of words of the caller's",
                value: self.also.into(),
                allowed: "0 to 1024",
            });
        }
        self.chunks.check()
    }
}

/// What a node was doing: the kind of its [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PodOperation {
    /// Allocating; the result is the chunk's offset in bytes.
    Alloc = 1,
    /// Freeing; the result is the chunk's offset in bytes.
    Free = 2,
    /// Giving a chunk to another owner; the result is the chunk's offset in bytes.
    Give = 3,
    /// Changing words of the caller's alone; the result is 0.
    Change = 4,
}

/// A chunk that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodChunk {
    /// Where it begins, in bytes from the start of the memory that is handed out.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// Whose it is: the word of an instance, or another number.
    pub owner: u64,
}

/// The kernel-level allocator: hands out large chunks of a memory to node instances.
///
/// Offsets are in bytes from the start of the memory that is handed out; that memory itself is
/// never touched. One node instance is one thread of control: threads of an agent put a lock of
/// their own process around it.
#[derive(Clone, Copy, Debug)]
pub struct PodAllocator<'m> {
    memory: &'m Mapping,
    at: u64,
    spec: PodAllocatorSpec,
    buddy: Buddy<'m>,
    /// How long it waits for its lock; without limit if that is not said.
    patience: Option<Duration>,
}

impl<'m> PodAllocator<'m> {
    /// Creates an allocator with everything free at `at` (bytes from the start of the mapping, a
    /// multiple of 64), in all-zero memory or where its creator died. One that is there already
    /// with the same `spec` is opened.
    ///
    /// # Errors
    /// [`BuddyError::BeingCreated`] by somebody alive, [`BuddyError::NotThis`],
    /// [`BuddyError::Spec`], [`BuddyError::Memory`] if it does not fit, [`BuddyError::Log`] if the
    /// mapping is read-only, [`BuddyError::Lock`] if `me` is nobody.
    pub fn create(
        memory: &'m Mapping,
        at: u64,
        spec: &PodAllocatorSpec,
        me: InstanceId,
        judge: &impl Liveness,
    ) -> Result<Self, BuddyError> {
        spec.check()?;
        let size = spec.metadata_size();
        let buddy_at = fits(memory, at, size)? + spec.buddy_at();
        writable(memory, at)?;
        let header: &Header = memory.get(at)?;
        let buddy = match header.claim(at, MAGIC, spec.fields(), me, judge)? {
            // Logs and lock are as their memory: all zero, which is empty and free.
            Claimed::Fresh => {
                let buddy = Buddy::create(memory, buddy_at, &spec.chunks, me, judge)?;
                header.seal(spec.fields(), me)?;
                buddy
            }
            Claimed::Complete => Buddy::open(memory, buddy_at)?,
        };
        Ok(Self {
            memory,
            at,
            spec: *spec,
            buddy,
            patience: None,
        })
    }

    /// Opens an allocator; waits up to `patience` for one that somebody alive is creating, or
    /// that nobody has begun to create.
    ///
    /// # Errors
    /// [`BuddyError::Unfinished`] if its creator died or nobody came, [`BuddyError::BeingCreated`]
    /// if it is still not complete, [`BuddyError::NotThis`], [`BuddyError::Memory`].
    pub fn open(
        memory: &'m Mapping,
        at: u64,
        judge: &impl Liveness,
        patience: Duration,
    ) -> Result<Self, BuddyError> {
        let header: &Header = memory.get(at)?;
        let mut pacer = Pacer::new(Some(deadline_after(patience)));
        let fields = loop {
            match header.read(at, MAGIC) {
                Err(BuddyError::Unfinished(creator)) => {
                    let is_alive = judge.is_alive(creator);
                    // It may have been sealed between the two looks.
                    if !creator.is_none() && !is_alive {
                        break header.read(at, MAGIC)?;
                    }
                    if pacer.sleep().is_err() {
                        return Err(match is_alive {
                            true => BuddyError::BeingCreated(creator),
                            false => BuddyError::Unfinished(creator),
                        });
                    }
                }
                fields => break fields?,
            }
        };
        let [version, nodes, units, unit, also] = fields;
        let not_this = |why| BuddyError::NotThis { at, why };
        if version != VERSION {
            return Err(not_this("it is of another version"));
        }
        let (Ok(nodes), Ok(units), Ok(also)) = (
            u32::try_from(nodes),
            u32::try_from(units),
            u32::try_from(also),
        ) else {
            return Err(not_this("its header is damaged"));
        };
        let chunks = BuddySpec { units, unit };
        let spec = PodAllocatorSpec {
            nodes,
            chunks,
            also,
        };
        spec.check()?;
        let buddy = Buddy::open(
            memory,
            fits(memory, at, spec.metadata_size())? + spec.buddy_at(),
        )?;
        if buddy.spec() != chunks {
            return Err(not_this("its parts have different shapes"));
        }
        Ok(Self {
            memory,
            at,
            spec,
            buddy,
            patience: None,
        })
    }

    /// Its shape.
    pub fn spec(&self) -> PodAllocatorSpec {
        self.spec
    }

    /// The same allocator, used by somebody who waits for its lock at most `patience` in each
    /// operation, which then ends with [`LockError::Timeout`](crate::lock::LockError::Timeout).
    pub fn with_patience(self, patience: Duration) -> Self {
        Self {
            patience: Some(patience),
            ..self
        }
    }

    /// Allocates at least `bytes` bytes, rounded up to a power of two of units, for the node
    /// instance `me`; returns the offset, a multiple of the size.
    ///
    /// Waits for the lock while its holder lives; settles what a dead holder left.
    ///
    /// # Errors
    /// [`BuddyError::NoRoom`], [`BuddyError::Nothing`] for 0 bytes, [`BuddyError::NotANode`],
    /// [`BuddyError::Corrupt`], [`BuddyError::Log`] and [`BuddyError::Lock`]. A deadlock, or an
    /// unsettled record of `me`, means that an earlier process of the same instance died, which
    /// [`recover`](Self::recover) settles.
    pub fn alloc(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        bytes: u64,
    ) -> Result<u64, BuddyError> {
        self.alloc_for(me, judge, bytes, me.word(), 0)
    }

    /// Allocates as [`alloc`](Self::alloc), for another `owner` (any number but 0, a group's for
    /// example), with a `tag` that the outcome tells.
    ///
    /// # Errors
    /// Those of [`alloc`](Self::alloc).
    pub fn alloc_for(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        bytes: u64,
        owner: u64,
        tag: u64,
    ) -> Result<u64, BuddyError> {
        self.alloc_with(me, judge, bytes, owner, tag, |_, _| Ok(()))
    }

    /// Allocates as [`alloc_for`](Self::alloc_for), and in the same step stores what `also`, which
    /// is told the chunk's offset, sets in the record: at most
    /// [`also`](PodAllocatorSpec::also) words of the same mapping, which a lock of the caller's
    /// protects. All of it happens or nothing, whenever the caller dies.
    ///
    /// Whoever takes that lock from a dead holder calls [`recover`](Self::recover) before it
    /// looks at the words.
    ///
    /// # Errors
    /// Those of [`alloc`](Self::alloc), and those of `also`.
    pub fn alloc_with(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        bytes: u64,
        owner: u64,
        tag: u64,
        also: impl FnOnce(&mut Record<'m>, u64) -> Result<(), BuddyError>,
    ) -> Result<u64, BuddyError> {
        let units = bytes.div_ceil(self.spec.chunks.unit);
        // More than there can be stays more than there can be.
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        self.operate(me, judge, PodOperation::Alloc, tag, |record| {
            let first = self.buddy.alloc_in(record, units, owner)?;
            let offset = u64::from(first) * self.spec.chunks.unit;
            also(record, offset)?;
            Ok(offset)
        })
    }

    /// Frees the chunk at `offset`, which belongs to `me`.
    ///
    /// # Errors
    /// [`BuddyError::DoubleFree`], [`BuddyError::Foreign`], [`BuddyError::NotAChunk`], and those
    /// of [`alloc`](Self::alloc) but for room.
    pub fn free(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        offset: u64,
    ) -> Result<(), BuddyError> {
        self.free_of(me, judge, offset, me.word(), 0)
    }

    /// Frees the chunk at `offset`, which belongs to `owner`: a group, or a dead instance whose
    /// chunks the caller clears up. With a `tag` that the outcome tells.
    ///
    /// # Errors
    /// Those of [`free`](Self::free).
    pub fn free_of(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        offset: u64,
        owner: u64,
        tag: u64,
    ) -> Result<(), BuddyError> {
        self.free_with(me, judge, offset, owner, tag, |_| Ok(()))
    }

    /// Frees as [`free_of`](Self::free_of), and in the same step stores what `also` sets in the
    /// record, as [`alloc_with`](Self::alloc_with) does.
    ///
    /// # Errors
    /// Those of [`free`](Self::free), and those of `also`.
    pub fn free_with(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        offset: u64,
        owner: u64,
        tag: u64,
        also: impl FnOnce(&mut Record<'m>) -> Result<(), BuddyError>,
    ) -> Result<(), BuddyError> {
        let first = self.unit_at(offset)?;
        self.operate(me, judge, PodOperation::Free, tag, |record| {
            self.buddy.free_in(record, first, owner)?;
            also(record)?;
            Ok(offset)
        })?;
        Ok(())
    }

    /// Stores what `also` sets in a record, all or nothing, and touches no chunk: for words that
    /// other operations change together with one, as [`alloc_with`](Self::alloc_with) does.
    ///
    /// # Errors
    /// Those of [`alloc`](Self::alloc) but for room, and those of `also`.
    pub fn change(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        tag: u64,
        also: impl FnOnce(&mut Record<'m>) -> Result<(), BuddyError>,
    ) -> Result<(), BuddyError> {
        self.operate(me, judge, PodOperation::Change, tag, |record| {
            also(record)?;
            Ok(0)
        })?;
        Ok(())
    }

    /// Gives the chunk at `offset` from its owner to another: what becomes of the chunks of the
    /// dead that are still needed. With a `tag` that the outcome tells.
    ///
    /// # Errors
    /// Those of [`free`](Self::free).
    pub fn give(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        offset: u64,
        from: u64,
        to: u64,
        tag: u64,
    ) -> Result<(), BuddyError> {
        let first = self.unit_at(offset)?;
        self.operate(me, judge, PodOperation::Give, tag, |record| {
            self.buddy.give_in(record, first, from, to)?;
            Ok(offset)
        })?;
        Ok(())
    }

    /// Finishes or aborts the operation in which a node died, if one did, and says which: after
    /// this returned, no dead node's operation is unfinished. Any survivor may call it at any
    /// time, and so does every agent when it starts, which finds here what an earlier process of
    /// its own instance left.
    ///
    /// # Errors
    /// [`BuddyError::Log`], [`BuddyError::Lock`].
    pub fn recover(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
    ) -> Result<Option<Outcome>, BuddyError> {
        writable(self.memory, self.at)?;
        let lock = self.lock()?;
        if let Some(orphan) = lock.resolve_own(me, judge)? {
            let outcome = self.settle(orphan.previous())?;
            orphan.repaired()?.unlock()?;
            return Ok(Some(outcome));
        }
        if !matches!(lock.inspect(judge), LockState::Orphaned { .. }) {
            return Ok(None);
        }
        let mut outcome = None;
        self.acquire(me, judge, &mut outcome)?.unlock()?;
        Ok(outcome)
    }

    /// The state of the lock, for people.
    ///
    /// # Errors
    /// [`BuddyError::Memory`].
    pub fn lock_state(&self, judge: &impl Liveness) -> Result<LockState, BuddyError> {
        Ok(self.lock()?.inspect(judge))
    }

    /// What became of the last operation of a node, in whichever life. A snapshot while it works.
    ///
    /// # Errors
    /// [`BuddyError::NotANode`], [`BuddyError::Log`].
    pub fn last(&self, node: NodeId) -> Result<Outcome, BuddyError> {
        Ok(self.log_of(InstanceId::of_node(node, 1))?.last()?)
    }

    /// All chunks in use, in the order of their offsets. Those of an owner are exact if it does
    /// not allocate or free meanwhile, as a dead one does not.
    pub fn chunks(&self) -> impl Iterator<Item = PodChunk> + 'm {
        let unit = self.spec.chunks.unit;
        self.buddy.chunks().map(move |chunk: Chunk| PodChunk {
            offset: u64::from(chunk.first) * unit,
            bytes: chunk.units() * unit,
            owner: chunk.owner,
        })
    }

    /// The chunks of one owner, as [`chunks`](Self::chunks).
    pub fn chunks_of(&self, owner: u64) -> impl Iterator<Item = PodChunk> + 'm {
        self.chunks().filter(move |chunk| chunk.owner == owner)
    }

    /// Audits the allocator under its lock.
    ///
    /// # Errors
    /// [`BuddyError::Corrupt`]; [`BuddyError::Lock`].
    pub fn audit(&self, me: InstanceId, judge: &impl Liveness) -> Result<BuddyAudit, BuddyError> {
        let guard = self.acquire(me, judge, &mut None)?;
        let audit = self.buddy.audit();
        guard.unlock()?;
        audit
    }

    /// One operation: intent, lock, change, commit, unlock.
    fn operate(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        operation: PodOperation,
        tag: u64,
        change: impl FnOnce(&mut Record<'m>) -> Result<u64, BuddyError>,
    ) -> Result<u64, BuddyError> {
        let log = self.log_of(me)?;
        if log.owner()? != me {
            // The first operation of this life; see the module documentation.
            self.acquire(me, judge, &mut None)?.unlock()?;
        }
        let mut record = log.begin(me, operation as u32, tag)?;
        record.intend(self.at + LOCK_AT);
        let guard = self.acquire(me, judge, &mut None)?;
        record.held(self.at + LOCK_AT);
        // An error in here gives the record up: nothing has happened.
        let result = change(&mut record)?;
        record.commit(result)?;
        guard.unlock()?;
        Ok(result)
    }

    /// The lock, after what a dead holder left was settled.
    fn acquire(
        &self,
        me: InstanceId,
        judge: &impl Liveness,
        outcome: &mut Option<Outcome>,
    ) -> Result<LockGuard<'m>, BuddyError> {
        writable(self.memory, self.at)?;
        let lock = self.lock()?;
        let acquired = match self.patience {
            Some(patience) => lock.lock_timeout(me, judge, patience),
            None => lock.lock(me, judge),
        };
        acquired?.or_repair(|dead| {
            *outcome = Some(self.settle(dead)?);
            Ok(())
        })
    }

    fn settle(&self, dead: InstanceId) -> Result<Outcome, BuddyError> {
        match self.log_of(dead) {
            Ok(log) => Ok(log.settle(dead)?),
            // A word that is no node has no log and did nothing.
            Err(BuddyError::NotANode { .. }) => Ok(Outcome::nothing(dead)),
            Err(error) => Err(error),
        }
    }

    fn lock(&self) -> Result<RecoverableLock<'m>, BuddyError> {
        let words: &LockWords = self.memory.get(self.at + LOCK_AT)?;
        Ok(RecoverableLock::new(words))
    }

    fn log_of(&self, node: InstanceId) -> Result<Log<'m>, BuddyError> {
        let nodes = self.spec.nodes;
        if node.id() == 0 || node.id() > nodes || node.generation() == 0 {
            return Err(BuddyError::NotANode {
                instance: node,
                nodes,
            });
        }
        let at = self.at + LOGS_AT + u64::from(node.id() - 1) * log_size(self.spec.entries());
        Ok(Log::new(self.memory, at, self.spec.entries())?)
    }

    fn unit_at(&self, offset: u64) -> Result<u32, BuddyError> {
        let unit = self.spec.chunks.unit;
        let first = offset / unit;
        match u32::try_from(first) {
            Ok(first) if offset.is_multiple_of(unit) => Ok(first),
            _ => Err(BuddyError::NotAChunk { first }),
        }
    }
}

/// Checks that `size` bytes from `at` on are mapped; returns `at`.
fn fits(memory: &Mapping, at: u64, size: u64) -> Result<u64, BuddyError> {
    memory.get_slice::<core::sync::atomic::AtomicU64>(at, size / 8)?;
    Ok(at)
}

#[cfg(test)]
#[path = "pod_test.rs"]
mod pod_test;
