//! A host that misbehaves under a pod of KVM guests: its clock is set, it has no memory to give.
//!
//! Needs what `pod_kvm.rs` needs, and a host that may be treated so: the nested test host.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::*;
use lupin_abi::event::{Cause, Event, EventKind};
use nix::sys::signal::Signal;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

const LIMIT: Duration = Duration::from_secs(150);
const DAY: i64 = 24 * 60 * 60;

/// Sets the clock on the wall forward, or back, and back again when dropped.
struct SetClock {
    seconds: i64,
}

impl SetClock {
    fn by(seconds: i64) -> Self {
        step(seconds);
        Self { seconds }
    }
}

impl Drop for SetClock {
    fn drop(&mut self) {
        step(-self.seconds);
    }
}

fn step(seconds: i64) {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("time");
    let then = TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec());
    clock_settime(ClockId::CLOCK_REALTIME, then).expect("only a nested host lets its clock be set");
}

/// A group of processes with little memory; who is in it leaves when it is dropped.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn with_memory(bytes: u64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").expect("memory controller");
        let folder = root.join("lupin-test");
        fs::create_dir(&folder).expect("group");
        let group = Self { folder };
        group.limit(&bytes.to_string());
        group
    }

    fn limit(&self, bytes: &str) {
        fs::write(self.folder.join("memory.max"), bytes).expect("limit");
    }

    fn take(&self, pid: i32) {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string()).expect("move");
    }

    /// How often the kernel has ended a process of the group for want of memory.
    fn ended(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join("memory.events")).expect("events");
        let line = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
        line.expect("oom_kill").parse().expect("number")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let inside = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for pid in inside.lines() {
            // It may be gone meanwhile.
            let _ = fs::write("/sys/fs/cgroup/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

fn failures(pod: &Pod, node: u32) -> Vec<Event> {
    let events = pod.events().expect("events").into_iter();
    events
        .filter(|e| e.node == node && e.kind == EventKind::FailureDetected)
        .collect()
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_set_clock_and_a_lack_of_memory_harm_nobody_who_runs() {
    let pod = up(&kvm_spec("host", 2));
    let survivor = pid(&pod, 1);

    // Nothing depends on the clock on the wall: nobody is taken for silent, or for back too early.
    for by in [DAY, -DAY] {
        let _clock = SetClock::by(by);
        // Longer than the deadline.
        std::thread::sleep(Duration::from_secs(7));
        assert_eq!(
            [failures(&pod, 1), failures(&pod, 2)],
            [vec![], vec![]],
            "the clock was set by {by} s"
        );
    }
    let clock = SetClock::by(-2 * DAY);
    signal(&pod, 2, Signal::SIGKILL);
    expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
    drop(clock);
    let events = pod.events().expect("events");
    let in_order = events.windows(2).all(|w| w[0].time_ns <= w[1].time_ns);
    assert!(in_order, "{events:#?}");

    // A guest has 256 MiB: what is allowed here is enough for the manager, and not for that.
    let group = Group::with_memory(64 << 20);
    group.take(pod.manager_pid().expect("manager"));
    signal(&pod, 2, Signal::SIGKILL);
    wait_until("two attempts for which there was no memory", LIMIT, || {
        failures(&pod, 2).len() >= 4
    });
    assert!(group.ended() >= 2, "the limit was not felt");
    let tries = failures(&pod, 2);
    for e in &tries[2..] {
        assert_eq!(e.cause, Cause::VmmExit, "{tries:#?}");
    }
    assert_eq!(pod.exec_ok(1, &["echo", "on"]).expect("exec"), "on\n");
    group.limit("max");
    // Every life that could not be is given up for good, with all that belongs to it.
    let joined = |e: &&Event| e.kind == EventKind::NodeJoined && e.node == 2 && e.generation > 2;
    wait_until("the node is back", LIMIT, || {
        pod.events().expect("events").iter().any(|e| joined(&e))
    });
    let events = pod.events().expect("events");
    let back = events.iter().find(joined).expect("just seen").generation;
    for old in 2..back {
        check_failure(&events, 2, old, Cause::VmmExit);
    }
    assert_eq!(failures(&pod, 1), vec![]);
    assert_eq!(pid(&pod, 1), survivor, "the other node was touched");
    assert!(pod.down().expect("down").status.success());
}
