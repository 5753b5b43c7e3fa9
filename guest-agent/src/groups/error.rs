//! What can go wrong with groups.

use lupin::lock::LockError;
use lupin_abi::InstanceId;
use lupin_abi::socket::RefusalCode;

/// Why something could not be done with groups.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The name breaks a rule.
    #[error("group name {0:?} is not 1 to 64 bytes of [A-Za-z0-9._-] without a leading dot")]
    Name(String),
    /// The rule for admission is not possible.
    #[error("the group's rule has {0}")]
    Rules(String),
    /// The name is taken.
    #[error("group {0:?} exists")]
    Exists(String),
    /// No such group.
    #[error("there is no group {0:?}")]
    NotFound(String),
    /// The caller may not do that.
    #[error("group {name:?}: {why}")]
    Denied {
        /// Which group.
        name: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// Nobody in the group is this.
    #[error("thread {thread} is no living member of group {name:?}")]
    NoMember {
        /// Which group.
        name: String,
        /// Who was named.
        thread: InstanceId,
    },
    /// Nobody expels itself.
    #[error("this process would expel itself: leave the group instead")]
    Own,
    /// The group has living members.
    #[error("group {name:?} has {members} living members")]
    Busy {
        /// Which group.
        name: String,
        /// How many.
        members: usize,
    },
    /// A table is full.
    #[error("the pod has no room for more {0}")]
    Full(&'static str),
    /// The user has too many.
    #[error("this user has {0} already, and may not have more")]
    Quota(String),
    /// There is no randomness for a salt.
    #[error("/dev/urandom: {0}")]
    Salt(std::io::Error),
    /// The lock cannot be had.
    #[error("the groups' lock: {0}")]
    Lock(#[from] LockError),
    /// This node is about to be stopped.
    #[error("this node drains: it will be stopped and admits no new member; join on another node")]
    Draining,
    /// This node was declared dead.
    #[error("this node was declared dead: it changes nothing in the pod any more")]
    Fenced,
}

impl GroupError {
    /// The kind of refusal that it is for a client.
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Name(_) | Self::Rules(_) | Self::Own => RefusalCode::Invalid,
            Self::Exists(_) => RefusalCode::Exists,
            Self::NotFound(_) | Self::NoMember { .. } => RefusalCode::NotFound,
            Self::Denied { .. } => RefusalCode::Permission,
            Self::Busy { .. } | Self::Draining => RefusalCode::Busy,
            Self::Full(_) => RefusalCode::NoSpace,
            Self::Quota(_) => RefusalCode::Limit,
            Self::Salt(_) | Self::Lock(_) | Self::Fenced => RefusalCode::Failed,
        }
    }
}
