//! The agent as its users start it: the program, flags, descriptors, a pod in a memory file.

mod support;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lupin_abi::ABI_VERSION;
use lupin_abi::node::AgentState;
use lupin_abi::port::{ExecStatus, ToAgent};
use lupin_abi::socket::{Reply, Request};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use support::{AGENT, Pod, until};

fn client(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

fn ask(client: &OwnedFd, request: &Request) -> Reply {
    let packet = lupin_abi::socket::encode(request).unwrap();
    nix::unistd::write(client, &packet).unwrap();
    answer(client)
}

fn answer(client: &OwnedFd) -> Reply {
    let mut buffer = vec![0; 65536];
    let len = nix::unistd::read(client, &mut buffer).unwrap();
    lupin_abi::socket::decode(&buffer[..len]).unwrap()
}

#[test]
fn a_namespace_node_joins_beats_serves_is_rung_and_shuts_down() {
    let pod = Pod::new();
    let mut agent = pod.start(&[], &[]);
    pod.joined();
    assert_eq!(pod.node().agent_process().1, 1);
    assert_ne!(pod.node().boot_id(), 0);
    let before = pod.node().beats();
    until("the heart beats", || pod.node().beats() > before + 20);

    let subscriber = client(&pod.socket());
    let version = ABI_VERSION;
    assert!(matches!(
        ask(&subscriber, &Request::Hello { version }),
        Reply::Welcome {
            node: 1,
            generation: 1,
            ..
        }
    ));
    assert_eq!(
        ask(&subscriber, &Request::Subscribe { from: 0 }),
        Reply::Done
    );
    let mut manager = pod.manager();
    let doorbell = manager.hello();
    let seq = pod.happen();
    nix::unistd::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
    assert!(matches!(answer(&subscriber), Reply::Event(event) if event.seq == seq));
    // A ring that is lost costs time, not the event.
    let seq = pod.happen();
    assert!(matches!(answer(&subscriber), Reply::Event(event) if event.seq == seq));

    let (text, status) = manager.run("echo $LUPIN_AGENT_SOCKET; exit 3");
    assert_eq!(text.trim_end(), pod.socket().to_str().unwrap());
    assert_eq!(status, ExecStatus::Code(3));
    // A second manager takes over, and gets the doorbell as well.
    let mut manager = pod.manager();
    manager.hello();
    // Not PID 1 here: only the agent itself must end, and no stranger be signalled.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(agent.0.id().cast_signed()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(agent.code(), Some(0));
    assert!(!pod.socket().exists());
}

/// Whether this user may make PID namespaces; where not, there is nothing to test.
fn may_unshare() -> bool {
    let made = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "true"])
        .stderr(Stdio::null())
        .status();
    made.is_ok_and(|status| status.success())
}

#[test]
fn the_first_process_of_a_namespace_reaps_and_ends_all_on_request() {
    if !may_unshare() {
        eprintln!("skipped: no right to make a PID namespace");
        return;
    }
    let pod = Pod::new();
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let mut agent = pod.start(&unshare, &["--init"]);
    pod.joined();
    assert_eq!(pod.node().agent_process(), (1, 1));
    let mut manager = pod.manager();
    manager.hello();
    // An orphan ends, and no zombie of it is left.
    let script = "(sleep 0.1 & ) ; sleep 0.5; grep -h '^State:' /proc/[0-9]*/status";
    let (text, status) = manager.run(script);
    assert_eq!(status, ExecStatus::Code(0));
    assert!(!text.contains('Z'), "{text}");
    // One that does not want to end.
    let script = "(trap '' TERM; sleep 100 & sleep 100) >/dev/null 2>&1 &";
    assert_eq!(manager.run(script).1, ExecStatus::Code(0));
    let start = Instant::now();
    manager.send(&ToAgent::Shutdown { grace_ms: 300 });
    until("it says that it stops", || {
        pod.node().agent().0 == AgentState::Stopping
    });
    assert_eq!(agent.code(), Some(0));
    assert!(start.elapsed() >= Duration::from_millis(300));
}

fn output(arguments: &[&str]) -> Output {
    Command::new(AGENT)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_cannot_work_is_said_with_its_own_exit_status() {
    assert_eq!(output(&["--help"]).status.code(), Some(0));
    assert_eq!(output(&["--nonsense"]).status.code(), Some(2));
    assert_eq!(output(&["--namespace", "--node=1"]).status.code(), Some(2));
    let node = ["--namespace", "--generation=1", "--pod-memory-fd=77"];
    let result = output(&[&node[..], &["--node=1"]].concat());
    assert_eq!(result.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&result.stderr).contains("pod-memory-fd 77"));
    let result = output(&[&node[..], &["--node=9999"]].concat());
    assert_eq!(result.status.code(), Some(2));

    let folder = tempfile::tempdir().unwrap();
    let cmdline = folder.path().join("cmdline");
    let words = format!("--cmdline={}", cmdline.display());
    let empty = format!("--sysfs={}", folder.path().display());
    std::fs::write(&cmdline, "quiet lupin.generation=1\n").unwrap();
    let result = output(&[&words, &empty]);
    assert_eq!(result.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&result.stderr).contains("lupin.node"));
    // An init that is not PID 1 is one on nodes only: else whose machine would it power off?
    assert_eq!(output(&["--init", &words, &empty]).status.code(), Some(2));
}

#[test]
fn a_damaged_pod_is_refused_and_the_node_says_that_it_failed() {
    let pod = Pod::new();
    let at = pod.header.kernel().offset + 8;
    pod.file.write_all_at(&[9], at).unwrap();
    let mut agent = pod.start(&[], &[]);
    assert_eq!(agent.code(), Some(3));
    assert_eq!(pod.node().agent(), (AgentState::Failed, 1));
}
