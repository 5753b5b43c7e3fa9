//! Ending one node because an operator wants it to, starting one that is down.
//!
//! 1. The [`Intent`] is put on record: what shall happen when this life is over. Without that,
//!    nothing is begun.
//! 2. State `Stopping`, event `NodeStopping`, and the agent is asked to end its node.
//! 3. The node ends, or its time is up and it is fenced: a failure like any other for its peers.
//! 4. The intent decides instead of the policy.
//!
//! Whoever takes over finds the intent, and asks the agent again.

use std::time::Duration;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::backoff::{Ending, Histories};
use super::crash;
use super::phase::{Order, Phase};
use super::record::Note;
use super::state::{Core, Effect, NodeControl, nanos};
use crate::api::{ControlError, NodeAction};
use crate::power::Exit;
use crate::runtime::{Intent, Then};

/// How much longer than the grace of its processes a node may take: to sync and power off.
pub(super) const POWER_OFF: Duration = Duration::from_secs(2);

/// Longest grace: whoever wants more wants no end.
const LONGEST_GRACE: Duration = Duration::from_secs(24 * 3600);

/// How an ordered end came about: the first word of the evidence of [`Cause::Operator`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Killed = 0,
    Obeyed = 1,
    Late = 2,
    Unasked = 3,
}

impl Core {
    /// Does what an operator wants of a node.
    pub fn steer(&mut self, id: NodeId, action: NodeAction) -> Result<(), ControlError> {
        if self.is_going_down() {
            return Err(ControlError::GoingDown);
        }
        let grace = |ms| Duration::from_millis(ms).min(LONGEST_GRACE);
        match action {
            NodeAction::Pause {} => self.pause(id),
            NodeAction::Resume {} => self.resume_node(id),
            NodeAction::Restart { grace_ms } => self.order(id, grace(grace_ms), Then::Restart),
            NodeAction::Stop { grace_ms } => self.order(id, grace(grace_ms), Then::Down),
            NodeAction::Start {} => self.start_again(id),
            NodeAction::Drain { wait_ms, grace_ms } => {
                self.drain(id, grace(wait_ms), grace(grace_ms))
            }
            NodeAction::CancelDrain {} => self.cancel_drain(id),
            NodeAction::Remove { grace_ms } => self.remove(id, grace(grace_ms)),
        }
    }

    pub fn known(&mut self, id: NodeId) -> Result<&mut NodeControl, ControlError> {
        let unknown = || ControlError::NoSuchNode {
            node: id.to_string(),
        };
        self.nodes.get_mut(&id).ok_or_else(unknown)
    }

    pub fn wrong_state(&self, id: NodeId, why: &str) -> ControlError {
        ControlError::WrongState {
            node: id.get(),
            state: self.recorder.fabric().entry(id).state(),
            why: why.into(),
        }
    }

    /// An operator wants a running node to end.
    pub fn order(&mut self, id: NodeId, grace: Duration, then: Then) -> Result<(), ControlError> {
        self.known(id)?;
        let now = self.now();
        let Some(life) = self.running(id) else {
            let why = match then {
                Then::Restart => "it does not run; `start` starts a node that is down",
                Then::Down | Then::Removed => "only a node that runs can be stopped",
            };
            return Err(self.wrong_state(id, why));
        };
        let generation = life.generation;
        let phase = self.nodes.get(&id).map(|node| &node.phase);
        let ends = matches!(phase, Some(Phase::Ordered(_) | Phase::Stopping { .. }));
        if ends {
            return Err(self.wrong_state(id, "it is ending already; `kill` does not wait"));
        }
        let can_be_asked = matches!(phase, Some(Phase::Joined(_))) && !grace.is_zero();
        let until_ns = now.saturating_add(nanos(grace + POWER_OFF));
        let intent = Intent {
            generation,
            then,
            asked_ns: now,
            until_ns,
            grace_ms: grace.as_millis() as u64,
            drain_until_ns: None,
        };
        self.put_on_record(id, &intent)?;
        self.begin_order(id, &intent, can_be_asked);
        Ok(())
    }

    /// Puts on record what shall happen after a life. Whatever was wanted before is not any more.
    pub fn put_on_record(&mut self, id: NodeId, intent: &Intent) -> Result<(), ControlError> {
        crash::point("intent");
        self.known(id)?
            .folder
            .write_intent(intent)
            .map_err(|e| ControlError::NotRecorded { why: e.to_string() })
    }

    /// The intent is on record.
    pub fn begin_order(&mut self, id: NodeId, intent: &Intent, can_be_asked: bool) {
        self.announce(id, intent);
        if can_be_asked {
            self.ask_to_end(id);
        } else {
            self.end_ordered(id, How::Unasked);
        }
    }

    /// Goes on with an order that a dead manager had given. The agent is asked once more as soon
    /// as there is a connection to it.
    pub fn order_again(&mut self, id: NodeId, intent: &Intent) {
        self.announce(id, intent);
    }

    /// There is a connection to the agent of a life.
    pub fn link_up(&mut self, id: NodeId, generation: Generation) {
        if self
            .running(id)
            .is_some_and(|life| life.generation == generation)
        {
            self.ask_to_end(id);
        }
    }

    fn announce(&mut self, id: NodeId, intent: &Intent) {
        self.recorder.set_state(id, NodeState::Stopping);
        let kinds = [EventKind::NodeStopping];
        let generation = intent.generation;
        if self.recorder.last_of(&kinds, id, generation).is_none() {
            let evidence = [intent.grace_ms, intent.then.number()];
            let note = Note::of(generation, Cause::Operator, &evidence);
            self.recorder.event(EventKind::NodeStopping, Some(id), note);
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.drain = None;
            if intent.then == Then::Removed {
                node.leaving_ns = Some(0);
            }
            node.phase = Phase::Ordered(Order {
                asked_ns: intent.asked_ns,
                until_ns: intent.until_ns,
            });
        }
    }

    /// Asks a node to end that shall. Twice does no harm.
    fn ask_to_end(&mut self, id: NodeId) {
        if let Some(Phase::Ordered(order)) = self.nodes.get(&id).map(|node| &node.phase) {
            let left = order.until_ns.saturating_sub(self.now());
            let grace = Duration::from_nanos(left).saturating_sub(POWER_OFF);
            self.effects.push(Effect::Shutdown(id, grace));
        }
    }

    /// One look at a node that was asked to end.
    pub fn look_at_order(&mut self, id: NodeId, now: u64) {
        if let Some(node) = self.nodes.get(&id)
            && let Phase::Ordered(order) = node.phase
            && order.until_ns <= now
        {
            log::warn!("{}: it did not end in the time that it had", node.spec);
            self.end_ordered(id, How::Late);
        }
    }

    /// Ends a node whose end was ordered, by its fence.
    pub fn end_ordered(&mut self, id: NodeId, how: How) {
        let now = self.now();
        if let Some(Phase::Ordered(order)) = self.nodes.get(&id).map(|node| &node.phase) {
            let evidence = [how as u64, now.saturating_sub(order.asked_ns)];
            self.detected(id, Cause::Operator, Ending::Ran, &evidence);
        }
    }

    /// A node ended that was asked to. If that was its own end and no crash, the operator is the
    /// cause; `false` if it is not.
    pub fn obeyed(&mut self, id: NodeId, exit: &Exit) -> bool {
        let Some(node) = self.nodes.get(&id) else {
            return false;
        };
        let asked = matches!(node.phase, Phase::Ordered(_));
        let obeyed = asked && matches!(exit.cause, Cause::GuestPowerOff | Cause::GuestReboot);
        if obeyed {
            self.end_ordered(id, How::Obeyed);
        }
        obeyed
    }

    /// What an operator wants to happen after that life.
    pub fn intent(&self, id: NodeId, ended: Generation) -> Option<Then> {
        let intent = self.nodes.get(&id)?.folder.intent()?;
        (intent.generation == ended).then_some(intent.then)
    }

    /// An operator wants a node that is down to be started, or one that waits not to wait.
    fn start_again(&mut self, id: NodeId) -> Result<(), ControlError> {
        let now = self.now();
        let node = self.known(id)?;
        if node.leaving_ns.is_some() {
            return Err(self.wrong_state(id, "it is being removed; `pod add` adds it again then"));
        }
        match node.phase {
            Phase::Down => {
                let generation = self.recorder.generation(id);
                if generation == Generation::MAX {
                    return Err(self.wrong_state(id, "it has used up its generations"));
                }
                self.recorder.set_state(id, NodeState::Restarting);
                let restarts = self.recorder.fabric().entry(id).restarts();
                let note = Note::of(generation, Cause::Operator, &[0, restarts.into()]);
                let kind = EventKind::NodeRestarting;
                self.recorder.event(kind, Some(id), note);
            }
            Phase::Waiting { .. } => {}
            _ => return Err(self.wrong_state(id, "only a node that is down can be started")),
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            // What went wrong before has been looked at.
            node.histories = Histories::default();
            node.phase = Phase::Waiting { until_ns: now };
        }
        self.advance(id);
        Ok(())
    }
}
