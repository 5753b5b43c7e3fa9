//! Nodes that are left alone before they are ended.

use std::sync::Arc;
use std::time::Duration;

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;

use super::fake::{
    Agents, FakeManager, Killed, Play, World, all_have_joined, id, is_wrong_state, newest,
};
use crate::api::{ControlError, NodeAction};

const DRAIN: NodeAction = NodeAction::Drain {
    wait_ms: 10_000,
    grace_ms: 1000,
};
const CANCEL: NodeAction = NodeAction::CancelDrain {};

#[test]
fn a_node_is_ended_when_nobody_is_left_on_it() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(2, DRAIN).unwrap();
    assert_eq!(world.state_of(2), NodeState::Draining);
    let told = newest(&world, 2, EventKind::NodeDraining);
    assert_eq!(
        (told.cause, told.evidence[..2].to_vec()),
        (Cause::Operator, vec![10_000, 1000])
    );
    manager.live(10);
    world.report_left(2, 3);
    manager.live(10);
    assert_eq!(world.state_of(2), NodeState::Draining);
    let detail = manager.core.nodes[&id(2)].detail.clone().unwrap();
    assert!(detail.contains("3 members"), "{detail}");
    // Twice is once, and nothing else can be asked of it but its end.
    manager.steer(2, DRAIN).unwrap();
    is_wrong_state(manager.steer(2, NodeAction::Pause {}), "--cancel");
    world.report_left(2, 0);
    manager.live(3);
    assert_eq!(
        (world.state_of(2), world.generation_of(2)),
        (NodeState::Down, 2)
    );
    assert_eq!(newest(&world, 2, EventKind::NodeDrained).evidence[0], 0);
    use EventKind::*;
    assert_eq!(
        world.kinds(2)[2..],
        [
            NodeDraining,
            NodeDrained,
            NodeStopping,
            FailureDetected,
            Fenced,
            GenerationRaised,
            Rung,
            NodeDown
        ]
    );
    assert_eq!(world.state_of(1), NodeState::Joined);
}

#[test]
fn a_drain_ends_in_time_whatever_agents_report() {
    // Nothing, what is not of this drain, or that somebody stays for ever.
    for report in [None, Some(7)] {
        let world = World::new("");
        let mut manager = FakeManager::up(&world);
        let section = world.memory.node(id(3)).unwrap();
        section.report_members_left(12345, 0);
        manager.steer(3, DRAIN).unwrap();
        if let Some(members) = report {
            world.report_left(3, members);
        }
        manager.live(600);
        assert_eq!(world.state_of(3), NodeState::Draining);
        manager.live(40);
        assert_eq!(world.state_of(3), NodeState::Down);
        let left = newest(&world, 3, EventKind::NodeDrained).evidence[0];
        assert_eq!(left, report.map_or(u64::MAX, u64::from));
    }
}

#[test]
fn a_drain_can_be_called_off_and_begun_anew() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(1, CANCEL).unwrap();
    assert!(
        world.kinds(1).len() == 2,
        "nothing happens to a node that does not drain"
    );
    manager.steer(1, DRAIN).unwrap();
    world.report_left(1, 0);
    manager.steer(1, CANCEL).unwrap();
    assert_eq!(world.state_of(1), NodeState::Joined);
    manager.live(1000);
    assert_eq!((world.state_of(1), world.lives(1)), (NodeState::Joined, 1));
    // What the agent said about the first drain does not count for the second.
    manager.steer(1, DRAIN).unwrap();
    manager.live(5);
    assert_eq!(world.state_of(1), NodeState::Draining);
    manager.agents = Agents::Ignore;
    world.report_left(1, 0);
    manager.live(2);
    assert_eq!(world.state_of(1), NodeState::Stopping);
    is_wrong_state(manager.steer(1, CANCEL), "ending already");
}

#[test]
fn a_node_that_drains_can_fail_and_be_killed_and_stays_down() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(1, DRAIN).unwrap();
    manager.steer(2, DRAIN).unwrap();
    world.die(1, Cause::Panic);
    manager.settle();
    assert_eq!(
        newest(&world, 1, EventKind::FailureDetected).cause,
        Cause::Panic
    );
    assert_eq!(world.state_of(1), NodeState::Down);
    // Its heart is judged.
    for _ in 0..20 {
        world.beat_all_but(&[2]);
        manager.tick();
    }
    assert_eq!(
        newest(&world, 2, EventKind::FailureDetected).cause,
        Cause::Hang
    );
    assert_eq!(world.state_of(2), NodeState::Down);
    is_wrong_state(manager.steer(1, DRAIN), "joined");
    assert!(matches!(
        manager.steer(9, DRAIN),
        Err(ControlError::NoSuchNode { .. })
    ));
    manager.steer(3, DRAIN).unwrap();
    manager.core.down(Duration::from_secs(1));
    manager.settle();
    assert!(manager.core.is_down());
}

#[test]
fn what_cannot_be_put_on_record_is_not_begun() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    let folder = manager.core.nodes[&id(1)].folder.path().to_owned();
    // As when the disk is full.
    std::fs::create_dir(folder.join("intent.json.new")).unwrap();
    let error = manager.steer(1, DRAIN).unwrap_err();
    assert!(matches!(error, ControlError::NotRecorded { .. }), "{error}");
    assert_eq!(world.state_of(1), NodeState::Joined);
}

/// Node 1 is drained and that is called off, node 2 is drained.
fn day(world: &Arc<World>) {
    let mut manager = FakeManager::up(world);
    manager.steer(1, DRAIN).unwrap();
    manager.steer(2, DRAIN).unwrap();
    world.report_left(2, 1);
    manager.live(3);
    manager.steer(1, CANCEL).unwrap();
    world.report_left(2, 0);
    manager.live(5);
}

/// What was confirmed to the operator is being done, and what was called off is not; then the drain
/// of node 1 is called off if it was not, and everything is waited for.
fn evening(manager: &mut FakeManager) {
    manager.live(5);
    let world = manager.world.clone();
    let drains = |node| world.state_of(node) == NodeState::Draining;
    for node in [1, 2] {
        let kinds = world.kinds(node);
        let count = |kind| kinds.iter().filter(|k| **k == kind).count();
        let told = count(EventKind::NodeDraining) > count(EventKind::DrainCancelled);
        let ended = count(EventKind::NodeDown);
        assert_eq!(told, drains(node) || ended == 1, "node {node}: {kinds:?}");
    }
    if drains(1) {
        manager.steer(1, CANCEL).unwrap();
    }
    manager.pass(20);
}

#[test]
fn managers_killed_while_nodes_drain_lose_nothing() {
    let play = Play {
        world: &|| World::new(""),
        day: &day,
        begun: all_have_joined,
        evening: &evening,
    };
    let steps = play.kill_two(|world, _, Killed { at, .. }| {
        for node in [1, 2] {
            let kinds = world.kinds(node);
            let count = |kind| kinds.iter().filter(|k| **k == kind).count();
            for kind in [
                EventKind::NodeDraining,
                EventKind::DrainCancelled,
                EventKind::NodeDrained,
                EventKind::NodeStopping,
                EventKind::FailureDetected,
            ] {
                assert!(count(kind) <= 1, "{at}: {kinds:?}");
            }
        }
        assert_eq!(
            (world.state_of(1), world.lives(1)),
            (NodeState::Joined, 1),
            "{at}"
        );
        assert_eq!((world.lives(3), world.generation_of(3)), (1, 1), "{at}");
        let kinds = world.kinds(2);
        if kinds.contains(&EventKind::NodeDraining) {
            assert_eq!(world.state_of(2), NodeState::Down, "{at}: {kinds:?}");
            assert_eq!((world.generation_of(2), world.lives(2)), (2, 1), "{at}");
            let last = [EventKind::Rung, EventKind::NodeDown];
            let told: Vec<_> = kinds.iter().filter(|k| last.contains(k)).collect();
            assert_eq!(told, [&last[0], &last[1]], "{at}: {kinds:?}");
        } else {
            assert_eq!(
                (world.state_of(2), world.lives(2)),
                (NodeState::Joined, 1),
                "{at}"
            );
        }
    });
    for step in ["intent", "cancel", "state", "event", "ring", "shutdown"] {
        assert!(steps.contains(&step), "never killed at {step}: {steps:?}");
    }
}
