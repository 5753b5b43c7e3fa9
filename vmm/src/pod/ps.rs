//! `pod ps`: who is there and how they are.

use std::path::Path;

use lupin_abi::event::Cause;
use lupin_fabric::api::{ClientError, NodeStatus, PodPhase, PodStatus};

use super::place::{self, Place};
use super::text::{size, span, table};
use super::{Failure, PsArgs, print, status};

pub(super) fn ps(base: &Path, args: &PsArgs) -> Result<i32, Failure> {
    let mut pods = Vec::new();
    if let Some(pod) = &args.pod {
        let place = Place::find(base, pod)?;
        let status = place.connect()?.status();
        pods.push(status.map_err(|e| Failure::of_client(&place, &e))?);
    } else {
        for name in place::running(base) {
            let place = Place::new(base, &name);
            match place.connect().and_then(|mut client| {
                let status = client.status();
                status.map_err(|e| Failure::of_client(&place, &e))
            }) {
                Ok(status) => pods.push(status),
                // It may have ended since it was listed, or belong to somebody else.
                Err(failure) => eprintln!("lupin-vmm: {}", failure.message),
            }
        }
        if pods.is_empty() && !args.json {
            eprintln!("no pod runs in {}", base.display());
        }
    }
    for (n, pod) in pods.iter().enumerate() {
        if args.json {
            let json = serde_json::to_string(pod)
                .map_err(|e| Failure::general(ClientError::Io(e.into()).to_string()))?;
            print(&(json + "\n"))?;
        } else {
            let gap = if n > 0 { "\n" } else { "" };
            print(&format!("{gap}{}", describe(pod, args.wide)))?;
        }
    }
    Ok(status::OK)
}

/// A pod in words and a table.
fn describe(pod: &PodStatus, wide: bool) -> String {
    let phase = match pod.phase {
        PodPhase::Running => "running",
        PodPhase::GoingDown => "going down",
    };
    let backup = match pod.backup_pid {
        Some(pid) => format!(", backup {pid}"),
        None => String::new(),
    };
    let mut out = format!(
        "pod {}: {phase}, manager {} (epoch {}){backup}, {} shared memory in {}\n",
        pod.pod,
        pod.manager_pid,
        pod.epoch,
        size(pod.memory_bytes),
        pod.memory.display(),
    );
    let mut head = HEAD.to_vec();
    let mut rows: Vec<_> = pod.nodes.iter().map(row).collect();
    if wide {
        head.extend(WIDE_HEAD);
        for (row, node) in rows.iter_mut().zip(&pod.nodes) {
            row.extend(wide_row(node));
        }
    }
    out += &table(&head, &rows);
    for node in &pod.nodes {
        if let Some(detail) = &node.detail {
            out += &format!("{}: {detail}\n", node.name);
        }
    }
    out
}

const HEAD: [&str; 9] = [
    "ID",
    "NAME",
    "BACKEND",
    "STATE",
    "FOR",
    "GENERATION",
    "RESTARTS",
    "PID",
    "LAST FAILURE",
];

/// The columns of `--wide`. The last three count from the start of the threads that live.
const WIDE_HEAD: [&str; 6] = [
    "BEAT",
    "LEFT",
    "FALSE ALARMS",
    "MEMORY",
    "CPU TIME",
    "WAITED",
];

fn wide_row(node: &NodeStatus) -> Vec<String> {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let beat = node.heartbeat.as_ref();
    let usage = node.usage.as_ref();
    vec![
        or_none(beat.map(|beat| span(beat.age_ns))),
        or_none(beat.map(|beat| span(beat.left_ns))),
        node.false_alarms.to_string(),
        or_none(usage.map(|usage| size(usage.memory_bytes))),
        or_none(usage.map(|usage| span(usage.run_ns))),
        or_none(usage.map(|usage| span(usage.delay_ns))),
    ]
}

fn row(node: &NodeStatus) -> Vec<String> {
    vec![
        node.id.to_string(),
        node.name.clone(),
        node.backend.clone(),
        node.state.name().into(),
        span(node.in_state_ns),
        node.generation.to_string(),
        node.restarts.to_string(),
        node.pid.map_or("-".into(), |pid| pid.to_string()),
        match node.cause {
            Cause::None => "-".into(),
            cause => cause.name().into(),
        },
    ]
}
