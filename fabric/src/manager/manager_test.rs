//! What the manager does when nodes fail, and in which order.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::Cause;
use lupin_abi::event::{Event, EventKind, FencePath};
use lupin_abi::fabric::NodeState;
use lupin_abi::node::AgentState;

use super::fake::{Agents, FakeManager, Seen, World, id};

use EventKind::*;

/// The events of a node after the first `skip`.
fn later(world: &World, node: u32, skip: usize) -> Vec<EventKind> {
    world.kinds(node).split_off(skip)
}

const FAILURE: [EventKind; 4] = [FailureDetected, Fenced, GenerationRaised, Rung];

/// Checks the events of one failure: order, times, generations and cause.
fn check_failure(world: &World, node: u32, old: u32, cause: Cause) -> Vec<Event> {
    let events: Vec<_> = world
        .events()
        .into_iter()
        .filter(|e| e.node == node && e.old_generation == old && FAILURE.contains(&e.kind))
        .collect();
    let kinds: Vec<_> = events.iter().map(|e| e.kind).collect();
    assert_eq!(kinds, FAILURE);
    for pair in events.windows(2) {
        assert!(pair[0].seq < pair[1].seq && pair[0].time_ns < pair[1].time_ns);
    }
    for event in &events {
        assert_eq!(event.cause, cause);
        let raised = matches!(event.kind, GenerationRaised | Rung);
        assert_eq!(event.generation, old + u32::from(raised));
    }
    events
}

#[test]
fn a_pod_comes_up() {
    let world = World::new("");
    let manager = FakeManager::up(&world);
    for n in 1..=3 {
        assert_eq!(world.kinds(n), [NodeStarted, NodeJoined]);
        assert_eq!(world.state_of(n), NodeState::Joined);
        assert_eq!(world.generation_of(n), 1);
        assert!(manager.core.nodes[&id(n)].joined_in_ns.unwrap() > 0);
    }
    assert_eq!(world.events()[0].kind, ManagerStarted);
    assert_eq!(world.memory.fabric().state().epoch(), 1);
}

#[test]
fn fence_comes_before_generation_before_ring_before_restart() {
    for (polite, path) in [(true, FencePath::Memslots), (false, FencePath::Killed)] {
        let world = World::new("");
        world.set_polite(polite, true);
        let mut manager = FakeManager::up(&world);
        assert!(manager.core.kill(id(2)));
        assert_eq!(world.state_of(2), NodeState::Failing);
        assert_eq!(world.generation_of(2), 1, "raised before the fence");
        manager.settle();

        let events = check_failure(&world, 2, 1, Cause::Operator);
        assert_eq!(events[1].evidence[..3], [path as u64, 5, 3]);
        assert_eq!(events[3].evidence[0], 2, "both others rung");
        assert_eq!(later(&world, 2, 6), [NodeRestarting, NodeStarted]);

        // The same from the other side. The fence saw the old generation in the table; whoever
        // was rung could read the raise; the new life began after all that.
        let raised = events[2].seq;
        let seen = world.seen();
        assert_eq!(seen[3], Seen::Fenced(id(2), 1, 1));
        let rung: Vec<_> = seen[4..6].to_vec();
        for (seen, node) in rung.iter().zip([1, 3]) {
            assert!(matches!(seen, Seen::Rung(n, read) if *n == id(node) && *read >= raised));
        }
        assert_eq!(seen[6], Seen::Released(id(2), 2));
        world.join_all();
        manager.tick();
        assert_eq!(world.state_of(2), NodeState::Joined);
        assert_eq!(world.memory.fabric().entry(id(2)).restarts(), 1);
    }
}

#[test]
fn a_death_is_known_by_its_cause_and_needs_no_fence() {
    for cause in [
        Cause::VmmExit,
        Cause::Panic,
        Cause::TripleFault,
        Cause::GuestReboot,
        Cause::GuestPowerOff,
    ] {
        let world = World::new("");
        let mut manager = FakeManager::up(&world);
        world.die(3, cause);
        manager.settle();
        let events = check_failure(&world, 3, 1, cause);
        assert_eq!(events[1].evidence[0], FencePath::Exited as u64);
        assert_eq!(world.lives(3), 2);
        assert_eq!(world.memory.fabric().entry(id(3)).cause(), cause);
    }
}

#[test]
fn a_verdict_does_not_wait_for_the_next_poll() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.live(10);
    assert_eq!(manager.core.next_look_ns, None, "nobody is silent");
    let deadline_ns = manager.core.pod.heartbeat.deadline.as_nanos() as u64;
    let poll_ns = 16_000_000;
    world.beat_all_but(&[2]);
    manager.tick();
    let mut next_tick = world.now.load(Ordering::Relaxed) + poll_ns;
    let mut between = 0;
    while world.state_of(2) == NodeState::Joined && between < 10_000 {
        let due = manager.core.next_look_ns.expect("node 2 is silent");
        let now = world.now.load(Ordering::Relaxed);
        if due < next_tick {
            world.advance(Duration::from_nanos(due.saturating_sub(now)));
            manager.core.look_at_the_due();
            manager.settle();
            between += 1;
        } else {
            world.advance(Duration::from_nanos(next_tick.saturating_sub(now)));
            world.beat_all_but(&[2]);
            manager.core.tick();
            manager.settle();
            next_tick += poll_ns;
        }
    }
    let events = check_failure(&world, 2, 1, Cause::Hang);
    let available_ns = events[0].evidence[1];
    // The eighth of a poll is the least pause between two looks.
    assert!((deadline_ns..deadline_ns + poll_ns / 8).contains(&available_ns));
    assert!(between >= 2, "one to ring, one for the verdict");
    assert_eq!(manager.core.next_look_ns, None);
}

#[test]
fn a_silent_node_is_rung_and_then_called_hung_with_the_numbers() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    for _ in 0..100 {
        world.beat_all_but(&[]);
        manager.tick();
    }
    assert_eq!(world.kinds(2), [NodeStarted, NodeJoined]);
    let mut ticks = 0;
    while world.state_of(2) == NodeState::Joined && ticks < 100 {
        world.beat_all_but(&[2]);
        manager.tick();
        ticks += 1;
    }
    assert!((7..=9).contains(&ticks), "{ticks} looks");
    let events = check_failure(&world, 2, 1, Cause::Hang);
    let [wall, available, deadline, counter, ..] = events[0].evidence;
    assert_eq!((deadline, counter), (100_000_000, 100));
    assert!(wall >= available && available >= deadline);
    let rung_first = world
        .seen()
        .iter()
        .position(|s| matches!(s, Seen::Rung(n, _) if *n == id(2)));
    let fenced = world
        .seen()
        .iter()
        .position(|s| matches!(s, Seen::Fenced(..)));
    assert!(rung_first.unwrap() < fenced.unwrap(), "hung without a ring");
    assert_eq!(world.lives(1) + world.lives(3), 2, "others untouched");
}

#[test]
fn a_silence_that_the_host_cannot_judge_is_none() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    world.set_blind(true);
    for _ in 0..1000 {
        world.beat_all_but(&[2]);
        manager.tick();
    }
    assert_eq!(world.state_of(2), NodeState::Joined);
    world.set_blind(false);
    for _ in 0..20 {
        world.beat_all_but(&[2]);
        manager.tick();
    }
    check_failure(&world, 2, 1, Cause::Hang);
}

#[test]
fn a_node_that_never_joins_is_given_up_with_its_last_words() {
    let world = World::new("");
    let mut manager = FakeManager::start(&world, false);
    let folder = world.runtime.node("n1").unwrap();
    std::fs::write(folder.console(), "booting\nno init found\n").unwrap();
    world.advance(Duration::from_secs(59));
    manager.tick();
    assert_eq!(world.state_of(1), NodeState::Starting);
    world.advance(Duration::from_secs(2));
    manager.tick();
    assert_eq!(later(&world, 1, 1)[..2], [JoinTimeout, FailureDetected]);
    check_failure(&world, 1, 1, Cause::NeverJoined);
    let detail = manager.core.nodes[&id(1)].detail.clone().unwrap();
    assert!(
        detail.contains("no init found") && detail.contains("within 61"),
        "{detail}"
    );
    // Not at once: something is wrong with it.
    assert_eq!(world.state_of(1), NodeState::Restarting);
    world.advance(Duration::from_secs(1));
    manager.tick();
    assert_eq!(world.lives(1), 2);
}

#[test]
fn an_agent_that_speaks_for_another_life_has_not_joined() {
    let world = World::new("");
    let mut manager = FakeManager::start(&world, false);
    let section = world.memory.node(id(1)).unwrap();
    section.introduce(7, 1, 1);
    section.set_state(AgentState::Joined);
    manager.tick();
    assert_eq!(world.state_of(1), NodeState::Starting);
    section.introduce(1, 1, 1);
    section.set_state(AgentState::Failed);
    manager.tick();
    check_failure(&world, 1, 1, Cause::NeverJoined);
}

#[test]
fn what_cannot_start_stays_down_and_what_might_is_tried_again_slowly() {
    let world = World::new("");
    world.refuse(1, true);
    world.refuse(2, false);
    let mut manager = FakeManager::start(&world, false);
    world.join_all();
    assert_eq!(world.state_of(1), NodeState::Down);
    assert_eq!(world.state_of(2), NodeState::Restarting);
    check_failure(&world, 1, 1, Cause::StartFailed);
    let detail = manager.core.nodes[&id(1)].detail.clone().unwrap();
    assert!(detail.contains("refused by the test"), "{detail}");
    for _ in 0..600 {
        world.beat_all_but(&[]);
        manager.tick();
    }
    assert_eq!(world.state_of(1), NodeState::Down);
    let attempts = world.generation_of(2) - 1;
    assert!((3..=9).contains(&attempts), "{attempts} attempts in 10 s");
    world.allow(2);
    world.advance(Duration::from_secs(60));
    manager.tick();
    assert_eq!(world.state_of(2), NodeState::Starting);
}

#[test]
fn a_node_that_shall_not_restart_stays_down() {
    let world = World::new("restart = \"never\"");
    let mut manager = FakeManager::up(&world);
    world.die(1, Cause::Panic);
    manager.settle();
    check_failure(&world, 1, 1, Cause::Panic);
    assert_eq!(world.kinds(1).last(), Some(&NodeDown));
    assert_eq!(world.state_of(1), NodeState::Down);
    assert_eq!(world.generation_of(1), 2, "peers must know that it is dead");
    assert!(!manager.core.kill(id(1)));
}

#[test]
fn a_new_life_waits_until_nothing_is_left_of_the_old_one() {
    let world = World::new("");
    world.set_polite(true, false);
    let mut manager = FakeManager::up(&world);
    manager.core.kill(id(2));
    manager.settle();
    assert_eq!(
        world.generation_of(2),
        2,
        "peers need not wait for the process"
    );
    assert_eq!(world.lives(2), 1);
    manager.tick();
    assert_eq!(world.lives(2), 1);
    world.advance(Duration::from_secs(1));
    manager.tick();
    assert!(world.seen().contains(&Seen::Killed(id(2), 1)));
    manager.tick();
    assert_eq!(world.lives(2), 2);
}

#[test]
fn two_nodes_that_fail_at_once_do_not_wait_for_each_other() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.core.kill(id(1));
    manager.core.kill(id(2));
    manager.settle();
    for n in [1, 2] {
        check_failure(&world, n, 1, Cause::Operator);
        assert_eq!(world.lives(n), 2);
    }
    assert_eq!(world.lives(3), 1);
}

#[test]
fn going_down_asks_first_and_ends_everybody() {
    for agents in [Agents::Obey, Agents::Ignore, Agents::Unreachable] {
        let world = World::new("");
        let mut manager = FakeManager::up(&world);
        manager.agents = agents;
        world.die(3, Cause::Panic);
        manager.settle();
        manager.core.down(Duration::from_secs(5));
        manager.settle();
        if agents == Agents::Ignore {
            assert_eq!(world.state_of(1), NodeState::Joined, "it has time");
            assert!(!manager.core.is_down());
            world.advance(Duration::from_secs(8));
            manager.tick();
        }
        assert!(manager.core.is_down());
        manager.core.finish();
        for n in 1..=3 {
            assert_eq!(world.state_of(n), NodeState::Down);
            let last = world.events().into_iter().rfind(|e| e.node == n).unwrap();
            assert_eq!((last.kind, last.cause), (NodeDown, Cause::PodDown));
        }
        check_failure(&world, 1, 1, Cause::PodDown);
        assert_eq!(world.processes(), 0);
        assert_eq!(world.events().last().unwrap().kind, ManagerStopped);
        // And up again: the next life, not a failure.
        let lives = world.lives(1);
        drop(manager);
        let again = FakeManager::up(&world);
        assert_eq!(world.lives(1), lives + 1);
        assert_eq!(world.state_of(1), NodeState::Joined);
        assert_eq!(again.core.recorder.epoch(), 2);
    }
}

#[test]
fn going_down_at_once_asks_nobody() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.agents = Agents::Ignore;
    manager.core.down(Duration::from_secs(60));
    manager.settle();
    assert!(!manager.core.is_down());
    // The operator has lost patience.
    manager.core.down(Duration::ZERO);
    manager.tick();
    assert!(manager.core.is_down());
    assert_eq!(world.lives(1), 1, "no restart");
}

#[test]
fn an_agent_that_ends_its_node_has_a_minute() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    let section = world.memory.node(id(1)).unwrap();
    section.set_state(AgentState::Stopping);
    for _ in 0..100 {
        world.beat_all_but(&[1]);
        manager.tick();
    }
    assert_eq!(
        world.state_of(1),
        NodeState::Joined,
        "no heartbeats are due"
    );
    world.advance(Duration::from_secs(60));
    manager.tick();
    check_failure(&world, 1, 1, Cause::Hang);
}
