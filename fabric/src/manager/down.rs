//! The end of a pod, on request: nodes end themselves, then they are ended.

use std::time::Duration;

use lupin_abi::NodeId;
use lupin_abi::event::{Cause, EventKind};

use super::backoff::Ending;
use super::order::{How, POWER_OFF};
use super::phase::Phase;
use super::record::Note;
use super::state::{Core, Effect, nanos};

impl Core {
    /// Begins to bring the pod down. A second request can only shorten the grace.
    pub fn down(&mut self, grace: Duration) {
        let patience = if grace.is_zero() {
            Duration::ZERO
        } else {
            grace + POWER_OFF
        };
        let by = self.now().saturating_add(nanos(patience));
        let first = self.down_by_ns.is_none();
        self.down_by_ns = Some(self.down_by_ns.map_or(by, |before| before.min(by)));
        if !first {
            return;
        }
        log::info!("bringing the pod down; nodes have {} ms", grace.as_millis());
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in ids {
            let Some(node) = self.nodes.get(&id) else {
                continue;
            };
            match node.phase {
                Phase::Waiting { .. } => {
                    let generation = self.recorder.generation(id);
                    self.leave_down(id);
                    let note = Note::of(generation, Cause::PodDown, &[]);
                    self.recorder.event(EventKind::NodeDown, Some(id), note);
                }
                Phase::Joined(_) if !grace.is_zero() => {
                    self.effects.push(Effect::Shutdown(id, grace));
                }
                // Its agent does not listen, yet or now: there is nothing to wait for.
                Phase::Starting | Phase::Paused(_) => self.end_now(id),
                _ => {}
            }
        }
        self.look_at_the_end();
    }

    /// The agent of a node cannot be asked.
    pub fn cannot_shut_down(&mut self, id: NodeId, why: &str) {
        log::warn!("node {id} cannot be asked to end ({why}): ending it");
        if self.is_going_down() {
            self.end_now(id);
        } else {
            self.end_ordered(id, How::Unasked);
        }
    }

    /// Ends whoever is left when patience is over.
    pub fn look_at_the_end(&mut self) {
        if self.down_by_ns.is_some_and(|by| by <= self.now()) {
            let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
            for id in ids {
                self.end_now(id);
            }
        }
    }

    /// Ends a running node: fence, generation, ring, and no restart.
    fn end_now(&mut self, id: NodeId) {
        if self.running(id).is_some() {
            self.detected(id, Cause::PodDown, Ending::Ran, &[]);
        }
    }

    /// Lets go of a pod that is down.
    pub fn finish(&mut self) {
        let note = Note::of(0, Cause::None, &[]);
        self.recorder.event(EventKind::ManagerStopped, None, note);
    }
}
