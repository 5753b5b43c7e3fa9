//! Pods of namespace nodes, natively: the real manager, agent, library and application.
//!
//! Every test needs root (namespaces) and the built products; `cargo xtask test` runs them.

mod common;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::*;
use lupin_abi::event::{Cause, FencePath};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs root and the built products"]
fn a_job_survives_the_kill_of_a_node_and_counts_every_word_once() {
    let pod = up(&namespace_spec("job", 3));
    let words = job_through_a_kill(&pod, 3, 2, 4 << 20);
    expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
    check_job(&pod, 2, "words", &words);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_new_manager_adopts_running_nodes_and_restarts_none() {
    let pod = up(&namespace_spec("adopt", 2));
    let pids = [pid(&pod, 1), pid(&pod, 2)];
    let epoch = pod.ps().expect("ps")["epoch"].as_u64();
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    kill(manager, Signal::SIGKILL).expect("kill");
    wait_until("the manager is gone", LIMIT, || !alive(manager));
    assert!(
        pids.iter().all(|pid| alive(*pid)),
        "a node died with its manager"
    );

    assert!(pod.up().expect("up").success());
    assert_ne!(pod.manager_pid().expect("manager"), manager.as_raw());
    assert_eq!([pid(&pod, 1), pid(&pod, 2)], pids);
    for node in [1, 2] {
        assert_eq!(pod.node(node).expect("node").generation, 1);
    }
    let ps = pod.ps().expect("ps");
    assert!(ps["epoch"].as_u64() > epoch, "{ps}");
    // The adopted nodes are watched like any other.
    signal(&pod, 1, Signal::SIGKILL);
    expect_failure(&pod, 1, 1, Cause::VmmExit, LIMIT);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_node_that_died_while_no_manager_ran_is_handled_by_the_next() {
    let pod = up(&namespace_spec("orphan", 2));
    let (survivor, victim) = (pid(&pod, 1), pid(&pod, 2));
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    kill(manager, Signal::SIGKILL).expect("kill");
    kill(victim, Signal::SIGKILL).expect("kill");
    wait_until("both are gone", LIMIT, || !alive(manager) && !alive(victim));
    assert!(pod.up().expect("up").success());
    expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);
    assert_eq!(pid(&pod, 1), survivor);
    assert_eq!(pod.node(1).expect("node").generation, 1);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_stopped_node_is_a_hang_and_is_killed_by_its_fence() {
    let pod = up(&namespace_spec("stopped", 2));
    signal(&pod, 2, Signal::SIGSTOP);
    let events = expect_failure(&pod, 2, 1, Cause::Hang, LIMIT);
    let fence = check_failure(&events, 2, 1, Cause::Hang);
    assert_eq!(fence_path(&fence), Some(FencePath::Killed));
}

#[test]
#[ignore = "needs root and the built products"]
fn an_operator_can_kill_a_node() {
    let pod = up(&namespace_spec("operator", 2));
    let output = pod.verb("kill").arg("n1").output().expect("kill");
    assert!(output.status.success(), "{}", text(&output));
    expect_failure(&pod, 1, 1, Cause::Operator, LIMIT);
    let output = pod.verb("kill").arg("n9").output().expect("kill");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
    assert!(text(&output).contains("n9"), "{}", text(&output));
}

#[test]
#[ignore = "needs root and the built products"]
fn commands_keep_their_streams_status_and_signals() {
    let pod = up(&namespace_spec("exec", 1));
    let mut command = pod.exec(1, &["sh", "-c", "cat; echo err >&2; exit 7"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("exec");
    let input = sample_text(3 << 20);
    let mut stdin = child.stdin.take().expect("stdin");
    let bytes = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().expect("exec ends");
    writer.join().expect("writer").expect("input");
    assert_eq!(output.status.code(), Some(7));
    assert!(output.stdout == input, "output differs from input");
    assert_eq!(output.stderr, b"err\n");

    let output = pod
        .exec(1, &["sh", "-c", "kill -9 $$"])
        .output()
        .expect("exec");
    assert_eq!(output.status.code(), Some(128 + 9), "{}", text(&output));
    let output = pod.exec(1, &["/no/such/program"]).output().expect("exec");
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));

    // A signal to the command line reaches the command inside the node.
    let mut command = pod.exec(
        1,
        &[
            "sh",
            "-c",
            "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done",
        ],
    );
    let mut child = command.stdout(Stdio::piped()).spawn().expect("exec");
    let mut out = child.stdout.take().expect("stdout");
    let mut ready = [0u8; 6];
    std::io::Read::read_exact(&mut out, &mut ready).expect("ready");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("signal");
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).expect("rest");
    assert_eq!(child.wait().expect("exec ends").code(), Some(5));
    assert_eq!(rest, "caught\n");
}

#[test]
#[ignore = "needs root and the built products"]
fn pod_memory_and_generations_outlive_the_pod() {
    let pod = up(&namespace_spec("again", 2));
    let words = sample_text(1 << 20);
    load_job(&pod, "words", &words);
    pod.exec_ok(1, &["lupin-wordcount", "work", "--job", "words"])
        .expect("work");
    let pids = [
        pid(&pod, 1),
        pid(&pod, 2),
        Pid::from_raw(pod.manager_pid().expect("manager")),
    ];
    let output = pod.down().expect("down");
    assert!(output.status.success(), "{}", text(&output));
    wait_until("all processes are gone", LIMIT, || {
        !pids.iter().any(|pid| alive(*pid))
    });
    let output = pod.down().expect("down");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));

    assert!(pod.up().expect("up").success());
    for node in [1, 2] {
        assert!(pod.node(node).expect("node").generation > 1);
    }
    check_job(&pod, 2, "words", &words);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_node_that_never_joins_is_reported_with_its_last_words() {
    let folder = tempfile::tempdir().expect("folder");
    for name in ["lupin-vmm", "lupin-fabricd", "lupin-wordcount"] {
        std::fs::copy(bin_dir().join(name), folder.path().join(name)).expect("copy");
    }
    let agent = folder.path().join("lupin-guest-agent");
    std::fs::write(
        &agent,
        "#!/bin/sh\necho 'no memory for heartbeats'\nexec sleep 1000\n",
    )
    .expect("agent");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&agent, mode).expect("mode");
    let spec = PodSpec {
        join_timeout_ms: 1_500,
        ..namespace_spec("mute", 1)
    };
    let pod = create_with(&spec, folder.path());
    let output = pod.verb("up").output().expect("up");
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    let said = text(&output);
    assert!(
        said.contains("n1") && said.contains("no memory for heartbeats"),
        "{said}"
    );
}

#[test]
#[ignore = "needs root and the built products"]
fn a_second_manager_and_a_second_up_are_told_so() {
    let pod = up(&namespace_spec("twice", 1));
    let mut command = pod.binaries.command("lupin-fabricd");
    command
        .arg("--pod-file")
        .arg(pod.file())
        .env("LUPIN_RUNTIME_DIR", pod.runtime());
    let output = command.output().expect("second manager");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let before = pid(&pod, 1);
    let output = pod.verb("up").output().expect("second up");
    assert!(text(&output).contains("running"), "{}", text(&output));
    assert_eq!(pid(&pod, 1), before);
}

/// Runs `pod up` on a changed pod file; its exit code and messages.
fn up_with(change: impl FnOnce(String) -> String) -> (Option<i32>, String) {
    let spec = namespace_spec("bad", 2);
    let pod = create(&spec);
    std::fs::write(pod.file(), change(spec.to_toml())).expect("pod file");
    let output = pod.verb("up").output().expect("up");
    (output.status.code(), text(&output))
}

#[test]
#[ignore = "needs root and the built products"]
fn bad_pod_files_are_refused_by_name_before_anything_starts() {
    let (code, said) = up_with(|t| t.replace("deadline_ms", "dedline_ms"));
    assert!(
        code == Some(2) && said.contains("dedline_ms"),
        "{code:?} {said}"
    );
    let (code, said) = up_with(|t| t.replace("id = 2", "id = 1"));
    assert!(
        code == Some(2) && said.contains('1') && said.contains("id"),
        "{code:?} {said}"
    );
    let (code, said) = up_with(|t| t.replace("64M", "63M"));
    assert!(
        code == Some(2) && said.contains("63M") && said.contains("2 MiB"),
        "{code:?} {said}"
    );
    let (code, said) = up_with(|t| t.replace("64M", "900T"));
    assert!(code == Some(2) && said.contains("900T"), "{code:?} {said}");
    let (code, said) = up_with(|t| {
        t.replace(
            "\"namespace\"",
            "\"kvm\"\nkernel = \"/no/kernel\"\ninitramfs = \"/no/initrd\"",
        )
    });
    assert!(
        code == Some(2) && said.contains("/no/kernel"),
        "{code:?} {said}"
    );
}

#[test]
#[ignore = "needs root and the built products"]
fn pod_memory_of_others_is_left_alone() {
    let pod = up(&namespace_spec("mine", 1));
    assert!(pod.down().expect("down").status.success());
    let memory = pod.folder.join("mine.pod");
    let good = std::fs::read(&memory).expect("memory");

    // Another version, with a checksum that is right for it.
    let change = |at: usize, value: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + value.len()].copy_from_slice(value);
        let sum = crc32fast::hash(&bad[..252]);
        bad[252..256].copy_from_slice(&sum.to_le_bytes());
        std::fs::write(&memory, &bad).expect("memory");
        let output = pod.verb("up").output().expect("up");
        assert!(!output.status.success());
        assert!(
            std::fs::read(&memory).expect("memory") == bad,
            "the file was changed"
        );
        text(&output)
    };
    let said = change(8, &99u32.to_le_bytes());
    assert!(said.contains("version 99"), "{said}");
    let said = change(64, b"yours\0");
    assert!(said.contains("yours"), "{said}");

    std::fs::write(&memory, &good[..good.len() / 2]).expect("memory");
    let output = pod.verb("up").output().expect("up");
    assert!(
        !output.status.success() && text(&output).contains("truncated"),
        "{}",
        text(&output)
    );

    std::fs::write(&memory, b"my diary").expect("memory");
    let output = pod.verb("up").output().expect("up");
    assert!(!output.status.success(), "{}", text(&output));
    assert_eq!(std::fs::read(&memory).expect("memory"), b"my diary");
}

#[test]
#[ignore = "needs root and the built products"]
fn pod_memory_in_use_is_refused_to_another_pod() {
    let pod = up(&namespace_spec("first", 1));
    let other = create(&namespace_spec("second", 1));
    let path = pod.folder.join("first.pod");
    let toml = std::fs::read_to_string(other.file()).expect("pod file");
    let toml = toml.replace(
        "path = \"second.pod\"",
        &format!("path = \"{}\"", path.display()),
    );
    std::fs::write(other.file(), toml).expect("pod file");
    let output = other.verb("up").output().expect("up");
    assert!(!output.status.success());
    assert!(text(&output).contains("first.pod"), "{}", text(&output));
    assert_eq!(pod.node(1).expect("node").state, "joined");
}

#[test]
#[ignore = "needs root and the built products"]
fn the_command_line_helps_and_refuses() {
    let vmm = || Command::new(bin_dir().join("lupin-vmm"));
    let help = vmm().args(["pod", "--help"]).output().expect("help");
    assert!(help.status.success());
    for verb in ["up", "down", "ps", "events", "kill", "exec"] {
        assert!(text(&help).contains(verb), "{}", text(&help));
    }
    let output = vmm()
        .args(["pod", "up", "/no/such/pod.toml"])
        .output()
        .expect("up");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(
        text(&output).contains("/no/such/pod.toml"),
        "{}",
        text(&output)
    );
    let output = vmm()
        .args(["pod", "ps", "no-such-pod"])
        .output()
        .expect("ps");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let output = vmm().args(["pod", "frobnicate"]).output().expect("verb");
    assert_eq!(output.status.code(), Some(2));
}
