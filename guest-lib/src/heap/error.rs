//! What can go wrong with a heap.

use lupin_abi::InstanceId;

use crate::buddy::BuddyError;
use crate::lock::LockError;
use crate::log::LogError;
use crate::shm::ShmError;

/// Why a heap, or an operation on it, cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    /// The memory holds something else.
    #[error("this memory does not hold a heap: {0}")]
    NotAHeap(&'static str),
    /// The memory is too small for a heap.
    #[error("the heap needs {needed} bytes of memory, this one has {available}")]
    TooSmall {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// A number of the specification is out of its range.
    #[error("a heap's {what} must be in {allowed}, not {value}")]
    Spec {
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The rule.
        allowed: &'static str,
    },
    /// The heap is there already.
    #[error("the heap exists")]
    Exists,
    /// Somebody alive is creating it.
    #[error("the heap is being created by {0}: try again in a moment")]
    BeingCreated(InstanceId),
    /// Its creator died in the middle.
    #[error("the creator of the heap ({0}) died before it was complete: create it again")]
    Unfinished(InstanceId),
    /// All places are taken by the living.
    #[error("all {participants} places of the heap are taken by living participants")]
    Full {
        /// Places there are.
        participants: u32,
    },
    /// The instance takes part already.
    #[error("{0} already takes part in this heap")]
    AlreadyJoined(InstanceId),
    /// The instance that asks is no instance.
    #[error("{0} cannot take part in a heap")]
    NoInstance(InstanceId),
    /// No block may be put into a slot that owns one.
    #[error("the slot at {slot:#x} already owns the block at {block:#x}")]
    SlotInUse {
        /// Offset of the slot.
        slot: u64,
        /// What it holds.
        block: u64,
    },
    /// There is nothing to free.
    #[error("the slot at {slot:#x} is null")]
    EmptySlot {
        /// Offset of the slot.
        slot: u64,
    },
    /// The block is free already.
    #[error("double free: the block at {block:#x}, owned by the slot at {slot:#x}, is free")]
    DoubleFree {
        /// Offset of the slot.
        slot: u64,
        /// The block's offset.
        block: u64,
    },
    /// The word is not the offset of a block of this heap.
    #[error("{block:#x} is not the offset of a block of this heap")]
    Foreign {
        /// The word.
        block: u64,
    },
    /// No memory is left that could hold a block of this size.
    #[error("no free memory in the heap for a block of {bytes} bytes")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// No block of this heap can be that large.
    #[error("{bytes} bytes asked for; a block of this heap has 1 to {largest}")]
    Size {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of the largest block.
        largest: u64,
    },
    /// There is no such root, hold or place.
    #[error("there is no {what} {index}: there are {count}")]
    NoSuch {
        /// What.
        what: &'static str,
        /// Its index.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// As many blocks are retired as there is room for, and a living reader may still see them.
    #[error("no room to retire another block: {reader} keeps those that were retired before")]
    LimboFull {
        /// The reader; none if nobody has asked who it is.
        reader: InstanceId,
    },
    /// The kind of a record belongs to the heap itself.
    #[error("the record kind {0:#x} is reserved")]
    ReservedKind(u32),
    /// Shared data are not what they can be.
    #[error("the heap is damaged: {what} at {at:#x}")]
    Damaged {
        /// What.
        what: &'static str,
        /// Offset of the damage.
        at: u64,
    },
    /// A lock was not acquired or released.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A log cannot be written or settled.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The allocator of spans complains.
    #[error(transparent)]
    Buddy(#[from] BuddyError),
    /// Memory out of bounds.
    #[error(transparent)]
    Memory(#[from] ShmError),
}
