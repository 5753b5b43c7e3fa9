//! The manager's connection to the agent inside a node.
//!
//! One [`AgentLink`] serves one life of a node: the manager starts it together with the node's
//! process and closes it when the node is fenced.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lupin_abi::{Generation, NodeId};

/// Which agent a link belongs to.
#[derive(Clone, Debug)]
pub struct LinkTarget {
    /// The UNIX stream socket that leads to the agent. It need not exist yet.
    pub socket: PathBuf,
    /// The pod's id.
    pub pod_id: u128,
    /// The node.
    pub node: NodeId,
    /// The life of the node that this link serves. An agent of another life is refused.
    pub generation: Generation,
}

/// What an agent said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentInfo {
    /// Version of the agent's package.
    pub agent: String,
    /// `uname -r` inside the node.
    pub kernel: String,
}

/// What a link tells its owner, from the link's own thread: the callback must not block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The agent answered; the doorbell, if it sent one, can be had from
    /// [`AgentLink::doorbell`].
    Up(AgentInfo),
    /// The connection was lost; the link tries again until it is closed.
    Lost(String),
    /// A line for the manager's log.
    Log(String),
}

/// Why a call on a link failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is no connection to the agent at the moment.
    #[error("no connection to the node's agent: {0}")]
    NotConnected(String),
    /// Too many commands run at once.
    #[error("too many commands at once on this node (at most {0})")]
    TooMany(usize),
    /// The command line does not fit into a frame.
    #[error("the command line is too long: {0}")]
    TooLong(String),
}

/// The connection to the agent of one life of a node.
#[derive(Debug)]
pub struct AgentLink {}

impl AgentLink {
    /// Starts to connect, in a thread of the link's own; never blocks.
    pub fn start(
        _target: LinkTarget,
        _notify: impl Fn(LinkEvent) + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }

    /// What the agent said of itself; `None` while there is no connection.
    pub fn agent(&self) -> Option<AgentInfo> {
        None
    }

    /// The doorbell of a namespace node, once its agent has sent it: write 1 to the eventfd to
    /// ring the node. A duplicate that the caller owns; `None` for guests.
    pub fn doorbell(&self) -> Option<OwnedFd> {
        None
    }

    /// Asks the agent to end its node in an orderly way. Returns once the request is queued.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`].
    pub fn shutdown(&self, _grace: Duration) -> Result<(), LinkError> {
        Err(LinkError::NotConnected("not yet".into()))
    }

    /// Ends the link: all its commands end with `NodeLost`. Idempotent; dropping does the same.
    pub fn close(&self) {}
}
