//! What is counted from the event ring.

use std::collections::BTreeMap;

use lupin_abi::Event;
use lupin_abi::event::{Cause, EventKind, FencePath};
use lupin_abi::fabric::{FabricSection, RingRead};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::snapshot::node_name;
use crate::api::PodStatus;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfCause {
    cause: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfPath {
    path: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfFailure {
    node: String,
    cause: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfReader {
    reader: &'static str,
}

/// From a millisecond to a minute.
fn detection() -> Histogram {
    Histogram::new(exponential_buckets(1e-3, 2.0, 17))
}

/// From ten microseconds to ten seconds.
fn handling() -> Histogram {
    Histogram::new(exponential_buckets(1e-5, 4.0, 11))
}

/// From ten milliseconds to three minutes.
fn starting() -> Histogram {
    Histogram::new(exponential_buckets(1e-2, 2.0, 15))
}

/// The reader of the ring.
pub(super) struct History {
    /// The next event to read.
    next: u64,
    /// Of the event before, in nanoseconds.
    last_ns: u64,
    /// When the failure of a node was detected that has not joined again, in nanoseconds.
    failed_ns: BTreeMap<u32, u64>,
    /// By node and cause. Names are looked up when they are shown.
    failures: BTreeMap<(u32, &'static str), u64>,
    missed: u64,

    detections: Family<OfCause, Histogram, fn() -> Histogram>,
    fences: Family<OfPath, Histogram, fn() -> Histogram>,
    notifications: Histogram,
    rings: Histogram,
    joins: Histogram,
    outages: Histogram,
    events: Family<OfKind, Counter>,
    shown_failures: Family<OfFailure, Counter>,
    lost: Family<OfReader, Counter>,
}

impl History {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let history = Self {
            next: 1,
            last_ns: 0,
            failed_ns: BTreeMap::new(),
            failures: BTreeMap::new(),
            missed: 0,
            detections: Family::new_with_constructor(detection),
            fences: Family::new_with_constructor(handling),
            notifications: handling(),
            rings: handling(),
            joins: starting(),
            outages: starting(),
            events: Family::default(),
            shown_failures: Family::default(),
            lost: Family::default(),
        };
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds(
            "notification",
            "From the detection of a failure until all live nodes were rung",
            &history.notifications,
        );
        seconds(
            "ring",
            "How long ringing all live nodes took",
            &history.rings,
        );
        seconds(
            "join",
            "From the start of a node until its agent used pod memory",
            &history.joins,
        );
        seconds(
            "outage",
            "From the detection of a failure until the node joined again",
            &history.outages,
        );
        registry.register_with_unit(
            "detection",
            "From the last beat of a node to the verdict, or from its start if it never joined; \
             deaths of processes are known at once and not counted here",
            Unit::Seconds,
            history.detections.clone(),
        );
        registry.register_with_unit(
            "fence",
            "From the detection of a failure until no store of the node could arrive any more",
            Unit::Seconds,
            history.fences.clone(),
        );
        registry.register(
            "failures",
            "Failures of nodes, by cause",
            history.shown_failures.clone(),
        );
        registry.register(
            "events",
            "Events on record, by kind",
            history.events.clone(),
        );
        registry.register(
            "events_lost",
            "Events that were overwritten before a reader read them: by these metrics, and by \
             followers of /v1/events",
            history.lost.clone(),
        );
        history
    }

    /// Reads on up to the newest event.
    pub(super) fn catch_up(&mut self, fabric: &FabricSection) {
        // Bounded: what comes meanwhile is read the next time.
        let head = fabric.state().ring_head();
        while self.next <= head {
            match fabric.read(self.next) {
                RingRead::Event(event) => {
                    self.next += 1;
                    self.take(&event);
                }
                RingRead::NotYet => return,
                RingRead::Lost { oldest } => {
                    let resume = oldest.max(self.next + 1);
                    // What was overwritten before this reader began is nobody's loss.
                    if self.next > 1 {
                        self.missed += resume - self.next;
                        // The end of what had begun may be among it.
                        self.failed_ns.clear();
                    }
                    self.next = resume;
                }
            }
        }
    }

    fn take(&mut self, event: &Event) {
        // The host was started again meanwhile: its clock as well.
        if event.time_ns < self.last_ns {
            self.failed_ns.clear();
        }
        self.last_ns = event.time_ns;
        let kind = event.kind.name();
        self.events.get_or_create(&OfKind { kind }).inc();
        let [first, second, ..] = event.evidence;
        let failed_ns = self.failed_ns.get(&event.node).copied();
        let since_failure = failed_ns.map(|then| seconds(event.time_ns - then));
        match event.kind {
            EventKind::FailureDetected => {
                let cause = event.cause.name();
                *self.failures.entry((event.node, cause)).or_default() += 1;
                self.failed_ns.insert(event.node, event.time_ns);
                if matches!(event.cause, Cause::Hang | Cause::NeverJoined) && first > 0 {
                    let detections = self.detections.get_or_create(&OfCause { cause });
                    detections.observe(seconds(first));
                }
            }
            EventKind::Fenced => {
                let path = FencePath::from_raw(u32::try_from(first).unwrap_or(0));
                let path = path.map_or("unknown", FencePath::name);
                if let Some(took) = since_failure {
                    self.fences.get_or_create(&OfPath { path }).observe(took);
                }
            }
            EventKind::Rung => {
                self.rings.observe(seconds(second));
                if let Some(took) = since_failure {
                    self.notifications.observe(took);
                }
            }
            EventKind::NodeJoined => {
                self.joins.observe(seconds(first));
                if let Some(took) = since_failure {
                    self.outages.observe(took);
                }
                self.failed_ns.remove(&event.node);
            }
            EventKind::NodeDown => {
                self.failed_ns.remove(&event.node);
            }
            EventKind::ManagerStopped => self.failed_ns.clear(),
            _ => {}
        }
    }

    /// Fills what needs names.
    pub(super) fn show(&mut self, status: &PodStatus, lost_by_followers: u64) {
        self.shown_failures.clear();
        for ((node, cause), count) in &self.failures {
            let node = node_name(status, *node);
            let label = OfFailure { node, cause };
            self.shown_failures.get_or_create(&label).inc_by(*count);
        }
        self.lost.clear();
        for (reader, count) in [("metrics", self.missed), ("followers", lost_by_followers)] {
            self.lost.get_or_create(&OfReader { reader }).inc_by(count);
        }
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}
