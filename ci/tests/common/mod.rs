//! What the whole-system tests share: a pod to work on, and the questions asked of it.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

pub mod member;
#[path = "../../src/pod/mod.rs"]
pub mod pod;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lupin_abi::event::{Cause, Event, EventKind, FencePath};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
#[allow(
    unused_imports,
    reason = "each test file uses its own part of this module"
)]
pub use pod::{Binaries, Guest, KillOnDrop, Pod, PodSpec};

/// Where the products are: `LUPIN_BIN_DIR`, or beside this test's own folder.
pub fn bin_dir() -> PathBuf {
    if let Some(folder) = std::env::var_os("LUPIN_BIN_DIR") {
        return folder.into();
    }
    let exe = std::env::current_exe().expect("own path");
    exe.parent()
        .and_then(Path::parent)
        .expect("target folder")
        .to_path_buf()
}

/// A pod of namespace nodes.
pub fn namespace_spec(name: &str, nodes: u32) -> PodSpec {
    PodSpec {
        name: name.into(),
        nodes,
        pool: "64M".into(),
        // Two shared cores run the nodes, the tests and whatever else: be patient, so that a
        // failure found here is a real one.
        beat_ms: 8,
        deadline_ms: 1_000,
        join_timeout_ms: 20_000,
        guest: None,
        extra_defaults: String::new(),
    }
}

/// What the test runner put there for a guest.
fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

/// Every character on the console is an exit.
fn cmdline() -> String {
    std::env::var("LUPIN_TEST_CMDLINE").unwrap_or_else(|_| "quiet".into())
}

/// A pod of KVM guests.
pub fn kvm_spec(name: &str, nodes: u32) -> PodSpec {
    PodSpec {
        // Emulated guests have little time to beat in, and beat with gaps of up to 100 ms and
        // more; a hang must still be found.
        beat_ms: 100,
        deadline_ms: 5_000,
        join_timeout_ms: 120_000,
        pool: "64M".into(),
        guest: Some(Guest {
            kernel: variable("LUPIN_TEST_KERNEL").into(),
            initramfs: variable("LUPIN_TEST_INITRAMFS").into(),
            memory: "256M".into(),
            cpus: 1,
        }),
        extra_defaults: format!("cmdline = {:?}", cmdline()),
        ..namespace_spec(name, nodes)
    }
}

/// A pod of whole Debian systems: all have one disk, and writes of their own.
pub fn debian_spec(name: &str, nodes: u32) -> PodSpec {
    let mut spec = PodSpec {
        deadline_ms: 10_000,
        join_timeout_ms: 500_000,
        extra_defaults: format!(
            "cmdline = \"{} root=/dev/vda systemd.show_status=no\"\n\
             [[defaults.disk]]\npath = {:?}\naccess = \"overlay\"",
            cmdline(),
            variable("LUPIN_TEST_DISK")
        ),
        ..kvm_spec(name, nodes)
    };
    if let Some(guest) = &mut spec.guest {
        guest.memory = "512M".into();
    }
    spec
}

/// Waits for all that a Debian starts. Its agent joins early; until the rest has started, an emulated
/// systemd has no time for questions.
pub fn wait_for_services(pod: &Pod, node: u32, limit: Duration) {
    wait_until("a system that has started", limit, || {
        let state = pod.exec(node, &["systemctl", "is-system-running"]).output();
        let state = text(&state.expect("exec starts"));
        ["running", "degraded"].contains(&state.trim())
    });
}

/// A pod with its folder, which goes away with it.
pub struct TestPod {
    pod: Pod,
    _folder: tempfile::TempDir,
}

impl std::ops::Deref for TestPod {
    type Target = Pod;
    fn deref(&self) -> &Pod {
        &self.pod
    }
}

/// A pod that is not up yet.
pub fn create(spec: &PodSpec) -> TestPod {
    create_with(spec, &bin_dir())
}

/// A pod that is not up yet, of products in `bin_dir`.
pub fn create_with(spec: &PodSpec, bin_dir: &Path) -> TestPod {
    let folder = tempfile::Builder::new()
        .prefix("lupin-test-")
        .tempdir()
        .expect("folder");
    let pod = Pod::create(Binaries::in_folder(bin_dir), folder.path(), spec).expect("pod file");
    TestPod {
        pod,
        _folder: folder,
    }
}

/// A pod that is up.
pub fn up(spec: &PodSpec) -> TestPod {
    let pod = create(spec);
    let status = pod.up().expect("`pod up` starts");
    assert!(status.success(), "`pod up`: {status}");
    pod
}

/// Text of an output, both streams.
pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The process of a node.
pub fn pid(pod: &Pod, node: u32) -> Pid {
    let node = pod.node(node).expect("node");
    Pid::from_raw(node.pid.expect("the node has a process"))
}

/// Sends a signal to the process of a node.
pub fn signal(pod: &Pod, node: u32, signal: Signal) {
    kill(pid(pod, node), signal).expect("signal");
}

/// Waits until a node failed with `cause` and joined again; checks the order of the records and
/// that the generation went up by exactly one.
pub fn expect_failure(pod: &Pod, node: u32, old: u32, cause: Cause, limit: Duration) -> Vec<Event> {
    let events = pod
        .wait_event(EventKind::NodeJoined, node, old + 1, limit)
        .expect("join");
    check_failure(&events, node, old, cause);
    events
}

/// Checks the records of the failure of generation `old` of a node; gives its fence.
pub fn check_failure(events: &[Event], node: u32, old: u32, cause: Cause) -> Event {
    let kinds = [
        EventKind::FailureDetected,
        EventKind::Fenced,
        EventKind::GenerationRaised,
        EventKind::Rung,
    ];
    let steps: Vec<&Event> = events
        .iter()
        .filter(|e| e.node == node && e.old_generation == old && kinds.contains(&e.kind))
        .collect();
    let found: Vec<EventKind> = steps.iter().map(|e| e.kind).collect();
    assert_eq!(
        found, kinds,
        "records of node {node}, generation {old}: {steps:#?}"
    );
    assert!(
        steps.windows(2).all(|w| w[0].time_ns <= w[1].time_ns),
        "{steps:#?}"
    );
    assert_eq!(steps[0].cause, cause, "{:#?}", steps[0]);
    assert_eq!(steps[2].generation, old + 1, "{:#?}", steps[2]);
    *steps[1]
}

/// By which path a fence went.
pub fn fence_path(fence: &Event) -> Option<FencePath> {
    FencePath::from_raw(fence.evidence[0] as u32)
}

/// A text with many different words, some of them hot; the same for the same length.
pub fn sample_text(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 32);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    while out.len() < bytes {
        // xorshift64 (Marsaglia 2003): only variety is asked of it.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let _ = match state % 4 {
            0 => write!(out, "the "),
            1 => write!(out, "Word{} ", (b'a' + (state >> 8) as u8 % 26) as char),
            2 => writeln!(out, "don't, {}", state >> 60),
            _ => write!(out, "w{}x ", letters(state >> 16)),
        };
    }
    out
}

fn letters(mut n: u64) -> String {
    (0..4)
        .map(|_| {
            let c = b'a' + (n % 26) as u8;
            n /= 26;
            c as char
        })
        .collect()
}

/// Loads a text as a job, through node 1.
pub fn load_job(pod: &Pod, job: &str, text: &[u8]) {
    let mut child = pod
        .exec(1, &["lupin-wordcount", "load", "--job", job])
        .stdin(Stdio::piped())
        .spawn()
        .expect("load starts");
    child
        .stdin
        .take()
        .expect("stdin")
        .write_all(text)
        .expect("text");
    let status = child.wait().expect("load ends");
    assert!(status.success(), "load: {status}");
}

/// Runs a job on nodes 1 to `nodes` and kills the process of `victim` in the middle of it; gives
/// the text. Workers linger in each unit, so that there is a middle.
pub fn job_through_a_kill(pod: &Pod, nodes: u32, victim: u32, bytes: usize) -> Vec<u8> {
    let words = sample_text(bytes);
    load_job(pod, "words", &words);
    let work = [
        "lupin-wordcount",
        "work",
        "--job",
        "words",
        "--linger-ms",
        "20",
    ];
    let quiet = |mut command: Command| {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        KillOnDrop(command.spawn().expect("work starts"))
    };
    let workers: Vec<KillOnDrop> = (1..=nodes)
        .map(|node| quiet(pod.exec(node, &work)))
        .collect();
    let until = [
        "lupin-wordcount",
        "status",
        "--job",
        "words",
        "--until",
        "10",
    ];
    pod.exec_ok(1, &until).expect("10 %");
    signal(pod, victim, Signal::SIGKILL);
    for (node, mut worker) in (1..).zip(workers) {
        let status = worker.0.wait().expect("worker ends");
        // 125: the node was lost, so its worker was still at work when it was killed.
        let expected = if node == victim { 125 } else { 0 };
        assert_eq!(status.code(), Some(expected), "worker on node {node}");
    }
    words
}

/// Checks a finished job against the plain count and its own audit, read on `node`.
pub fn check_job(pod: &Pod, node: u32, job: &str, text_bytes: &[u8]) {
    let result = pod
        .exec_ok(node, &["lupin-wordcount", "result", "--job", job])
        .expect("result");
    let mut plain = pod
        .binaries
        .command("lupin-wordcount")
        .arg("plain")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("plain starts");
    let mut stdin = plain.stdin.take().expect("stdin");
    let bytes = text_bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let plain = plain.wait_with_output().expect("plain ends");
    writer.join().expect("writer").expect("text");
    assert!(!plain.stdout.is_empty());
    assert!(
        result.as_bytes() == plain.stdout,
        "the pod's answer differs from the plain count"
    );
    let audit = pod
        .exec(node, &["lupin-wordcount", "audit", "--job", job])
        .output()
        .expect("audit");
    assert!(audit.status.success(), "audit: {}", text(&audit));
}

/// Waits until a condition holds.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process exists and is not a zombie.
pub fn alive(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}
