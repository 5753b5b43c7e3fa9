//! A failure told from the pod's own records.

use std::fmt::Write as _;

use lupin_abi::event::{Cause, Event, EventKind, FencePath};

/// The records of one failure, in the order in which the manager must have acted.
#[derive(Debug)]
pub struct Timeline {
    /// When the node was killed: the host's monotonic clock, in nanoseconds.
    killed_ns: u64,
    detected: Event,
    fenced: Event,
    raised: Event,
    rung: Event,
    started: Option<Event>,
    /// Absent while the node is still booting.
    joined: Option<Event>,
}

impl Timeline {
    /// Picks the records of the failure of `node` that followed `killed_ns`.
    ///
    /// # Errors
    /// Names the record that is missing.
    pub fn find(events: &[Event], node: u32, killed_ns: u64) -> Result<Self, String> {
        let after = |kind: EventKind| {
            events
                .iter()
                .find(|e| e.kind == kind && e.node == node && e.time_ns >= killed_ns)
                .copied()
        };
        let need = |kind: EventKind| {
            after(kind).ok_or_else(|| format!("the pod recorded no `{kind}` of node {node}"))
        };
        Ok(Self {
            killed_ns,
            detected: need(EventKind::FailureDetected)?,
            fenced: need(EventKind::Fenced)?,
            raised: need(EventKind::GenerationRaised)?,
            rung: need(EventKind::Rung)?,
            started: after(EventKind::NodeStarted),
            joined: after(EventKind::NodeJoined),
        })
    }

    /// Whether the records prove the order: detected, fenced, generation raised, others rung,
    /// by sequence number and by time.
    ///
    /// # Errors
    /// Names the two records that are in the wrong order.
    pub fn check(&self) -> Result<(), String> {
        let steps = [&self.detected, &self.fenced, &self.raised, &self.rung];
        for pair in steps.windows(2) {
            if pair[0].seq >= pair[1].seq || pair[0].time_ns > pair[1].time_ns {
                return Err(format!(
                    "`{}` (record {}, {} ns) does not come before `{}` (record {}, {} ns)",
                    pair[0].kind,
                    pair[0].seq,
                    pair[0].time_ns,
                    pair[1].kind,
                    pair[1].seq,
                    pair[1].time_ns
                ));
            }
        }
        if self.raised.generation <= self.raised.old_generation {
            return Err(format!(
                "the generation went from {} to {}",
                self.raised.old_generation, self.raised.generation
            ));
        }
        match &self.joined {
            Some(joined) if joined.generation < self.raised.generation => Err(format!(
                "the node joined again with generation {}, not {}",
                joined.generation, self.raised.generation
            )),
            _ => Ok(()),
        }
    }

    /// The failure in plain words, one line a step, times since the kill. `seen` are things that
    /// somebody else saw, with the host's monotonic time.
    pub fn words(&self, seen: &[(u64, String)]) -> String {
        let record = |e: &Event, text: String| (e.time_ns, format!("record {}", e.seq), text);
        let path = match FencePath::from_raw(self.fenced.evidence[0] as u32) {
            Some(FencePath::Exited) => "its process is gone with all its threads",
            Some(FencePath::Memslots) => "its pod memslots are deleted",
            Some(FencePath::Killed) => "it was killed and all its threads are gone",
            None => "by a path that this version does not know",
        };
        let node = self.detected.node;
        let (old, new) = (self.raised.old_generation, self.raised.generation);
        let mut lines = vec![
            (
                self.killed_ns,
                String::new(),
                format!("node {node} is killed with SIGKILL"),
            ),
            record(
                &self.detected,
                format!("the manager knows: {}", signal(self.detected.cause)),
            ),
            record(
                &self.fenced,
                format!("fenced: {path}; it can store nothing more"),
            ),
            record(
                &self.raised,
                format!("generation {old} -> {new}: every lock and claim of the old life is free"),
            ),
            record(
                &self.rung,
                format!("the {} other nodes were rung", self.rung.evidence[0]),
            ),
        ];
        lines.extend(
            self.started
                .iter()
                .map(|e| record(e, format!("node {node} is started again"))),
        );
        lines.extend(self.joined.iter().map(|e| {
            record(
                e,
                format!(
                    "node {node} is back and joined as generation {}",
                    e.generation
                ),
            )
        }));
        lines.extend(
            seen.iter()
                .map(|(ns, text)| (*ns, String::new(), text.clone())),
        );
        lines.sort_by_key(|(ns, ..)| *ns);
        let mut out = String::new();
        for (ns, record, text) in lines {
            let time = millis(ns.saturating_sub(self.killed_ns));
            let _ = writeln!(out, "  {time:>12}  {record:<10} {text}");
        }
        out
    }
}

/// By which signal a failure was noticed, in words.
fn signal(cause: Cause) -> &'static str {
    match cause {
        Cause::VmmExit => "the pidfd of its process became readable",
        Cause::Panic => "the guest's pvpanic device reported a panic",
        Cause::TripleFault => "KVM reported a shutdown of its CPU",
        Cause::GuestReboot => "the guest asked for a reset",
        Cause::GuestPowerOff => "the guest powered itself off",
        Cause::Hang => "its heartbeat stood still past the deadline",
        Cause::Operator => "the operator told it",
        _ => "its process ended",
    }
}

/// Nanoseconds as milliseconds, for people.
pub fn millis(ns: u64) -> String {
    format!("{:.2} ms", ns as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64, kind: EventKind) -> Event {
        Event {
            seq,
            time_ns: 1000 + seq,
            epoch: 1,
            kind,
            node: 2,
            old_generation: 1,
            generation: 2,
            cause: Cause::VmmExit,
            evidence: [1, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    fn failure() -> Vec<Event> {
        [
            EventKind::FailureDetected,
            EventKind::Fenced,
            EventKind::GenerationRaised,
            EventKind::Rung,
        ]
        .into_iter()
        .zip(5..)
        .map(|(kind, seq)| event(seq, kind))
        .collect()
    }

    #[test]
    fn the_right_order_passes_and_is_told() {
        let timeline = Timeline::find(&failure(), 2, 1000).unwrap();
        timeline.check().unwrap();
        let words = timeline.words(&[(1006, "the job goes on".into())]);
        let at = |text: &str| {
            words
                .find(text)
                .unwrap_or_else(|| panic!("no {text}: {words}"))
        };
        assert!(at("the manager knows") < at("the job goes on"), "{words}");
        assert!(at("the job goes on") < at("were rung"), "{words}");
        assert!(words.contains("generation 1 -> 2"), "{words}");
    }

    #[test]
    fn a_generation_raised_before_the_fence_is_caught() {
        let mut events = failure();
        events[1].kind = EventKind::GenerationRaised;
        events[2].kind = EventKind::Fenced;
        let error = Timeline::find(&events, 2, 1000)
            .unwrap()
            .check()
            .unwrap_err();
        assert!(error.contains("`fenced`"), "{error}");
    }

    #[test]
    fn records_of_an_earlier_failure_do_not_count() {
        let error = Timeline::find(&failure(), 2, 5000).unwrap_err();
        assert!(error.contains("failure-detected"), "{error}");
    }
}
