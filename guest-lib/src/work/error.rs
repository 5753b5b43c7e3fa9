//! What can go wrong with a job.

use lupin_abi::InstanceId;

use crate::shm::ShmError;

/// Why a job cannot be created, opened or worked on.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The memory holds something else.
    #[error("this segment does not hold a job of the expected kind: {0}")]
    NotThisJob(&'static str),
    /// The memory is too small for the job.
    #[error("the job needs a segment of {needed} bytes, this one has {available}")]
    TooSmall {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// A number of the specification is out of its range.
    #[error("a job's {what} must be in {allowed}, not {value}")]
    Spec {
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The rule.
        allowed: &'static str,
    },
    /// The job is there already.
    #[error("the job exists")]
    Exists,
    /// Somebody alive is creating it.
    #[error("the job is being created by thread {0}: try again in a moment")]
    BeingCreated(InstanceId),
    /// Its creator died in the middle.
    #[error("the creator of the job (thread {0}) died before it was complete: create it again")]
    Unfinished(InstanceId),
    /// The arena is used up.
    #[error("the job's arena of {capacity} bytes is used up; {wanted} more were wanted")]
    ArenaFull {
        /// Bytes in the arena.
        capacity: u64,
        /// Bytes wanted.
        wanted: u64,
    },
    /// A result is larger than any may be.
    #[error("a result of {0} bytes is larger than a unit may have")]
    ResultTooLarge(u64),
    /// A unit gave two different results.
    #[error(
        "unit {unit} gave a result of {found} bytes after one of {placed}: units must be pure \
         functions of their input"
    )]
    NotPure {
        /// Unit, counted over all phases.
        unit: u32,
        /// Bytes placed by the first attempt.
        placed: u64,
        /// Bytes of this attempt.
        found: u64,
    },
    /// A stored result is damaged.
    #[error("the result of unit {unit} is damaged: {detail}")]
    Damaged {
        /// Unit, counted over all phases.
        unit: u32,
        /// How.
        detail: &'static str,
    },
    /// Memory out of bounds: the job's header lies.
    #[error(transparent)]
    Memory(#[from] ShmError),
}
