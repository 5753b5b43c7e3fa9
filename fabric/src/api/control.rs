//! The seam between the manager and those who steer it.
//!
//! The server of this module's parent turns requests of clients into calls of [`PodControl`];
//! the manager implements it, and tests implement it with fakes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lupin_abi::event::Cause;
use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::{Generation, NodeId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::schema;
use crate::agent_link::AgentLink;
pub use crate::podfile::{Difference, Effect};
use crate::sys::usage::Usage;

/// What a manager can be asked to do.
///
/// Every method is called from threads of the control server, many at once, and must return
/// promptly: none may wait for a node. What takes time is started here and seen in the events.
pub trait PodControl: Send + Sync {
    /// A snapshot of the pod.
    fn status(&self) -> PodStatus;

    /// The mapped fabric section: generation table and event ring, the record of what happened.
    fn fabric(&self) -> &FabricSection;

    /// Ends this life of a node as if it had failed, with cause
    /// [`Operator`](lupin_abi::Cause::Operator): fence, generation, ring, then restart as its
    /// policy says. Returns once the kill is on its way.
    ///
    /// # Errors
    /// [`ControlError::NoSuchNode`]; [`ControlError::WrongState`] unless the node runs.
    fn kill(&self, node: NodeId) -> Result<(), ControlError>;

    /// Does something to one node. Returns once it is decided, on record and on its way; the events
    /// tell the rest.
    ///
    /// # Errors
    /// [`ControlError::NoSuchNode`]; [`ControlError::GoingDown`]; [`ControlError::WrongState`]
    /// with what would be needed; [`ControlError::NotRecorded`], and then nothing was changed.
    fn steer(&self, node: NodeId, action: NodeAction) -> Result<(), ControlError>;

    /// Begins to bring the whole pod down: nodes get `grace` to end by themselves, then they are
    /// ended. Returns at once; the manager process exits when all is done. Idempotent.
    fn down(&self, grace: Duration);

    /// Begins to replace the manager's program by `program` (the same path if absent), in the same
    /// process: nodes run on, and the new program takes them over with the next epoch. Its
    /// control socket answers again when it is in charge.
    ///
    /// # Errors
    /// [`ControlError::GoingDown`]; [`ControlError::BadRequest`] if the program does not run, or
    /// the pod file could not be used by it. Nothing was begun then.
    fn upgrade(&self, program: Option<PathBuf>) -> Result<(), ControlError>;

    /// Takes a node of the pod file as it is now into the running pod, and starts it.
    ///
    /// # Errors
    /// [`ControlError::BadRequest`] if the pod file does not read, or does not have that node, or
    /// if the pod memory has no room for it; [`ControlError::WrongState`] if the pod has it
    /// already; [`ControlError::GoingDown`]; [`ControlError::NotRecorded`].
    fn add(&self, node: &str) -> Result<NodeId, ControlError>;

    /// Compares the pod file as it is now with the pod, and applies what can be applied while it
    /// runs: all of that or nothing. Returns everything that differs. With `dry_run` nothing is
    /// applied.
    ///
    /// # Errors
    /// [`ControlError::BadRequest`] if the pod file does not read, or names what is not there;
    /// [`ControlError::GoingDown`]; [`ControlError::NotRecorded`].
    fn reload(&self, dry_run: bool) -> Result<Vec<Difference>, ControlError>;

    /// The connection to the agent of a node's current life.
    ///
    /// # Errors
    /// [`ControlError::NoSuchNode`]; [`ControlError::WrongState`] if the node has no process.
    fn link(&self, node: NodeId) -> Result<Arc<AgentLink>, ControlError>;
}

/// What can be done to a node, beside killing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NodeAction {
    /// Stop its virtual CPUs, or all its processes. No heartbeat is expected of it meanwhile: a
    /// paused node is not a failed one. It must have joined.
    Pause {},
    /// Let a paused node run again.
    Resume {},
    /// End it in an orderly way and start it again at once, whatever its policy says. For its
    /// peers this is a failure like any other: its generation is raised once.
    Restart {
        /// How long it may take to end by itself, in milliseconds; then it is ended.
        grace_ms: u64,
    },
    /// End it in an orderly way and leave it down.
    Stop {
        /// How long it may take to end by itself, in milliseconds; then it is ended.
        grace_ms: u64,
    },
    /// Start a node that is down, or that waits for its time to be started again.
    Start {},
    /// Let the members of groups move off a node, and then stop it.
    Drain {
        /// How long they may take, in milliseconds.
        wait_ms: u64,
        /// How long the node may take to end by itself then, in milliseconds.
        grace_ms: u64,
    },
    /// Let a node that drains go on as before.
    CancelDrain {},
    /// Stop a node if it runs, and take it out of the pod for good.
    Remove {
        /// How long it may take to end by itself, in milliseconds; then it is ended.
        grace_ms: u64,
    },
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum ControlError {
    /// The pod has no such node.
    #[error("the pod has no node {node}")]
    NoSuchNode {
        /// What the caller named: an id or a name.
        node: String,
    },
    /// The node's state does not allow it.
    #[error("node {node} is {state}: {why}")]
    WrongState {
        /// The node's id.
        node: u32,
        /// Its state.
        state: NodeState,
        /// What would be needed, in a few words.
        why: String,
    },
    /// The pod is going down.
    #[error("the pod is going down")]
    GoingDown,
    /// The node's agent cannot be reached.
    #[error("the agent of node {node} cannot be reached: {why}")]
    Agent {
        /// The node's id.
        node: u32,
        /// What happened.
        why: String,
    },
    /// Too many clients or commands at once.
    #[error("too many {what} at once (at most {limit})")]
    TooMany {
        /// Of what.
        what: String,
        /// The bound.
        limit: usize,
    },
    /// What was asked for could not be put on record, so it was not begun.
    #[error("nothing was changed, because it cannot be put on record: {why}")]
    NotRecorded {
        /// What the file system said.
        why: String,
    },
    /// The request is malformed.
    #[error("bad request: {why}")]
    BadRequest {
        /// What is wrong with it.
        why: String,
    },
    /// The manager failed inside.
    #[error("the manager failed: {why}")]
    Internal {
        /// What happened.
        why: String,
    },
}

/// Where the pod as a whole stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodPhase {
    /// The manager runs and keeps the nodes running.
    Running,
    /// It was told to bring the pod down.
    GoingDown,
}

/// A snapshot of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PodStatus {
    /// The pod's name.
    pub pod: String,
    /// The pod's random id, in hexadecimal: new at every format.
    pub pod_id: String,
    /// Where it stands.
    #[schema(value_type = schema::PodPhase)]
    pub phase: PodPhase,
    /// Process id of the manager.
    pub manager_pid: u32,
    /// How many managers have taken charge of this pod memory, this one included.
    pub epoch: u64,
    /// Process id of the manager that stands by, if there is one.
    pub backup_pid: Option<u32>,
    /// The pod file in use.
    #[schema(value_type = String)]
    pub pod_file: PathBuf,
    /// The pod memory.
    #[schema(value_type = String)]
    pub memory: PathBuf,
    /// Size of the pod memory, in bytes.
    pub memory_bytes: u64,
    /// How long a node may take to join, in milliseconds.
    pub join_timeout_ms: u64,
    /// Number of the newest event; 0 if nothing ever happened. What is asked for after this
    /// snapshot shows in later events.
    #[serde(default)]
    pub newest_event: u64,
    /// The nodes of the pod file, by id.
    pub nodes: Vec<NodeStatus>,
}

impl PodStatus {
    /// Finds a node by what an operator typed: its name, else its id.
    pub fn find(&self, id_or_name: &str) -> Option<&NodeStatus> {
        let by_name = self.nodes.iter().find(|node| node.name == id_or_name);
        by_name.or_else(|| {
            let id: u32 = id_or_name.parse().ok()?;
            self.nodes.iter().find(|node| node.id == id)
        })
    }

    /// Measures what each node that has a process takes of the host. Reads some files of `/proc`
    /// for each of its threads, so this is for the thread that serves whoever asked.
    pub fn measure(&mut self) {
        for node in &mut self.nodes {
            node.usage = node.pid.and_then(Usage::of_tree);
        }
    }
}

/// A snapshot of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// Node number.
    pub id: u32,
    /// Its name in the pod file.
    pub name: String,
    /// Which backend runs it: `kvm` or `namespace`.
    pub backend: String,
    /// Where it stands in its life.
    #[schema(value_type = schema::State)]
    pub state: NodeState,
    /// Its current generation; 0 if it never lived.
    pub generation: Generation,
    /// Why it last failed.
    #[schema(value_type = schema::FailureCause)]
    pub cause: Cause,
    /// How often it was started again.
    pub restarts: u32,
    /// How long it has been in this state, in nanoseconds.
    pub in_state_ns: u64,
    /// How long it took from start to join in this life, in nanoseconds.
    pub joined_in_ns: Option<u64>,
    /// Process id of its VMM, or of its init.
    pub pid: Option<u32>,
    /// Its runtime folder: console log, sockets.
    #[schema(value_type = String)]
    pub folder: PathBuf,
    /// What an operator should know about it, if anything; why it did not start, for example.
    pub detail: Option<String>,
    /// Its heartbeat; absent unless the manager listens to one.
    #[serde(default)]
    pub heartbeat: Option<HeartbeatStatus>,
    /// How often it was suspected to hang and was found to live, since this manager took charge:
    /// rung half-way to its deadline, or silent beyond it on the wall clock alone.
    #[serde(default)]
    pub false_alarms: u64,
    /// What it takes of the host; absent if it has no process, or was not measured.
    #[serde(default)]
    pub usage: Option<Usage>,
}

/// How a node stands with its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeartbeatStatus {
    /// How long ago the manager saw it beat, in nanoseconds.
    pub age_ns: u64,
    /// How much time it has left to beat, in nanoseconds, counted only while it could run.
    pub left_ns: u64,
    /// How much it has after a beat, in nanoseconds.
    pub deadline_ns: u64,
}
