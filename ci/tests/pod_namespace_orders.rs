//! Orders that cannot be: wrong words, wrong nodes, wrong states, and operators who lose patience.
//! Each is answered with an exit code of its kind and a message that names what is wrong, and leaves
//! the pod as it was.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use common::member::Member;
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);

/// The verbs that name a node of the pod.
const OF_NODES: [&str; 8] = [
    "kill", "pause", "resume", "restart", "stop", "start", "drain", "rm",
];

/// Runs a verb on the pod; its exit code and what it said.
fn order(pod: &Pod, verb: &str, words: &[&str]) -> (Option<i32>, String) {
    let output = pod.verb(verb).args(words).output().expect(verb);
    (output.status.code(), text(&output))
}

fn done(pod: &Pod, verb: &str, words: &[&str]) {
    let (code, said) = order(pod, verb, words);
    assert_eq!(code, Some(0), "{verb} {words:?}: {said}");
}

fn refused(pod: &Pod, verb: &str, words: &[&str], code: i32, named: &str) {
    let (found, said) = order(pod, verb, words);
    assert_eq!(found, Some(code), "{verb} {words:?}: {said}");
    assert!(said.contains(named), "{verb} {words:?}: {said}");
    assert!(!said.contains("panicked"), "{verb} {words:?}: {said}");
}

/// How the nodes are: state, generation and process.
fn nodes(pod: &Pod) -> Vec<(String, u32, Option<i32>)> {
    let node = |id| pod.node(id).expect("node");
    let all = [node(1), node(2)];
    all.map(|n| (n.state, n.generation, n.pid)).into()
}

#[test]
#[ignore = "needs root and the built products"]
fn words_that_make_no_sense_and_nodes_that_are_not_there_change_nothing() {
    let pod = up(&namespace_spec("words", 2));
    let before = (nodes(&pod), pod.events().expect("events").len());
    for (verb, words, named) in [
        ("drain", &[][..], "NODE"),
        ("drain", &["n1", "--wait", "soon"], "soon"),
        ("drain", &["n1", "--cancel", "--wait", "1s"], "--cancel"),
        ("drain", &["n1", "--grace", "5h"], "5h"),
        ("rm", &["n1", "--grace=-1s"], "-1s"),
        ("rm", &["n1", "n2"], "n2"),
        ("add", &[], "NODE"),
        ("add", &["n1", "--grace", "1s"], "--grace"),
        ("reload", &["now"], "now"),
        ("pause", &["n1", "--timeout", "never"], "never"),
        ("resume", &["n1", "--force"], "--force"),
        ("kill", &["n1", "--grace", "1s"], "--grace"),
        ("upgrade", &["n1"], "n1"),
        (
            "upgrade",
            &["--program", "/no/such/program"],
            "/no/such/program",
        ),
        ("upgrade", &["--program", "/bin/true"], "no fabric manager"),
        ("upgrade", &["--program", "/etc/passwd"], "/etc/passwd"),
    ] {
        refused(&pod, verb, words, 2, named);
    }
    for verb in OF_NODES {
        for node in ["n9", "9", "0", "", "\u{1f4a5}"] {
            refused(&pod, verb, &[node], 4, node);
        }
        let mut stranger = pod.command(verb);
        let output = stranger.args(["no-such-pod", "n1"]).output().expect(verb);
        assert_eq!(output.status.code(), Some(3), "{verb}: {}", text(&output));
        assert!(text(&output).contains("no-such-pod"), "{}", text(&output));
    }
    // Of the pod file, not of the pod.
    refused(&pod, "add", &["n9"], 2, "n9");
    refused(&pod, "add", &["n1"], 4, "already");
    assert_eq!((nodes(&pod), pod.events().expect("events").len()), before);

    // A pod that is down.
    assert!(pod.down().expect("down").status.success());
    for verb in OF_NODES.into_iter().chain(["add"]) {
        refused(&pod, verb, &["n1"], 3, "words");
    }
    for verb in ["reload", "upgrade"] {
        refused(&pod, verb, &[], 3, "words");
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn orders_in_wrong_states_are_refused_with_the_state() {
    let pod = up(&namespace_spec("states", 2));
    let toml = std::fs::read_to_string(pod.file()).expect("pod file");
    refused(&pod, "resume", &["n1"], 4, "joined");
    refused(&pod, "start", &["n1"], 4, "joined");
    done(&pod, "drain", &["n1", "--cancel"]);

    done(&pod, "pause", &["n1"]);
    for verb in ["pause", "drain", "start"] {
        refused(&pod, verb, &["n1"], 4, "paused");
    }
    done(&pod, "resume", &["n1"]);

    done(&pod, "stop", &["n2"]);
    for verb in ["stop", "restart", "kill", "pause", "resume", "drain"] {
        refused(&pod, verb, &["n2"], 4, "down");
    }
    // Nothing to call off, and nothing to wait for.
    done(&pod, "drain", &["n2", "--cancel"]);
    done(&pod, "start", &["n2"]);

    done(&pod, "rm", &["n2"]);
    refused(&pod, "rm", &["n2"], 4, "n2");
    refused(&pod, "rm", &["n1"], 4, "pod down");
    done(&pod, "add", &["n2"]);
    refused(&pod, "add", &["n2"], 4, "already");

    // Parts that cannot be applied, a file that does not read, one that is not there.
    done(&pod, "reload", &[]);
    let write = |text: &str| std::fs::write(pod.file(), text).expect("pod file");
    write(&toml.replace("\"64M\"", "\"128M\""));
    refused(&pod, "reload", &["--dry-run"], 4, "[memory]");
    refused(&pod, "reload", &[], 4, "[memory]");
    write("name = 1");
    let by_name = |verb: &str, words: &[&str]| {
        let mut command = pod.command(verb);
        let output = command.arg("states").args(words).output().expect(verb);
        (output.status.code(), text(&output))
    };
    for (verb, words) in [("reload", &[][..]), ("add", &["n2"]), ("upgrade", &[])] {
        let (code, said) = by_name(verb, words);
        assert!(
            code == Some(2) && said.contains("pod.toml"),
            "{verb}: {said}"
        );
    }
    std::fs::remove_file(pod.file()).expect("pod file");
    let (code, said) = by_name("reload", &[]);
    assert!(code == Some(2) && said.contains("pod.toml"), "{said}");
    write(&toml);
    let expected = [("joined", 1), ("joined", 3)];
    for (node, expected) in nodes(&pod).iter().zip(expected) {
        assert_eq!((node.0.as_str(), node.1), expected);
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn an_operator_who_loses_patience_leaves_the_order_and_nothing_else() {
    let pod = up(&namespace_spec("patience", 2));
    let folder = tempfile::tempdir().expect("folder");
    let member = Member::join(&pod, 2, folder.path(), "member");
    let mut drain = pod.verb("drain");
    drain.args(["n2", "--wait", "10m"]).stdin(Stdio::null());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut waiting = KillOnDrop(drain.spawn().expect("drain"));
        wait_until("the node drains", LIMIT, || {
            pod.node(2).expect("node").state == "draining"
        });
        kill(Pid::from_raw(waiting.0.id() as i32), signal).expect("signal");
        let status = waiting.0.wait().expect("drain ends");
        assert_eq!(status.signal(), Some(signal as i32));
        // What was confirmed goes on without whoever asked for it.
        assert_eq!(pod.node(2).expect("node").state, "draining");
        done(&pod, "drain", &["n2", "--cancel"]);
        assert_eq!(pod.node(2).expect("node").state, "joined");
    }
    drop(member);
    // Too short a time to wait is told apart, and the order stands.
    let mark = folder.path().join("stubborn");
    let script = format!(
        "trap '' TERM; touch {}; while :; do sleep 1; done",
        mark.display()
    );
    let mut stubborn = pod.exec(2, &["sh", "-c", &script]);
    let _stubborn = KillOnDrop(stubborn.stdin(Stdio::null()).spawn().expect("sh"));
    wait_until("a process that does not end", LIMIT, || mark.exists());
    refused(
        &pod,
        "stop",
        &["n2", "--grace", "2s", "--timeout", "0s"],
        5,
        "n2",
    );
    wait_until("the node is stopped", LIMIT, || {
        pod.node(2).expect("node").state == "down"
    });
    done(&pod, "start", &["n2"]);
    let intent = pod.runtime().join("patience/nodes/n2/intent.json");
    done(&pod, "rm", &["n2"]);
    done(&pod, "add", &["n2"]);
    assert!(!intent.exists(), "an order outlived its node");
    assert!(pod.down().expect("down").status.success());
}
