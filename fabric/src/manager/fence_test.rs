//! Power control that is slow, fails, and lies.

use std::time::Duration;

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;

use super::fake::{FakeManager, Firmware, Seen, World, id};

/// Nothing of a life that is not surely fenced is given away.
fn check_failing(world: &World, at: &str) {
    assert_eq!(world.state_of(2), NodeState::Failing, "{at}");
    assert_eq!(world.generation_of(2), 1, "{at}");
    assert_eq!(world.running().len(), 3, "{at}: it may still store");
    let rung = |seen: &Seen| matches!(seen, Seen::Rung(..));
    assert!(!world.seen().iter().any(rung), "{at}");
}

#[test]
fn a_fence_that_is_slow_fails_and_lies_is_tried_until_it_is_confirmed() {
    use Firmware::{Lies, Refuses};
    let world = World::new("");
    world.set_polite(true, true);
    let mut manager = FakeManager::up(&world);
    let bmc = [Lies, Refuses, Lies, Refuses];
    world.set_firmware(&bmc, Duration::from_secs(4));
    manager.core.kill(id(2));
    manager.settle();
    let mut ticks = 0;
    while world.state_of(2) == NodeState::Failing {
        check_failing(&world, "while it is not confirmed");
        world.beat_all_but(&[2]);
        manager.tick();
        ticks += 1;
        assert!(ticks < 10_000, "it is given up");
    }
    // Five attempts of 4 s, and pauses of 0.5 + 1 + 2 + 4 s.
    assert!(ticks >= 27_500 / 16, "{ticks}");
    let failures: Vec<_> = world
        .events()
        .into_iter()
        .filter(|e| e.kind == EventKind::FenceFailed)
        .collect();
    let told: Vec<_> = failures
        .iter()
        .map(|e| (e.cause, e.evidence[0], e.evidence[1]))
        .collect();
    let by = Cause::Operator;
    assert_eq!(
        told,
        [(by, 1, 500), (by, 2, 1000), (by, 3, 2000), (by, 4, 4000)]
    );
    world.join_all();
    manager.tick();
    assert_eq!(
        (world.state_of(2), world.generation_of(2)),
        (NodeState::Joined, 2)
    );
    // Others were not held up.
    assert_eq!([1, 3].map(|node| world.lives(node)), [1, 1]);
}

#[test]
fn a_manager_that_takes_over_goes_on_fencing() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    world.set_firmware(&[Firmware::Refuses; 3], Duration::ZERO);
    manager.core.kill(id(2));
    manager.settle();
    check_failing(&world, "after the first attempt");
    drop(manager);
    let mut next = FakeManager::start(&world, true);
    check_failing(&world, "after a take-over");
    // Another node can fail meanwhile, and its fence works in its turn.
    world.advance(Duration::from_secs(10));
    for _ in 0..200 {
        world.join_all();
        world.beat_all_but(&[]);
        next.tick();
    }
    assert_eq!(
        (world.state_of(2), world.generation_of(2)),
        (NodeState::Joined, 2)
    );
    let kinds = world.kinds(2);
    let count = |kind| kinds.iter().filter(|k| **k == kind).count();
    assert_eq!(count(EventKind::FailureDetected), 1, "{kinds:?}");
    assert_eq!(count(EventKind::GenerationRaised), 1, "{kinds:?}");
}

#[test]
fn a_process_that_dies_while_its_fence_waits_is_fenced_at_once() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    world.set_firmware(&[Firmware::Refuses], Duration::ZERO);
    manager.core.kill(id(2));
    manager.settle();
    check_failing(&world, "after the first attempt");
    world.die(2, Cause::VmmExit);
    manager.settle();
    assert_eq!(world.generation_of(2), 2, "whoever is gone stores nothing");
}

#[test]
fn a_pod_does_not_end_before_its_last_node_is_fenced() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    world.set_firmware(&[Firmware::Refuses; 6], Duration::ZERO);
    manager.core.down(Duration::ZERO);
    manager.settle();
    assert!(!manager.core.is_down());
    for _ in 0..200 {
        manager.tick();
    }
    assert!(manager.core.is_down());
}
