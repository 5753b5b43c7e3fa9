//! Why an operation on a collection failed.

use lupin_abi::InstanceId;

use crate::heap::HeapError;
use crate::lock::LockError;
use crate::log::LogError;
use crate::shm::ShmError;

/// Why an operation on a collection failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectionError {
    /// It is there already.
    #[error("the {0} exists already")]
    Exists(&'static str),
    /// Nobody has begun to create it.
    #[error("there is no {0} here")]
    Absent(&'static str),
    /// The place holds other data.
    #[error("there is no {expected} here, but data that begins with {found:#x}")]
    NotThis {
        /// What was expected.
        expected: &'static str,
        /// The first word.
        found: u64,
    },
    /// Somebody alive is creating it.
    #[error("{0} is still creating it")]
    BeingCreated(InstanceId),
    /// Its creator died; creating it again takes over.
    #[error("{0} died while creating it; create it again")]
    Unfinished(InstanceId),
    /// The memory cannot hold it.
    #[error("it needs {needed} bytes and there are {available}")]
    TooSmall {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// A number that cannot be.
    #[error("{what} cannot be {value}; allowed: {allowed}")]
    Spec {
        /// Which number.
        what: &'static str,
        /// What it was.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// There is no room for more.
    #[error("there is no room for another {what}: capacity {capacity}")]
    Full {
        /// What there is no room for.
        what: &'static str,
        /// How much there can be.
        capacity: u64,
    },
    /// Somebody alive has the place that belongs to one id.
    #[error("{holder} lives and has the place of thread id {id}")]
    InUse {
        /// The thread id.
        id: u32,
        /// Who has the place.
        holder: InstanceId,
    },
    /// The caller is no instance.
    #[error("{0} cannot own anything")]
    NoInstance(InstanceId),
    /// The caller was declared dead and another acts in its place.
    #[error("{0} was declared dead and succeeded")]
    Lost(InstanceId),
    /// The data cannot be what this module stored.
    #[error("the {what} at offset {at:#x} is damaged: {detail}")]
    Damaged {
        /// What.
        what: &'static str,
        /// Where, in bytes from the start of the mapping.
        at: u64,
        /// How.
        detail: &'static str,
    },
    /// An access outside of the mapping.
    #[error(transparent)]
    Memory(#[from] ShmError),
    /// A lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The heap.
    #[error(transparent)]
    Heap(#[from] HeapError),
    /// The participant's log.
    #[error(transparent)]
    Log(#[from] LogError),
}
