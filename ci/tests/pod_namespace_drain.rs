//! A node is drained under members of a group: they move off, and it is stopped then; or one stays,
//! and it is stopped when the time is up.

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::member::Member;
use common::*;
use lupin_abi::event::{Cause, Event, EventKind};

const LIMIT: Duration = Duration::from_secs(60);

/// `pod drain` of node 2, not waited for.
fn drain(pod: &Pod, wait: &str) -> KillOnDrop {
    let mut command = pod.verb("drain");
    command.args(["n2", "--wait", wait, "--grace", "2s"]);
    KillOnDrop(command.stdin(Stdio::null()).spawn().expect("drain"))
}

fn wait_for_state(pod: &Pod, node: u32, state: &str) {
    wait_until(&format!("node {node} is {state}"), LIMIT, || {
        pod.node(node).expect("node").state == state
    });
}

/// What `pod ps` says of node 2.
fn detail(pod: &Pod) -> String {
    let ps = pod.ps().expect("ps");
    let nodes = ps["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|node| node["id"] == 2).expect("node 2");
    node["detail"].as_str().unwrap_or_default().into()
}

/// A command that tries to be a member on node 2.
fn newcomer(pod: &Pod) -> Command {
    let mut command = pod.exec(2, &["lupin-measure", "member"]);
    command.stdin(Stdio::null());
    command
}

/// The events of node 2 from the drain on, without those of later lives.
fn story(pod: &Pod) -> Vec<Event> {
    let events = pod.events().expect("events").into_iter();
    let of_life = events.filter(|e| e.node == 2 && e.old_generation == 1);
    of_life
        .skip_while(|e| e.kind != EventKind::NodeDraining)
        .collect()
}

/// The order of a drain that was carried out with so many members left.
fn check_drained(pod: &Pod, left: u64) {
    use EventKind::*;
    let story = story(pod);
    let kinds: Vec<_> = story.iter().map(|event| event.kind).collect();
    let expected = [
        NodeDraining,
        NodeDrained,
        NodeStopping,
        FailureDetected,
        Fenced,
        GenerationRaised,
        Rung,
        NodeDown,
    ];
    assert_eq!(kinds, expected, "{story:#?}");
    assert_eq!(story[1].evidence[0], left, "{story:#?}");
    check_failure(&story, 2, 1, Cause::Operator);
    for node in [1, 3] {
        let node = pod.node(node).expect("node");
        assert_eq!((node.state.as_str(), node.generation), ("joined", 1));
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn a_node_is_stopped_when_its_members_have_moved_off() {
    let pod = up(&namespace_spec("drained", 3));
    let folder = tempfile::tempdir().expect("folder");
    let join = |node, name: &str| Member::join(&pod, node, folder.path(), name);
    let (stays, first, second) = (join(1, "stays"), join(2, "first"), join(2, "second"));
    stays.wait_told("Joined", 3);

    let mut draining = drain(&pod, "10m");
    wait_for_state(&pod, 2, "draining");
    wait_until("the agent says who is left", LIMIT, || {
        detail(&pod).contains("2 members")
    });
    let refused = newcomer(&pod).output().expect("exec");
    assert!(!refused.status.success(), "{}", text(&refused));
    let said = text(&refused).to_lowercase();
    assert!(said.contains("drain") || said.contains("busy"), "{said}");

    // They go on elsewhere, and leave.
    let moved = [join(1, "first'"), join(3, "second'")];
    first.kill(&pod);
    wait_until("one is left", LIMIT, || detail(&pod).contains("1 member"));
    assert_eq!(pod.node(2).expect("node").state, "draining");
    second.kill(&pod);
    let status = draining.0.wait().expect("drain ends");
    assert_eq!(status.code(), Some(0));
    assert_eq!(pod.node(2).expect("node").state, "down");
    check_drained(&pod, 0);

    // Everybody else is told, and goes on.
    for member in [&stays, &moved[0], &moved[1]] {
        member.wait_told("NodeFailed", 1);
    }
    let started = pod.verb("start").arg("n2").output().expect("start");
    assert_eq!(started.status.code(), Some(0), "{}", text(&started));
    let back = join(2, "back");
    assert!(back.pid().is_some());
    assert_eq!(pod.node(2).expect("node").generation, 2);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_member_that_stays_costs_the_time_and_no_more() {
    let pod = up(&namespace_spec("drain-late", 3));
    let folder = tempfile::tempdir().expect("folder");
    let join = |node, name: &str| Member::join(&pod, node, folder.path(), name);
    let (peer, stays) = (join(1, "peer"), join(2, "stays"));
    peer.wait_told("Joined", 2);

    // Called off, it has the node as it was.
    let mut first = drain(&pod, "10m");
    wait_for_state(&pod, 2, "draining");
    let mut cancel = pod.verb("drain");
    let cancelled = cancel.args(["n2", "--cancel"]).output().expect("cancel");
    assert_eq!(cancelled.status.code(), Some(0), "{}", text(&cancelled));
    assert_eq!(first.0.wait().expect("drain ends").code(), Some(1));
    wait_for_state(&pod, 2, "joined");
    let guest = join(2, "guest");
    guest.kill(&pod);
    peer.wait_told("Died", 1);

    let begin = std::time::Instant::now();
    let status = drain(&pod, "2s").0.wait().expect("drain ends");
    assert_eq!(status.code(), Some(0));
    assert!(begin.elapsed() >= Duration::from_secs(2));
    let story = story(&pod);
    let drained = story.iter().find(|e| e.kind == EventKind::NodeDrained);
    let drained = drained.expect("drained");
    assert_eq!(drained.evidence[0], 1, "{story:#?}");
    check_failure(&story, 2, 1, Cause::Operator);
    assert_eq!(pod.node(2).expect("node").state, "down");
    // The one that stayed ended with its node, and is told of.
    peer.wait_told("NodeFailed", 1);
    peer.wait_told("Died", 2);
    drop(stays);
}
