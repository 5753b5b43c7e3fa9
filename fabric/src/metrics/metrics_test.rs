use std::alloc::{Layout, alloc_zeroed};

use lupin_abi::Event;
use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind, FencePath};
use lupin_abi::fabric::{FabricSection, NodeState, RING_SLOTS};
use lupin_abi::layout::FABRIC_SIZE;

use super::*;
use crate::api::{HeartbeatStatus, NodeStatus, PodPhase};
use crate::sys::usage::Usage;

fn fabric() -> &'static FabricSection {
    let layout = Layout::from_size_align(FABRIC_SIZE as usize, 4096).unwrap();
    // SAFETY: the layout is not empty; the memory is zeroed, aligned, never freed and used
    // through the section's atomics only.
    unsafe { FabricSection::from_ptr(alloc_zeroed(layout)) }
}

fn status() -> PodStatus {
    PodStatus {
        pod: "demo".into(),
        pod_id: "07".into(),
        phase: PodPhase::Running,
        manager_pid: 1,
        epoch: 5,
        backup_pid: Some(9),
        pod_file: "/demo.toml".into(),
        memory: "/demo.pod".into(),
        memory_bytes: 1 << 20,
        join_timeout_ms: 1000,
        newest_event: 0,
        nodes: vec![NodeStatus {
            id: 2,
            name: "n2".into(),
            backend: "namespace".into(),
            state: NodeState::Joined,
            generation: 4,
            cause: Cause::Hang,
            restarts: 3,
            in_state_ns: 0,
            joined_in_ns: Some(1),
            pid: Some(4),
            folder: "/".into(),
            detail: None,
            heartbeat: Some(HeartbeatStatus {
                age_ns: 8_000_000,
                left_ns: 92_000_000,
                deadline_ns: 100_000_000,
            }),
            false_alarms: 6,
            usage: Some(Usage {
                memory_bytes: 4096,
                run_ns: 1_500_000_000,
                delay_ns: 500_000_000,
                processes: 1,
                threads: 2,
            }),
        }],
    }
}

fn append(fabric: &FabricSection, time_ms: u64, kind: EventKind, cause: Cause, evidence: &[u64]) {
    let mut words = [0; EVIDENCE_WORDS];
    words[..evidence.len()].copy_from_slice(evidence);
    fabric.append(&Event {
        seq: 0,
        time_ns: time_ms * 1_000_000,
        epoch: 1,
        kind,
        node: 2,
        old_generation: 3,
        generation: 4,
        cause,
        evidence: words,
    });
}

/// A hang found after 120 ms, fenced in 3 ms, all rung after 4 ms, back after 504 ms.
fn failure(fabric: &FabricSection, at_ms: u64) {
    let hang = Cause::Hang;
    append(
        fabric,
        at_ms,
        EventKind::FailureDetected,
        hang,
        &[120_000_000],
    );
    let killed = FencePath::Killed as u64;
    append(fabric, at_ms + 3, EventKind::Fenced, hang, &[killed]);
    append(fabric, at_ms + 3, EventKind::GenerationRaised, hang, &[]);
    append(fabric, at_ms + 4, EventKind::Rung, hang, &[1, 20_000]);
    append(
        fabric,
        at_ms + 504,
        EventKind::NodeJoined,
        Cause::None,
        &[400_000_000],
    );
}

/// The value of one series.
fn value(text: &str, series: &str) -> f64 {
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{series} ")));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_failure_is_counted_with_the_times_of_its_steps() {
    let (fabric, metrics) = (fabric(), Metrics::new("demo"));
    failure(fabric, 1000);
    metrics.catch_up(fabric);
    failure(fabric, 9000);
    metrics.catch_up(fabric);
    metrics.catch_up(fabric);
    let text = metrics.render(&status(), 11).unwrap();
    let near = |series: &str, expected: f64| {
        let found = value(&text, series);
        assert!((found - expected).abs() < 1e-9, "{series} is {found}");
    };
    near(
        "lupin_failures_total{pod=\"demo\",node=\"n2\",cause=\"hang\"}",
        2.0,
    );
    near(
        "lupin_detection_seconds_sum{pod=\"demo\",cause=\"hang\"}",
        0.24,
    );
    near(
        "lupin_fence_seconds_sum{pod=\"demo\",path=\"killed\"}",
        0.006,
    );
    near("lupin_notification_seconds_sum{pod=\"demo\"}", 0.008);
    near("lupin_ring_seconds_sum{pod=\"demo\"}", 40e-6);
    near("lupin_join_seconds_sum{pod=\"demo\"}", 0.8);
    near("lupin_outage_seconds_count{pod=\"demo\"}", 2.0);
    near("lupin_outage_seconds_sum{pod=\"demo\"}", 1.008);
    near(
        "lupin_events_lost_total{pod=\"demo\",reader=\"metrics\"}",
        0.0,
    );
    near(
        "lupin_events_lost_total{pod=\"demo\",reader=\"followers\"}",
        11.0,
    );
    near("lupin_events_total{pod=\"demo\",kind=\"rung\"}", 2.0);
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn a_snapshot_shows_each_node_and_forgets_those_that_left() {
    let metrics = Metrics::new("demo");
    metrics.render(&status(), 0).unwrap();
    let text = metrics.render(&status(), 0).unwrap();
    for (series, expected) in [
        ("lupin_epoch{pod=\"demo\"}", 5.0),
        ("lupin_backup{pod=\"demo\"}", 1.0),
        ("lupin_going_down{pod=\"demo\"}", 0.0),
        (
            "lupin_node_state{pod=\"demo\",node=\"n2\",state=\"joined\"}",
            1.0,
        ),
        (
            "lupin_node_state{pod=\"demo\",node=\"n2\",state=\"down\"}",
            0.0,
        ),
        ("lupin_node_generation{pod=\"demo\",node=\"n2\"}", 4.0),
        ("lupin_node_restarts_total{pod=\"demo\",node=\"n2\"}", 3.0),
        (
            "lupin_node_false_alarms_total{pod=\"demo\",node=\"n2\"}",
            6.0,
        ),
        (
            "lupin_node_heartbeat_age_seconds{pod=\"demo\",node=\"n2\"}",
            0.008,
        ),
        (
            "lupin_node_heartbeat_left_seconds{pod=\"demo\",node=\"n2\"}",
            0.092,
        ),
        ("lupin_node_memory_bytes{pod=\"demo\",node=\"n2\"}", 4096.0),
        (
            "lupin_node_cpu_seconds_total{pod=\"demo\",node=\"n2\"}",
            1.5,
        ),
        (
            "lupin_node_cpu_wait_seconds_total{pod=\"demo\",node=\"n2\"}",
            0.5,
        ),
    ] {
        assert_eq!(value(&text, series), expected, "{series}");
    }
    let mut empty = status();
    empty.nodes.clear();
    assert!(!metrics.render(&empty, 0).unwrap().contains("n2"));
}

#[test]
fn a_reader_that_is_overrun_says_so_and_a_new_one_does_not() {
    let (fabric, metrics) = (fabric(), Metrics::new("demo"));
    failure(fabric, 1000);
    metrics.catch_up(fabric);
    append(fabric, 3000, EventKind::FailureDetected, Cause::Panic, &[]);
    metrics.catch_up(fabric);
    for _ in 0..2 * RING_SLOTS {
        append(fabric, 4000, EventKind::NodeStarted, Cause::None, &[]);
    }
    // Its failure is among what was lost: this join ends no outage that could be timed.
    append(fabric, 5000, EventKind::NodeJoined, Cause::None, &[1]);
    metrics.catch_up(fabric);
    let text = metrics.render(&status(), 0).unwrap();
    let lost = value(
        &text,
        "lupin_events_lost_total{pod=\"demo\",reader=\"metrics\"}",
    );
    let seen: f64 = text
        .lines()
        .filter(|line| line.starts_with("lupin_events_total"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert_eq!(lost + seen, fabric.state().ring_head() as f64);
    assert!(lost > RING_SLOTS as f64);
    assert_eq!(
        value(&text, "lupin_outage_seconds_count{pod=\"demo\"}"),
        1.0
    );

    let later = Metrics::new("demo");
    later.catch_up(fabric);
    let text = later.render(&status(), 0).unwrap();
    let series = "lupin_events_lost_total{pod=\"demo\",reader=\"metrics\"}";
    assert_eq!(value(&text, series), 0.0);
}

#[test]
fn a_clock_that_began_anew_times_nothing() {
    let (fabric, metrics) = (fabric(), Metrics::new("demo"));
    append(fabric, 9000, EventKind::FailureDetected, Cause::Panic, &[]);
    append(fabric, 10, EventKind::NodeStarted, Cause::None, &[]);
    append(fabric, 20_000, EventKind::NodeJoined, Cause::None, &[1]);
    metrics.catch_up(fabric);
    let text = metrics.render(&status(), 0).unwrap();
    assert_eq!(
        value(&text, "lupin_outage_seconds_count{pod=\"demo\"}"),
        0.0
    );
    assert_eq!(value(&text, "lupin_join_seconds_count{pod=\"demo\"}"), 1.0);
}
