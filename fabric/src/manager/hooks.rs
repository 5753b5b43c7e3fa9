//! When hooks are called, and what is told of them.

use std::time::Duration;

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::{Event, Generation, NodeId};

use super::hook::{BOUND, Hook, HookOutcome};
use super::record::Note;
use super::state::{Core, Effect, nanos};

/// A failure that is older than this is not told by a manager that takes over.
const NEWS_NS: u64 = 60_000_000_000;

impl Core {
    /// Tells the hook of a node, if it has one, that a life has failed and what comes now.
    pub fn call_hook(&mut self, id: NodeId, old: Generation, cause: Cause, next: Option<Duration>) {
        if self.is_going_down() || cause == Cause::PodDown {
            return;
        }
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let words = &node.spec.policies.of(cause).hook;
        if words.is_empty() {
            return;
        }
        let is_it = |event: &Event| {
            event.kind == EventKind::FailureDetected
                && event.node == id.get()
                && event.old_generation == old
        };
        let found = self.recorder.newest_first().find(is_it);
        let evidence = found.map(|event| event.evidence).unwrap_or_default();
        let evidence: Vec<_> = evidence.iter().map(u64::to_string).collect();
        let (action, delay) = match next {
            Some(delay) => ("restart", delay.as_millis()),
            None => ("down", 0),
        };
        let environment = [
            ("LUPIN_POD", self.pod.name.clone()),
            ("LUPIN_NODE", id.to_string()),
            ("LUPIN_NODE_NAME", node.spec.name.clone()),
            ("LUPIN_GENERATION", old.to_string()),
            ("LUPIN_CAUSE", cause.to_string()),
            ("LUPIN_EVIDENCE", evidence.join(" ")),
            (
                "LUPIN_DETAIL",
                node.detail.clone().unwrap_or_default().replace('\0', ""),
            ),
            ("LUPIN_ACTION", action.into()),
            ("LUPIN_DELAY_MS", delay.to_string()),
        ];
        let hook = Hook {
            words: words.clone(),
            environment: environment.map(|(name, value)| (name.into(), value)).into(),
            log: node.folder.path().join("hook.log"),
        };
        self.effects.push(Effect::Hook(id, old, hook));
    }

    /// Calls the hooks of failures that a dead manager had told to everybody else.
    pub fn call_missed_hooks(&mut self) {
        let now = self.now();
        let missed = self.nodes.keys().filter_map(|id| {
            let of_node = |event: &Event| event.node == id.get();
            let decided = self.recorder.newest_first().find(|event| {
                of_node(event) && matches!(event.kind, EventKind::NodeRestarting | EventKind::NodeDown)
            })?;
            let (old, cause) = (decided.old_generation, decided.cause);
            let is_news = now.saturating_sub(decided.time_ns) < NEWS_NS;
            let failed = decided.generation > old && is_news;
            let told = self.recorder.has(EventKind::HookStarted, *id, old);
            // What this manager has just decided itself calls the hook anyway.
            let called = |effect: &Effect| matches!(effect, Effect::Hook(of, life, _) if (of, *life) == (id, old));
            let called = self.effects.iter().any(called);
            let delay = Duration::from_millis(decided.evidence[0]);
            let next = (decided.kind == EventKind::NodeRestarting).then_some(delay);
            (failed && !told && !called).then_some((*id, old, cause, next))
        });
        for (id, old, cause, next) in missed.collect::<Vec<_>>() {
            self.call_hook(id, old, cause, next);
        }
    }

    /// A hook runs.
    pub fn hook_started(&mut self, id: NodeId, old: Generation, pid: u32) {
        let note = Note::of(old, Cause::None, &[pid.into()]);
        self.recorder.event(EventKind::HookStarted, Some(id), note);
    }

    /// A hook is over.
    pub fn hook_ended(
        &mut self,
        id: NodeId,
        old: Generation,
        outcome: &HookOutcome,
        took: Duration,
    ) {
        let (code, signal, why) = match outcome {
            HookOutcome::Done => return,
            HookOutcome::Status(code) => (*code as u32, 0, format!("it ended with status {code}")),
            HookOutcome::Signal(signal) => {
                (0, *signal as u32, format!("signal {signal} killed it"))
            }
            HookOutcome::Late => (0, 9, format!("it was ended after {} s", BOUND.as_secs())),
            HookOutcome::NotStarted(why) => (0, 0, why.clone()),
        };
        log::error!("the hook of node {id} for the end of generation {old} failed: {why}");
        let evidence = [code.into(), signal.into(), nanos(took)];
        let note = Note::of(old, Cause::None, &evidence);
        self.recorder.event(EventKind::HookFailed, Some(id), note);
    }
}
