//! What can go wrong with the directory.

use lupin::buddy::BuddyError;
use lupin::lock::LockError;
use lupin_abi::groups::GroupId;
use lupin_abi::socket::RefusalCode;

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
    /// The group's segments would have more bytes than its creator allowed.
    #[error(
        "the segments of group {group} may have {quota} bytes together; they have {used}, and \
         {asked} more are asked for"
    )]
    Quota {
        /// Which group.
        group: GroupId,
        /// Bytes allowed.
        quota: u64,
        /// Bytes that its segments have.
        used: u64,
        /// Bytes asked for, rounded up.
        asked: u64,
    },
    /// The user has too many segments.
    #[error("this user has {0} segments already, and may not have more")]
    TooMany(usize),
    /// A segment of no group cannot live as long as the group's members.
    #[error("segment {0:?} belongs to no group, so that it cannot end with the group's members")]
    NoMembers(String),
    /// The allocator of the pool cannot be used.
    #[error("the pool's allocator: {0}")]
    Allocator(#[from] BuddyError),
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
            Self::Name(_) | Self::Size { .. } | Self::NoMembers(_) => RefusalCode::Invalid,
            Self::Quota { .. } => RefusalCode::Quota,
            Self::TooMany(_) => RefusalCode::Limit,
            Self::Exists(_) => RefusalCode::Exists,
            Self::NotFound(_) => RefusalCode::NotFound,
            Self::Busy { .. } => RefusalCode::Busy,
            Self::NoSpace { .. } => RefusalCode::NoSpace,
            Self::Permission { .. } => RefusalCode::Permission,
            Self::Thread { code, .. } => *code,
            Self::Allocator(_) | Self::Damaged(_) | Self::Lock(_) | Self::Fenced => {
                RefusalCode::Failed
            }
        }
    }
}
