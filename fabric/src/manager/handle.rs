//! What other threads see of the manager: a queue for what they want, a view of what is.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::{Generation, NodeId};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::hand_over;
use super::hook::HookOutcome;
use super::judge::Standing;
use super::phase::Phase;
use super::state::Core;
use crate::agent_link::AgentLink;
use crate::api::{
    ControlError, Difference, HeartbeatStatus, NodeAction, NodeStatus, PodControl, PodPhase,
    PodStatus,
};
use crate::memory::PodMemory;
use crate::podfile::{HostLimits, Pod};
use crate::power::Fence;
use crate::sys::clock::monotonic_ns;

/// What other threads ask of the manager's thread.
pub(super) enum Command {
    Kill(NodeId),
    Down(Duration),
    Fenced(NodeId, Generation, Fence),
    /// A fence was not confirmed, and why.
    NotFenced(NodeId, Generation, String),
    LinkUp(NodeId, Generation),
    /// A node stands (`true`) or runs again, after so long; or why not.
    Paused(NodeId, Generation, bool, Result<Duration, String>),
    /// A hook runs.
    HookStarted(NodeId, Generation, u32),
    /// A hook is over, after so long.
    HookEnded(NodeId, Generation, HookOutcome, Duration),
    /// What an operator asks; the answer goes its own way.
    Ask(Question),
}

/// A question to the manager's thread.
pub(super) type Question = Box<dyn FnOnce(&mut Core) + Send>;

/// How long the manager's thread may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// What is known of a node beside the generation table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeView {
    pub pid: Option<u32>,
    pub detail: Option<String>,
    pub joined_in_ns: Option<u64>,
    pub heartbeat: Option<Standing>,
    pub false_alarms: u64,
}

#[derive(Debug, Default)]
pub(super) struct View {
    pub nodes: BTreeMap<NodeId, NodeView>,
    pub going_down: bool,
}

/// The manager as other threads see it.
pub struct ManagerHandle {
    pod: Mutex<Arc<Pod>>,
    memory: Arc<PodMemory>,
    folder: PathBuf,
    epoch: u64,
    /// Process id of the backup manager, 0 if there is none.
    pub backup_pid: AtomicU32,
    /// None once the manager's thread takes no more.
    queue: Mutex<Option<VecDeque<Command>>>,
    pub(super) wake: EventFd,
    view: Mutex<View>,
    pub(super) links: Mutex<BTreeMap<NodeId, Arc<AgentLink>>>,
}

/// Every critical section of this module leaves its data consistent at each step, so a thread
/// that panicked in one has broken nothing.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ManagerHandle {
    pub(super) fn new(
        pod: Arc<Pod>,
        memory: Arc<PodMemory>,
        folder: &Path,
        epoch: u64,
    ) -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            pod: Mutex::new(pod),
            memory,
            folder: folder.into(),
            epoch,
            backup_pid: AtomicU32::new(0),
            queue: Mutex::new(Some(VecDeque::new())),
            wake: EventFd::from_value_and_flags(0, flags)?,
            view: Mutex::default(),
            links: Mutex::default(),
        })
    }

    pub(super) fn send(&self, command: Command) {
        match lock(&self.queue).as_mut() {
            Some(queue) => queue.push_back(command),
            // Who waits for an answer learns that there will be none.
            None => return,
        }
        // Fails only when the counter is full, and then the loop is being woken already.
        let _ = self.wake.write(1);
    }

    pub(super) fn take_commands(&self) -> VecDeque<Command> {
        lock(&self.queue)
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Takes no more commands, and drops those that nobody will obey.
    pub(super) fn close(&self) {
        drop(lock(&self.queue).take());
    }

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        lock(&self.view)
    }

    /// The pod as it is now.
    fn pod(&self) -> Arc<Pod> {
        lock(&self.pod).clone()
    }

    /// Shows other threads where the nodes stand.
    pub(super) fn publish(&self, core: &Core) {
        let mut pod = lock(&self.pod);
        if !Arc::ptr_eq(&pod, &core.pod) {
            *pod = core.pod.clone();
        }
        drop(pod);
        let mut view = self.view();
        view.going_down = core.is_going_down();
        if !view.nodes.keys().eq(core.nodes.keys()) {
            let mut known = std::mem::take(&mut view.nodes);
            let shown = core.nodes.keys();
            view.nodes = shown
                .map(|id| (*id, known.remove(id).unwrap_or_default()))
                .collect();
        }
        // Side by side: there may be many, and this comes with every look at them.
        for (shown, node) in view.nodes.values_mut().zip(core.nodes.values()) {
            shown.pid = node.life.as_ref().map(|life| life.instance.process().pid);
            shown.joined_in_ns = node.joined_in_ns;
            shown.false_alarms = node.false_alarms;
            shown.heartbeat = match &node.phase {
                Phase::Joined(judge) => Some(judge.standing()),
                _ => None,
            };
            if shown.detail != node.detail {
                shown.detail.clone_from(&node.detail);
            }
        }
    }

    pub(super) fn set_link(&self, node: NodeId, link: Option<Arc<AgentLink>>) {
        let mut links = lock(&self.links);
        let old = match link {
            Some(link) => links.insert(node, link),
            None => links.remove(&node),
        };
        drop(links);
        if let Some(old) = old {
            old.close();
        }
    }

    pub(super) fn link_of(&self, node: NodeId) -> Option<Arc<AgentLink>> {
        lock(&self.links).get(&node).cloned()
    }

    /// Asks the manager's thread, which decides about one thing at a time.
    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Core) -> Result<T, ControlError> + Send + 'static,
    ) -> Result<T, ControlError> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.send(Command::Ask(Box::new(move |core| {
            let _ = sender.send(question(core));
        })));
        receiver.recv_timeout(ANSWER_PATIENCE).unwrap_or_else(|_| {
            Err(ControlError::Internal {
                why: "it is ending, or did not answer in time; the events tell what happened"
                    .into(),
            })
        })
    }

    /// The pod file as it is now.
    fn read_file(&self) -> Result<Pod, ControlError> {
        Pod::load(&self.pod().file).map_err(|e| ControlError::BadRequest { why: e.to_string() })
    }

    fn check(&self, node: NodeId) -> Result<NodeState, ControlError> {
        match self.pod().node(node) {
            Some(_) => Ok(self.memory.fabric().entry(node).state()),
            None => Err(ControlError::NoSuchNode {
                node: node.to_string(),
            }),
        }
    }
}

impl PodControl for ManagerHandle {
    fn status(&self) -> PodStatus {
        let now = monotonic_ns();
        let pod = self.pod();
        let view = self.view();
        let nodes = pod.nodes.iter().map(|node| {
            let entry = self.memory.fabric().entry(node.id);
            let known = view.nodes.get(&node.id).cloned().unwrap_or_default();
            NodeStatus {
                id: node.id.get(),
                name: node.name.clone(),
                backend: node.backend.name().into(),
                state: entry.state(),
                generation: entry.generation(),
                cause: entry.cause(),
                restarts: entry.restarts(),
                in_state_ns: now.saturating_sub(entry.since_ns()),
                joined_in_ns: known.joined_in_ns,
                pid: known.pid,
                folder: self.folder.join("nodes").join(&node.name),
                detail: known.detail,
                heartbeat: known.heartbeat.map(|standing| HeartbeatStatus {
                    age_ns: now.saturating_sub(standing.changed_ns),
                    left_ns: standing.deadline_ns.saturating_sub(standing.used_ns),
                    deadline_ns: standing.deadline_ns,
                }),
                false_alarms: known.false_alarms,
                usage: None,
            }
        });
        PodStatus {
            pod: pod.name.clone(),
            pod_id: format!("{:032x}", self.memory.header().pod_id()),
            phase: if view.going_down {
                PodPhase::GoingDown
            } else {
                PodPhase::Running
            },
            manager_pid: std::process::id(),
            epoch: self.epoch,
            backup_pid: match self.backup_pid.load(Ordering::Relaxed) {
                0 => None,
                pid => Some(pid),
            },
            pod_file: pod.file.clone(),
            memory: pod.memory.path.clone(),
            memory_bytes: self.memory.header().total_size(),
            newest_event: self.memory.fabric().state().ring_head(),
            join_timeout_ms: pod.heartbeat.join_timeout.as_millis() as u64,
            nodes: nodes.collect(),
        }
    }

    fn fabric(&self) -> &FabricSection {
        self.memory.fabric()
    }

    fn kill(&self, node: NodeId) -> Result<(), ControlError> {
        let state = self.check(node)?;
        if self.view().going_down {
            return Err(ControlError::GoingDown);
        }
        if !state.may_store() || state == NodeState::Failing {
            return Err(ControlError::WrongState {
                node: node.get(),
                state,
                why: "only a node that runs can be killed".into(),
            });
        }
        self.send(Command::Kill(node));
        Ok(())
    }

    fn steer(&self, node: NodeId, action: NodeAction) -> Result<(), ControlError> {
        self.ask(move |core| core.steer(node, action))
    }

    fn down(&self, grace: Duration) {
        self.send(Command::Down(grace));
    }

    fn upgrade(&self, program: Option<PathBuf>) -> Result<(), ControlError> {
        let program = hand_over::check(&self.pod(), program)?;
        self.ask(move |core| core.begin_hand_over(program))
    }

    fn add(&self, node: &str) -> Result<NodeId, ControlError> {
        let bad = |why: String| ControlError::BadRequest { why };
        let file = self.read_file()?;
        let Some(spec) = file.find(node).cloned() else {
            let file = file.file.display();
            return Err(bad(format!(
                "{file} has no node {node}; write it there first"
            )));
        };
        let pod = self.pod();
        if pod.node(spec.id).is_none() {
            let new = file.only(spec.id);
            new.check_host(&HostLimits::of_this_host(&new))
                .and_then(|()| pod.with(&spec).check_sharing())
                .map_err(|e| bad(e.to_string()))?;
        }
        let id = spec.id;
        self.ask(move |core| core.add(&spec))?;
        Ok(id)
    }

    fn reload(&self, dry_run: bool) -> Result<Vec<Difference>, ControlError> {
        let file = self.read_file()?;
        file.check_host(&HostLimits::of_this_host(&file))
            .map_err(|e| ControlError::BadRequest { why: e.to_string() })?;
        self.ask(move |core| core.reload(&file, dry_run))
    }

    fn link(&self, node: NodeId) -> Result<Arc<AgentLink>, ControlError> {
        let state = self.check(node)?;
        if state == NodeState::Paused {
            return Err(ControlError::WrongState {
                node: node.get(),
                state,
                why: "its agent cannot answer; resume it first".into(),
            });
        }
        self.link_of(node).ok_or_else(|| ControlError::WrongState {
            node: node.get(),
            state,
            why: "it has no process to talk to".into(),
        })
    }
}
