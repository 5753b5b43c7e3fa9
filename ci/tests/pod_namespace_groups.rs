//! Groups over the nodes of a pod: every member on every node is told of everything once, in one
//! order, whoever dies.

mod common;

use std::process::Stdio;
use std::time::Duration;

use common::member::{Member, Notice};
use common::*;
use lupin_abi::event::Cause;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(60);

/// All of them were told the same under the same numbers, each number once, and none left out.
fn check(members: &[&Member]) {
    let longest = members.iter().map(|m| m.told()).max_by_key(Vec::len);
    let longest = longest.expect("members");
    for member in members {
        let told = member.told();
        let first = told.first().expect("its own joining").0;
        let numbers = told.iter().map(|(seq, _)| *seq);
        assert!(numbers.eq((first..).take(told.len())), "{told:#?}");
        for notice in &told {
            let known = longest.iter().find(|(seq, _)| *seq == notice.0);
            assert!(known.is_none_or(|known| known == notice), "{told:#?}");
        }
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn a_death_is_told_once_to_every_member_on_every_node() {
    let pod = up(&namespace_spec("groups", 3));
    let folder = tempfile::tempdir().expect("folder");
    let join = |node, name: &str| Member::join(&pod, node, folder.path(), name);
    let all = [join(1, "a"), join(1, "b"), join(2, "c"), join(3, "d")];
    let mut listening: Vec<&Member> = all.iter().collect();
    all[0].wait_told("Joined", 4);

    // A process of a node that others of its node and of the others listen on.
    let victim = join(2, "victim");
    victim.kill(&pod);
    for member in &listening {
        member.wait_told("Died", 1);
    }
    check(&listening);

    // A node and its agent, which is its first process; with it the member there.
    let node = listening.remove(3);
    signal(&pod, node.node, Signal::SIGKILL);
    expect_failure(&pod, node.node, 1, Cause::VmmExit, LIMIT);
    for member in &listening {
        member.wait_told("NodeFailed", 1);
        member.wait_told("Died", 2);
        member.wait_told("NodeBack", 1);
    }
    check(&listening);

    // The manager passes the news on between nodes; without it they come late and not less.
    let back = join(3, "back");
    listening.push(&back);
    let manager = pod.manager_pid().expect("manager");
    let manager = nix::unistd::Pid::from_raw(manager);
    let late = join(2, "late");
    let pid = late.pid().expect("a member");
    // By a process that is there already: the manager starts none while it stands.
    let script = format!("sleep 2; kill -KILL {pid}");
    let mut command = pod.exec(2, &["sh", "-c", &script]);
    let _killer = KillOnDrop(command.stdin(Stdio::null()).spawn().expect("killer"));
    std::thread::sleep(Duration::from_secs(1));
    nix::sys::signal::kill(manager, Signal::SIGSTOP).expect("stop");
    for member in &listening {
        let before = if member.file == back.file { 1 } else { 3 };
        member.wait_told("Died", before);
    }
    nix::sys::signal::kill(manager, Signal::SIGCONT).expect("go on");
    check(&listening);
    for member in &listening {
        let told = member.told();
        let deaths = |(_, what): &&Notice| what.starts_with("Died");
        let expected = if member.file == back.file { 1 } else { 3 };
        assert_eq!(told.iter().filter(deaths).count(), expected, "{told:#?}");
    }
}
