//! A node that stands still because an operator wants it to, and runs again.
//!
//! ```text
//!            state Paused          it stands         asked to resume          it runs
//! Joined ------------------> Going -----------> Stands -------------> Coming ---------> Joined
//!                              |                  NodePaused             |     NodeResumed
//!                              +---- cannot be paused -------------------+
//! ```
//!
//! The state is in the generation table before the first thread is stopped, and is `Joined` again
//! after the last one runs: whoever takes over in between never judges the heartbeat of a node that
//! cannot beat. He pauses it once more, which changes nothing.

use std::time::Duration;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::crash;
use super::judge::Judge;
use super::phase::{Pause, Phase, Step};
use super::record::Note;
use super::state::{Core, Effect, nanos};
use crate::api::ControlError;

/// Between two attempts to resume a node.
const RESUME_AGAIN: Duration = Duration::from_secs(1);

impl Core {
    /// An operator wants a node to stand still.
    pub fn pause(&mut self, id: NodeId) -> Result<(), ControlError> {
        let since_ns = self.now();
        let node = self.known(id)?;
        if node.drain.is_some() {
            return Err(self.wrong_state(id, "call the drain off first: `pod drain --cancel`"));
        }
        if !matches!(node.phase, Phase::Joined(_)) {
            return Err(self.wrong_state(id, "only a node that has joined can be paused"));
        }
        self.recorder.set_state(id, NodeState::Paused);
        self.begin_pause(id, since_ns);
        Ok(())
    }

    /// The state is in the table: from here on no heartbeat is expected.
    pub fn begin_pause(&mut self, id: NodeId, since_ns: u64) {
        let step = Step::Going;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.phase = Phase::Paused(Pause { step, since_ns });
        }
        self.move_it(id, true);
    }

    /// An operator wants a paused node to run.
    pub fn resume_node(&mut self, id: NodeId) -> Result<(), ControlError> {
        let node = self.known(id)?;
        match &mut node.phase {
            Phase::Paused(pause) if pause.step == Step::Stands => pause.step = Step::Coming,
            Phase::Paused(pause) => {
                let why = match pause.step {
                    Step::Going => "it is being paused; ask again when it stands",
                    _ => "it is being resumed",
                };
                return Err(self.wrong_state(id, why));
            }
            _ => return Err(self.wrong_state(id, "only a paused node can be resumed")),
        }
        self.move_it(id, false);
        Ok(())
    }

    fn move_it(&mut self, id: NodeId, pause: bool) {
        if let Some(life) = self.running(id) {
            let (generation, instance) = (life.generation, life.instance.clone());
            let effect = Effect::Pause(id, generation, instance, pause);
            self.effects.push(effect);
        }
    }

    /// The outcome of [`Effect::Pause`]: how long it took, or why it failed.
    pub fn pause_done(
        &mut self,
        id: NodeId,
        generation: Generation,
        pause: bool,
        outcome: Result<Duration, String>,
    ) {
        let now = self.now();
        let current = self.running(id).map(|life| life.generation);
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let Phase::Paused(mut at) = node.phase else {
            return;
        };
        if current != Some(generation) || pause != (at.step == Step::Going) {
            return;
        }
        match (pause, outcome) {
            (true, Ok(took)) => {
                at.step = Step::Stands;
                node.phase = Phase::Paused(at);
                if self.last_pause(id, generation) != Some(EventKind::NodePaused) {
                    let note = Note::of(generation, Cause::Operator, &[nanos(took)]);
                    self.recorder.event(EventKind::NodePaused, Some(id), note);
                }
            }
            (true, Err(why)) => {
                log::error!("{} cannot be paused and runs on: {why}", node.spec);
                node.detail = Some(format!("it could not be paused: {why}"));
                at.step = Step::Coming;
                node.phase = Phase::Paused(at);
                self.move_it(id, false);
            }
            (false, Ok(_)) => {
                let beats = self.memory.node(id).map_or(0, |section| section.beats());
                node.phase = Phase::Joined(Judge::new(&self.pod.heartbeat, now, beats));
                self.recorder.set_state(id, NodeState::Joined);
                self.tell_resumed(id, generation, now.saturating_sub(at.since_ns));
            }
            (false, Err(why)) => {
                log::error!("{} cannot be resumed: {why}; trying again", node.spec);
                node.detail = Some(format!("it could not be resumed: {why}"));
                let until_ns = now.saturating_add(nanos(RESUME_AGAIN));
                at.step = Step::Stuck { until_ns };
                node.phase = Phase::Paused(at);
            }
        }
    }

    /// Tells the end of a pause, if its beginning was told.
    pub fn tell_resumed(&self, id: NodeId, generation: Generation, paused_ns: u64) {
        if self.last_pause(id, generation) == Some(EventKind::NodePaused) {
            crash::point("resumed");
            let note = Note::of(generation, Cause::Operator, &[paused_ns]);
            self.recorder.event(EventKind::NodeResumed, Some(id), note);
        }
    }

    fn last_pause(&self, id: NodeId, generation: Generation) -> Option<EventKind> {
        let kinds = [EventKind::NodePaused, EventKind::NodeResumed];
        self.recorder.last_of(&kinds, id, generation)
    }

    /// One look at a paused node.
    pub fn look_at_pause(&mut self, id: NodeId, now: u64) {
        if let Some(node) = self.nodes.get_mut(&id)
            && let Phase::Paused(pause) = &mut node.phase
            && let Step::Stuck { until_ns } = pause.step
            && until_ns <= now
        {
            pause.step = Step::Coming;
            self.move_it(id, false);
        }
    }
}
