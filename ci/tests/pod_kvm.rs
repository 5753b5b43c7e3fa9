//! Pods of KVM guests: stock Debian kernels on real KVM, usually inside the nested test host.
//!
//! Every test boots guests and needs a KVM that runs stock kernels, the built products, and
//! `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; `cargo xtask test` runs them. A booted pod is
//! used for several faults in a row, because an emulated boot takes ten seconds.

mod common;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::*;
use lupin_abi::event::{Cause, Event, FencePath};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg, socket,
};
use nix::unistd::Pid;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(150);

/// Starts a command that will not come back, because it ends its node.
fn fatal(pod: &Pod, node: u32, script: &str) -> KillOnDrop {
    let mut command = pod.exec(node, &["sh", "-c", script]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    KillOnDrop(command.spawn().expect("exec starts"))
}

/// Asks a VMM for its counters, as the manager would.
fn vmm_status(pod: &Pod, node: u32) -> Value {
    let ps = pod.ps().expect("ps");
    let nodes = ps["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|n| n["id"] == node).expect("node");
    let folder = Path::new(node["folder"].as_str().expect("folder"));
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("socket");
    let address = UnixAddr::new(&folder.join("control.sock")).expect("address");
    connect(fd.as_raw_fd(), &address).expect("the VMM listens");
    let request = [IoSlice::new(b"\"status\"")];
    sendmsg::<()>(fd.as_raw_fd(), &request, &[], MsgFlags::empty(), None).expect("request");
    let mut packet = [0u8; 4096];
    let mut slices = [IoSliceMut::new(&mut packet)];
    let got = recvmsg::<()>(fd.as_raw_fd(), &mut slices, None, MsgFlags::empty()).expect("reply");
    let bytes = got.bytes;
    let reply: Value = serde_json::from_slice(&packet[..bytes]).expect("JSON");
    reply["status"].clone()
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn two_guests_share_memory_and_a_job_survives_the_kill_of_one() {
    let pod = up(&kvm_spec("kvmjob", 2));
    let kernel = pod.exec_ok(1, &["uname", "-r"]).expect("uname");
    println!("guests run {}", kernel.trim());

    // What each sees: its devices with the right modes, its doorbell with an MSI of its own. The
    // kernel's seed of each region has size 0 and stays root's.
    let script = "for d in /sys/bus/dax/devices/*; do \
                  [ $(cat $d/size) = 0 ] || stat -c '%a %n' /dev/${d##*/}; done";
    let modes = pod.exec_ok(1, &["sh", "-c", script]).expect("devices");
    let count = |mode: &str| modes.lines().filter(|line| line.starts_with(mode)).count();
    assert_eq!(
        (count("444 "), count("600 "), modes.lines().count()),
        (2, 2, 4),
        "{modes}"
    );
    let interrupts = pod
        .exec_ok(1, &["cat", "/proc/interrupts"])
        .expect("interrupts");
    assert!(
        interrupts.contains("MSI") && interrupts.contains("virtio"),
        "{interrupts}"
    );

    let words = job_through_a_kill(&pod, 2, 2, 1 << 20);
    let events = expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
    assert_eq!(
        fence_path(&check_failure(&events, 2, 1, Cause::VmmExit)),
        Some(FencePath::Exited)
    );
    check_job(&pod, 2, "words", &words);

    // The survivor was rung: its agent forwarded what happened.
    let status = vmm_status(&pod, 1);
    assert!(status["doorbells"].as_u64() >= Some(1), "{status}");
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn each_way_to_fail_has_its_cause_and_the_node_comes_back() {
    let pod = up(&kvm_spec("kvmfail", 2));
    let survivor = pid(&pod, 1);
    let mut generation = 1;
    let mut expect = |cause: Cause| -> Event {
        let events = expect_failure(&pod, 2, generation, cause, LIMIT);
        let fence = check_failure(&events, 2, generation, cause);
        generation += 1;
        fence
    };

    let _panic = fatal(&pod, 2, "echo c > /proc/sysrq-trigger");
    expect(Cause::Panic);
    let _reboot = fatal(&pod, 2, "reboot -f");
    expect(Cause::GuestReboot);
    let _poweroff = fatal(&pod, 2, "poweroff -f");
    expect(Cause::GuestPowerOff);
    signal(&pod, 2, Signal::SIGSTOP);
    assert_eq!(fence_path(&expect(Cause::Hang)), Some(FencePath::Killed));
    let output = pod.verb("kill").arg("n2").output().expect("kill");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(
        fence_path(&expect(Cause::Operator)),
        Some(FencePath::Memslots)
    );

    assert_eq!(pid(&pod, 1), survivor, "the other node was touched");
    assert_eq!(pod.node(1).expect("node").generation, 1);
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_guest_cannot_change_the_fabric_section_and_a_manager_may_die() {
    let pod = up(&kvm_spec("kvmsafe", 2));
    let epoch = pod.ps().expect("ps")["epoch"].as_u64();

    let said = pod.exec_ok(2, &["lupin-poke", "3"]).expect("poke");
    println!("inside the guest: {}", said.trim());
    assert!(said.contains("the generation reads 1"), "{said}");
    assert_eq!(pod.node(2).expect("node").generation, 1);
    assert_eq!(pod.ps().expect("ps")["epoch"].as_u64(), epoch);
    let dropped = vmm_status(&pod, 2)["fabric-writes-dropped"]
        .as_u64()
        .expect("counter");
    assert!(dropped > 0, "no store was counted");
    assert_eq!(
        vmm_status(&pod, 1)["fabric-writes-dropped"].as_u64(),
        Some(0)
    );
    let ps = pod.ps().expect("ps");
    let folder = Path::new(ps["nodes"][1]["folder"].as_str().expect("folder"));
    let log = std::fs::read_to_string(folder.join("vmm.log")).expect("the VMM's log");
    let lines = log
        .lines()
        .filter(|line| line.contains("fabric section"))
        .count();
    assert!(
        (1..=6).contains(&lines),
        "{lines} lines for {dropped} stores in 3 s:\n{log}"
    );

    let pids = [pid(&pod, 1), pid(&pod, 2)];
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    kill(manager, Signal::SIGKILL).expect("kill");
    wait_until("the manager is gone", LIMIT, || !alive(manager));
    assert!(pod.up().expect("up").success());
    assert_eq!([pid(&pod, 1), pid(&pod, 2)], pids, "a node was restarted");
    assert_eq!(
        pod.exec_ok(2, &["echo", "still here"]).expect("exec"),
        "still here\n"
    );
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    assert!(pod.down().expect("down").status.success());
    let gone = || !pids.iter().chain([&manager]).any(|pid| alive(*pid));
    wait_until("everything is gone", LIMIT, gone);
}
