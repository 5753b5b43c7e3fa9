//! Packets between an agent and the processes of its node.
//!
//! `/run/lupin/agent.sock` is a `SOCK_SEQPACKET` socket: one packet is one message in postcard
//! encoding, at most [`MAX_PACKET`] bytes; descriptors travel as `SCM_RIGHTS` with the packet
//! that announces them. A client sends a request and reads replies until it sees one that is not
//! [`Reply::Event`]; events come only after [`Request::Subscribe`]. Notifications of a group come only
//! after [`GroupRequest::Watch`], on a connection that is used for nothing else.
//!
//! Who the client is the agent learns from the kernel (`SO_PEERCRED`), never from a message.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::groups::{GroupId, GroupReply, GroupRequest};
use crate::id::Generation;

/// Where the agent listens, unless the environment variable [`SOCKET_ENV`] says otherwise.
pub const SOCKET_PATH: &str = "/run/lupin/agent.sock";
/// Environment variable that overrides [`SOCKET_PATH`].
pub const SOCKET_ENV: &str = "LUPIN_AGENT_SOCKET";
/// Longest packet, in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// From a process to its node's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First on every connection.
    Hello {
        /// [`ABI_VERSION`](crate::ABI_VERSION) of the client.
        version: u32,
    },
    /// Become a thread instance of the pod. The instance lives until it is released or the
    /// connection's process, or the named thread of it, dies.
    RegisterThread {
        /// A number to keep across restarts, or `None` for any free one.
        id: Option<u32>,
        /// The thread of the caller's process whose end is the instance's, as the process itself
        /// numbers it (`gettid`); `None` if the instance lives as long as the process.
        tid: Option<u32>,
    },
    /// End a thread instance in an orderly way.
    ReleaseThread {
        /// Its number.
        id: u32,
        /// Its generation.
        generation: Generation,
    },
    /// Create a segment, scrubbed to zero.
    CreateSegment {
        /// Which.
        segment: SegmentName,
        /// Bytes; rounded up to a multiple of 2 MiB.
        size: u64,
        /// Permission bits for owner, group and others, as for a file (0o660 and the like), of a
        /// segment that belongs to no group. Those of a group are for all its members alike.
        mode: u32,
        /// How long it stays.
        lifetime: Lifetime,
    },
    /// Open an existing segment.
    OpenSegment {
        /// Which.
        segment: SegmentName,
        /// Whether it will only be read.
        read_only: bool,
    },
    /// Open a segment once more that the caller had mapped, and that was taken away for the sake of
    /// others. Names the very segment, whatever it is called by now.
    ReopenSegment {
        /// Its number, from [`Reply::Segment`].
        entry: u32,
        /// The use of that number, from [`Reply::Segment`].
        uses: u32,
        /// Whether it will only be read.
        read_only: bool,
    },
    /// Append to a segment that is smaller. What is there stays where it is; what is added is
    /// zero.
    GrowSegment {
        /// Which.
        segment: SegmentName,
        /// Bytes that it is to have at least; rounded up to a multiple of 2 MiB.
        size: u64,
    },
    /// Give a segment another name. Who has it open keeps it.
    RenameSegment {
        /// Which.
        segment: SegmentName,
        /// Its new name, in the same group.
        to: String,
    },
    /// Remove a segment.
    RemoveSegment {
        /// Which.
        segment: SegmentName,
        /// Whether to take it from those who have it open. Where that cannot be done, they keep
        /// it, without a name, until they let it go. Otherwise the request is refused while
        /// anybody else uses it.
        revoke: bool,
    },
    /// List the segments that the caller may read.
    ListSegments,
    /// Send fabric events from `from` on as they happen; 0 means from now on.
    Subscribe {
        /// First sequence number wanted.
        from: u64,
    },
    /// Something about groups.
    Group(GroupRequest),
    /// Send [`Reply::Deaths`] from now on whenever somebody died.
    WatchDeaths,
    /// Wake sleepers of other nodes. Has no reply, and may be dropped: a wake-up is a hint.
    Wake {
        /// The segment, by its number from [`Reply::Segment`].
        segment: u32,
        /// The futex word, in bytes from the segment's start; a multiple of 4.
        offset: u64,
        /// A bit for each [class](crate::NodeId::wake_class) of nodes to reach.
        classes: u16,
        /// All sleepers of each node, or one.
        all: bool,
    },
}

/// Folder beside the agent's socket in which the agents of namespace nodes take a
/// [`Request::Wake`] as a datagram, each on a socket named by its node's number. Only the agents'
/// user may enter it; guests have none.
pub const PEERS: &str = "peers";

/// Longest encoding of a [`Request::Wake`], in bytes.
pub const MAX_WAKE: usize = 24;

/// Names a segment. Each group has names of its own, and so have the segments of no group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentName {
    /// The group that it belongs to: the caller must be a member.
    pub group: Option<GroupId>,
    /// 1 to 64 bytes of `[A-Za-z0-9._-]`, not beginning with a dot.
    pub name: String,
}

/// How long a segment stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifetime {
    /// Until it is removed, or its group is. It outlives processes and nodes, as a file does.
    #[default]
    Kept,
    /// As long as its group has a living member. For segments of groups.
    Members,
}

/// A mapping that the client may make of a descriptor it received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Offset for `mmap`, in bytes.
    pub offset: u64,
    /// Length for `mmap`, in bytes.
    pub size: u64,
}

/// From an agent to a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Answer to [`Request::Hello`]; two descriptors follow with it: the fabric section and the
    /// instances, both to be mapped read-only.
    Welcome {
        /// [`ABI_VERSION`](crate::ABI_VERSION) of the agent.
        version: u32,
        /// This node.
        node: u32,
        /// Its generation.
        generation: Generation,
        /// How to map the first descriptor.
        fabric: Mapping,
        /// How to map the second descriptor.
        instances: Mapping,
    },
    /// The thread instance.
    Thread {
        /// Its number.
        id: u32,
        /// Its generation.
        generation: Generation,
    },
    /// A segment; one descriptor comes with it for each of its extents.
    Segment {
        /// How to map the descriptors, one after the other.
        mappings: Vec<Mapping>,
        /// Whether this request created it.
        created: bool,
        /// Its number, for [`Request::Wake`].
        entry: u32,
        /// Which segment of those that have had the number.
        uses: u32,
        /// Whether what is mapped may be taken away, and is to be opened once more
        /// ([`Request::ReopenSegment`]) by those who still may.
        revocable: bool,
    },
    /// The segments.
    Segments(Vec<SegmentInfo>),
    /// Done, nothing to tell.
    Done,
    /// Something happened in the pod. Not an answer to a request.
    Event(Event),
    /// Events up to, not including, this number were lost to the reader: re-read the generation
    /// table. Not an answer to a request.
    EventsLost {
        /// The next number that will be sent.
        next: u64,
    },
    /// Something about groups.
    Group(GroupReply),
    /// A node failed, or a thread instance died somewhere in the pod: ask whoever judges the
    /// living again. Not an answer to a request.
    Deaths,
    /// The request was not carried out.
    Refused {
        /// Which kind of refusal, for programs.
        code: RefusalCode,
        /// What was wrong and what to do, for people.
        message: String,
    },
}

/// What a segment is, for listings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// The group that it belongs to.
    pub group: Option<GroupId>,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The packet does not decode, or came out of order.
    Protocol,
    /// The client speaks another version.
    Version,
    /// The id belongs to a living thread, or to another client.
    IdTaken,
    /// The caller may not do that.
    Permission,
    /// No such segment, thread or group.
    NotFound,
    /// A segment or group of that name exists.
    Exists,
    /// In use, perhaps on another node.
    Busy,
    /// A name, size or id is not valid.
    Invalid,
    /// Pool, directory or id space is used up.
    NoSpace,
    /// Too many requests or connections of this client.
    Limit,
    /// The agent could not do it; the message and its log say why.
    Failed,
    /// The segments of the group would have more bytes than its creator allowed.
    Quota,
}

/// Encodes a packet.
///
/// # Errors
/// If the message does not fit in [`MAX_PACKET`] bytes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, postcard::Error> {
    let packet = postcard::to_allocvec(message)?;
    if packet.len() > MAX_PACKET {
        return Err(postcard::Error::SerializeBufferFull);
    }
    Ok(packet)
}

/// Decodes a packet; trailing bytes are an error.
///
/// # Errors
/// If the bytes are not a message of this version.
pub fn decode<'a, T: Deserialize<'a>>(packet: &'a [u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(packet)? {
        (message, []) => Ok(message),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_read_back_and_garbage_is_refused() {
        let request = Request::CreateSegment {
            segment: SegmentName {
                group: Some(GroupId::new(3, 7)),
                name: "a".into(),
            },
            size: 1 << 21,
            mode: 0o600,
            lifetime: Lifetime::Members,
        };
        let mut packet = encode(&request).unwrap();
        assert_eq!(decode::<Request>(&packet), Ok(request));
        packet.push(0);
        assert!(decode::<Request>(&packet).is_err());
        for len in 0..packet.len() - 1 {
            assert!(
                decode::<Request>(&packet[..len]).is_err(),
                "prefix of {len}"
            );
        }
        assert!(decode::<Request>(&[0xff; 64]).is_err());
    }
}
