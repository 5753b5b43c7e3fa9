//! Notifications, and the packets about groups between an agent and the processes of its node.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, InstanceId};

/// A group in one use of its entry: an id that outlives its group names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(u64);

impl GroupId {
    /// The group of entry number `index`, in its `uses`-th use.
    pub const fn new(index: usize, uses: u32) -> Self {
        Self((uses as u64) << 32 | (index as u64 + 1))
    }

    /// The number of its entry; `None` for the word 0 and other words that name none.
    pub const fn index(self) -> Option<usize> {
        (self.0 as u32 as usize).checked_sub(1)
    }

    /// Takes the word as it is stored in pod memory.
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word to store in pod memory.
    pub const fn word(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 as u32, self.0 >> 32)
    }
}

/// A member of a group: a thread instance, and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The thread instance.
    pub thread: InstanceId,
    /// The node instance on which it lives.
    pub node: InstanceId,
    /// Its process, as its node numbers it.
    pub pid: u32,
}

/// How a member ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum End {
    /// It is gone; nobody could tell how.
    Unknown,
    /// Its process exited with this code.
    Exited(i32),
    /// Its process was killed by this signal.
    Killed(i32),
    /// Its node failed.
    Node,
    /// Its thread ended and the process went on: the thread returned, panicked or made the
    /// `exit` system call, or the process began another program (`exec`).
    Thread,
}

impl End {
    /// From the status word of `wait(2)`.
    pub const fn from_wait_status(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Exited(status >> 8 & 0xff),
            signal => Self::Killed(signal),
        }
    }

    pub(super) const fn word(self) -> u64 {
        let (tag, value) = match self {
            Self::Unknown => (0, 0),
            Self::Exited(code) => (1, code),
            Self::Killed(signal) => (2, signal),
            Self::Node => (3, 0),
            Self::Thread => (4, 0),
        };
        tag | (value as u32 as u64) << 32
    }

    pub(super) const fn from_word(word: u64) -> Self {
        let value = (word >> 32) as i32;
        match word as u32 {
            1 => Self::Exited(value),
            2 => Self::Killed(value),
            3 => Self::Node,
            4 => Self::Thread,
            _ => Self::Unknown,
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A member came.
    Joined {
        /// Who.
        member: Member,
    },
    /// A member whose death was told came back, in a new life.
    Rejoined {
        /// Who.
        member: Member,
        /// The generation of the life that had ended.
        previous: Generation,
    },
    /// A member left in an orderly way.
    Left {
        /// Who.
        member: Member,
    },
    /// A member exited or crashed. It stores nothing any more.
    Died {
        /// Who.
        member: Member,
        /// How.
        end: End,
    },
    /// A node on which the group has had members failed. The deaths of its members follow.
    NodeFailed {
        /// Which life of which node.
        node: InstanceId,
    },
    /// A node that had failed takes part again.
    NodeBack {
        /// Which life of which node.
        node: InstanceId,
    },
    /// A member was made to leave. It may live on, and hold locks: it is not dead.
    Expelled {
        /// Who.
        member: Member,
        /// The user who asked for it.
        by: u32,
    },
}

/// One notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notification {
    /// Its number in its group, from 1, without gaps.
    pub seq: u64,
    /// What happened.
    pub what: What,
}

/// Words of a notification in the ring.
pub(super) const WORDS: usize = 6;

impl Notification {
    pub(super) fn to_words(self) -> [u64; WORDS] {
        let none = Member {
            thread: InstanceId::NONE,
            node: InstanceId::NONE,
            pid: 0,
        };
        let (kind, member, detail) = match self.what {
            What::Joined { member } => (1, member, 0),
            What::Rejoined { member, previous } => (2, member, previous.into()),
            What::Left { member } => (3, member, 0),
            What::Died { member, end } => (4, member, end.word()),
            What::NodeFailed { node } => (5, Member { node, ..none }, 0),
            What::NodeBack { node } => (6, Member { node, ..none }, 0),
            What::Expelled { member, by } => (7, member, by.into()),
        };
        [
            self.seq,
            kind,
            member.thread.word(),
            member.node.word(),
            member.pid.into(),
            detail,
        ]
    }

    pub(super) fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let [seq, kind, thread, node, pid, detail] = words;
        let node = InstanceId::from_word(node);
        let member = Member {
            thread: InstanceId::from_word(thread),
            node,
            pid: pid as u32,
        };
        let what = match kind {
            1 => What::Joined { member },
            2 => What::Rejoined {
                member,
                previous: detail as u32,
            },
            3 => What::Left { member },
            4 => What::Died {
                member,
                end: End::from_word(detail),
            },
            5 => What::NodeFailed { node },
            6 => What::NodeBack { node },
            7 => What::Expelled {
                member,
                by: detail as u32,
            },
            _ => return None,
        };
        Some(Self { seq, what })
    }
}

/// A group's secret, as it is presented. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Fewest bytes of a secret. It must be a random token, not a password that could be guessed:
    /// pod memory holds a fast hash of it.
    pub const MIN: usize = 16;
    /// Most bytes of a secret.
    pub const MAX: usize = 256;

    /// A secret of these bytes; its length is checked by the agent.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// Who may join a group. All that is set must hold; if nothing is set, only the creator's user
/// may join.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// Whoever joins must present this secret.
    pub secret: Option<Secret>,
    /// Whoever joins must be one of these users, or in one of `gids`. At most
    /// [`MAX_RULES`](super::MAX_RULES).
    pub uids: Vec<u32>,
    /// Whoever joins must be in one of these groups of the operating system, or one of `uids`. At
    /// most [`MAX_RULES`](super::MAX_RULES).
    pub gids: Vec<u32>,
}

/// A request about groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupRequest {
    /// Create a group.
    Create {
        /// Name: 1 to 64 bytes of `[A-Za-z0-9._-]`, not beginning with a dot.
        name: String,
        /// Who may join.
        admission: Admission,
        /// Bytes that its segments may have together; `None` for no limit but the pool.
        quota: Option<u64>,
    },
    /// Change the rule for who may join. Who is a member stays one. For the group's creator's user,
    /// and root.
    SetAdmission {
        /// Its name.
        name: String,
        /// Who may join from now on.
        admission: Admission,
    },
    /// Remove a group without living members. For its creator's user, and root.
    Remove {
        /// Its name.
        name: String,
    },
    /// List the groups whose rule the caller meets.
    List,
    /// Make thread instances of the caller's process members.
    Join {
        /// The group's name.
        name: String,
        /// Its secret.
        secret: Option<Secret>,
        /// Ids and generations.
        threads: Vec<(u32, Generation)>,
    },
    /// End memberships of thread instances of the caller's process in an orderly way.
    Leave {
        /// The group.
        group: GroupId,
        /// Ids and generations.
        threads: Vec<(u32, Generation)>,
    },
    /// List members. For members.
    Members {
        /// The group.
        group: GroupId,
        /// Where the list before this one ended; 0 at first.
        after: u32,
    },
    /// Send the group's notifications from number `from` on as they happen. For members.
    Watch {
        /// The group.
        group: GroupId,
        /// First number wanted, at least 1.
        from: u64,
    },
    /// End the membership of others. For the group's creator's user, and root.
    Expel {
        /// The group's name.
        name: String,
        /// Id and generation of a living member.
        thread: (u32, Generation),
        /// All members of its process, and not it alone.
        process: bool,
    },
}

/// An agent's answer or message about groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupReply {
    /// Created.
    Created {
        /// The group.
        group: GroupId,
    },
    /// The groups.
    Groups(Vec<GroupInfo>),
    /// The thread instances are members.
    Joined {
        /// The group.
        group: GroupId,
        /// The number of the group's newest notification before this request changed anything.
        before: u64,
    },
    /// Members, as they were when notification `seq` was the newest.
    Members {
        /// Number of the newest notification that the list takes into account.
        seq: u64,
        /// The members, the dead that may come back among them.
        members: Vec<MemberInfo>,
        /// If there are more: what to ask for next.
        more: Option<u32>,
    },
    /// Notifications, with numbers in order. Not an answer to a request.
    Notices(Vec<Notification>),
    /// Notifications up to, not including, this number were lost to the reader: ask for the
    /// members. Not an answer to a request.
    Overflow {
        /// The next number that will be sent.
        next: u64,
    },
    /// The process is no longer a member, or the group is gone: there is nothing more to come.
    /// Not an answer to a request.
    Ended,
    /// The memberships are over.
    Expelled {
        /// How many.
        members: u32,
        /// What becomes of the memory that their process has mapped.
        memory: Leftover,
    },
}

/// What an expelled process has left of the memory of the group's segments. It is given none of it
/// again in any case, unless it is admitted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leftover {
    /// Nothing, as soon as the agent of its node has heard: what it has mapped is taken away.
    Nothing,
    /// Everything: other threads of the process are still members.
    Membership,
    /// What it has mapped, for as long as it runs: its node cannot take a mapping away.
    Mappings,
}

/// What a group is, for listings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Name.
    pub name: String,
    /// Living members.
    pub members: u32,
    /// The user who created it.
    pub uid: u32,
    /// Whether a secret is asked for.
    pub secret: bool,
}

/// A member, for listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Who.
    pub member: Member,
    /// How it ended; `None` while it lives.
    pub end: Option<End>,
}
