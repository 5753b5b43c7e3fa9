//! A failure, from its detection to the restart. The order is the correctness argument:
//!
//! 1. **detect**: state `Failing`, `FailureDetected`. Nobody believes anything else yet.
//! 2. **fence**: afterwards no store of the old life reaches pod memory. `Fenced`.
//! 3. **raise** the generation, with a Release store: whoever reads the new one also sees all that
//!    the old life stored. It kills every owner of that life at once. `GenerationRaised`.
//! 4. **ring** all live nodes: a hint to read the table now. `Rung`.
//! 5. **restart**, or leave down.

use std::sync::Arc;
use std::time::Duration;

use log::Level;
use lupin_abi::event::{Cause, EventKind, FencePath};
use lupin_abi::fabric::NodeState;
use lupin_abi::{Generation, NodeId};

use super::backoff::Ending;
use super::crash;
use super::order::How;
use super::phase::{Failure, Phase};
use super::record::Note;
use super::state::{Core, Effect, nanos};
use crate::power::{Exit, Fence, Instance};
use crate::runtime::Then;

/// How long what is left of a fenced life may take to end by itself.
const QUIT_BOUND_NS: u64 = 1_000_000_000;
/// Between a fence that failed and the next attempt; doubled every time.
const FENCE_AGAIN: Duration = Duration::from_millis(500);
/// Longest time between two attempts.
const LONGEST_FENCE_AGAIN: Duration = Duration::from_secs(30);

impl Core {
    /// Step 1: a node is dead, or shall die.
    pub fn detected(&mut self, id: NodeId, cause: Cause, ending: Ending, evidence: &[u64]) {
        self.detected_by(id, cause, ending, evidence, false);
    }

    /// As [`detected`](Self::detected); `resumed` if another manager may have told already.
    pub fn detected_by(
        &mut self,
        id: NodeId,
        cause: Cause,
        ending: Ending,
        evidence: &[u64],
        resumed: bool,
    ) {
        let generation = self.recorder.generation(id);
        // A failure while the pod goes down is the pod's end, whatever it looks like.
        let cause = if self.is_going_down() {
            Cause::PodDown
        } else {
            cause
        };
        self.recorder.set_cause(id, cause);
        self.recorder.set_state(id, NodeState::Failing);
        self.tell(
            resumed,
            EventKind::FailureDetected,
            id,
            Note::of(generation, cause, evidence),
        );
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.drain = None;
        node.phase = Phase::Failing(Failure {
            cause,
            ending,
            resumed,
            attempts: 0,
            again_ns: None,
        });
        self.effects.push(Effect::Unlink(id));
        self.fence(id);
    }

    /// Step 2 begins, or begins again.
    fn fence(&mut self, id: NodeId) {
        let generation = self.recorder.generation(id);
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let instance = node.life.as_ref().map(|life| life.instance.clone());
        match instance {
            Some(instance) if !instance.is_gone() => {
                self.effects.push(Effect::Fence(id, generation, instance));
            }
            // Whoever is gone stores nothing: fenced at this moment.
            _ => {
                let fence = Fence {
                    path: FencePath::Exited,
                    nanos: 0,
                    slots: 0,
                };
                self.fenced(id, generation, &fence);
            }
        }
    }

    /// A fence was not confirmed. As long as that is so the life may store: its generation is not
    /// raised, nobody takes over what it owns, and the fence is tried again, for ever.
    pub fn fence_failed(&mut self, id: NodeId, generation: Generation, why: &str) {
        let now = self.now();
        if self.recorder.generation(id) != generation {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let Phase::Failing(failure) = &mut node.phase else {
            return;
        };
        failure.attempts = failure.attempts.saturating_add(1);
        let attempts = failure.attempts;
        let delay = FENCE_AGAIN
            .saturating_mul(1 << (attempts - 1).min(16))
            .min(LONGEST_FENCE_AGAIN);
        failure.again_ns = Some(now.saturating_add(nanos(delay)));
        let cause = failure.cause;
        log::error!(
            "{} could not be fenced (attempt {attempts}): {why}",
            node.spec
        );
        node.detail = Some(format!("it could not be fenced {attempts} times: {why}"));
        let evidence = [attempts.into(), delay.as_millis() as u64];
        let note = Note::of(generation, cause, &evidence);
        self.recorder.event(EventKind::FenceFailed, Some(id), note);
    }

    /// One look at a node that is being fenced.
    pub fn look_at_fence(&mut self, id: NodeId, now: u64) {
        if let Some(node) = self.nodes.get_mut(&id)
            && let Phase::Failing(failure) = &mut node.phase
            && failure.again_ns.is_some_and(|again| again <= now)
        {
            failure.again_ns = None;
            self.fence(id);
        }
    }

    /// Steps 2 to 4 and the decision on 5: the fence of a life is complete.
    pub fn fenced(&mut self, id: NodeId, generation: Generation, fence: &Fence) {
        let now = self.now();
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let Phase::Failing(failure) = &node.phase else {
            return;
        };
        let (cause, resumed) = (failure.cause, failure.resumed);
        if let Some(life) = node.life.take() {
            node.remains = Some((life.instance, now + QUIT_BOUND_NS));
        }
        let evidence = [fence.path as u64, fence.nanos, fence.slots.into()];
        let note = Note::of(generation, cause, &evidence);
        self.tell(resumed, EventKind::Fenced, id, note);
        if let Some(raised) = generation.checked_add(1) {
            self.recorder.set_generation(id, raised);
            self.raised(id, generation, raised);
        } else {
            // Four billion lives. The last generation cannot be told from a later one: no more.
            log::error!("node {id} has used up its generations and stays down");
            self.leave_down(id);
            self.dispose(id);
        }
    }

    /// From step 3 on: the table holds the new generation.
    pub fn raised(&mut self, id: NodeId, old: Generation, new: Generation) {
        let Some(Phase::Failing(failure)) = self.nodes.get(&id).map(|n| &n.phase) else {
            return;
        };
        let (cause, ending, resumed) = (failure.cause, failure.ending, failure.resumed);
        let note = |evidence: &[u64]| Note::between(old, new, cause, evidence);
        self.tell(resumed, EventKind::GenerationRaised, id, note(&[]));
        let begin = self.now();
        let rung = self.ring_all_but(Some(id));
        let took = self.now().saturating_sub(begin);
        self.tell(resumed, EventKind::Rung, id, note(&[rung, took]));
        self.recorder.write_log();

        let delay = self.delay_of_restart(id, old, cause, ending);
        self.call_hook(id, old, cause, delay);
        match delay {
            Some(delay) => {
                let restarts = self.recorder.count_restart(id);
                self.recorder.set_state(id, NodeState::Restarting);
                let evidence = [delay.as_millis() as u64, restarts.into()];
                self.tell(resumed, EventKind::NodeRestarting, id, note(&evidence));
                let until_ns = self.now().saturating_add(nanos(delay));
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.phase = Phase::Waiting { until_ns };
                }
            }
            None => {
                self.leave_down(id);
                self.tell(resumed, EventKind::NodeDown, id, note(&[]));
            }
        }
        self.dispose(id);
        self.advance(id);
    }

    /// When a node is started again whose life `old` has ended; `None` if it stays down.
    fn delay_of_restart(
        &mut self,
        id: NodeId,
        old: Generation,
        cause: Cause,
        ending: Ending,
    ) -> Option<Duration> {
        if self.is_going_down() {
            return None;
        }
        match self.intent(id, old) {
            Some(Then::Restart) => return Some(Duration::ZERO),
            Some(Then::Down) => return None,
            Some(Then::Removed) => {
                self.nodes.get_mut(&id)?.leaving_ns = Some(0);
                return None;
            }
            None => {}
        }
        let now = self.now();
        let node = self.nodes.get_mut(&id)?;
        node.histories
            .decide(&node.spec.policies, cause, ending, now)
    }

    /// Tells an event once: with `resumed`, only if the ring does not hold it.
    fn tell(&self, resumed: bool, kind: EventKind, id: NodeId, note: Note) {
        if !(resumed && self.recorder.has(kind, id, note.old)) {
            self.recorder.event(kind, Some(id), note);
        }
    }

    /// Rings every live node, but one perhaps; returns how many have heard it.
    pub fn ring_all_but(&self, except: Option<NodeId>) -> u64 {
        let mut rung = 0;
        for id in self.nodes.keys().filter(|id| Some(**id) != except) {
            if let Some(life) = self.running(*id) {
                crash::point("ring");
                rung += u64::from(life.instance.ring());
            }
        }
        rung
    }

    /// Ends what is left of a fenced life.
    fn dispose(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let Some((instance, _)) = &node.remains else {
            return;
        };
        if instance.is_gone() {
            // Takes the process from the kernel's table.
            instance.exit();
            node.remains = None;
        } else {
            crash::point("quit");
            instance.quit();
        }
    }

    /// A process is gone. Which life it belonged to is decided here, not by the caller.
    pub fn gone(&mut self, id: NodeId, instance: &Arc<dyn Instance>) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if node
            .remains
            .as_ref()
            .is_some_and(|(old, _)| Arc::ptr_eq(old, instance))
        {
            instance.exit();
            node.remains = None;
            self.advance(id);
            return;
        }
        let current = self
            .running(id)
            .is_some_and(|life| Arc::ptr_eq(&life.instance, instance));
        if current {
            let exit = instance.exit();
            self.ended(id, &exit);
        }
        // Otherwise its fence is under way and will find it gone; if it is to be tried again, then
        // now.
        self.look_at_fence(id, u64::MAX);
    }

    /// An operator wants this life to end; `false` if there is none.
    pub fn kill(&mut self, id: NodeId) -> bool {
        let runs = self.running(id).is_some();
        if runs {
            let evidence = [How::Killed as u64, 0];
            self.detected(id, Cause::Operator, Ending::Ran, &evidence);
        }
        runs
    }

    /// A running life ended by itself.
    pub fn ended(&mut self, id: NodeId, exit: &Exit) {
        if self.obeyed(id, exit) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let ending = match (exit.permanent, &node.phase) {
            (true, _) => Ending::CannotStart,
            (false, Phase::Starting) => Ending::DidNotStart,
            _ => Ending::Ran,
        };
        let mut detail = format!("{}: {}", exit.cause, exit.detail);
        if ending != Ending::Ran {
            detail.push_str(&last_words(&node.folder.console_tail(5)));
        }
        let line = format!("{}: {detail}", node.spec);
        if self.down_by_ns.is_some() {
            self.recorder.log(Level::Debug, line);
        } else {
            self.recorder.log(Level::Warn, line);
            node.detail = Some(detail);
        }
        self.detected(id, exit.cause, ending, &exit.evidence);
    }
}

/// The last lines of a console, to be appended to a message.
pub(super) fn last_words(lines: &[String]) -> String {
    if lines.is_empty() {
        return "; its console is empty".into();
    }
    format!("; its console ends with:\n    {}", lines.join("\n    "))
}
