//! Requests and replies of the control socket: one JSON object a line, UTF-8.

use std::path::PathBuf;

use lupin_abi::Event;
use serde::{Deserialize, Serialize};

use super::control::{ControlError, Difference, NodeAction, PodStatus};

/// Longest line, in bytes, the newline included.
pub const MAX_LINE: usize = 256 << 10;

/// From a client to the manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A snapshot of the pod. Answer: [`Reply::Status`].
    Status {},
    /// End this life of a node. Answer: [`Reply::Done`], once the kill is on its way.
    Kill {
        /// Id or name.
        node: String,
    },
    /// Do something else to a node: `{"steer":{"node":"n2","action":{"pause":{}}}}`. Answer:
    /// [`Reply::Done`], once it is on its way.
    Steer {
        /// Id or name.
        node: String,
        /// What.
        action: NodeAction,
    },
    /// Bring the pod down. Answer: [`Reply::Done`] at once; the manager closes the connection
    /// when it exits, after the last node has ended.
    Down {
        /// How long nodes may take to end by themselves, in milliseconds.
        grace_ms: u64,
    },
    /// Replace the manager's program. Answer: [`Reply::Done`]; then the connection ends.
    Upgrade {
        /// The program; the same path as now if absent.
        #[serde(default)]
        program: Option<PathBuf>,
    },
    /// Take a node of the pod file into the pod. Answer: [`Reply::Done`], once it is on its way.
    Add {
        /// Id or name in the pod file.
        node: String,
    },
    /// Apply what has changed in the pod file. Answer: [`Reply::Reloaded`].
    Reload {
        /// Only say what would be done.
        #[serde(default)]
        dry_run: bool,
    },
    /// The events of the ring. Answers: any number of [`Reply::Event`] and
    /// [`Reply::EventsLost`], then, without `follow`, [`Reply::Done`].
    Events {
        /// First sequence number; the oldest that the ring holds if absent.
        #[serde(default)]
        from: Option<u64>,
        /// Whether to go on with new events as they happen.
        #[serde(default)]
        follow: bool,
    },
    /// Run a command inside a node. Answer: [`Reply::Exec`]; from then on the connection carries
    /// frames of [`lupin_abi::port`] whose channel is 0: `Stdin` and `Signal` from the client,
    /// within the credit; `Started`, `Output`, `Credit` and `Exited` to it. A client that closes
    /// the connection before `Exited` ends the command.
    Exec {
        /// Id or name.
        node: String,
        /// Program and arguments; at least one.
        argv: Vec<String>,
        /// Variables added to the environment.
        #[serde(default)]
        env: Vec<(String, String)>,
        /// Working directory.
        #[serde(default)]
        cwd: Option<String>,
    },
}

/// From the manager to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Answer to [`Request::Status`].
    Status(PodStatus),
    /// The request was carried out.
    Done {},
    /// Answer to [`Request::Reload`]: what differs.
    Reloaded(Vec<Difference>),
    /// An event of the ring.
    Event(Event),
    /// Events were overwritten before they could be sent to this client: they are in no ring
    /// any more, and the stream goes on with `resume`.
    EventsLost {
        /// First sequence number lost.
        from: u64,
        /// Next sequence number to come.
        resume: u64,
    },
    /// The connection carries frames from here on.
    Exec {},
    /// The request was refused.
    Error(ControlError),
}
