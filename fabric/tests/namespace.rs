//! Namespace nodes and the program `lupin-fabricd`, natively. Needs root.

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::event::{EventKind, FencePath};
use lupin_abi::fabric::{NodeState, RingRead};
use lupin_abi::layout::MIN_SYSTEM_SIZE;
use lupin_abi::{Cause, NodeId};
use lupin_fabric::memory::{Geometry, PodMemory};
use lupin_fabric::podfile::Pod;
use lupin_fabric::power::namespace::NamespacePower;
use lupin_fabric::power::{PowerControl, StartRequest};
use lupin_fabric::runtime::RuntimeFolder;
use support::{FABRICD, Mapped, TestPod, agent_script, node_program as run_node, wait_until};

/// Not a test: the program of the nodes that the tests start.
#[test]
#[ignore = "is started by the other tests as a node"]
fn node_program() {
    run_node();
}

/// Maps a pod memory for reading: a manager does not start beside an unknown writer.
fn map(path: &Path) -> Mapped {
    use std::os::fd::AsRawFd;
    Mapped::read_only(std::fs::File::open(path).unwrap().as_raw_fd())
}

/// A pidfd of a namespace's first process becomes readable only when every process of the
/// namespace is gone. So a counter that a grandchild increments in a tight loop stands still
/// from the return of the fence on.
#[test]
fn nothing_stores_after_the_fence_of_a_namespace() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pod.toml");
    let text = "name = \"test\"\n[memory]\npath = \"pod\"\npool = \"2M\"\nnode_capacity = 1\n\
                [[node]]\nid = 1\nbackend = \"namespace\"\n";
    let pod = Pod::parse(text, &file).unwrap();
    let geometry = Geometry {
        name: "test".into(),
        node_capacity: 1,
        system: MIN_SYSTEM_SIZE,
        pool: 2 << 20,
    };
    let memory = PodMemory::open(&pod.memory.path, &geometry).unwrap();
    let runtime = RuntimeFolder::open(&folder.path().join("run"), "test", 2).unwrap();
    let node_folder = runtime.node("n1").unwrap();
    let power = NamespacePower {
        init: FABRICD.into(),
        agent: agent_script(folder.path(), "node_program", "store"),
    };
    let mapped = map(&pod.memory.path);
    for generation in 1..=20 {
        node_folder.clean().unwrap();
        let request = StartRequest {
            node: &pod.nodes[0],
            generation,
            folder: &node_folder,
            memory: &memory,
            heartbeat_period: Duration::from_millis(8),
        };
        let instance = power.prepare(&request).unwrap().release().unwrap();
        let counters = [mapped.word(0), mapped.word(1)];
        let before = counters.map(|c| c.load(Ordering::Relaxed));
        wait_until("both processes to store", || {
            counters
                .iter()
                .zip(before)
                .all(|(c, b)| c.load(Ordering::Relaxed) > b + 1000)
        });
        let fence = instance.fence().unwrap();
        let at_fence = counters.map(|c| c.load(Ordering::Relaxed));
        assert_eq!(fence.path, FencePath::Killed);
        assert!(instance.is_gone());
        std::thread::sleep(Duration::from_millis(5));
        let later = counters.map(|c| c.load(Ordering::Relaxed));
        assert_eq!(at_fence, later, "a store after fence {generation}");
        assert_eq!(instance.exit().evidence, [0, 9]);
        // Once more finds it gone.
        assert_eq!(instance.fence().unwrap().path, FencePath::Exited);
    }
}

#[test]
fn a_killed_manager_is_replaced_and_no_node_notices() {
    let mut pod = TestPod::new(3, "");
    pod.start();
    let before = pod.wait_joined(&[1, 1, 1]);
    for epoch in 2..5 {
        pod.kill_manager();
        pod.start();
        let after = pod.wait_joined(&[1, 1, 1]);
        assert_eq!(after.epoch, epoch);
        for (a, b) in before.nodes.iter().zip(&after.nodes) {
            assert_eq!(
                (a.pid, b.restarts),
                (b.pid, 0),
                "node {} was restarted",
                a.id
            );
        }
    }
    // The adopted nodes are watched: one that dies is replaced.
    let pid = before.nodes[1].pid.unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    pod.wait_joined(&[1, 2, 1]);
    pod.signal_manager(libc::SIGHUP);
    std::thread::sleep(Duration::from_millis(50));
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
    let memory = map(&pod.folder.path().join("pod"));
    for n in 1..=3 {
        let entry = memory.fabric().entry(NodeId::new(n).unwrap());
        assert_eq!(entry.state(), NodeState::Down);
    }
    assert!(!pod.runtime().join("fabricd.sock").exists());
    // And up again, with generations that nobody had.
    pod.start();
    pod.wait_joined(&[2, 3, 2]);
}

#[test]
fn a_stopped_node_is_hung_and_a_node_that_dies_while_nobody_watches_is_replaced() {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let signal = |pid: Option<u32>, signal| {
        let pid = nix::unistd::Pid::from_raw(pid.unwrap() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    };
    signal(first.nodes[0].pid, nix::sys::signal::Signal::SIGSTOP);
    let second = pod.wait_joined(&[2, 1]);
    assert_eq!(second.nodes[0].cause, Cause::Hang);
    pod.kill_manager();
    signal(second.nodes[1].pid, nix::sys::signal::Signal::SIGKILL);
    pod.start();
    let third = pod.wait_joined(&[2, 2]);
    assert_eq!(third.nodes[0].pid, second.nodes[0].pid);
    assert_eq!(third.nodes[1].cause, Cause::VmmExit);

    // The record tells both failures in the order that makes them safe.
    let memory = map(&pod.folder.path().join("pod"));
    let fabric = memory.fabric();
    let events: Vec<_> = (1..=fabric.state().ring_head())
        .filter_map(|seq| match fabric.read(seq) {
            RingRead::Event(event) => Some(event),
            _ => None,
        })
        .collect();
    for n in [1, 2] {
        let failure: Vec<_> = events
            .iter()
            .filter(|e| e.node == n && e.old_generation == 1)
            .map(|e| e.kind)
            .skip_while(|kind| *kind != EventKind::FailureDetected)
            .collect();
        use EventKind::*;
        let expected = [
            FailureDetected,
            Fenced,
            GenerationRaised,
            Rung,
            NodeRestarting,
        ];
        assert_eq!(failure, expected);
    }
}

#[test]
fn a_starter_is_told_when_the_manager_is_ready_and_by_exit_codes_why_not() {
    let mut pod = TestPod::new(1, "");
    // Ready.
    let (read, write) = std::io::pipe().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&write);
    let mut command = pod.command();
    command.args(["--ready-fd", &number.to_string()]);
    // SAFETY: fcntl on an inherited descriptor, between fork and exec.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            libc::fcntl(number, libc::F_SETFD, 0);
            Ok(())
        });
    }
    pod.manager = Some(command.spawn().unwrap());
    drop(command);
    drop(write);
    let said = std::io::read_to_string(read).unwrap();
    assert_eq!(said, "ready\n");
    assert_eq!(pod.status().nodes.len(), 1);

    let refused = |pod: &TestPod, code: i32, words: &str| {
        let before = pod.log().len();
        let output = pod.command().output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{:?}", pod.log());
        let said = pod.log().split_off(before);
        assert!(said.contains(words), "{words:?} is not in {said}");
    };
    // 3: another manager of the same pod.
    let pid = pod.manager.as_ref().unwrap().id().to_string();
    refused(&pod, 3, &pid);
    // 4: the same memory under another runtime folder; then a memory that is none.
    let mut other = TestPod::new(1, "");
    let shared = pod.folder.path().join("pod");
    std::os::unix::fs::symlink(&shared, other.folder.path().join("pod")).unwrap();
    refused(&other, 4, "another fabric manager uses this pod memory");
    other = TestPod::new(1, "");
    std::fs::write(other.folder.path().join("pod"), "not a pod").unwrap();
    refused(&other, 4, "truncated");
    // 2: a pod file that cannot be used.
    std::fs::write(&other.file, "name = 1").unwrap();
    refused(&other, 2, "pod.toml");

    // An interrupt from a terminal ends the pod as well.
    pod.signal_manager(libc::SIGINT);
    let status = pod.wait_for_end();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}

#[test]
fn a_pod_file_that_lost_a_running_node_and_a_runtime_folder_that_was_changed_are_refused() {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let status = pod.wait_joined(&[1, 1]);
    let pids: Vec<_> = status.nodes.iter().map(|node| node.pid.unwrap()).collect();
    pod.kill_manager();
    let whole = std::fs::read_to_string(&pod.file).unwrap();
    let refused = |pod: &TestPod, text: &str, code: i32, words: &[&str]| {
        std::fs::write(&pod.file, text).unwrap();
        let before = pod.log().len();
        let output = pod.command().output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", pod.log());
        let said = pod.log().split_off(before);
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
    };
    let without = whole.replace("[[node]]\nid = 2\n", "");
    // Without its record of the pod as it runs, it has the pod file only.
    let record = pod.runtime().join("pod.json");
    let kept = std::fs::read(&record).unwrap();
    std::fs::remove_file(&record).unwrap();
    refused(&pod, &without, 2, &["n2", &pids[1].to_string()]);
    std::fs::write(pod.folder.path().join("k"), "").unwrap();
    let other = "[[node]]\nid = 2\nbackend=\"kvm\"\nkernel = \"k\"\ninitramfs = \"k\"\n";
    let changed = whole.replace("[[node]]\nid = 2\n", other);
    refused(&pod, &changed, 2, &["namespace", "kvm"]);
    // Without its runtime folder a manager cannot know the nodes, but it can see them.
    let (run, hidden) = (
        pod.folder.path().join("run"),
        pod.folder.path().join("hidden"),
    );
    std::fs::rename(&run, &hidden).unwrap();
    refused(&pod, &whole, 4, &["--runtime-dir", "can write"]);
    std::fs::remove_dir_all(&run).unwrap();
    std::fs::rename(&hidden, &run).unwrap();
    // With it, nodes run on as they are, whatever the file says meanwhile.
    std::fs::write(&record, kept).unwrap();
    std::fs::write(&pod.file, without).unwrap();
    pod.start();
    let after = pod.wait_joined(&[1, 1]);
    let still: Vec<_> = after.nodes.iter().map(|node| node.pid.unwrap()).collect();
    assert_eq!(still, pids);
}

#[test]
fn without_an_agent_the_node_stays_down_and_says_why() {
    let mut pod = TestPod::new(1, "");
    std::fs::remove_file(pod.folder.path().join("agent")).unwrap();
    pod.start();
    wait_until("the node to be given up", || {
        pod.status().nodes[0].state == NodeState::Down
    });
    let node = pod.status().nodes.remove(0);
    assert_eq!(node.cause, Cause::StartFailed);
    assert!(node.detail.unwrap().contains("LUPIN_GUEST_AGENT"));
}

#[test]
fn a_node_that_never_joins_is_reported_with_its_console() {
    let mut pod = TestPod::new(1, "join_timeout_ms = 300\n");
    let script = "#!/bin/sh\necho no network, no disk, no hope\nexec sleep 1000\n";
    std::fs::write(pod.folder.path().join("agent"), script).unwrap();
    pod.start();
    wait_until("the join timeout", || {
        let detail = pod.status().nodes.remove(0).detail.unwrap_or_default();
        detail.contains("no hope")
    });
    assert!(pod.log().contains("join-timeout"));
}

/// Waits for a manager other than `before` with a backup of its own.
fn wait_for_successor(pod: &TestPod, before: u32) -> (u32, u32) {
    let begin = std::time::Instant::now();
    loop {
        let status = lupin_fabric::api::Client::connect(&pod.runtime())
            .and_then(|mut client| client.status());
        if let Ok(status) = status
            && status.manager_pid != before
            && let Some(backup) = status.backup_pid
        {
            return (status.manager_pid, backup);
        }
        assert!(begin.elapsed() < support::PATIENCE, "{}", pod.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal_process(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

fn is_gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Nobody may have waited for it yet.
    stat.is_empty() || stat.contains(") Z ")
}

#[test]
fn a_backup_takes_the_place_of_a_dead_manager_and_of_a_hung_one() {
    use nix::sys::signal::Signal;
    let mut pod = TestPod::new(2, "[manager]\nbackup = true\nbackup_timeout_ms = 200\n");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let (manager, backup) = wait_for_successor(&pod, 0);
    assert_eq!(manager, first.manager_pid);
    let memory = map(&pod.folder.path().join("pod"));
    let entry = memory.fabric().entry(NodeId::new(2).unwrap());

    // A node dies together with the manager that should have noticed.
    let begin = std::time::Instant::now();
    signal_process(manager, Signal::SIGKILL);
    signal_process(first.nodes[1].pid.unwrap(), Signal::SIGKILL);
    wait_until("the new generation", || entry.generation() == 2);
    println!("generation raised {:?} after both deaths", begin.elapsed());
    let (second, next_backup) = wait_for_successor(&pod, manager);
    assert_eq!(second, backup, "the backup that stood by took over");
    assert_ne!(next_backup, backup);
    let status = pod.wait_joined(&[1, 2]);
    assert_eq!(status.epoch, 2);
    assert_eq!(status.nodes[0].pid, first.nodes[0].pid, "nobody noticed");

    // A stopped manager does not look at anything; its backup ends it first.
    signal_process(second, Signal::SIGSTOP);
    let (third, last_backup) = wait_for_successor_of_stopped(&pod, second, &memory);
    assert_eq!(third, next_backup);
    assert!(is_gone(second), "two managers");
    let status = pod.wait_joined(&[1, 2]);
    assert_eq!(status.epoch, 3);
    assert_eq!(status.nodes[0].pid, first.nodes[0].pid);

    // A backup that dies is replaced; a second one has nothing to do. Not before the first stands
    // by: who comes first does.
    let stands_by = format!("standing by for manager {third}\n");
    let standing_by = || pod.log().matches(&stands_by).count();
    wait_until("the last backup", || standing_by() == 1);
    signal_process(last_backup, Signal::SIGKILL);
    wait_until("another backup", || {
        let backup = pod.status().backup_pid;
        backup.is_some_and(|pid| pid != last_backup)
    });
    wait_until("it stands by", || standing_by() == 2);
    let output = pod.command().arg("--standby").output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", pod.log());

    // The pod goes down, and with it everybody.
    let backup = pod.status().backup_pid.unwrap();
    signal_process(third, Signal::SIGTERM);
    wait_until("the end of manager and backup", || {
        is_gone(third) && is_gone(backup)
    });
    assert!(!pod.runtime().join("fabricd.sock").exists());
    let output = pod.command().arg("--standby").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", pod.log());
    assert!(pod.log().contains("nothing to stand by for"));
}

#[test]
fn a_backup_that_is_killed_while_it_starts_is_replaced_and_the_next_takes_over() {
    use nix::sys::signal::Signal;
    let mut pod = TestPod::new(1, "[manager]\nbackup = true\nbackup_timeout_ms = 20000\n");
    pod.start();
    let first = pod.wait_joined(&[1]);
    // From before it is executed until it stands by, which is a matter of milliseconds.
    let mut last = 0;
    let delays = [0, 1, 3, 10];
    for delay in delays {
        let mut backup = None;
        wait_until("a backup", || {
            backup = pod.status().backup_pid.filter(|pid| *pid != last);
            backup.is_some()
        });
        last = backup.unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        signal_process(last, Signal::SIGKILL);
    }
    let manager = first.manager_pid;
    let stands_by = format!("standing by for manager {manager}\n");
    wait_until("one that stands by", || {
        let log = pod.log();
        let after = log
            .match_indices("the backup manager has ended")
            .nth(delays.len() - 1);
        after.is_some_and(|(at, _)| log[at..].contains(&stands_by))
    });
    signal_process(manager, Signal::SIGKILL);
    let (second, _) = wait_for_successor(&pod, manager);
    assert_ne!(second, last);
    let status = pod.wait_joined(&[1]);
    assert_eq!(status.nodes[0].pid, first.nodes[0].pid, "nobody noticed");
    pod.manager.take().unwrap().wait().unwrap();
    signal_process(second, Signal::SIGTERM);
    wait_until("the end of the manager", || is_gone(second));
}

/// As [`wait_for_successor`]; the control socket of a stopped manager takes connections and
/// never answers, so look at the epoch first.
fn wait_for_successor_of_stopped(pod: &TestPod, before: u32, memory: &Mapped) -> (u32, u32) {
    let epoch = memory.fabric().state().epoch();
    wait_until("the next epoch", || memory.fabric().state().epoch() > epoch);
    wait_for_successor(pod, before)
}

/// Processes of a node that count in a loop, and one that was stopped before the pause.
#[test]
fn a_paused_namespace_node_stands_still_as_a_whole_and_survives_managers() {
    use lupin_fabric::api::{Client, NodeAction};
    let mut pod = TestPod::new(2, "");
    agent_script(pod.folder.path(), "node_program", "tree");
    pod.start();
    let before = pod.wait_joined(&[1, 1]);
    let mapped = map(&pod.folder.path().join("pod"));
    let counters = [mapped.word(0), mapped.word(1)];
    let moves = |what: &str| {
        let before = counters.map(|c| c.load(Ordering::Relaxed));
        wait_until(what, || {
            let moved =
                |(c, b): (&&std::sync::atomic::AtomicU64, u64)| c.load(Ordering::Relaxed) > b + 100;
            counters.iter().zip(before).all(moved)
        });
    };
    moves("both processes to count");
    let steer =
        |pod: &TestPod, action| Client::connect(&pod.runtime()).unwrap().steer("n1", action);
    let told = |pod: &TestPod, kind: EventKind, count: usize| {
        wait_until(kind.name(), || {
            let fabric = mapped.fabric();
            let found = (1..=fabric.state().ring_head()).filter(|seq| {
                matches!(fabric.read(*seq), RingRead::Event(e) if e.kind == kind && e.node == 1)
            });
            found.count() >= count
        });
        assert!(pod.status().nodes[0].pid.is_some());
    };
    for round in 1..=2 {
        steer(&pod, NodeAction::Pause {}).unwrap();
        told(&pod, EventKind::NodePaused, round);
        let at_pause = counters.map(|c| c.load(Ordering::Relaxed));
        // Several deadlines, and another manager.
        std::thread::sleep(Duration::from_millis(700));
        pod.kill_manager();
        pod.start();
        std::thread::sleep(Duration::from_millis(700));
        let later = counters.map(|c| c.load(Ordering::Relaxed));
        assert_eq!(at_pause, later, "a store of a paused node");
        let status = pod.status();
        assert_eq!(status.nodes[0].state, NodeState::Paused, "{}", pod.log());
        assert_eq!(status.nodes[0].pid, before.nodes[0].pid);
        // The new manager has to find it standing before it lets it run.
        wait_until("the node to be resumed", || {
            steer(&pod, NodeAction::Resume {}).is_ok()
        });
        told(&pod, EventKind::NodeResumed, round);
        pod.wait_joined(&[1, 1]);
        moves("both processes to count again");
    }
    steer(&pod, NodeAction::Pause {}).unwrap();
    told(&pod, EventKind::NodePaused, 3);
    Client::connect(&pod.runtime()).unwrap().kill("n1").unwrap();
    let after = pod.wait_joined(&[2, 1]);
    assert_ne!(after.nodes[0].pid, before.nodes[0].pid);
    // Nothing is left of the first life.
    let folder = pod.runtime().join("nodes/n1");
    wait_until("the record to go", || {
        !folder.join("standstill.json").exists()
    });
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
}

#[test]
fn the_manager_is_upgraded_in_place_and_no_node_notices() {
    use lupin_fabric::api::Client;
    let more = "[manager]\nbackup = true\nbackup_timeout_ms = 20000\n";
    let mut pod = TestPod::new(2, more);
    pod.start();
    let before = pod.wait_joined(&[1, 1]);
    wait_until("a backup", || pod.status().backup_pid.is_some());
    let first_backup = pod.status().backup_pid;
    // A program that is none is refused, and nothing has happened.
    let mut client = Client::connect(&pod.runtime()).unwrap();
    assert!(client.upgrade(Some(Path::new("/bin/true"))).is_err());
    assert_eq!(pod.status().epoch, before.epoch);
    let epoch_is = |pod: &TestPod, epoch: u64| {
        wait_until("the next epoch", || {
            Client::connect(&pod.runtime())
                .and_then(|mut client| client.status())
                .is_ok_and(|status| status.epoch == epoch)
        });
    };
    client.upgrade(None).unwrap();
    epoch_is(&pod, before.epoch + 1);
    pod.signal_manager(libc::SIGUSR2);
    epoch_is(&pod, before.epoch + 2);
    let after = pod.wait_joined(&[1, 1]);
    assert_eq!(after.manager_pid, before.manager_pid);
    for (a, b) in before.nodes.iter().zip(&after.nodes) {
        assert_eq!(
            (a.pid, b.restarts),
            (b.pid, 0),
            "node {} was restarted",
            a.id
        );
    }
    wait_until("another backup", || {
        let now = pod.status().backup_pid;
        now.is_some() && now != first_backup
    });
    // Failures are handled as before.
    Client::connect(&pod.runtime()).unwrap().kill("n1").unwrap();
    pod.wait_joined(&[2, 1]);
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
}
