//! What can go wrong with a log.

use lupin_abi::InstanceId;

/// Why a log cannot be used, or a record not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// There is no room for a log.
    #[error(
        "a log of {size} bytes cannot lie at offset {at} of a mapping of {mapped} bytes: it must \
         lie inside and begin at a multiple of 64"
    )]
    Place {
        /// Where it should begin, in bytes from the start of the mapping.
        at: u64,
        /// Its size in bytes.
        size: u64,
        /// Bytes mapped.
        mapped: u64,
    },
    /// A log of a size that no log has.
    #[error("a log may have 1 to 65536 entries, not {0}")]
    Entries(u32),
    /// The mapping allows no stores.
    #[error("the log at offset {at} is mapped read-only")]
    ReadOnly {
        /// Where the log begins.
        at: u64,
    },
    /// Whoever wants to write a record is no instance.
    #[error("{0} cannot own a record")]
    NoInstance(InstanceId),
    /// A committed record was not retired: its owner died while it was being applied.
    #[error("record {seq} of {owner} in the log is committed and not applied: settle it first")]
    Unsettled {
        /// Whose record it is.
        owner: InstanceId,
        /// Its sequence number.
        seq: u64,
    },
    /// A record cannot change, or read, this word.
    #[error("a record cannot hold the word at offset {at}: {why}")]
    Target {
        /// Offset in bytes from the start of the mapping.
        at: u64,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The record has as many entries as the log can hold.
    #[error("the record has {entries} entries, and the log has no room for more")]
    Full {
        /// Entries of the log.
        entries: u32,
    },
    /// The log holds what no program of this library wrote. Nothing of it was applied.
    #[error("the log is corrupt at offset {at}: its {field} cannot be {found:#x}")]
    Corrupt {
        /// Where, in bytes from the start of the mapping.
        at: u64,
        /// What lies there.
        field: &'static str,
        /// What was found.
        found: u64,
    },
}
