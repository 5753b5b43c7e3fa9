//! What is true of a pod at the moment of a scrape.

use std::sync::atomic::AtomicU64;

use lupin_abi::fabric::NodeState;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{PodPhase, PodStatus};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfNode {
    node: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfState {
    node: String,
    state: &'static str,
}

type Real = Gauge<f64, AtomicU64>;
type RealCounter = Counter<f64, AtomicU64>;

/// One series a node, or one for the pod.
#[derive(Default)]
pub(super) struct Snapshot {
    epoch: Gauge,
    backup: Gauge,
    going_down: Gauge,
    memory: Gauge,
    states: Family<OfState, Gauge>,
    generations: Family<OfNode, Gauge>,
    restarts: Family<OfNode, Counter>,
    beat_age: Family<OfNode, Real>,
    beat_left: Family<OfNode, Real>,
    false_alarms: Family<OfNode, Counter>,
    resident: Family<OfNode, Gauge>,
    run: Family<OfNode, RealCounter>,
    wait: Family<OfNode, RealCounter>,
}

impl Snapshot {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let snapshot = Self::default();
        registry.register(
            "epoch",
            "How many managers have taken charge of this pod memory",
            snapshot.epoch.clone(),
        );
        registry.register(
            "backup",
            "Whether a backup manager stands by",
            snapshot.backup.clone(),
        );
        registry.register(
            "going_down",
            "Whether the pod is being brought down",
            snapshot.going_down.clone(),
        );
        registry.register_with_unit(
            "pod_memory",
            "Size of the pod memory",
            Unit::Bytes,
            snapshot.memory.clone(),
        );
        registry.register(
            "node_state",
            "1 for the state in which a node is, 0 for the others",
            snapshot.states.clone(),
        );
        registry.register(
            "node_generation",
            "The node's current generation",
            snapshot.generations.clone(),
        );
        registry.register(
            "node_restarts",
            "How often the node was started again",
            snapshot.restarts.clone(),
        );
        registry.register_with_unit(
            "node_heartbeat_age",
            "How long ago the manager saw the node beat",
            Unit::Seconds,
            snapshot.beat_age.clone(),
        );
        registry.register_with_unit(
            "node_heartbeat_left",
            "How much time the node has left to beat, counted only while it could run",
            Unit::Seconds,
            snapshot.beat_left.clone(),
        );
        registry.register(
            "node_false_alarms",
            "How often the node was suspected to hang and was found alive or starved",
            snapshot.false_alarms.clone(),
        );
        registry.register_with_unit(
            "node_memory",
            "Resident memory of the node's processes",
            Unit::Bytes,
            snapshot.resident.clone(),
        );
        registry.register_with_unit(
            "node_cpu",
            "Time on a processor of the host, of the node's threads that live",
            Unit::Seconds,
            snapshot.run.clone(),
        );
        registry.register_with_unit(
            "node_cpu_wait",
            "Time in which the node's threads could have run and waited for a processor",
            Unit::Seconds,
            snapshot.wait.clone(),
        );
        snapshot
    }

    /// Replaces what an earlier scrape showed.
    pub(super) fn show(&mut self, status: &PodStatus) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        self.epoch.set(whole(status.epoch));
        self.backup.set(status.backup_pid.is_some().into());
        self.going_down
            .set((status.phase == PodPhase::GoingDown).into());
        self.memory.set(whole(status.memory_bytes));
        // Nodes come and go; what is gone has no series.
        self.states.clear();
        self.generations.clear();
        self.restarts.clear();
        self.beat_age.clear();
        self.beat_left.clear();
        self.false_alarms.clear();
        self.resident.clear();
        self.run.clear();
        self.wait.clear();
        for node in &status.nodes {
            for state in NodeState::ALL {
                let label = OfState {
                    node: node.name.clone(),
                    state: state.name(),
                };
                let is = i64::from(*state == node.state);
                self.states.get_or_create(&label).set(is);
            }
            let label = OfNode {
                node: node.name.clone(),
            };
            let generation = self.generations.get_or_create(&label);
            generation.set(node.generation.into());
            let restarts = self.restarts.get_or_create(&label);
            restarts.inc_by(node.restarts.into());
            let alarms = self.false_alarms.get_or_create(&label);
            alarms.inc_by(node.false_alarms);
            if let Some(beat) = &node.heartbeat {
                self.beat_age
                    .get_or_create(&label)
                    .set(seconds(beat.age_ns));
                self.beat_left
                    .get_or_create(&label)
                    .set(seconds(beat.left_ns));
            }
            if let Some(usage) = &node.usage {
                self.resident
                    .get_or_create(&label)
                    .set(whole(usage.memory_bytes));
                self.run.get_or_create(&label).inc_by(seconds(usage.run_ns));
                self.wait
                    .get_or_create(&label)
                    .inc_by(seconds(usage.delay_ns));
            }
        }
    }
}

/// The name of a node; its number if it is not in the pod file any more.
pub(super) fn node_name(status: &PodStatus, id: u32) -> String {
    let node = status.nodes.iter().find(|node| node.id == id);
    node.map_or_else(|| id.to_string(), |node| node.name.clone())
}
