//! The look at every node that the manager takes once a poll: who has joined, who is silent,
//! whose time is up. Silent nodes get looks in between, when their deadline could pass.

use log::Level;
use lupin_abi::NodeId;
use lupin_abi::event::{Cause, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_abi::node::AgentState;

use super::backoff::Ending;
use super::failure::last_words;
use super::judge::{Judge, Verdict};
use super::phase::Phase;
use super::record::Note;
use super::state::{Core, nanos};

/// How long a node may take to end after its agent said that it is ending it.
const STOPPING_BOUND_NS: u64 = 60_000_000_000;

impl Core {
    /// One look at every node.
    pub fn tick(&mut self) {
        let others = self.look_at_the_living();
        for id in &others {
            self.look(*id);
            self.advance(*id);
        }
        self.look_at_the_end();
        // The silent ones are among the others.
        self.next_look_ns = others.iter().filter_map(|id| self.due_ns(*id)).min();
    }

    /// A look at the silent nodes whose deadline could have passed, between two ticks.
    pub fn look_at_the_due(&mut self) {
        let now = self.now();
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let (due, later): (Vec<_>, Vec<_>) = ids
            .into_iter()
            .filter_map(|id| Some((id, self.due_ns(id)?)))
            .partition(|(_, due_ns)| *due_ns <= now);
        for (id, _) in &due {
            self.look(*id);
            self.advance(*id);
        }
        let again = due.iter().filter_map(|(id, _)| self.due_ns(*id));
        let later = later.iter().map(|(_, due_ns)| *due_ns);
        self.next_look_ns = later.chain(again).min();
    }

    /// When a look at a node could have a consequence; `None` if it is not silent.
    fn due_ns(&self, id: NodeId) -> Option<u64> {
        match &self.nodes.get(&id)?.phase {
            Phase::Joined(judge) => judge.next_look_ns(),
            _ => None,
        }
    }

    /// The look at the nodes that have joined and whose heart beats, which are nearly always nearly
    /// all: one pass and a few loads each, for there may be a thousand. Returns the others.
    fn look_at_the_living(&mut self) -> Vec<NodeId> {
        let now = self.now();
        let mut others = Vec::new();
        for (id, node) in &mut self.nodes {
            let beats = match (&mut node.phase, &node.life, &node.remains) {
                (Phase::Joined(judge), Some(life), None) if node.drain.is_none() => self
                    .memory
                    .node(*id)
                    .filter(|section| section.agent() == (AgentState::Joined, life.generation))
                    .is_some_and(|section| judge.beats_on(now, section.beats())),
                _ => false,
            };
            if !beats {
                others.push(*id);
            }
        }
        others
    }

    fn look(&mut self, id: NodeId) {
        let now = self.now();
        let mut gone = None;
        if let Some(node) = self.nodes.get_mut(&id)
            && let Some((instance, kill_at)) = &mut node.remains
        {
            if instance.is_gone() {
                // It is told at once, unless there was nothing left to watch it with.
                gone = Some(instance.clone());
            } else if *kill_at <= now {
                instance.kill();
                // Once more only if that did not help for a long time.
                *kill_at = now.saturating_add(nanos(std::time::Duration::from_secs(10)));
            }
        }
        if let Some(instance) = gone {
            self.gone(id, &instance);
        }
        let Some(phase) = self.nodes.get(&id).map(|node| &node.phase) else {
            return;
        };
        match phase {
            Phase::Starting => self.look_for_join(id, now),
            Phase::Joined(_) => {
                self.look_at_heartbeat(id, now);
                self.look_at_drain(id, now);
            }
            Phase::Failing(_) => self.look_at_fence(id, now),
            Phase::Paused(_) => self.look_at_pause(id, now),
            Phase::Ordered(_) => self.look_at_order(id, now),
            Phase::Stopping { until_ns } if *until_ns <= now => {
                self.say(
                    id,
                    "its agent began to end the node and did not finish".into(),
                );
                self.detected(id, Cause::Hang, Ending::Ran, &[STOPPING_BOUND_NS]);
            }
            _ => {}
        }
    }

    /// Looks whether nodes that were adopted have joined, before anybody asks something of them
    /// that only a node that has joined can do.
    pub(super) fn look_at_the_adopted(&mut self) {
        let now = self.now();
        let adopted = self.nodes.iter().filter(|(id, node)| {
            matches!(node.phase, Phase::Starting)
                && self.agent_state(**id) == Some(AgentState::Joined)
        });
        let adopted: Vec<NodeId> = adopted.map(|(id, _)| *id).collect();
        for id in adopted {
            self.look_for_join(id, now);
        }
    }

    /// What the agent of the life with the given generation says of itself.
    fn agent_state(&self, id: NodeId) -> Option<AgentState> {
        let life = self.nodes.get(&id)?.life.as_ref()?;
        let (state, generation) = self.memory.node(id)?.agent();
        (generation == life.generation).then_some(state)
    }

    fn look_for_join(&mut self, id: NodeId, now: u64) {
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let Some(life) = &node.life else {
            return;
        };
        let generation = life.generation;
        let waited = now.saturating_sub(life.started_ns);
        match self.agent_state(id) {
            Some(AgentState::Joined) => {
                let beats = self.memory.node(id).map_or(0, |section| section.beats());
                let judge = Judge::new(&self.pod.heartbeat, now, beats);
                // An adopted node has joined before, and that was told.
                let state = self.recorder.fabric().entry(id).state();
                let joined = state == NodeState::Draining
                    || state == NodeState::Joined
                        && self.recorder.has(EventKind::NodeJoined, id, generation);
                if !joined {
                    self.recorder.set_state(id, NodeState::Joined);
                    let note = Note::of(generation, Cause::None, &[waited]);
                    self.recorder.event(EventKind::NodeJoined, Some(id), note);
                }
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.phase = Phase::Joined(judge);
                    node.detail = None;
                    node.joined_in_ns = (!joined).then_some(waited);
                }
            }
            Some(AgentState::Stopping) => self.stopping(id, now),
            Some(AgentState::Failed) => {
                let words = last_words(&node.folder.console_tail(10));
                self.say(id, format!("its agent gave up{words}"));
                self.detected(id, Cause::NeverJoined, Ending::DidNotStart, &[waited]);
            }
            _ if waited > nanos(self.pod.heartbeat.join_timeout) => {
                let words = last_words(&node.folder.console_tail(10));
                self.say(
                    id,
                    format!("it did not join within {} ms{words}", waited / 1_000_000),
                );
                let note = Note::of(generation, Cause::NeverJoined, &[waited]);
                self.recorder.event(EventKind::JoinTimeout, Some(id), note);
                self.detected(id, Cause::NeverJoined, Ending::DidNotStart, &[waited]);
            }
            _ => {}
        }
    }

    fn look_at_heartbeat(&mut self, id: NodeId, now: u64) {
        match self.agent_state(id) {
            Some(AgentState::Stopping) => {
                self.stopping(id, now);
                return;
            }
            Some(AgentState::Failed) => {
                self.say(id, "its agent gave up".into());
                self.detected(id, Cause::Hang, Ending::Ran, &[]);
                return;
            }
            _ => {}
        }
        let Some(beats) = self.memory.node(id).map(|section| section.beats()) else {
            return;
        };
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let (Phase::Joined(judge), Some(life)) = (&mut node.phase, &node.life) else {
            return;
        };
        match judge.look(now, beats, || life.instance.thread_times()) {
            Verdict::Alive | Verdict::Silent => {}
            Verdict::FalseAlarm(silence) => {
                node.false_alarms += 1;
                log::debug!(
                    "{}: silent for {} ms, {} ms of which it could have run; it lives",
                    node.spec,
                    silence.wall_ns / 1_000_000,
                    silence.available_ns / 1_000_000
                );
            }
            Verdict::Ring => {
                life.instance.ring();
            }
            Verdict::Hung(silence) => {
                self.say(
                    id,
                    format!(
                        "no heartbeat for {} ms, {} ms of which it could have run",
                        silence.wall_ns / 1_000_000,
                        silence.available_ns / 1_000_000
                    ),
                );
                let evidence = [
                    silence.wall_ns,
                    silence.available_ns,
                    silence.deadline_ns,
                    silence.beats,
                ];
                self.detected(id, Cause::Hang, Ending::Ran, &evidence);
            }
        }
    }

    /// The agent ends its node: heartbeats mean nothing any more, but it has not for ever.
    fn stopping(&mut self, id: NodeId, now: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            let until_ns = now.saturating_add(STOPPING_BOUND_NS);
            node.drain = None;
            node.phase = Phase::Stopping { until_ns };
        }
    }

    /// Tells the operator about a node: in the log and in its status.
    fn say(&mut self, id: NodeId, detail: String) {
        if let Some(node) = self.nodes.get_mut(&id) {
            let line = format!("{}: {detail}", node.spec);
            self.recorder.log(Level::Warn, line);
            node.detail = Some(detail);
        }
    }
}
