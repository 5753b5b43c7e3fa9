//! Starting a life of a node.

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::backoff::Ending;
use super::crash;
use super::phase::{Life, Phase};
use super::record::Note;
use super::state::{Core, Effect};
use crate::power::StartError;
use crate::runtime::NodeRecord;
use crate::sys::process::host_boot_id;

impl Core {
    /// Starts a node if it waits, its time has come, and nothing of its last life is left; or
    /// removes it then, if it is to be.
    pub fn advance(&mut self, id: NodeId) {
        self.forget(id);
        let now = self.now();
        let ready = self.nodes.get(&id).is_some_and(|node| {
            node.remains.is_none()
                && matches!(node.phase, Phase::Waiting { until_ns } if until_ns <= now)
        });
        if ready && !self.is_going_down() {
            self.start(id);
        }
    }

    /// Starts a life with the generation that the table holds, which no life has had.
    fn start(&mut self, id: NodeId) {
        let mut generation = self.recorder.generation(id);
        if generation == 0 {
            generation = 1;
            self.recorder.set_generation(id, generation);
        }
        // Before the process: whoever takes over knows that there may be one.
        self.recorder.set_state(id, NodeState::Starting);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Starting;
            node.joined_in_ns = None;
        }
        match self.launch(id, generation) {
            Ok(life) => {
                let pid = life.instance.process().pid;
                let note = Note::of(generation, Cause::None, &[u64::from(pid)]);
                self.recorder.event(EventKind::NodeStarted, Some(id), note);
                self.take_life(id, life);
            }
            Err(error) => {
                log::error!("node {id} cannot be started: {error}");
                let ending = if error.permanent {
                    Ending::CannotStart
                } else {
                    Ending::DidNotStart
                };
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.detail = Some(error.message);
                }
                let evidence = [0, 0, u64::from(error.errno.unsigned_abs())];
                self.detected(id, Cause::StartFailed, ending, &evidence);
            }
        }
    }

    /// Makes the process, puts it on record, and only then lets it run.
    fn launch(&mut self, id: NodeId, generation: Generation) -> Result<Life, StartError> {
        let Some(node) = self.nodes.get(&id) else {
            return Err(StartError::permanent(format!("the pod has no node {id}")));
        };
        // The node is fenced: this is the one time when its section is the manager's to write.
        if let Some(section) = self.memory.node(id) {
            crash::point("reset");
            section.reset();
        }
        crash::point("clean");
        node.folder.clean()?;
        node.folder.rotate_console()?;
        let backend = self.backends.of(&node.spec);
        crash::point("prepare");
        let prepared = backend.prepare(&self.request(node, generation))?;
        let started_ns = self.now();
        let record = NodeRecord {
            process: prepared.process(),
            host_boot_id: host_boot_id(),
            generation,
            backend: node.spec.backend.name().into(),
            started_ns,
        };
        crash::point("record");
        node.folder.write_record(&record)?;
        crash::point("release");
        Ok(Life {
            instance: prepared.release()?,
            generation,
            started_ns,
        })
    }

    /// Keeps a life that runs, new or adopted.
    pub fn take_life(&mut self, id: NodeId, life: Life) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        self.effects.push(Effect::Watch(id, life.instance.clone()));
        let socket = node.folder.agent_socket();
        self.effects.push(Effect::Link(id, life.generation, socket));
        node.life = Some(life);
    }
}
