//! What operators want of single nodes.

use std::sync::Arc;
use std::time::Duration;

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;

use super::fake::{Agents, FakeManager, Play, World, all_have_joined, id, is_wrong_state, newest};
use crate::api::{ControlError, NodeAction};

const RESTART: NodeAction = NodeAction::Restart { grace_ms: 1000 };
const STOP: NodeAction = NodeAction::Stop { grace_ms: 1000 };
const PAUSE: NodeAction = NodeAction::Pause {};
const RESUME: NodeAction = NodeAction::Resume {};
const START: NodeAction = NodeAction::Start {};

#[test]
fn a_paused_node_is_not_a_failed_node() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(2, PAUSE).unwrap();
    assert!(world.stands(2));
    assert_eq!(world.state_of(2), NodeState::Paused);
    // For many deadlines.
    manager.live(1000);
    assert_eq!(world.state_of(2), NodeState::Paused);
    is_wrong_state(manager.steer(2, PAUSE), "joined");
    manager.steer(2, RESUME).unwrap();
    assert!(!world.stands(2));
    is_wrong_state(manager.steer(2, RESUME), "paused");
    manager.live(10);
    assert_eq!(world.state_of(2), NodeState::Joined);
    assert_eq!((world.lives(2), world.generation_of(2)), (1, 1));
    let told = &world.kinds(2)[2..];
    assert_eq!(told, [EventKind::NodePaused, EventKind::NodeResumed]);
    let resumed = newest(&world, 2, EventKind::NodeResumed);
    assert!(resumed.evidence[0] >= 16_000_000_000, "{resumed:?}");
    // From now on it is judged again.
    for _ in 0..20 {
        world.beat_all_but(&[2]);
        manager.tick();
    }
    assert_eq!(
        newest(&world, 2, EventKind::FailureDetected).cause,
        Cause::Hang
    );
}

#[test]
fn a_paused_node_can_fail_and_be_killed_and_go_down() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    for node in 1..=3 {
        manager.steer(node, PAUSE).unwrap();
    }
    world.die(1, Cause::VmmExit);
    manager.settle();
    manager.core.kill(id(2));
    manager.settle();
    manager.live(3);
    assert_eq!(
        (world.state_of(1), world.generation_of(1)),
        (NodeState::Joined, 2)
    );
    assert_eq!(
        (world.state_of(2), world.generation_of(2)),
        (NodeState::Joined, 2)
    );
    assert_eq!(world.state_of(3), NodeState::Paused);
    manager.core.down(Duration::from_secs(5));
    manager.settle();
    assert!(
        manager.core.is_down(),
        "nobody waits for a node that cannot end"
    );
}

#[test]
fn a_node_that_cannot_be_paused_runs_on_and_says_why() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    world.set_stiff(true);
    manager.steer(1, PAUSE).unwrap();
    assert_eq!(world.state_of(1), NodeState::Paused, "until it surely runs");
    is_wrong_state(manager.steer(1, RESUME), "being resumed");
    world.set_stiff(false);
    manager.live(100);
    assert_eq!(world.state_of(1), NodeState::Joined);
    let detail = manager.core.nodes[&id(1)].detail.clone();
    assert!(detail.unwrap().contains("stiff"));
    assert_eq!(world.kinds(1).len(), 2, "a pause that was none is not told");
    assert_eq!(world.lives(1), 1);
}

#[test]
fn a_restart_raises_the_generation_once_whatever_the_policy() {
    for (agents, how) in [
        (Agents::Obey, 1),
        (Agents::Ignore, 2),
        (Agents::Unreachable, 3),
    ] {
        let world = World::new("restart = \"never\"");
        let mut manager = FakeManager::up(&world);
        manager.agents = agents;
        manager.steer(2, RESTART).unwrap();
        if agents == Agents::Ignore {
            assert_eq!(world.state_of(2), NodeState::Stopping);
            is_wrong_state(manager.steer(2, RESTART), "ending already");
            is_wrong_state(manager.steer(2, PAUSE), "joined");
            world.advance(Duration::from_secs(4));
            manager.tick();
        }
        manager.live(3);
        assert_eq!(world.state_of(2), NodeState::Joined);
        assert_eq!((world.lives(2), world.generation_of(2)), (2, 2));
        let found = newest(&world, 2, EventKind::FailureDetected);
        assert_eq!((found.cause, found.evidence[0]), (Cause::Operator, how));
        assert_eq!(
            newest(&world, 2, EventKind::NodeStopping).evidence[..2],
            [1000, 1]
        );
        // The next end is the policy's business again.
        world.die(2, Cause::Panic);
        manager.settle();
        assert_eq!(world.state_of(2), NodeState::Down);
    }
}

#[test]
fn a_stopped_node_stays_down_until_it_is_started() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    is_wrong_state(manager.steer(3, START), "down");
    manager.steer(3, STOP).unwrap();
    manager.live(100);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Down, 2)
    );
    is_wrong_state(manager.steer(3, STOP), "runs");
    is_wrong_state(manager.steer(3, RESTART), "start");
    is_wrong_state(manager.steer(3, PAUSE), "joined");
    manager.steer(3, START).unwrap();
    manager.live(3);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Joined, 2)
    );
    // A node that crashes while it ends has failed, and yet stays down.
    manager.agents = Agents::Ignore;
    manager.steer(3, STOP).unwrap();
    world.die(3, Cause::Panic);
    manager.settle();
    assert_eq!(
        newest(&world, 3, EventKind::FailureDetected).cause,
        Cause::Panic
    );
    assert_eq!(world.state_of(3), NodeState::Down);
}

#[test]
fn a_node_that_waits_is_started_at_once_on_request() {
    let world = World::new("max_restarts_per_minute = 1");
    let mut manager = FakeManager::up(&world);
    for _ in 0..2 {
        manager.live(1);
        world.die(1, Cause::Panic);
        manager.settle();
    }
    assert_eq!(world.state_of(1), NodeState::Restarting);
    manager.steer(1, START).unwrap();
    manager.live(2);
    assert_eq!((world.state_of(1), world.lives(1)), (NodeState::Joined, 3));
}

#[test]
fn what_cannot_be_put_on_record_is_not_begun() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    let folder = manager.core.nodes[&id(1)].folder.path().to_owned();
    // As when the disk is full: the record cannot be written.
    std::fs::create_dir(folder.join("intent.json.new")).unwrap();
    let before = world.events().len();
    let error = manager.steer(1, RESTART).unwrap_err();
    assert!(matches!(error, ControlError::NotRecorded { .. }), "{error}");
    assert_eq!(
        (world.events().len(), world.state_of(1)),
        (before, NodeState::Joined)
    );
    std::fs::remove_dir(folder.join("intent.json.new")).unwrap();
    manager.steer(1, RESTART).unwrap();
    assert_eq!(world.lives(1), 2);
}

#[test]
fn strangers_and_pods_on_their_way_down_are_refused() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    let error = manager.steer(9, PAUSE).unwrap_err();
    assert!(matches!(error, ControlError::NoSuchNode { .. }), "{error}");
    manager.agents = Agents::Ignore;
    manager.core.down(Duration::from_secs(5));
    for action in [PAUSE, RESUME, RESTART, STOP, START] {
        assert_eq!(manager.steer(1, action), Err(ControlError::GoingDown));
    }
}

/// An operator at work: pauses node 1 twice, restarts node 2, stops node 3 and starts it again.
fn day(world: &Arc<World>) {
    let mut manager = FakeManager::up(world);
    manager.steer(1, PAUSE).unwrap();
    manager.live(10);
    manager.steer(1, RESUME).unwrap();
    manager.live(10);
    manager.steer(2, RESTART).unwrap();
    manager.live(3);
    manager.steer(3, STOP).unwrap();
    manager.steer(1, PAUSE).unwrap();
    manager.steer(3, START).unwrap();
    manager.live(10);
}

#[test]
fn managers_killed_while_an_operator_works_lose_nothing() {
    let play = Play {
        world: &|| World::new("restart = \"never\""),
        day: &day,
        // Not before the pod is up: that is another test's.
        begun: all_have_joined,
        evening: &|manager| manager.pass(20),
    };
    let steps = play.kill_two(|world, _, killed| {
        let at = &killed.at;
        assert_eq!((world.lives(1), world.generation_of(1)), (1, 1), "{at}");
        let stands = world.state_of(1) == NodeState::Paused;
        assert!(stands || world.state_of(1) == NodeState::Joined, "{at}");
        assert_eq!(world.stands(1), stands, "{at}");
        let of_pause =
            |kind: &EventKind| matches!(kind, EventKind::NodePaused | EventKind::NodeResumed);
        let told: Vec<_> = world.kinds(1).into_iter().filter(of_pause).collect();
        let told_paused = told.last() == Some(&EventKind::NodePaused);
        assert_eq!(told_paused, stands, "{at}");
        let twice = told.windows(2).any(|pair| pair[0] == pair[1]);
        assert!(!twice, "{at}: {told:?}");
        for node in [2, 3] {
            let kinds = world.kinds(node);
            let count = |kind| kinds.iter().filter(|k| **k == kind).count();
            let ended = count(EventKind::FailureDetected);
            assert_eq!(
                world.generation_of(node) as usize,
                1 + ended,
                "{at}: {kinds:?}"
            );
            for step in [
                EventKind::Fenced,
                EventKind::GenerationRaised,
                EventKind::Rung,
            ] {
                assert_eq!(count(step), ended, "{at}: {kinds:?}");
            }
            let stopping = count(EventKind::NodeStopping);
            assert!(stopping <= 1, "{at}: {kinds:?}");
            // A process that was on record and never ran counts as a life that failed.
            assert!(
                (stopping..=stopping + killed.unused()).contains(&ended),
                "{at}: {kinds:?}"
            );
        }
        // Whoever was to be started again is; a life whose process never ran is given up.
        let two = world.state_of(2);
        let unused = killed.unused() > 0 && two == NodeState::Down;
        assert!(two == NodeState::Joined || unused, "{at}: {two}");
        assert!(
            matches!(world.state_of(3), NodeState::Joined | NodeState::Down),
            "{at}"
        );
    });
    for step in ["pause", "intent", "shutdown", "resumed"] {
        assert!(steps.contains(&step), "never killed at {step}");
    }
}
