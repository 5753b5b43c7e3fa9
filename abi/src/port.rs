//! Frames between the fabric manager and a node's agent.
//!
//! They travel over the stream port `org.lupin.agent` of a guest, or over a UNIX stream socket
//! of a namespace node. The doorbell port `org.lupin.fabric` carries bytes without meaning:
//! whoever is rung re-reads the generation table and the event ring.
//!
//! A frame is a header of 12 bytes and a body: magic `LPF1`, length of the body, CRC-32 of the
//! body, all little-endian; then the body in postcard encoding. A stream that does not follow
//! this is closed by whoever notices, and both sides start anew.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::id::Generation;

/// Name of the doorbell port inside a guest: `/dev/virtio-ports/org.lupin.fabric`.
pub const FABRIC_PORT: &str = "org.lupin.fabric";
/// Name of the message port inside a guest: `/dev/virtio-ports/org.lupin.agent`.
pub const AGENT_PORT: &str = "org.lupin.agent";

/// Bytes of a frame header.
pub const FRAME_HEADER: usize = 12;
/// Longest body of a frame, in bytes.
pub const MAX_FRAME: usize = 64 << 10;
/// Longest chunk of a stream in one frame, in bytes: leaves room for the encoding.
pub const MAX_CHUNK: usize = 32 << 10;
/// Bytes that a side may send on a channel and direction before the other grants more.
pub const INITIAL_CREDIT: u32 = 256 << 10;

const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"LPF1");

/// From the fabric manager to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// First on every connection. The agent answers with [`ToManager::Hello`], also when the
    /// identity is not its own; the manager decides.
    Hello {
        /// [`ABI_VERSION`](crate::ABI_VERSION) of the manager.
        version: u32,
        /// Pod id.
        pod_id: u128,
    },
    /// Run a command. The channel is chosen by the manager and unused until `Exited`.
    Exec {
        /// Channel.
        channel: u32,
        /// Program and arguments; at least one.
        argv: Vec<String>,
        /// Variables added to the agent's own environment.
        env: Vec<(String, String)>,
        /// Working directory; `/` if absent.
        cwd: Option<String>,
    },
    /// Bytes for the standard input of a command; empty means end of file.
    Stdin {
        /// Channel.
        channel: u32,
        /// At most [`MAX_CHUNK`] bytes, within the credit.
        #[serde(with = "bytes")]
        data: Vec<u8>,
    },
    /// Send a signal to the process group of a command.
    Signal {
        /// Channel.
        channel: u32,
        /// Linux signal number.
        signal: i32,
    },
    /// The manager took this many bytes of output of a command.
    Credit {
        /// Channel.
        channel: u32,
        /// Bytes of standard output and error together.
        bytes: u32,
    },
    /// End the node in an orderly way: end commands, sync, power off.
    Shutdown {
        /// Milliseconds between SIGTERM and SIGKILL to processes.
        grace_ms: u32,
    },
    /// Wake sleepers of this node.
    Wake(Wake),
    /// Thread instances of another node died.
    Deaths,
    /// Another node has notifications of groups for the members of this one.
    Groups,
}

/// A wake-up on its way to other nodes. A hint: any of those who pass it on may drop it, and one
/// that names a place where meanwhile something else lies wakes somebody for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// The futex word, in bytes from the start of the pool; a multiple of 4.
    pub at: u64,
    /// A bit for each [class](crate::NodeId::wake_class) of nodes to reach.
    pub classes: u16,
    /// All sleepers of each node, or one.
    pub all: bool,
}

/// From an agent to the fabric manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToManager {
    /// Answer to [`ToAgent::Hello`]. A namespace node's agent sends its doorbell descriptor as
    /// ancillary data with it.
    Hello {
        /// [`ABI_VERSION`](crate::ABI_VERSION) of the agent.
        version: u32,
        /// Node number.
        node: u32,
        /// Generation.
        generation: Generation,
        /// Version of the agent's package.
        agent: String,
        /// `uname -r`.
        kernel: String,
    },
    /// The command runs.
    Started {
        /// Channel.
        channel: u32,
        /// Its pid inside the node.
        pid: u32,
    },
    /// Output of a command.
    Output {
        /// Channel.
        channel: u32,
        /// Whether it came from standard error.
        stderr: bool,
        /// At most [`MAX_CHUNK`] bytes, within the credit.
        #[serde(with = "bytes")]
        data: Vec<u8>,
    },
    /// The command took this many bytes of its standard input.
    Credit {
        /// Channel.
        channel: u32,
        /// Bytes.
        bytes: u32,
    },
    /// The command is over and all its output was sent; the channel is free.
    Exited {
        /// Channel.
        channel: u32,
        /// How it ended.
        status: ExecStatus,
    },
    /// A line for the manager's log.
    Log {
        /// Text.
        message: String,
    },
    /// Pass a wake-up on to the other nodes that it names.
    Wake(Wake),
    /// Thread instances of this node died: tell the other nodes.
    Deaths,
    /// There are notifications of groups: tell the other nodes.
    Groups,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExecStatus {
    /// It exited with this code.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
    /// It could not be started: errno and text.
    NotStarted(i32, String),
    /// The node died, or the connection to it was lost.
    NodeLost,
}

/// Why bytes are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header does not begin with the magic.
    #[error("not a frame: found {0:#010x} where {FRAME_MAGIC:#010x} belongs")]
    Magic(u32),
    /// The body is longer than allowed.
    #[error("frame of {0} bytes is longer than {MAX_FRAME}")]
    TooLong(usize),
    /// The checksum does not match.
    #[error("frame is damaged: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Stored checksum.
        found: u32,
        /// Computed checksum.
        computed: u32,
    },
    /// The body is not a message of this version.
    #[error("frame does not decode: {0}")]
    Decode(postcard::Error),
}

/// Encodes a message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`] if the encoded body exceeds [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = alloc::vec![0u8; FRAME_HEADER];
    frame = postcard::to_extend(message, frame).map_err(FrameError::Decode)?;
    let body = &frame[FRAME_HEADER..];
    if body.len() > MAX_FRAME {
        return Err(FrameError::TooLong(body.len()));
    }
    let (len, sum) = (body.len() as u32, crc32fast::hash(body));
    frame[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    frame[4..8].copy_from_slice(&len.to_le_bytes());
    frame[8..12].copy_from_slice(&sum.to_le_bytes());
    Ok(frame)
}

/// Collects bytes of a stream and gives out messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they were read.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next whole message; `None` if more bytes are needed.
    ///
    /// # Errors
    /// After an error the stream has lost its framing: close it.
    pub fn next_message<T: for<'a> Deserialize<'a>>(&mut self) -> Result<Option<T>, FrameError> {
        let rest = &self.buffer[self.taken..];
        let Some(header) = rest.first_chunk::<FRAME_HEADER>() else {
            return Ok(None);
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if word(0) != FRAME_MAGIC {
            return Err(FrameError::Magic(word(0)));
        }
        let len = word(4) as usize;
        if len > MAX_FRAME {
            return Err(FrameError::TooLong(len));
        }
        let Some(body) = rest.get(FRAME_HEADER..FRAME_HEADER + len) else {
            return Ok(None);
        };
        let computed = crc32fast::hash(body);
        if word(8) != computed {
            return Err(FrameError::Checksum {
                found: word(8),
                computed,
            });
        }
        let message = postcard::from_bytes(body).map_err(FrameError::Decode)?;
        self.taken += FRAME_HEADER + len;
        Ok(Some(message))
    }
}

/// Byte strings as length and bytes, not as a sequence of numbers.
mod bytes {
    use alloc::vec::Vec;
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(data: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(data)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, v: &[u8]) -> Result<Vec<u8>, E> {
                Ok(v.into())
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
#[path = "port_test.rs"]
mod port_test;
