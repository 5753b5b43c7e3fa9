//! Managers that are killed at every point, and the managers that go on after them.

use std::sync::Arc;
use std::time::Duration;

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;

use super::crash::injection::kill_at;
use super::fake::{FakeManager, Killed, Play, Seen, World, id};
use crate::api::NodeAction;

/// A day in the life of a pod: it comes up, one node dies, another is killed by an operator.
fn day(world: &Arc<World>, takeover: bool) {
    let mut manager = FakeManager::start(world, takeover);
    world.join_all();
    manager.tick();
    world.beat_all_but(&[]);
    world.die(2, Cause::Panic);
    manager.settle();
    world.join_all();
    manager.tick();
    manager.core.kill(id(3));
    manager.settle();
    converge(world, &mut manager);
}

/// Lets time pass until nothing is to be done any more.
fn converge(world: &World, manager: &mut FakeManager) {
    for _ in 0..10 {
        world.advance(Duration::from_secs(20));
        world.join_all();
        world.beat_all_but(&[]);
        manager.tick();
    }
}

/// Everything that must hold in the end, whoever was killed when.
///
/// A manager that dies between the record of a process and its release leaves a process that
/// never ran and looks like one that died: its generation is given up unused. That is the one
/// case in which a generation has no life.
///
/// Node 1 has had as many lives as it had to: nobody ends a healthy node.
fn check_lives(world: &World, lives: u32, killed: &[&str], at: &str) {
    check_all(world, killed, at);
    assert_eq!(world.lives(1), lives, "lives of node 1, {at}");
}

fn check(world: &World, killed: &[&str], at: &str) {
    check_lives(world, 1, killed, at);
}

fn check_all(world: &World, killed: &[&str], at: &str) {
    let unused = killed.iter().filter(|step| **step == "release").count() as u32;
    for n in 1..=3 {
        assert_eq!(world.state_of(n), NodeState::Joined, "node {n}, {at}");
        let lives = world.lives(n);
        assert!(
            (lives..=lives + unused).contains(&world.generation_of(n)),
            "generation of node {n}, {at}"
        );
    }
    assert_eq!(world.processes(), 3, "{at}");
    let events = world.events();
    for pair in events.windows(2) {
        assert!(pair[0].time_ns < pair[1].time_ns && pair[0].epoch <= pair[1].epoch);
    }
    let seen = world.seen();
    for n in 1..=3 {
        for old in 1..world.generation_of(n) {
            use EventKind::*;
            let told: Vec<_> = events
                .iter()
                .filter(|e| e.node == n && e.old_generation == old)
                .map(|e| e.kind)
                .filter(|kind| !matches!(kind, NodeAdopted | NodeJoined | NodeStarted))
                .collect();
            let whole = [
                FailureDetected,
                Fenced,
                GenerationRaised,
                Rung,
                NodeRestarting,
            ];
            assert_eq!(told, whole, "life {old} of node {n}, {at}");
            // Whoever was fenced while alive was so before the raise.
            for fence in &seen {
                if let Seen::Fenced(node, generation, table) = fence {
                    assert!(*node != id(n) || generation == table, "{fence:?}, {at}");
                }
            }
        }
    }
}

/// A [`day`] from its very beginning.
fn killed_on_a_day(polite: bool, twice: bool) -> Vec<&'static str> {
    let play = Play {
        world: &|| {
            let world = World::new("");
            world.set_polite(polite, polite);
            world
        },
        day: &|world| day(world, false),
        begun: |_| true,
        evening: &|manager| converge(&manager.world.clone(), manager),
    };
    let check = |world: &World, _: &FakeManager, killed: &Killed| {
        check(world, &killed.steps, &killed.at);
    };
    if twice {
        play.kill_two(check)
    } else {
        play.kill_one(check)
    }
}

#[test]
fn what_only_a_joined_node_can_do_is_asked_right_after_a_takeover() {
    for action in [
        NodeAction::Pause {},
        NodeAction::Drain {
            wait_ms: 10_000,
            grace_ms: 1000,
        },
    ] {
        let world = World::new("");
        drop(FakeManager::up(&world));
        let mut manager = FakeManager::start(&world, true);
        // Nobody has looked at a heartbeat yet.
        manager.steer(2, action).unwrap();
        assert_eq!(world.state_of(1), NodeState::Joined);
    }
}

#[test]
fn a_manager_killed_at_any_step_is_replaced_without_loss() {
    for polite in [false, true] {
        let steps = killed_on_a_day(polite, false);
        assert!(steps.len() > 60, "only {} steps", steps.len());
        for step in [
            "fence",
            "generation",
            "ring",
            "record",
            "release",
            "prepare",
        ] {
            assert!(steps.contains(&step), "never killed at {step}");
        }
    }
    let world = World::new("");
    day(&world, false);
    check(&world, &[], "nobody was killed");
}

#[test]
fn the_replacement_may_be_killed_as_well() {
    killed_on_a_day(true, true);
}

/// Primary and backup are gone, whatever they were at; nodes that were well die then, one after the
/// other, and long afterwards somebody starts a manager, which may die as well.
#[test]
fn what_dies_while_there_is_no_manager_is_found_whatever_was_being_done() {
    for polite in [false, true] {
        for n in 0.. {
            let world = World::new("");
            world.set_polite(polite, polite);
            let Some(point) = kill_at(n, || day(&world, false)) else {
                break;
            };
            let ran = |node| world.running().iter().any(|(id, _)| id.get() == node);
            let lives = 1 + u32::from(ran(1));
            world.die(1, Cause::TripleFault);
            world.advance(Duration::from_secs(3));
            world.die(3, Cause::Panic);
            world.advance(Duration::from_secs(60));
            // The same step of what follows, so that all of them are tried over the whole test.
            let again = kill_at(n, || drop(FakeManager::start(&world, true)));
            let mut last = FakeManager::start(&world, true);
            converge(&world, &mut last);
            let at = format!("killed at {n} ({point}, then {again:?}), polite {polite}");
            let killed: Vec<_> = [Some(point), again].into_iter().flatten().collect();
            check_lives(&world, lives, &killed, &at);
        }
    }
}

#[test]
fn a_healthy_pod_notices_nothing_of_a_takeover() {
    let world = World::new("");
    drop(FakeManager::up(&world));
    let mut next = FakeManager::start(&world, true);
    for _ in 0..50 {
        world.beat_all_but(&[]);
        next.tick();
    }
    for n in 1..=3 {
        let kinds = world.kinds(n);
        assert_eq!(
            kinds,
            [
                EventKind::NodeStarted,
                EventKind::NodeJoined,
                EventKind::NodeAdopted
            ]
        );
        assert_eq!(world.generation_of(n), 1);
    }
    assert_eq!(world.memory.fabric().state().epoch(), 2);
}

#[test]
fn deaths_while_nobody_watched_are_handled_and_rung() {
    let world = World::new("");
    drop(FakeManager::up(&world));
    world.die(2, Cause::TripleFault);
    let before = world.seen().len();
    let _next = FakeManager::start(&world, true);
    let cause = world.memory.fabric().entry(id(2)).cause();
    assert_eq!(cause, Cause::TripleFault, "its last words were read");
    let rung: Vec<_> = world.seen()[before..]
        .iter()
        .filter_map(|s| match s {
            Seen::Rung(node, _) => Some(node.get()),
            _ => None,
        })
        .collect();
    assert_eq!(rung, [1, 3], "adopted nodes are rung");
    assert_eq!(world.lives(2), 2);
}

#[test]
fn a_host_that_went_down_with_its_pod_is_not_a_takeover() {
    let world = World::new("");
    drop(FakeManager::up(&world));
    for n in 1..=3 {
        world.die(n, Cause::VmmExit);
    }
    let mut next = FakeManager::start(&world, false);
    converge(&world, &mut next);
    for n in 1..=3 {
        assert_eq!(world.generation_of(n), 2, "no life is lived twice");
        assert_eq!(world.state_of(n), NodeState::Joined);
    }
}

#[test]
fn a_node_that_was_left_down_stays_down_after_a_takeover() {
    let world = World::new("restart = \"never\"");
    let mut manager = FakeManager::up(&world);
    world.die(1, Cause::Panic);
    manager.settle();
    drop(manager);
    let mut next = FakeManager::start(&world, true);
    next.tick();
    assert_eq!(world.state_of(1), NodeState::Down);
    assert_eq!(world.lives(1), 1);
    assert_eq!(world.kinds(1).last(), Some(&EventKind::NodeDown));
}

#[test]
fn a_pod_that_is_being_started_anew_starts_whole_although_its_manager_dies() {
    let began = |n| {
        let world = World::new("");
        let mut manager = FakeManager::up(&world);
        manager.core.down(Duration::ZERO);
        manager.tick();
        manager.core.finish();
        drop(manager);
        let killed = kill_at(n, || drop(FakeManager::start(&world, false)));
        (world, killed)
    };
    // The epoch, and one state a node: before these the next start is a start as well.
    for n in 4.. {
        let (world, killed) = began(n);
        if killed.is_none() {
            break;
        }
        let mut next = FakeManager::start(&world, true);
        converge(&world, &mut next);
        for node in 1..=3 {
            assert_eq!(
                world.state_of(node),
                NodeState::Joined,
                "killed at {n}: {killed:?}"
            );
            assert_eq!(world.lives(node), 2);
        }
    }
}
