//! A pod of whole Debian systems: one image for all, on a disk, with the agent's package installed
//! as a user would install it.
//!
//! Needs a KVM that runs stock kernels, `LUPIN_TEST_DISK` and the variables of the KVM tests;
//! `cargo xtask test --only debian` builds the image and runs it in the nested host.

mod common;

use std::time::Duration;

use common::*;
use lupin_abi::event::Cause;

/// Emulated, a Debian takes two minutes from its kernel to its last service.
const LIMIT: Duration = Duration::from_secs(600);

#[test]
#[ignore = "needs a KVM that runs stock kernels, and a disk with a system"]
fn two_debians_share_one_disk_and_come_back() {
    let pod = up(&debian_spec("debian", 2));

    // It is a Debian with systemd, and its agent is the package's.
    for node in [1, 2] {
        let comm = pod.exec_ok(node, &["cat", "/proc/1/comm"]).expect("exec");
        assert_eq!(comm.trim(), "systemd");
        let status = pod
            .exec_ok(
                node,
                &["dpkg-query", "-W", "-f=${Status}", "lupin-guest-agent"],
            )
            .expect("dpkg-query");
        assert_eq!(status, "install ok installed");
    }
    for node in [1, 2] {
        wait_for_services(&pod, node, LIMIT);
        let failed = [
            "systemctl",
            "list-units",
            "--failed",
            "--plain",
            "--no-legend",
        ];
        let failed = pod.exec_ok(node, &failed).expect("systemctl");
        assert_eq!(failed, "", "units of node {node} failed");
        let unit = ["systemctl", "is-active", "lupin-guest-agent.service"];
        let unit = pod.exec_ok(node, &unit).expect("systemctl");
        assert_eq!(unit.trim(), "active");
        let times = pod.exec(node, &["systemd-analyze"]).output();
        println!("node {node}: {}", text(&times.expect("exec starts")));
    }

    // Each has the image's files and its own writes.
    let names = |node: u32| pod.exec_ok(node, &["ls", "/srv"]).expect("ls");
    pod.exec_ok(2, &["sh", "-c", "echo two >/srv/mine && sync"])
        .expect("write");
    assert_eq!((names(1).trim(), names(2).trim()), ("", "mine"));

    // systemd starts an agent that was killed, within the deadline; the node lives on.
    let agent = "systemctl show -p MainPID --value lupin-guest-agent.service";
    let first = pod.exec_ok(2, &["sh", "-c", agent]).expect("pid");
    // The command that kills the agent loses its way back.
    let _ = pod
        .exec(
            2,
            &[
                "systemctl",
                "kill",
                "-s",
                "KILL",
                "lupin-guest-agent.service",
            ],
        )
        .output();
    wait_until("the agent is another process", LIMIT, || {
        pod.exec_ok(2, &["sh", "-c", agent])
            .is_ok_and(|now| now != first && now.trim() != "0")
    });
    assert_eq!(pod.node(2).expect("node").generation, 1);

    // A job, and the kill of a node in its middle.
    let text = job_through_a_kill(&pod, 2, 2, 1 << 18);
    let events = expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
    check_failure(&events, 2, 1, Cause::VmmExit);
    check_job(&pod, 2, "words", &text);

    // A private overlay went with its guest.
    assert_eq!(names(2).trim(), "");

    // The console shows a login prompt: that of the node which started alone. systemd gives a serial
    // line 90 s to appear, which is too little where two nodes are emulated at once.
    wait_until("a login prompt", LIMIT, || {
        pod.console(2).contains("login:")
    });
}
