//! Sleepers of one node and releases of another: woken, not polling, and right whoever dies.

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::*;
use lupin_abi::event::Cause;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(30);

/// A holder in a node, and a waiter in node 1 that tells how its waits ended.
struct Sleepers {
    _programs: [KillOnDrop; 2],
    folder: tempfile::TempDir,
}

/// How a wait ended, and how often the waiter asked for the holder meanwhile.
#[derive(Debug)]
struct Wait {
    kind: String,
    /// From the release.
    ns: u64,
    looks: u64,
}

impl Sleepers {
    fn start(pod: &Pod, rounds: u32, hold_ms: u64) -> Self {
        Self::with_holder(pod, 2, rounds, hold_ms)
    }

    fn with_holder(pod: &Pod, holder: u32, rounds: u32, hold_ms: u64) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let (rounds, ms) = (rounds.to_string(), hold_ms.to_string());
        let file = path(&folder);
        let file = file.to_str().expect("text");
        let start = |node, words: &[&str]| {
            let mut argv = vec!["lupin-measure", "sleeper"];
            argv.extend(words);
            argv.extend(["--rounds", &rounds]);
            let mut command = pod.exec(node, &argv);
            let command = command.stdin(Stdio::null());
            KillOnDrop(command.spawn().expect("sleeper starts"))
        };
        let holder = start(holder, &["hold", "--ms", &ms]);
        let waiter = start(1, &["wait", file]);
        Self {
            _programs: [holder, waiter],
            folder,
        }
    }

    /// The first so many waits.
    fn ended(&self, rounds: usize) -> Vec<Wait> {
        wait_until("the waits end", LIMIT, || {
            read(&path(&self.folder)).len() >= rounds
        });
        read(&path(&self.folder))
    }
}

fn path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("waits")
}

fn read(file: &Path) -> Vec<Wait> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    whole
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Wait {
                kind: words[1].into(),
                ns: words[2].parse().expect("nanoseconds"),
                looks: words[3].parse().expect("looks"),
            }
        })
        .collect()
}

/// A sleeper looks a dozen times before it sleeps long, once every 250 ms, and some times more if
/// something else happens in the pod. One that looked every 8 ms would do so 250 times in 2 s.
const FEW_LOOKS: u64 = 80;

#[test]
#[ignore = "needs root and the built products"]
fn a_release_in_one_node_wakes_a_sleeper_in_another_who_did_not_poll() {
    let pod = up(&namespace_spec("wake", 2));
    let waits = Sleepers::start(&pod, 3, 2_000).ended(3);
    for wait in &waits {
        assert_eq!(wait.kind, "clean", "{waits:?}");
        assert!(wait.looks < FEW_LOOKS, "{waits:?}");
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn a_sleeper_learns_that_the_node_of_the_holder_died() {
    let pod = up(&namespace_spec("wake-dead", 2));
    let sleepers = Sleepers::start(&pod, 1, 60_000);
    // Into its long sleep, if the machine lets it: right in any case.
    std::thread::sleep(Duration::from_secs(2));
    signal(&pod, 2, Signal::SIGKILL);
    let waits = sleepers.ended(1);
    assert_eq!(waits[0].kind, "orphaned", "{waits:?}");
    assert!(waits[0].looks < FEW_LOOKS, "{waits:?}");
    expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
}

#[test]
#[ignore = "needs root and the built products"]
fn without_a_manager_a_sleeper_finds_the_release_itself() {
    let pod = up(&namespace_spec("wake-alone", 2));
    let sleepers = Sleepers::start(&pod, 8, 100);
    sleepers.ended(2);
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    kill(manager, Signal::SIGSTOP).expect("stop");
    wait_until("waits end", LIMIT, || {
        read(&path(&sleepers.folder)).len() >= 6
    });
    kill(manager, Signal::SIGCONT).expect("go on");
    let waits = sleepers.ended(8);
    assert!(waits.iter().all(|wait| wait.kind == "clean"), "{waits:?}");
}

#[test]
#[ignore = "needs root and the built products"]
fn in_a_pod_of_eighteen_nodes_those_of_the_same_class_wake_each_other() {
    // A sleeper leaves the class of its node, one of sixteen.
    let pod = up(&namespace_spec("wake-many", 18));
    let waits = Sleepers::with_holder(&pod, 17, 9, 1_000).ended(9);
    for wait in &waits {
        assert_eq!(wait.kind, "clean", "{waits:?}");
        assert!(wait.looks < FEW_LOOKS, "{waits:?}");
    }
    // Who is not woken looks every 250 ms: a quarter of such waits are as short as these.
    let woken = waits.iter().filter(|wait| wait.ns < 60_000_000).count();
    assert!(woken >= 6, "{waits:?}");
}
