//! The manager's state, owned by one thread.
//!
//! ```text
//!             start             joined
//!   Waiting ---------> Starting -------> Joined
//!     ^                   |                |
//!     |                   +----- failure --+
//!     |                            v
//!     |                         Failing      fence under way; nothing is known to peers
//!     |                            |
//!     |    fenced: generation raised, event appended, live nodes rung
//!     |                            v
//!     +--- restart ---------- (policy) -----> Down
//! ```
//!
//! On the way a joined node may be paused and resumed ([`pause`](super::pause)), and a running one
//! may be asked to end ([`order`](super::order)), perhaps after a while in which it is left alone
//! ([`drain`](super::drain)): all these are states in which it can fail. A node that is down may be
//! removed ([`members`](super::members)).
//!
//! Every state is in the generation table as well, and written there before anything that
//! follows from it is done: whoever takes over reads there how far the manager had come.
//!
//! The state machine never blocks and makes no thread: what takes time it asks of its driver
//! with an [`Effect`], and hears the outcome as a call.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::Clock;
use super::backoff::Histories;
use super::hook::Hook;
use super::phase::{Drain, Life, Phase};
use super::record::Recorder;
use crate::memory::PodMemory;
use crate::podfile::{Backend, Node, Pod};
use crate::power::{Instance, PowerControl, StartRequest};
use crate::runtime::{KeptPod, NodeFolder, PodFolder, RuntimeError, RuntimeFolder};

/// The power backends of a manager.
#[derive(Clone)]
pub struct Backends {
    /// For KVM nodes.
    pub kvm: Arc<dyn PowerControl>,
    /// For namespace nodes.
    pub namespace: Arc<dyn PowerControl>,
}

impl Backends {
    pub(super) fn of(&self, node: &Node) -> &Arc<dyn PowerControl> {
        match node.backend {
            Backend::Kvm(_) => &self.kvm,
            Backend::Namespace => &self.namespace,
        }
    }
}

/// What the state machine asks of its driver.
pub(super) enum Effect {
    /// Fence this life in the background and report to [`Core::fenced`](super::Core::fenced), or
    /// to [`Core::fence_failed`](super::Core::fence_failed).
    Fence(NodeId, Generation, Arc<dyn Instance>),
    /// Run the hook of a node in the background and report to
    /// [`Core::hook_started`](super::Core::hook_started) and
    /// [`Core::hook_ended`](super::Core::hook_ended).
    Hook(NodeId, Generation, Hook),
    /// Report to [`Core::gone`](super::Core::gone) when this process is gone.
    Watch(NodeId, Arc<dyn Instance>),
    /// Keep a connection to the agent of this life.
    Link(NodeId, Generation, PathBuf),
    /// Close the connection to the agent.
    Unlink(NodeId),
    /// Pause (`true`) or resume this life in the background and report to
    /// [`Core::pause_done`](super::Core::pause_done).
    Pause(NodeId, Generation, Arc<dyn Instance>, bool),
    /// Ask the agent to end its node within this time; report failure to
    /// [`Core::cannot_shut_down`](super::Core::cannot_shut_down).
    Shutdown(NodeId, Duration),
}

/// One node.
pub(super) struct NodeControl {
    pub spec: Node,
    pub folder: NodeFolder,
    pub phase: Phase,
    /// The running life.
    pub life: Option<Life>,
    /// The process of a life that is fenced, until it is gone; killed at that time.
    pub remains: Option<(Arc<dyn Instance>, u64)>,
    pub histories: Histories,
    /// It has joined and drains.
    pub drain: Option<Drain>,
    /// It is to be removed as soon as nothing of it is left, not before this time of the clock.
    pub leaving_ns: Option<u64>,
    /// For operators: why it does not run.
    pub detail: Option<String>,
    /// From start to join, in this life.
    pub joined_in_ns: Option<u64>,
    /// How often it was suspected to hang and lived, under this manager.
    pub false_alarms: u64,
}

impl NodeControl {
    /// A node that does not run.
    pub fn new(spec: Node, folder: NodeFolder) -> Self {
        Self {
            spec,
            folder,
            phase: Phase::Down,
            life: None,
            remains: None,
            histories: Histories::default(),
            drain: None,
            leaving_ns: None,
            detail: None,
            joined_in_ns: None,
            false_alarms: 0,
        }
    }
}

/// The state machine of a pod.
pub(super) struct Core {
    pub pod: Arc<Pod>,
    /// The nodes that came while the pod ran.
    pub added: BTreeSet<NodeId>,
    /// Where records are kept.
    pub folder: PodFolder,
    pub memory: Arc<PodMemory>,
    pub backends: Backends,
    pub clock: Clock,
    pub recorder: Recorder,
    pub nodes: BTreeMap<NodeId, NodeControl>,
    pub effects: Vec<Effect>,
    /// When the driver is to call [`look_at_the_due`](Self::look_at_the_due), of the clock.
    pub next_look_ns: Option<u64>,
    /// Going down, and when patience ends.
    pub down_by_ns: Option<u64>,
    /// The program that shall take over.
    pub hand_over: Option<PathBuf>,
}

impl Core {
    /// Takes charge of the pod. Nothing is started or adopted yet.
    pub fn new(
        kept: KeptPod,
        memory: Arc<PodMemory>,
        runtime: &RuntimeFolder,
        backends: Backends,
        clock: Clock,
    ) -> Result<Self, RuntimeError> {
        let folder = runtime.records();
        let mut nodes = BTreeMap::new();
        for spec in &kept.pod.nodes {
            let node = NodeControl::new(spec.clone(), folder.node(&spec.name)?);
            nodes.insert(spec.id, node);
        }
        Ok(Self {
            recorder: Recorder::take_charge(memory.clone(), clock.clone()),
            pod: Arc::new(kept.pod),
            added: kept.added,
            folder,
            memory,
            backends,
            clock,
            nodes,
            effects: Vec::new(),
            next_look_ns: None,
            down_by_ns: None,
            hand_over: None,
        })
    }

    pub fn now(&self) -> u64 {
        (self.clock)()
    }

    /// Takes what is to be done since the last call.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub fn is_going_down(&self) -> bool {
        self.down_by_ns.is_some()
    }

    /// Whether every node is down and every process gone.
    pub fn is_down(&self) -> bool {
        self.nodes
            .values()
            .all(|n| matches!(n.phase, Phase::Down) && n.remains.is_none() && n.life.is_none())
    }

    /// The life that runs, if the node is in a state in which it can fail.
    pub fn running(&self, id: NodeId) -> Option<&Life> {
        let node = self.nodes.get(&id)?;
        matches!(
            node.phase,
            Phase::Starting
                | Phase::Joined(_)
                | Phase::Paused(_)
                | Phase::Ordered(_)
                | Phase::Stopping { .. }
        )
        .then_some(node.life.as_ref())?
    }

    pub fn request<'a>(
        &'a self,
        node: &'a NodeControl,
        generation: Generation,
    ) -> StartRequest<'a> {
        StartRequest {
            node: &node.spec,
            generation,
            folder: &node.folder,
            memory: &self.memory,
            heartbeat_period: self.pod.heartbeat.period,
        }
    }

    /// Leaves a node down for good and says so.
    pub fn leave_down(&mut self, id: NodeId) {
        self.recorder.set_state(id, NodeState::Down);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Down;
        }
    }
}

/// Nanoseconds of a duration, at the type's end for the absurd ones.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
