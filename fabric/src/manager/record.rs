//! The record: every change of the fabric section, in one place.
//!
//! There is one writer at a time, the manager that holds the pod memory's lock.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use log::Level;
use lupin_abi::event::{Cause, EVIDENCE_WORDS, Event, EventKind, FencePath};
use lupin_abi::fabric::{FabricSection, NodeState, RING_SLOTS, RingRead};
use lupin_abi::{Generation, NodeId};

use super::Clock;
use super::crash;
use crate::memory::PodMemory;

/// What an event says beyond its kind and node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Note {
    pub old: Generation,
    pub new: Generation,
    pub cause: Cause,
    pub evidence: [u64; EVIDENCE_WORDS],
}

impl Note {
    /// An event of one life.
    pub fn of(generation: Generation, cause: Cause, evidence: &[u64]) -> Self {
        Self::between(generation, generation, cause, evidence)
    }

    /// An event between two lives. Evidence beyond the words of an event is cut.
    pub fn between(old: Generation, new: Generation, cause: Cause, evidence: &[u64]) -> Self {
        let mut words = [0; EVIDENCE_WORDS];
        for (word, given) in words.iter_mut().zip(evidence) {
            *word = *given;
        }
        Self {
            old,
            new,
            cause,
            evidence: words,
        }
    }
}

/// Writes events, states and generations.
pub(super) struct Recorder {
    memory: Arc<PodMemory>,
    clock: Clock,
    epoch: u64,
    /// Lines for the log that wait for a moment when nobody waits for us.
    lines: RefCell<Vec<(Level, String)>>,
}

impl Recorder {
    /// Takes charge: raises the epoch.
    pub fn take_charge(memory: Arc<PodMemory>, clock: Clock) -> Self {
        crash::point("epoch");
        let state = memory.fabric().state();
        let epoch = state.epoch() + 1;
        state.set_epoch(epoch);
        Self {
            memory,
            clock,
            epoch,
            lines: RefCell::default(),
        }
    }

    /// Keeps a line for the log until [`write_log`](Self::write_log): between a failure and the
    /// ring that tells of it there is no time to wait for a disk.
    pub fn log(&self, level: Level, line: String) {
        if log::log_enabled!(level) {
            self.lines.borrow_mut().push((level, line));
        }
    }

    /// Writes what was kept.
    pub fn write_log(&self) {
        for (level, line) in self.lines.take() {
            log::log!(level, "{line}");
        }
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn fabric(&self) -> &FabricSection {
        self.memory.fabric()
    }

    pub fn generation(&self, node: NodeId) -> Generation {
        self.fabric().entry(node).generation()
    }

    pub fn set_state(&self, node: NodeId, state: NodeState) {
        crash::point("state");
        self.fabric().entry(node).set_state(state, (self.clock)());
    }

    pub fn set_cause(&self, node: NodeId, cause: Cause) {
        crash::point("cause");
        self.fabric().entry(node).set_cause(cause);
    }

    pub fn set_generation(&self, node: NodeId, generation: Generation) {
        crash::point("generation");
        self.fabric().entry(node).set_generation(generation);
    }

    pub fn count_restart(&self, node: NodeId) -> u32 {
        crash::point("restarts");
        let entry = self.fabric().entry(node);
        let restarts = entry.restarts().saturating_add(1);
        entry.set_restarts(restarts);
        restarts
    }

    /// Appends an event, and a line for the log.
    pub fn event(&self, kind: EventKind, node: Option<NodeId>, note: Note) {
        crash::point("event");
        let event = Event {
            seq: 0,
            time_ns: (self.clock)(),
            epoch: self.epoch,
            kind,
            node: node.map_or(0, NodeId::get),
            old_generation: note.old,
            generation: note.new,
            cause: note.cause,
            evidence: note.evidence,
        };
        let seq = self.fabric().append(&event);
        let line = match node {
            None => format!("[{seq}] {kind}: epoch {}", self.epoch),
            Some(node) => {
                let more = more(kind, &note);
                format!("[{seq}] node {node} generation {}: {kind}{more}", note.new)
            }
        };
        self.log(Level::Info, line);
    }

    /// The kind of the newest event in the ring about that life that is of one of these kinds.
    pub fn last_of(
        &self,
        kinds: &[EventKind],
        node: NodeId,
        generation: Generation,
    ) -> Option<EventKind> {
        self.newest_first().find_map(|event| {
            let found = event.node == node.get()
                && event.generation == generation
                && kinds.contains(&event.kind);
            found.then_some(event.kind)
        })
    }

    /// Every event that the ring holds.
    pub fn newest_first(&self) -> impl Iterator<Item = Event> + '_ {
        let head = self.fabric().state().ring_head();
        let oldest = head.saturating_sub(RING_SLOTS as u64 - 2).max(1);
        let read = move |seq| match self.fabric().read(seq) {
            RingRead::Event(event) => Some(event),
            _ => None,
        };
        (oldest..=head).rev().filter_map(read)
    }

    /// Whether the ring holds an event of this kind about the failure of that life. For a manager
    /// that goes on where another one died: each step of a failure shall be told once.
    pub fn has(&self, kind: EventKind, node: NodeId, failed: Generation) -> bool {
        self.newest_first().any(|event| {
            event.kind == kind && event.node == node.get() && event.old_generation == failed
        })
    }
}

/// The evidence of an event in a few words, for the log.
fn more(kind: EventKind, note: &Note) -> String {
    let [first, second, third, ..] = note.evidence;
    let micros = |nanos: u64| Duration::from_micros(nanos / 1000);
    match kind {
        EventKind::NodeStarted | EventKind::NodeAdopted => format!(": process {first}"),
        EventKind::NodeJoined => format!(" after {:?}", micros(first)),
        EventKind::FailureDetected | EventKind::NodeDown | EventKind::JoinTimeout => {
            format!(": {}", note.cause)
        }
        EventKind::Fenced => {
            let path = u32::try_from(first).ok().and_then(FencePath::from_raw);
            let path = path.map_or("?", FencePath::name);
            let slots = if third > 0 {
                format!(" ({third})")
            } else {
                String::new()
            };
            format!(": {path}{slots} in {:?}", micros(second))
        }
        EventKind::GenerationRaised => format!(" from {}", note.old),
        EventKind::Rung => format!(": {first} nodes in {:?}", micros(second)),
        EventKind::NodeRestarting => format!(" in {first} ms"),
        EventKind::NodePaused | EventKind::NodeResumed => format!(" after {:?}", micros(first)),
        EventKind::FenceFailed => format!(": attempt {first}, again in {second} ms"),
        EventKind::HookStarted => format!(": process {first}"),
        EventKind::HookFailed => format!(": status {first}, signal {second}"),
        EventKind::NodeStopping => format!(": it has {first} ms"),
        EventKind::NodeDraining => format!(": for {first} ms at most"),
        EventKind::NodeDrained if first == u64::MAX => ": its agent did not say".into(),
        EventKind::NodeDrained => format!(": {first} members left"),
        _ => String::new(),
    }
}
