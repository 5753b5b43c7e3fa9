//! Upgrade in place: the successor goes on where the agent was.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lupin::client::{End, What};
use lupin::liveness::Liveness;
use lupin::{Admission, GroupEvent, Membership, Patience};
use lupin_abi::port::ExecStatus;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};
use support::{AGENT, Agent, Pod};

const LIMIT: Duration = Duration::from_secs(60);
const UPGRADES: u32 = 5;

fn attach(socket: &Path) -> lupin::Pod {
    let patience = Patience {
        connect: LIMIT,
        ..Patience::default()
    };
    lupin::Pod::attach_at(socket, patience).unwrap()
}

fn next(membership: &mut Membership, seq: &mut u64) -> What {
    match membership.notifications().next_within(LIMIT).unwrap() {
        Some(GroupEvent::Notice(notice)) => {
            *seq += 1;
            assert_eq!(notice.seq, *seq, "{notice:?}");
            notice.what
        }
        other => panic!("after {seq}: {other:?}"),
    }
}

/// A process that is a member until it is killed: with an instance of its process's life, and one
/// of its thread's.
fn member(socket: &Path) -> Pid {
    // SAFETY: the child makes system calls and small allocations (the C library's allocator is
    // usable after a fork), and never returns.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let _ = std::panic::catch_unwind(|| {
                let pod = attach(socket);
                let own = pod.register_own_thread(Some(12)).unwrap();
                let thread = pod.register_thread(Some(13)).unwrap();
                let _member = pod.join_group("g", None, &[&own, &thread]).unwrap();
                loop {
                    pause();
                }
            });
            loop {
                pause();
            }
        }
    }
}

fn lives(pod: &Pod) -> u64 {
    u64::from(pod.node().agent_process().1)
}

fn upgrade(agent: &Agent) {
    kill(Pid::from_raw(agent.0.id().cast_signed()), Signal::SIGUSR2).unwrap();
}

/// Copies the agent in a process of its own: one that another test forks off meanwhile would keep
/// a descriptor of ours open for writing, and what is open so cannot be executed.
fn copy_agent(to: &Path) {
    let status = Command::new("cp").arg(AGENT).arg(to).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_successor_keeps_processes_memberships_and_the_manager() {
    let pod = Pod::new();
    // From a file of its own, which is replaced as a package does it.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("agent");
    copy_agent(&program);
    let start = format!("exec {} \"$@\"", program.display());
    let mut agent = pod.start(&["/bin/sh", "-c", &start], &[]);
    pod.joined();
    let pid = agent.0.id();
    let attached = attach(&pod.socket());
    attached.create_group("g", Admission::default()).unwrap();
    let thread = attached.register_thread(Some(11)).unwrap();
    let mut watcher = attached.join_group("g", None, &[&thread]).unwrap();
    let (mut seq, mut members) = (0, Vec::new());
    let child = member(&pod.socket());
    for _ in 0..3 {
        match next(&mut watcher, &mut seq) {
            What::Joined { member } => members.push(member.thread),
            other => panic!("{other:?}"),
        }
    }
    for n in 1..=UPGRADES {
        let before = lives(&pod);
        let new = folder.path().join("new");
        copy_agent(&new);
        std::fs::rename(&new, &program).unwrap();
        upgrade(&agent);
        support::until("the successor", || lives(&pod) > before);
        pod.joined();
        // The old connections were broken, and are restored.
        let another = attached.register_thread(Some(20 + n)).unwrap();
        assert!(
            members
                .iter()
                .all(|member| attached.threads_alive().is_alive(*member))
        );
        drop(another);
        assert_eq!(watcher.members().unwrap().len(), 3);
        // The manager connects again, to the same listener, and gets the doorbell.
        let mut manager = pod.manager();
        manager.hello();
        assert_eq!(manager.run("exit 7").1, ExecStatus::Code(7));
    }
    assert_eq!(agent.0.id(), pid);
    assert!(agent.0.try_wait().unwrap().is_none());
    // A file that is none: the agent stays, and works.
    std::fs::remove_file(&program).unwrap();
    let before = lives(&pod);
    upgrade(&agent);
    drop(attached.register_thread(Some(30)).unwrap());
    // Nobody was told of a death up to here, and now of each once.
    kill(child, Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        match next(&mut watcher, &mut seq) {
            What::Died { member, end } => {
                assert_eq!(end, End::Killed(9));
                assert!(members.contains(&member.thread));
                members.retain(|thread| *thread != member.thread);
            }
            other => panic!("{other:?}"),
        }
    }
    waitpid(child, None).unwrap();
    assert_eq!(lives(&pod), before);
}

/// A process, and a thread of another, die while no agent runs; that other process lives.
#[test]
fn what_died_while_no_agent_ran_is_told_once_and_the_living_are_not() {
    let pod = Pod::new();
    let agent = pod.start(&[], &[]);
    pod.joined();
    let attached = attach(&pod.socket());
    attached.create_group("g", Admission::default()).unwrap();
    let thread = attached.register_thread(Some(11)).unwrap();
    let mut watcher = attached.join_group("g", None, &[&thread]).unwrap();
    let mut seq = 0;
    let child = member(&pod.socket());
    for _ in 0..3 {
        assert!(matches!(next(&mut watcher, &mut seq), What::Joined { .. }));
    }
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (tell, joined) = std::sync::mpsc::channel();
    let of_thread = attached.clone();
    let worker = std::thread::spawn(move || {
        let own = of_thread.register_own_thread(Some(14)).unwrap();
        std::mem::forget(of_thread.join_group("g", None, &[&own]).unwrap());
        std::mem::forget(own);
        tell.send(()).unwrap();
        let _ = wait.recv();
    });
    assert!(matches!(next(&mut watcher, &mut seq), What::Joined { .. }));
    joined.recv_timeout(LIMIT).unwrap();
    drop(agent);
    kill(child, Signal::SIGKILL).unwrap();
    waitpid(child, None).unwrap();
    drop(go);
    worker.join().unwrap();
    let _agent = pod.start(&[], &[]);
    let mut dead = Vec::new();
    for _ in 0..3 {
        match next(&mut watcher, &mut seq) {
            What::Died { member, .. } => dead.push(member.thread.id()),
            other => panic!("{other:?}"),
        }
    }
    dead.sort_unstable();
    assert_eq!(dead, [12, 13, 14]);
    assert!(attached.threads_alive().is_alive(thread.instance()));
    let living = watcher.members().unwrap();
    let living: Vec<u32> = living
        .iter()
        .filter(|info| info.end.is_none())
        .map(|info| info.member.thread.id())
        .collect();
    assert_eq!(living, [11]);
}
