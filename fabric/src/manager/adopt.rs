//! Taking charge of a pod: from an orderly start, or from a manager that died at any instruction.
//!
//! The generation table says how far the dead manager had come with a node, the node's record who
//! runs it. A record is written before its process may run, so the pair decides everything:
//!
//! | table | record of this generation, process | what is done |
//! |---|---|---|
//! | `Starting`, `Joined` | alive | adopted: the node notices nothing |
//! | `Paused` | alive | adopted, and paused once more |
//! | `Stopping` | alive | adopted, and asked once more to end |
//! | `Draining` | alive | adopted, and left alone as long as it was to be |
//! | any of these | dead | a failure like any other |
//! | `Starting` | none | no life has begun: started now, with this generation |
//! | `Failing` | any | fenced, for nobody knows whether it was; then raised |
//! | `Failing` | of the generation before | fenced and raised already: peers are rung, and on |
//! | `Restarting` | of the generation before | all was told: what is left is ended, then started |
//! | `Down` | | stays down |
//!
//! What an operator wants of a life is on record before anything is done about it: a life with an
//! intent goes on with that, whatever its state.

use std::sync::Arc;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::backoff::Ending;
use super::phase::{Failure, Life, Phase};
use super::record::Note;
use super::state::{Core, Effect};
use crate::power::{Exit, Instance};
use crate::runtime::NodeRecord;

/// A node that has no life to adopt, and what is known of its process.
pub(super) struct Unadopted {
    id: NodeId,
    found: Option<Found>,
}

/// What is known of a node's process.
struct Found {
    record: NodeRecord,
    instance: Option<Arc<dyn Instance>>,
}

impl Core {
    /// Marks what an earlier pod left down as about to be started. Comes before the mark of a
    /// running pod and before anybody can ask: neither a manager that takes over from here nor an
    /// operator must take these nodes for given up.
    pub fn revive(&self) {
        for (id, node) in &self.nodes {
            // What was wanted of an earlier run is over.
            if let Err(e) = node.folder.remove_intent() {
                log::warn!("{}: {e}", node.spec);
            }
            if self.recorder.fabric().entry(*id).state() == NodeState::Down {
                self.recorder.set_state(*id, NodeState::Restarting);
            }
        }
    }

    /// Takes charge, and adopts the lives that run. With `takeover`, nodes of an earlier manager
    /// may run; without, none does: either the pod was brought down, or the host was. Returns the
    /// others for [`begin`](Self::begin): all nodes are taken over before any is started or
    /// declared dead, so that a failure rings everybody who lives.
    ///
    /// # Errors
    /// If a process cannot be judged alive or dead. Nothing was changed then for its node.
    pub fn adopt(&mut self, takeover: bool) -> std::io::Result<Vec<Unadopted>> {
        let evidence = [
            self.recorder.epoch(),
            u64::from(!self.memory.was_formatted()),
        ];
        let note = Note::of(0, Cause::None, &evidence);
        self.recorder.event(EventKind::ManagerStarted, None, note);
        self.clear_removed();
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let mut others = Vec::new();
        for id in ids {
            let found = if takeover { self.find(id)? } else { None };
            if !self.adopt_running(id, found.as_ref()) {
                others.push(Unadopted { id, found });
            }
        }
        Ok(others)
    }

    /// Goes on with the nodes that have no life to adopt.
    pub fn begin(&mut self, others: Vec<Unadopted>, takeover: bool) {
        if takeover {
            // Before a later life of the same node can fail, too.
            self.call_missed_hooks();
        }
        for Unadopted { id, found } in others {
            self.resume(id, found, takeover);
        }
        if takeover {
            self.call_missed_hooks();
        }
        self.look_at_the_adopted();
    }

    /// Looks for the process on record.
    fn find(&self, id: NodeId) -> std::io::Result<Option<Found>> {
        let Some(node) = self.nodes.get(&id) else {
            return Ok(None);
        };
        let Some(record) = node.folder.record() else {
            return Ok(None);
        };
        let request = self.request(node, record.generation);
        let instance = self.backends.of(&node.spec).adopt(&request, &record)?;
        Ok(Some(Found { record, instance }))
    }

    /// Adopts a life that runs and that nobody had begun to fence.
    fn adopt_running(&mut self, id: NodeId, found: Option<&Found>) -> bool {
        let generation = self.recorder.generation(id);
        let state = self.recorder.fabric().entry(id).state();
        let lives = matches!(
            state,
            NodeState::Starting
                | NodeState::Joined
                | NodeState::Paused
                | NodeState::Stopping
                | NodeState::Draining
        );
        if !lives {
            return false;
        }
        let Some((record, instance)) = found
            .filter(|found| found.record.generation == generation)
            .and_then(|found| Some((&found.record, found.instance.clone()?)))
        else {
            return false;
        };
        let pid = instance.process().pid;
        let note = Note::of(generation, Cause::None, &[u64::from(pid)]);
        self.recorder.event(EventKind::NodeAdopted, Some(id), note);
        let life = Life {
            instance,
            generation,
            started_ns: record.started_ns,
        };
        if let Some(node) = self.nodes.get_mut(&id) {
            // Whether it has joined, a look at its section tells, when all are taken over.
            node.phase = Phase::Starting;
        }
        self.take_life(id, life);
        self.go_on(id, generation, state);
        true
    }

    /// Goes on with what an operator wanted of a life that was adopted.
    fn go_on(&mut self, id: NodeId, generation: Generation, state: NodeState) {
        let since_ns = self.recorder.fabric().entry(id).since_ns();
        let intent = self.nodes.get(&id).and_then(|node| node.folder.intent());
        let intent = intent.filter(|intent| intent.generation == generation);
        match (state, intent) {
            (NodeState::Joined | NodeState::Draining, Some(intent)) => {
                match intent.drain_until_ns {
                    Some(until_ns) => self.begin_drain(id, &intent, until_ns),
                    None => self.order_again(id, &intent),
                }
            }
            (NodeState::Starting | NodeState::Paused | NodeState::Stopping, Some(intent)) => {
                self.order_again(id, &intent);
            }
            (NodeState::Draining, None) => self.drain_cancelled(id, generation),
            (NodeState::Joined, None) => {
                let paused_ns = self.now().saturating_sub(since_ns);
                self.tell_resumed(id, generation, paused_ns);
            }
            (NodeState::Paused, None) => self.begin_pause(id, since_ns),
            // Its record is lost; that it was to end is not.
            (NodeState::Stopping, None) => self.detected(id, Cause::Operator, Ending::Ran, &[]),
            _ => {}
        }
    }

    /// Goes on with a node that has no life to adopt.
    fn resume(&mut self, id: NodeId, found: Option<Found>, takeover: bool) {
        let generation = self.recorder.generation(id);
        let entry = self.recorder.fabric().entry(id);
        let (state, cause) = (entry.state(), entry.cause());
        let of_now = found
            .as_ref()
            .is_some_and(|found| found.record.generation == generation);
        let now = self.now();
        match state {
            NodeState::Absent => {
                self.tell_added(id);
                self.wait(id, found, now);
            }
            NodeState::Restarting if takeover => {
                self.tell_last(EventKind::NodeRestarting, id, generation, cause);
                if self.is_to_leave(id) {
                    self.keep_remains(id, found);
                    self.leave_again(id);
                } else {
                    self.wait(id, found, now);
                }
            }
            NodeState::Down if takeover => {
                self.tell_last(EventKind::NodeDown, id, generation, cause);
                self.keep_remains(id, found);
                if self.is_to_leave(id) {
                    self.leave_again(id);
                }
            }
            NodeState::Restarting | NodeState::Down => self.wait(id, found, now),
            NodeState::Starting
            | NodeState::Joined
            | NodeState::Paused
            | NodeState::Stopping
            | NodeState::Draining
                if of_now =>
            {
                // It was ours to watch, and died while nobody watched.
                let exit = self.exit_on_record(id, found.as_ref());
                self.ended(id, &exit);
            }
            NodeState::Starting if takeover => self.wait(id, found, now),
            NodeState::Starting
            | NodeState::Joined
            | NodeState::Paused
            | NodeState::Stopping
            | NodeState::Draining => {
                // Without a record: the host went down with the pod.
                self.ended(id, &Exit::unknown());
            }
            NodeState::Failing => self.resume_failure(id, found, generation, cause),
        }
    }

    /// Tells the last event of a failure, if the manager died between the state and the event.
    fn tell_last(&self, kind: EventKind, id: NodeId, generation: Generation, cause: Cause) {
        let old = generation.saturating_sub(1);
        let told = [old, generation].map(|old| self.recorder.has(kind, id, old));
        if told == [false, false] {
            let note = Note::between(old, generation, cause, &[]);
            self.recorder.event(kind, Some(id), note);
        }
    }

    /// Goes on with a failure that a dead manager had begun.
    fn resume_failure(
        &mut self,
        id: NodeId,
        found: Option<Found>,
        generation: Generation,
        cause: Cause,
    ) {
        let failed = found.as_ref().map(|found| found.record.generation);
        match (failed, generation.checked_sub(1)) {
            (Some(failed), Some(before)) if failed == before && failed > 0 => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.phase = Phase::Failing(Failure {
                        cause,
                        ending: Ending::Ran,
                        resumed: true,
                        attempts: 0,
                        again_ns: None,
                    });
                }
                self.keep_remains(id, found);
                self.raised(id, failed, generation);
            }
            _ => {
                if let (Some(node), Some(found)) = (self.nodes.get_mut(&id), found)
                    && let Some(instance) = found.instance
                {
                    self.effects.push(Effect::Watch(id, instance.clone()));
                    node.life = Some(Life {
                        instance,
                        generation,
                        started_ns: found.record.started_ns,
                    });
                }
                self.detected_by(id, cause, Ending::Ran, &[], true);
            }
        }
    }

    /// Starts a node as soon as nothing of an earlier life is left.
    fn wait(&mut self, id: NodeId, found: Option<Found>, now: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Waiting { until_ns: now };
        }
        self.keep_remains(id, found);
        self.advance(id);
    }

    /// A process of a fenced life that still exists is ended, and waited for.
    fn keep_remains(&mut self, id: NodeId, found: Option<Found>) {
        let instance = found.and_then(|found| found.instance);
        if let (Some(node), Some(instance)) = (self.nodes.get_mut(&id), instance) {
            instance.kill();
            self.effects.push(Effect::Watch(id, instance.clone()));
            node.remains = Some((instance, 0));
        }
    }

    /// Why a process is gone that is not our child.
    fn exit_on_record(&self, id: NodeId, found: Option<&Found>) -> Exit {
        let exit = self.nodes.get(&id).zip(found).map(|(node, found)| {
            let backend = self.backends.of(&node.spec);
            backend.last_words(&node.folder, &found.record)
        });
        exit.unwrap_or_else(Exit::unknown)
    }
}
