//! What can go wrong in a buddy allocator.

use lupin_abi::InstanceId;

use crate::lock::LockError;
use crate::log::LogError;
use crate::shm::ShmError;

/// Why a chunk was not allocated or freed, or an allocator not created or opened.
#[derive(Debug, thiserror::Error)]
pub enum BuddyError {
    /// No free block is large enough.
    #[error("no room for {units} units in a row: the largest free block has {largest}")]
    NoRoom {
        /// Units wanted, rounded up to a power of two.
        units: u64,
        /// Units of the largest free block.
        largest: u64,
    },
    /// Somebody asked for nothing, or in nobody's name.
    #[error("a chunk must have a size and an owner")]
    Nothing,
    /// The chunk was freed before.
    #[error("the chunk at unit {first} is free already; its last owner was {owner:#x}")]
    DoubleFree {
        /// First unit.
        first: u64,
        /// Who owned it last.
        owner: u64,
    },
    /// The chunk is another's.
    #[error("the chunk at unit {first} belongs to {owner:#x}")]
    Foreign {
        /// First unit.
        first: u64,
        /// Who owns it.
        owner: u64,
    },
    /// No chunk begins there.
    #[error("no chunk begins at unit {first}")]
    NotAChunk {
        /// The unit.
        first: u64,
    },
    /// A number of the specification is out of its range.
    #[error("{what} cannot be {value}: allowed is {allowed}")]
    Spec {
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The rule.
        allowed: &'static str,
    },
    /// The memory holds something else, or an allocator of another shape.
    #[error("there is no such allocator at offset {at}: {why}")]
    NotThis {
        /// Where, in bytes from the start of the mapping.
        at: u64,
        /// What is there instead.
        why: &'static str,
    },
    /// Somebody alive is creating it.
    #[error("the allocator is being created by {0}: try again in a moment")]
    BeingCreated(InstanceId),
    /// It is not complete, and nobody is known to be at it.
    #[error("the allocator is not complete; {0} began to create it: create it again")]
    Unfinished(InstanceId),
    /// Somebody without a log asks.
    #[error("{instance} is no node of this allocator, which has {nodes}")]
    NotANode {
        /// Who.
        instance: InstanceId,
        /// How many nodes it is made for.
        nodes: u32,
    },
    /// The allocator's words contradict each other. Nothing was changed.
    #[error("the allocator is corrupt at offset {at}: its {field} cannot be {found:#x}")]
    Corrupt {
        /// Where, in bytes from the start of the mapping.
        at: u64,
        /// What lies there.
        field: &'static str,
        /// What was found.
        found: u64,
    },
    /// The log refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The lock refused.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The memory is too small, or its words lie.
    #[error(transparent)]
    Memory(#[from] ShmError),
}
