//! Nodes that come to a pod that runs, and nodes that leave it for good.
//!
//! Which nodes a pod has is on record in the runtime folder ([`KeptPod`]); writing it anew, under
//! another name and then renamed, is the one step that adds or removes a node:
//!
//! | | before that step | after it |
//! |---|---|---|
//! | add | nothing has happened | event `NodeAdded`, and the node is started |
//! | remove | the node is ended, fenced, its generation raised, its process gone | state `Absent`, event `NodeRemoved` |
//!
//! Whoever takes over finds which step was the last. A line of the generation table is never
//! cleared: the generation that it holds when a node is removed is the one that a later node of
//! that id begins with.

use std::sync::Arc;
use std::time::Duration;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::crash;
use super::phase::Phase;
use super::record::Note;
use super::state::{Core, NodeControl};
use crate::api::{ControlError, Difference};
use crate::podfile::{self, Node, Pod};
use crate::runtime::{Intent, KeptPod, Then};

/// Between attempts to put on record that a node is gone.
const RECORD_AGAIN_NS: u64 = 1_000_000_000;
/// Whether a node has come or gone.
const STEPS: [EventKind; 2] = [EventKind::NodeAdded, EventKind::NodeRemoved];

impl Core {
    /// Puts on record which pod this is from now on.
    fn keep(&mut self, kept: KeptPod) -> Result<(), ControlError> {
        crash::point("keep");
        self.folder
            .keep(&kept)
            .map_err(|e| ControlError::NotRecorded { why: e.to_string() })?;
        self.pod = Arc::new(kept.pod);
        self.added = kept.added;
        Ok(())
    }

    /// Takes a node into the pod and starts it.
    pub fn add(&mut self, spec: &Node) -> Result<(), ControlError> {
        let mut pod = Pod::clone(&self.pod);
        pod.nodes.push(spec.clone());
        self.check_new(spec)?;
        self.take_in(pod, &[spec.id])
    }

    /// Whether a node can come to this pod.
    fn check_new(&self, spec: &Node) -> Result<(), ControlError> {
        if self.is_going_down() {
            return Err(ControlError::GoingDown);
        }
        if self.nodes.contains_key(&spec.id) {
            return Err(self.wrong_state(spec.id, "the pod has a node of this id already"));
        }
        if let Some(other) = self.nodes.values().find(|n| n.spec.name == spec.name) {
            let why = format!("it has the name {:?} already", spec.name);
            return Err(self.wrong_state(other.spec.id, &why));
        }
        let bad = |why| Err(ControlError::BadRequest { why });
        let capacity = self.memory.header().node_capacity();
        if spec.id.get() > capacity {
            return bad(format!(
                "{spec}: the pod memory was formatted with memory.node_capacity = {capacity}, \
                 which is the largest id that the pod can ever have"
            ));
        }
        if self.recorder.generation(spec.id) == Generation::MAX {
            return bad(format!("{spec}: this id has used up its generations"));
        }
        Ok(())
    }

    /// Makes `pod` the pod; `new` of its nodes are to be started.
    fn take_in(&mut self, mut pod: Pod, new: &[NodeId]) -> Result<(), ControlError> {
        let record =
            |e: crate::runtime::RuntimeError| ControlError::NotRecorded { why: e.to_string() };
        pod.nodes.sort_by_key(|node| node.id);
        let mut controls = Vec::new();
        for id in new {
            let Some(spec) = pod.node(*id) else {
                continue;
            };
            let folder = self.folder.node(&spec.name).map_err(record)?;
            // Of an earlier node of that name: it means nothing here.
            folder.remove_intent().map_err(record)?;
            controls.push((*id, NodeControl::new(spec.clone(), folder)));
        }
        let mut added = self.added.clone();
        added.extend(new);
        self.keep(KeptPod { pod, added })?;
        for (id, node) in controls {
            self.nodes.insert(id, node);
        }
        for id in new {
            self.came(*id);
        }
        Ok(())
    }

    /// A node has been taken in: says so, once, and starts it.
    fn came(&mut self, id: NodeId) {
        self.tell_added(id);
        let until_ns = self.now();
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Waiting { until_ns };
        }
        self.advance(id);
    }

    /// Says that a node was added, if it was and nobody said so.
    pub fn tell_added(&self, id: NodeId) {
        let generation = self.recorder.generation(id);
        let told = self.recorder.last_of(&STEPS, id, generation);
        if self.added.contains(&id) && told != Some(EventKind::NodeAdded) {
            let note = Note::of(generation, Cause::Operator, &[]);
            self.recorder.event(EventKind::NodeAdded, Some(id), note);
        }
    }

    /// An operator wants a node to leave the pod for good. Twice is once.
    pub fn remove(&mut self, id: NodeId, grace: Duration) -> Result<(), ControlError> {
        let others = self.nodes.iter().filter(|(other, _)| **other != id);
        let stays = others.filter(|(_, node)| node.leaving_ns.is_none()).count();
        let generation = self.recorder.generation(id);
        let now = self.now();
        let node = self.known(id)?;
        if node.leaving_ns.is_some() {
            return Ok(());
        }
        if stays == 0 {
            let why = "it is the last node that stays; `pod down` ends the pod";
            return Err(self.wrong_state(id, why));
        }
        let of_life = |generation| Intent {
            generation,
            then: Then::Removed,
            asked_ns: now,
            until_ns: now,
            grace_ms: grace.as_millis() as u64,
            drain_until_ns: None,
        };
        match &node.phase {
            Phase::Down | Phase::Waiting { .. } => {
                // The life before the one that will not be.
                self.put_on_record(id, &of_life(generation.saturating_sub(1)))?;
                self.leave(id);
            }
            Phase::Failing(_) => self.put_on_record(id, &of_life(generation))?,
            Phase::Ordered(_) | Phase::Stopping { .. } => {
                let intent = node.folder.intent().filter(|i| i.generation == generation);
                let intent = intent.unwrap_or_else(|| of_life(generation));
                let then = Then::Removed;
                self.put_on_record(id, &Intent { then, ..intent })?;
            }
            _ => self.order(id, grace, Then::Removed)?,
        }
        self.known(id)?.leaving_ns = Some(0);
        self.advance(id);
        Ok(())
    }

    /// A node that does not run is to be removed: from here on nobody starts it.
    fn leave(&mut self, id: NodeId) {
        if self.recorder.fabric().entry(id).state() != NodeState::Down {
            let generation = self.recorder.generation(id);
            self.leave_down(id);
            let note = Note::of(generation, Cause::Operator, &[]);
            self.recorder.event(EventKind::NodeDown, Some(id), note);
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Down;
        }
    }

    /// Whether a node that does not run was to be removed.
    pub fn is_to_leave(&self, id: NodeId) -> bool {
        let before = self.recorder.generation(id).saturating_sub(1);
        self.intent(id, before) == Some(Then::Removed)
    }

    /// Goes on with the removal of a node that does not run, which a dead manager had begun.
    pub fn leave_again(&mut self, id: NodeId) {
        self.leave(id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.leaving_ns = Some(0);
        }
        self.advance(id);
    }

    /// Takes a node out of the pod of which nothing is left.
    pub fn forget(&mut self, id: NodeId) {
        let now = self.now();
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let gone = matches!(node.phase, Phase::Down) && node.remains.is_none();
        if !gone || node.leaving_ns.is_none_or(|at| at > now) {
            return;
        }
        let mut pod = Pod::clone(&self.pod);
        pod.nodes.retain(|node| node.id != id);
        let mut added = self.added.clone();
        added.remove(&id);
        if let Err(e) = self.keep(KeptPod { pod, added }) {
            log::error!("node {id} is down and cannot be removed: {e}");
            if let Some(node) = self.nodes.get_mut(&id) {
                node.detail = Some(e.to_string());
                node.leaving_ns = Some(now.saturating_add(RECORD_AGAIN_NS));
            }
            return;
        }
        self.nodes.remove(&id);
        self.removed(id);
    }

    /// A node is not in the record any more: clears its state and says so, once.
    fn removed(&self, id: NodeId) {
        let generation = self.recorder.generation(id);
        let told = self.recorder.last_of(&STEPS, id, generation);
        if told != Some(EventKind::NodeRemoved) {
            let note = Note::of(generation, Cause::Operator, &[]);
            self.recorder.event(EventKind::NodeRemoved, Some(id), note);
        }
        // After the event, which nobody would know to be missing else.
        self.recorder.set_state(id, NodeState::Absent);
    }

    /// Clears up after nodes that the pod does not have any more, and that nobody has taken out of
    /// the generation table: a manager died over it, or the pod file has changed between two runs.
    pub fn clear_removed(&self) {
        for n in 1..=self.memory.header().node_capacity() {
            let Some(id) = NodeId::new(n).filter(|id| !self.nodes.contains_key(id)) else {
                continue;
            };
            let state = self.recorder.fabric().entry(id).state();
            if state == NodeState::Absent {
                continue;
            }
            let old = self.recorder.generation(id);
            if let (true, Some(new)) = (state.may_store(), old.checked_add(1)) {
                // It died with its host, for nobody has the memory mapped; what it owned is free.
                self.recorder.set_generation(id, new);
                let note = Note::between(old, new, Cause::Operator, &[]);
                let kind = EventKind::GenerationRaised;
                self.recorder.event(kind, Some(id), note);
            }
            self.removed(id);
        }
    }

    /// Compares the pod file with the pod, and applies what can be applied while it runs.
    pub fn reload(&mut self, file: &Pod, dry_run: bool) -> Result<Vec<Difference>, ControlError> {
        if self.is_going_down() {
            return Err(ControlError::GoingDown);
        }
        let check = |spec: &Node| self.check_new(spec).map_err(|e| e.to_string());
        let (pod, differences) = podfile::compare(&self.pod, file, check);
        if dry_run || pod == *self.pod {
            return Ok(differences);
        }
        let is_new = |node: &&Node| !self.nodes.contains_key(&node.id);
        let new: Vec<NodeId> = pod.nodes.iter().filter(is_new).map(|n| n.id).collect();
        let specs = pod.nodes.clone();
        self.take_in(pod, &new)?;
        for spec in specs {
            if let Some(node) = self.nodes.get_mut(&spec.id) {
                node.spec = spec;
            }
        }
        Ok(differences)
    }
}
