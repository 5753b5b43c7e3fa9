//! Policies by cause, and the programs that are told.

use std::time::{Duration, Instant};

use lupin_abi::Cause;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;

use super::crash::injection::kill_at;
use super::fake::{FakeManager, World, id};
use super::hook::{Hook, HookOutcome};

const POLICIES: &str = "hook = [\"/bin/tell\", \"me\"]\non.panic = \"leave-down\"\n\
                        on.operator.hook = []\n\
                        on.vmm-exit = { max_per_minute = 2, back_off_ms = [0, 3000] }";

#[test]
fn each_cause_has_its_policy_and_the_hook_hears_of_it() {
    let world = World::new(POLICIES);
    let mut manager = FakeManager::up(&world);
    world.die(1, Cause::Panic);
    world.die(2, Cause::VmmExit);
    manager.settle();
    manager.core.kill(id(3));
    manager.settle();
    assert_eq!(world.state_of(1), NodeState::Down);
    world.join_all();
    manager.tick();
    assert_eq!([2, 3].map(|n| world.state_of(n)), [NodeState::Joined; 2]);
    world.die(2, Cause::VmmExit);
    manager.settle();
    assert_eq!(world.state_of(2), NodeState::Restarting, "3 s of back-off");
    let told = |node, life, name: &str| world.hooks(node, life)[0][name].clone();
    assert_eq!(told(1, 1, "LUPIN_ACTION"), "down");
    assert_eq!(told(1, 1, "LUPIN_CAUSE"), "panic");
    assert_eq!(told(2, 2, "LUPIN_DELAY_MS"), "3000");
    assert_eq!(told(2, 1, "LUPIN_NODE_NAME"), "n2");
    assert_eq!(told(2, 1, "LUPIN_POD"), "fake");
    assert_eq!(told(2, 1, "LUPIN_EVIDENCE"), "0 0 0 0 0 0 0 0");
    assert!(world.hooks(3, 1).is_empty(), "an empty hook is none");
    // The end of the pod is no failure.
    manager.core.down(Duration::ZERO);
    manager.settle();
    assert!(world.hooks(3, 2).is_empty());
}

#[test]
fn a_hook_is_called_although_the_manager_dies() {
    let mut points = Vec::new();
    for n in 0.. {
        let world = World::new(POLICIES);
        let mut manager = FakeManager::up(&world);
        let killed = kill_at(n, || {
            world.die(1, Cause::Hang);
            manager.settle();
        });
        drop(manager);
        let mut next = FakeManager::start(&world, true);
        world.join_all();
        next.tick();
        let at = format!("killed at {n}: {killed:?}");
        let calls = world.hooks(1, 1).len();
        let twice = killed == Some("hook-started") || killed == Some("event");
        assert!(calls == 1 || (twice && calls == 2), "{calls} calls, {at}");
        let Some(point) = killed else {
            break;
        };
        points.push(point);
        // And not once more by the manager after that.
        drop(next);
        FakeManager::start(&world, true);
        assert_eq!(world.hooks(1, 1).len(), calls, "{at}");
    }
    assert!(points.contains(&"hook") && points.contains(&"hook-started"));
}

fn shell(script: &str, log: &std::path::Path) -> Hook {
    Hook {
        words: ["/bin/sh", "-c", script].map(String::from).into(),
        environment: vec![("LUPIN_CAUSE".into(), "panic".into())],
        log: log.into(),
    }
}

#[test]
fn a_hook_runs_in_a_group_of_its_own_and_its_failure_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("hook.log");
    let mut pid = 0;
    let script = "echo $LUPIN_CAUSE $$ $(ps -o pgid= -p $$)";
    assert_eq!(shell(script, &log).run(|its| pid = its), HookOutcome::Done);
    let said = std::fs::read_to_string(&log).unwrap();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words, ["panic", &pid.to_string(), &pid.to_string()]);
    assert_eq!(shell("exit 3", &log).run(|_| {}), HookOutcome::Status(3));
    assert_eq!(
        shell("kill -TERM $$", &log).run(|_| {}),
        HookOutcome::Signal(15)
    );
    let mut none = shell("", &log);
    none.words = vec!["/nonexistent/hook".into()];
    let begin = Instant::now();
    assert!(matches!(
        none.run(|_| panic!("it runs")),
        HookOutcome::NotStarted(_)
    ));
    assert!(begin.elapsed() < Duration::from_secs(20));

    let world = World::new(POLICIES);
    let mut manager = FakeManager::up(&world);
    manager
        .core
        .hook_ended(id(1), 1, &HookOutcome::Late, Duration::from_secs(30));
    manager
        .core
        .hook_ended(id(1), 1, &HookOutcome::Done, Duration::ZERO);
    let failed = world
        .events()
        .into_iter()
        .rfind(|e| e.kind == EventKind::HookFailed);
    assert_eq!(failed.unwrap().evidence[..2], [0, 9]);
}
