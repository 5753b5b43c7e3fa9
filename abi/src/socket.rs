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
use crate::groups::{GroupReply, GroupRequest};
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
        /// Name: 1 to 64 bytes of `[A-Za-z0-9._-]`, not beginning with a dot.
        name: String,
        /// Bytes; rounded up to a multiple of 2 MiB.
        size: u64,
        /// Permission bits for owner, group and others, as for a file (0o660 and the like).
        mode: u32,
    },
    /// Open an existing segment.
    OpenSegment {
        /// Its name.
        name: String,
        /// Whether it will only be read.
        read_only: bool,
    },
    /// Remove a segment. Refused while another node has it open.
    RemoveSegment {
        /// Its name.
        name: String,
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
    /// A segment; one descriptor comes with it.
    Segment {
        /// How to map the descriptor.
        mapping: Mapping,
        /// Whether this request created it.
        created: bool,
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
            name: "a".into(),
            size: 1 << 21,
            mode: 0o600,
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
