//! What can go wrong between a program and its node's agent.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use lupin_abi::AttachError;
use lupin_abi::socket::RefusalCode;

use crate::shm::ShmError;

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the agent's socket.
    #[error(
        "no Lupin agent answers on {path} ({source}): is this program running inside a node of a \
         pod, and is lupin-guest-agent up?", path = path.display()
    )]
    NoAgent {
        /// The socket.
        path: PathBuf,
        /// What the last attempt said.
        source: io::Error,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer to {what} within {waited:?}")]
    Timeout {
        /// The request.
        what: &'static str,
        /// How long this program waited.
        waited: Duration,
    },
    /// The connection broke and could not be restored.
    #[error("the connection to the agent broke during {what}: {source}")]
    Connection {
        /// The request.
        what: &'static str,
        /// How.
        source: io::Error,
    },
    /// The agent sent something that this version does not understand.
    #[error("the agent's answer to {what} makes no sense: {detail}")]
    Protocol {
        /// The request.
        what: &'static str,
        /// What was wrong.
        detail: String,
    },
    /// The agent speaks another version.
    #[error(
        "the agent speaks ABI version {agent}, this program speaks {own}: install matching versions"
    )]
    Version {
        /// The agent's.
        agent: u32,
        /// This program's.
        own: u32,
    },
    /// The agent refused.
    #[error("the agent refused {what}: {message}")]
    Refused {
        /// The request.
        what: &'static str,
        /// For programs.
        code: RefusalCode,
        /// For people.
        message: String,
    },
    /// The segment is there, and smaller than it was asked for.
    #[error("the segment `{name}` exists and has {size} bytes of the {needed} that are needed")]
    Smaller {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// Bytes asked for.
        needed: u64,
    },
    /// The pod memory that the agent handed out is not what it should be.
    #[error("cannot attach to the pod: {0}")]
    Attach(#[from] AttachError),
    /// Memory that was to be guarded cannot be.
    #[error(transparent)]
    Guard(#[from] crate::revocation::GuardError),
    /// Memory could not be mapped.
    #[error(transparent)]
    Shm(#[from] ShmError),
    /// The agent that answers now belongs to another life of the node than this program.
    #[error("this program belongs to node {own}, but the agent that answers is of {agent}")]
    OtherLife {
        /// The node instance that this program attached to.
        own: lupin_abi::InstanceId,
        /// The one that answers now.
        agent: lupin_abi::InstanceId,
    },
}

impl ClientError {
    /// The agent's reason, if it refused.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}
