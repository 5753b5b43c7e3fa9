//! The manager's connection to the agent inside a node.
//!
//! One [`AgentLink`] serves one life of a node: the manager starts it together with the node's
//! process and closes it when the node is fenced. A thread of the link's own connects, says
//! hello, and from then on carries frames of [`lupin_abi::port`] in both directions.
//!
//! # Flow control
//!
//! Many commands ([`Exec`]) share one stream. Each direction of each command has a credit of
//! [`INITIAL_CREDIT`] bytes that only the receiver renews, once it has consumed them. So the
//! link's thread always takes what the agent sends: a command whose output nobody reads fills
//! its own queue up to the credit and stops there, without stopping the others.
//!
//! # Trust
//!
//! The other end is a guest. It may send anything at any time: what breaks the protocol ends the
//! connection, what it may legally send is bounded (credit, number of commands, rate of log
//! lines), and nothing it sends is printed without escaping.
//!
//! ```text
//!          connect            Hello answered              bad frame, EOF, error
//! waiting ---------> greeting ---------------> up ---------------------------------+
//!    ^                  | other life, EOF      |                                   |
//!    +------------------+----------------------+--- commands end with NodeLost <---+
//! ```

mod channel;
mod doorbell;
mod exec;
mod greeting;
mod hint;
mod message;
mod receive;
mod worker;

#[cfg(test)]
pub(crate) mod fake;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lupin_abi::port::{self, ExecStatus, INITIAL_CREDIT, ToAgent};
use lupin_abi::{Generation, NodeId};
use nix::sys::eventfd::{EfdFlags, EventFd};

use channel::Channel;
pub use doorbell::ring;
pub use exec::{Exec, ExecSpec};
pub use hint::Hint;
pub use message::ExecMessage;

/// Most commands that may run over one link at once.
pub const MAX_EXECS: usize = 64;

/// Most bytes that wait for an agent that does not read: every command's standard input at its
/// credit, and as much again for the frames around it and the rest.
const MAX_OUTGOING: usize = 2 * MAX_EXECS * INITIAL_CREDIT as usize;

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
    /// The connection could not be made or was lost; the link tries again until it is closed.
    /// Told once for each reason in a row.
    Lost(String),
    /// A line of the agent for the manager's log, without control characters.
    Log(String),
    /// For the other nodes, a limited number a second. A hint: may be dropped.
    Hint(Hint),
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
    /// The command is over.
    #[error("the command is over")]
    Over,
    /// More standard input than the command's credit allows.
    #[error("{sent} bytes of standard input, but only {credit} were granted")]
    Credit {
        /// Bytes offered.
        sent: usize,
        /// Bytes granted.
        credit: u32,
    },
}

/// The connection to the agent of one life of a node.
#[derive(Debug)]
pub struct AgentLink {
    shared: Arc<Shared>,
}

/// What the link's thread, its owner and its commands share.
#[derive(Debug)]
struct Shared {
    target: LinkTarget,
    /// Written after `state` changed in a way that the thread must act on.
    wake: EventFd,
    /// Lock order: `state` before any channel's own lock.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    closed: bool,
    up: Option<AgentInfo>,
    /// Why there is no connection, while there is none.
    why: String,
    doorbell: Option<OwnedFd>,
    channels: HashMap<u32, Arc<Channel>>,
    next_channel: u32,
    /// Encoded frames that the thread has not taken yet.
    outgoing: Vec<u8>,
    /// Bytes that the thread took and has not written yet.
    in_flight: usize,
    /// The connection, for who writes to it while the thread has nothing to write.
    direct: Option<UnixStream>,
}

impl AgentLink {
    /// Starts to connect, in a thread of the link's own; never blocks.
    ///
    /// # Errors
    /// If the thread or its wake-up descriptor cannot be created.
    pub fn start(
        target: LinkTarget,
        notify: impl Fn(LinkEvent) + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let name = format!("agent-link-{}", target.node);
        let shared = Arc::new(Shared {
            target,
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            state: Mutex::new(State {
                closed: false,
                up: None,
                why: "not connected yet".into(),
                doorbell: None,
                channels: HashMap::new(),
                next_channel: first_channel(),
                outgoing: Vec::new(),
                in_flight: 0,
                direct: None,
            }),
        });
        let of_thread = shared.clone();
        std::thread::Builder::new()
            .name(name)
            .spawn(move || worker::run(&of_thread, &notify))?;
        Ok(Arc::new(Self { shared }))
    }

    /// What the agent said of itself; `None` while there is no connection.
    pub fn agent(&self) -> Option<AgentInfo> {
        self.shared.lock().up.clone()
    }

    /// Why there is no connection; `None` while there is one.
    pub fn why_down(&self) -> Option<String> {
        let state = self.shared.lock();
        state.up.is_none().then(|| state.why.clone())
    }

    /// The doorbell of a namespace node, once its agent has sent it: [`ring`] it. A duplicate
    /// that the caller owns; `None` for guests.
    pub fn doorbell(&self) -> Option<OwnedFd> {
        let state = self.shared.lock();
        state
            .doorbell
            .as_ref()
            .and_then(|fd| fd.as_fd().try_clone_to_owned().ok())
    }

    /// Starts a command inside the node. Returns once the request is queued; whether it could be
    /// started is told by the first message.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`], [`LinkError::TooMany`], [`LinkError::TooLong`].
    pub fn exec(&self, spec: ExecSpec) -> Result<Exec, LinkError> {
        let mut state = self.shared.lock();
        if state.channels.len() >= MAX_EXECS {
            return Err(LinkError::TooMany(MAX_EXECS));
        }
        let mut id = state.next_channel;
        while state.channels.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        state.send(&ToAgent::Exec {
            channel: id,
            argv: spec.argv,
            env: spec.env,
            cwd: spec.cwd,
        })?;
        state.next_channel = id.wrapping_add(1);
        let channel = Arc::new(Channel::new(id));
        state.channels.insert(id, channel.clone());
        drop(state);
        self.shared.wake();
        Ok(Exec::new(self.shared.clone(), channel))
    }

    /// Asks the agent to end its node in an orderly way. Returns once the request is queued.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`].
    pub fn shutdown(&self, grace: Duration) -> Result<(), LinkError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.shared.send(&ToAgent::Shutdown { grace_ms })
    }

    /// Ends the link: all its commands end with `NodeLost`. Idempotent; dropping does the same.
    pub fn close(&self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.disconnect("the link to the node was closed");
        drop(state);
        self.shared.wake();
    }
}

impl Drop for AgentLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock in a state that others could not use.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only if the counter is full, in which case the thread is being woken anyway.
        let _ = self.wake.write(1);
    }

    /// Queues a frame for the agent and wakes the thread.
    fn send(&self, message: &ToAgent) -> Result<(), LinkError> {
        self.lock().send(message)?;
        self.wake();
        Ok(())
    }
}

impl State {
    fn send(&mut self, message: &ToAgent) -> Result<(), LinkError> {
        if self.up.is_none() {
            return Err(LinkError::NotConnected(self.why.clone()));
        }
        let frame = port::encode(message).map_err(|e| LinkError::TooLong(e.to_string()))?;
        if self.outgoing.len() + self.in_flight + frame.len() > MAX_OUTGOING {
            let why = "it reads nothing".to_string();
            return Err(LinkError::NotConnected(why));
        }
        self.outgoing.extend_from_slice(&frame);
        Ok(())
    }

    /// Forgets the connection; every command ends with `NodeLost`.
    fn disconnect(&mut self, why: &str) {
        self.up = None;
        self.why = why.into();
        self.doorbell = None;
        self.outgoing = Vec::new();
        self.in_flight = 0;
        self.direct = None;
        for (_, channel) in self.channels.drain() {
            channel.end(ExecStatus::NodeLost);
        }
    }
}

/// Where a link starts to count channels: not where an earlier manager's link to the same agent
/// did, so that late frames of its commands are not taken for ours.
fn first_channel() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) as u32
}

#[cfg(test)]
#[path = "link_test.rs"]
mod link_test;
