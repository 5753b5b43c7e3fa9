//! Guests that write what they like into their own section.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;
use lupin_abi::node::NodeSection;

use super::fake::{FakeManager, World, id, newest};
use crate::api::NodeAction;

/// A look that finds the other nodes in good health.
fn look(world: &Arc<World>, manager: &mut FakeManager) {
    world.join_all();
    world.beat_all_but(&[2]);
    manager.tick();
}

fn others_live(world: &World, at: &str) {
    for node in [1, 3] {
        assert_eq!(world.state_of(node), NodeState::Joined, "{at}");
        assert_eq!(
            (world.lives(node), world.generation_of(node)),
            (1, 1),
            "{at}"
        );
    }
}

#[test]
fn beats_cannot_be_saved_for_later() {
    for many in [2, 1000] {
        let world = World::new("restart = \"never\"");
        let mut manager = FakeManager::up(&world);
        let section = world.memory.node(id(2)).unwrap();
        for _ in 0..200 {
            (0..many).for_each(|_| section.beat());
            look(&world, &mut manager);
        }
        assert_eq!((world.state_of(2), world.lives(2)), (NodeState::Joined, 1));
        // The deadline is 100 ms, a look comes every 16 ms.
        let looks = (1..).find(|_| {
            look(&world, &mut manager);
            world.state_of(2) != NodeState::Joined
        });
        assert!((6..=9).contains(&looks.unwrap()), "{looks:?}");
        assert_eq!(
            newest(&world, 2, EventKind::FailureDetected).cause,
            Cause::Hang
        );
        others_live(&world, "after the hang");
    }
}

#[test]
fn a_node_that_never_beats_is_hung_from_its_join_on() {
    let world = World::new("restart = \"never\"");
    let mut manager = FakeManager::up(&world);
    for _ in 0..20 {
        look(&world, &mut manager);
    }
    assert_eq!(world.state_of(2), NodeState::Down);
    others_live(&world, "after the hang");
}

/// The words of a section, as the guest has them.
fn words(section: &NodeSection) -> &[AtomicU64] {
    let words = size_of::<NodeSection>() / 8;
    // SAFETY: a section consists of atomics, is aligned to 64 bytes, and the words lie within it.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(section).cast(), words) }
}

#[test]
fn nonsense_in_a_section_harms_its_node_alone() {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for round in 0..200 {
        let world = World::new("");
        let mut manager = FakeManager::up(&world);
        if round % 2 == 1 {
            let (wait_ms, grace_ms) = (500, 100);
            let drain = NodeAction::Drain { wait_ms, grace_ms };
            manager.steer(2, drain).unwrap();
        }
        for _ in 0..60 {
            let section = world.memory.node(id(2)).unwrap();
            for word in words(section) {
                // Any value, and those that mean something.
                let value = match next() % 4 {
                    0 => next(),
                    1 => next() % 6,
                    2 => u64::MAX,
                    _ => continue,
                };
                word.store(value, Ordering::Relaxed);
            }
            look(&world, &mut manager);
        }
        let at = format!("round {round}");
        others_live(&world, &at);
        // Whatever became of it, the books are right.
        let kinds = world.kinds(2);
        let count = |kind| kinds.iter().filter(|k| **k == kind).count() as u32;
        let raised = count(EventKind::GenerationRaised);
        assert_eq!(world.generation_of(2), 1 + raised, "{at}: {kinds:?}");
        assert_eq!(count(EventKind::FailureDetected), raised, "{at}: {kinds:?}");
    }
}
