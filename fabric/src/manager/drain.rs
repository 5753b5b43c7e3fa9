//! Draining: a node is about to leave, and what uses it may move off before.
//!
//! 1. The [`Intent`] is put on record, with the time until which the node drains.
//! 2. State `Draining`, event `NodeDraining`, and everybody is rung. The node's agent admits no new
//!    member to a group, and says in its section how many are left.
//! 3. Nobody is left, or the time is up: `NodeDrained`, and the node is ended as by `stop`.
//!
//! Until then it is a node like any other: its heart is judged, and it may fail. It stays down then.
//! To call a drain off is to remove the intent: whoever takes over and finds the state without an
//! intent goes on with that.

use std::time::Duration;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::crash;
use super::order::POWER_OFF;
use super::phase::{Drain, Phase};
use super::record::Note;
use super::state::{Core, nanos};
use crate::api::ControlError;
use crate::runtime::{Intent, Then};

/// What tells how far a drain has come.
const STEPS: [EventKind; 3] = [
    EventKind::NodeDraining,
    EventKind::NodeDrained,
    EventKind::DrainCancelled,
];

impl Core {
    /// An operator wants a node to be left alone, and then to end. Twice is once.
    pub fn drain(
        &mut self,
        id: NodeId,
        wait: Duration,
        grace: Duration,
    ) -> Result<(), ControlError> {
        let now = self.now();
        let node = self.known(id)?;
        if node.drain.is_some() {
            return Ok(());
        }
        let generation = match (&node.phase, &node.life) {
            (Phase::Joined(_), Some(life)) => life.generation,
            _ => return Err(self.wrong_state(id, "only a node that has joined can be drained")),
        };
        let until_ns = now.saturating_add(nanos(wait));
        let intent = Intent {
            generation,
            then: Then::Down,
            asked_ns: now,
            until_ns: until_ns.saturating_add(nanos(grace + POWER_OFF)),
            grace_ms: grace.as_millis() as u64,
            drain_until_ns: Some(until_ns),
        };
        self.put_on_record(id, &intent)?;
        self.begin_drain(id, &intent, until_ns);
        Ok(())
    }

    /// The intent is on record.
    pub fn begin_drain(&mut self, id: NodeId, intent: &Intent, until_ns: u64) {
        // The time of the state names the drain to the agent: it is not set anew.
        if self.recorder.fabric().entry(id).state() != NodeState::Draining {
            self.recorder.set_state(id, NodeState::Draining);
        }
        let told = self.recorder.last_of(&STEPS, id, intent.generation);
        if matches!(told, None | Some(EventKind::DrainCancelled)) {
            let wait_ms = until_ns.saturating_sub(intent.asked_ns) / 1_000_000;
            let evidence = [wait_ms, intent.grace_ms];
            let note = Note::of(intent.generation, Cause::Operator, &evidence);
            self.recorder.event(EventKind::NodeDraining, Some(id), note);
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.drain = Some(Drain {
                asked_ns: intent.asked_ns,
                until_ns,
                grace_ms: intent.grace_ms,
            });
        }
        self.ring_all_but(None);
    }

    /// An operator does not want it any more. Of a node that does not drain, nothing is to be done.
    pub fn cancel_drain(&mut self, id: NodeId) -> Result<(), ControlError> {
        let node = self.known(id)?;
        match (&node.drain, &node.phase) {
            (Some(_), _) => {}
            (None, Phase::Ordered(_) | Phase::Stopping { .. } | Phase::Failing(_)) => {
                return Err(self.wrong_state(id, "it is ending already"));
            }
            (None, _) => return Ok(()),
        }
        crash::point("cancel");
        self.known(id)?
            .folder
            .remove_intent()
            .map_err(|e| ControlError::NotRecorded { why: e.to_string() })?;
        self.drain_cancelled(id, self.recorder.generation(id));
        Ok(())
    }

    /// There is no intent any more.
    pub fn drain_cancelled(&mut self, id: NodeId, generation: Generation) {
        let told = self.recorder.last_of(&STEPS, id, generation);
        if told != Some(EventKind::DrainCancelled) {
            let note = Note::of(generation, Cause::Operator, &[]);
            let kind = EventKind::DrainCancelled;
            self.recorder.event(kind, Some(id), note);
        }
        // After the event, which nobody would know to be missing else.
        self.recorder.set_state(id, NodeState::Joined);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.drain = None;
            node.detail = None;
        }
        self.ring_all_but(None);
    }

    /// One look at a node that drains.
    pub fn look_at_drain(&mut self, id: NodeId, now: u64) {
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let (Some(drain), Phase::Joined(_)) = (node.drain, &node.phase) else {
            return;
        };
        let since_ns = self.recorder.fabric().entry(id).since_ns();
        let section = self.memory.node(id);
        let left = section.and_then(|section| section.members_left(since_ns));
        if left != Some(0) && now < drain.until_ns {
            let detail = match left {
                Some(members) => format!("drains: {members} members of groups are left on it"),
                None => "drains: its agent has not said yet how many members are left".into(),
            };
            if let Some(node) = self.nodes.get_mut(&id)
                && node.detail.as_ref() != Some(&detail)
            {
                node.detail = Some(detail);
            }
            return;
        }
        let generation = self.recorder.generation(id);
        if self.recorder.last_of(&STEPS, id, generation) != Some(EventKind::NodeDrained) {
            let left = left.map_or(u64::MAX, u64::from);
            let evidence = [left, now.saturating_sub(drain.asked_ns)];
            let note = Note::of(generation, Cause::Operator, &evidence);
            self.recorder.event(EventKind::NodeDrained, Some(id), note);
        }
        let grace = Duration::from_millis(drain.grace_ms);
        let intent = Intent {
            generation,
            then: Then::Down,
            asked_ns: now,
            until_ns: now.saturating_add(nanos(grace + POWER_OFF)),
            grace_ms: drain.grace_ms,
            drain_until_ns: None,
        };
        // The record of the drain says all that another manager needs.
        self.begin_order(id, &intent, !grace.is_zero());
    }
}
