//! What tests show as the status of a pod.

use lupin_abi::event::Cause;
use lupin_abi::fabric::NodeState;

use super::{HeartbeatStatus, NodeStatus, PodPhase, PodStatus};

/// A node that has joined; its process is this one.
pub(crate) fn node(id: u32, name: &str) -> NodeStatus {
    NodeStatus {
        id,
        name: name.into(),
        backend: "namespace".into(),
        state: NodeState::Joined,
        generation: 1,
        cause: Cause::None,
        restarts: 0,
        in_state_ns: 5,
        joined_in_ns: Some(7),
        pid: Some(std::process::id()),
        folder: "/".into(),
        detail: None,
        heartbeat: Some(HeartbeatStatus {
            age_ns: 1,
            left_ns: 2,
            deadline_ns: 3,
        }),
        false_alarms: 0,
        usage: None,
    }
}

/// A pod of these nodes.
pub(crate) fn pod(nodes: Vec<NodeStatus>) -> PodStatus {
    PodStatus {
        pod: "demo".into(),
        pod_id: "07".into(),
        phase: PodPhase::Running,
        manager_pid: 1,
        epoch: 1,
        backup_pid: None,
        pod_file: "/demo.toml".into(),
        memory: "/demo.pod".into(),
        memory_bytes: 0,
        join_timeout_ms: 1000,
        newest_event: 0,
        nodes,
    }
}
