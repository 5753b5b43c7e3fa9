//! Nodes that come to a pod that runs, and nodes that leave it.

use std::sync::Arc;
use std::time::Duration;

use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;
use lupin_abi::{Cause, NodeId};

use super::fake::{Agents, FakeManager, Play, World, all_have_joined, id, is_wrong_state};
use crate::api::{ControlError, Effect, NodeAction};
use crate::podfile::{Node, Pod};

const REMOVE: NodeAction = NodeAction::Remove { grace_ms: 1000 };
const STOP: NodeAction = NodeAction::Stop { grace_ms: 1000 };

impl FakeManager {
    fn add(&mut self, spec: &Node) -> Result<(), ControlError> {
        let done = self.core.add(spec);
        self.settle();
        done
    }

    fn ids(&self) -> Vec<u32> {
        let known: Vec<u32> = self.core.nodes.keys().map(|id| id.get()).collect();
        let kept = self.world.runtime.kept().unwrap();
        let kept: Vec<u32> = kept.pod.nodes.iter().map(|node| node.id.get()).collect();
        assert_eq!(known, kept, "the record is not what the manager believes");
        known
    }
}

fn spec(world: &World, node: u32) -> Node {
    world.pod.node(id(node)).unwrap().clone()
}

fn last_kinds(world: &World, node: u32, most: usize) -> Vec<EventKind> {
    let kinds = world.kinds(node);
    kinds[kinds.len().saturating_sub(most)..].to_vec()
}

#[test]
fn a_removed_node_is_gone_and_its_generations_go_on() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(3, REMOVE).unwrap();
    assert_eq!(manager.ids(), [1, 2]);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Absent, 2)
    );
    use EventKind::*;
    assert_eq!(
        last_kinds(&world, 3, 7),
        [
            NodeStopping,
            FailureDetected,
            Fenced,
            GenerationRaised,
            Rung,
            NodeDown,
            NodeRemoved
        ]
    );
    for action in [REMOVE, STOP, NodeAction::Start {}] {
        let error = manager.steer(3, action).unwrap_err();
        assert!(matches!(error, ControlError::NoSuchNode { .. }), "{error}");
    }
    manager.live(10);
    manager.add(&spec(&world, 3)).unwrap();
    manager.live(3);
    assert_eq!(manager.ids(), [1, 2, 3]);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Joined, 2)
    );
    assert_eq!(
        last_kinds(&world, 3, 3),
        [NodeAdded, NodeStarted, NodeJoined]
    );
    is_wrong_state(manager.add(&spec(&world, 3)), "already");
    // A later failure is the policy's business, not that of the removal before.
    world.die(3, Cause::Panic);
    manager.settle();
    manager.live(3);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Joined, 3)
    );
}

#[test]
fn nodes_are_removed_in_every_state_and_never_twice() {
    let world = World::new("max_restarts_per_minute = 1");
    let mut manager = FakeManager::up(&world);
    // Down.
    manager.steer(1, STOP).unwrap();
    assert_eq!(world.state_of(1), NodeState::Down);
    manager.steer(1, REMOVE).unwrap();
    assert_eq!(
        (world.state_of(1), world.generation_of(1)),
        (NodeState::Absent, 2)
    );
    manager.add(&spec(&world, 1)).unwrap();
    manager.live(3);
    // On its way to be stopped: the order is taken further, and asked for twice.
    manager.agents = Agents::Ignore;
    manager.steer(1, STOP).unwrap();
    manager.steer(1, REMOVE).unwrap();
    manager.steer(1, REMOVE).unwrap();
    assert_eq!(world.state_of(1), NodeState::Stopping);
    is_wrong_state(manager.steer(1, NodeAction::Start {}), "removed");
    world.advance(Duration::from_secs(4));
    manager.tick();
    assert_eq!(
        (world.state_of(1), world.generation_of(1)),
        (NodeState::Absent, 3)
    );
    // Waiting to be started again.
    for _ in 0..2 {
        manager.live(1);
        world.die(2, Cause::Panic);
        manager.settle();
    }
    assert_eq!(world.state_of(2), NodeState::Restarting);
    manager.steer(2, REMOVE).unwrap();
    assert_eq!(
        (world.state_of(2), world.generation_of(2)),
        (NodeState::Absent, 3)
    );
    is_wrong_state(manager.steer(3, REMOVE), "pod down");
    assert_eq!(manager.ids(), [3]);
}

#[test]
fn a_node_that_cannot_be_had_is_refused_with_the_reason() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    let mut stranger = spec(&world, 3);
    stranger.id = NodeId::new(4).unwrap();
    is_wrong_state(manager.add(&stranger), "name");
    stranger.name = "n4".into();
    let error = manager.add(&stranger).unwrap_err().to_string();
    assert!(error.contains("node_capacity = 3"), "{error}");
    // As when the disk is full.
    manager.steer(3, REMOVE).unwrap();
    let before = world.events().len();
    let blocked = world.runtime.path().join("pod.json.new");
    std::fs::create_dir(&blocked).unwrap();
    let error = manager.add(&spec(&world, 3)).unwrap_err();
    assert!(matches!(error, ControlError::NotRecorded { .. }), "{error}");
    assert_eq!((world.events().len(), manager.ids()), (before, vec![1, 2]));
    // A node that cannot be taken out of the record stays down, and goes when it can.
    manager.steer(2, REMOVE).unwrap();
    manager.live(200);
    assert_eq!(world.state_of(2), NodeState::Down);
    is_wrong_state(manager.steer(2, NodeAction::Start {}), "removed");
    std::fs::remove_dir(&blocked).unwrap();
    manager.live(200);
    assert_eq!(
        (world.state_of(2), manager.ids()),
        (NodeState::Absent, vec![1])
    );
    manager.core.down(Duration::ZERO);
    assert_eq!(manager.add(&spec(&world, 3)), Err(ControlError::GoingDown));
}

#[test]
fn a_pod_file_that_changed_is_applied_or_refused_by_its_parts() {
    let world = World::new("");
    let mut manager = FakeManager::up(&world);
    manager.steer(3, REMOVE).unwrap();
    let mut file = Pod::clone(&world.pod);
    file.memory.pool *= 2;
    file.nodes[0].policies.default.kind = crate::podfile::RestartKind::Never;
    let differences = manager.core.reload(&file, true).unwrap();
    let effects: Vec<_> = differences.iter().map(|d| d.effect).collect();
    assert_eq!(effects, [Effect::Refused, Effect::Now, Effect::Now]);
    assert_eq!(manager.ids(), [1, 2], "a dry run changes nothing");
    assert_eq!(manager.core.reload(&file, false).unwrap(), differences);
    manager.settle();
    manager.live(3);
    assert_eq!(manager.ids(), [1, 2, 3]);
    assert_eq!(
        (world.state_of(3), world.generation_of(3)),
        (NodeState::Joined, 2)
    );
    world.die(1, Cause::Panic);
    manager.settle();
    assert_eq!(world.state_of(1), NodeState::Down, "by the new policy");
    // What was refused still differs, and a manager that takes over goes on with the rest.
    drop(manager);
    let mut next = FakeManager::start(&world, true);
    assert_eq!(next.core.reload(&file, false).unwrap(), differences[..1]);
    assert_eq!(world.lives(2), 1);
}

/// Node 3 is removed while it runs and added again, node 2 when it is down.
fn day(world: &Arc<World>) {
    let mut manager = FakeManager::up(world);
    manager.steer(3, REMOVE).unwrap();
    manager.live(3);
    manager.steer(2, STOP).unwrap();
    manager.steer(2, REMOVE).unwrap();
    manager.add(&spec(world, 3)).unwrap();
    manager.live(5);
}

#[test]
fn managers_killed_while_nodes_come_and_go_lose_nothing() {
    for polite in [false, true] {
        let play = Play {
            world: &|| {
                let world = World::new("");
                world.set_polite(polite, polite);
                world
            },
            day: &day,
            begun: all_have_joined,
            evening: &|manager| manager.pass(20),
        };
        let steps = play.kill_two(|world, next, killed| {
            let at = &killed.at;
            let ids = next.ids();
            assert_eq!(
                (world.state_of(1), world.lives(1)),
                (NodeState::Joined, 1),
                "{at}"
            );
            for node in [2, 3] {
                let kinds = world.kinds(node);
                let count = |kind| kinds.iter().filter(|k| **k == kind).count();
                let there = ids.contains(&node);
                assert_eq!(
                    there,
                    world.state_of(node) != NodeState::Absent,
                    "{at}: {kinds:?}"
                );
                let (added, removed) = (count(EventKind::NodeAdded), count(EventKind::NodeRemoved));
                assert_eq!(usize::from(there), 1 + added - removed, "{at}: {kinds:?}");
                // Every failure has raised the generation once, and nothing else has; a process
                // that was on record and never ran counts as a life that failed.
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
                let ends = count(EventKind::NodeStopping);
                assert!(
                    (ends..=ends + killed.unused()).contains(&ended),
                    "{at}: {kinds:?}"
                );
                // An order that was told is carried out.
                if ends == 1 && added == 0 {
                    let rests = [NodeState::Absent, NodeState::Down];
                    assert!(rests.contains(&world.state_of(node)), "{at}: {kinds:?}");
                }
                if world.state_of(node) == NodeState::Joined {
                    let lives = world.lives(node);
                    assert!(lives <= world.generation_of(node), "{at}");
                }
            }
        });
        for step in ["intent", "keep", "state", "event", "generation"] {
            assert!(steps.contains(&step), "never killed at {step}: {steps:?}");
        }
    }
}
