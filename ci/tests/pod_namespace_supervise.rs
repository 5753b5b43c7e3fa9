//! A team of threads under supervisors, on a pod of namespace nodes of which one is killed, and on
//! another one the program.
//!
//! Needs root (namespaces) and the built products; `cargo xtask test` runs it.

mod common;

use std::process::Stdio;
use std::time::Duration;

use common::*;
use lupin_abi::event::Cause;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(120);
/// Kills the program of a node, wherever it is in the middle of its work.
const KILL_WORKER: &str = "for p in /proc/[0-9]*; do \
    [ \"$(cat $p/comm 2>/dev/null)\" = lupin-wordcount ] || continue; \
    tr '\\0' ' ' < $p/cmdline | grep -q ' work ' && kill -9 ${p#/proc/} && exit 0; \
    done; exit 1";

/// Whether a node has threads of the team at work: the library names them so.
fn works(pod: &Pod, node: u32) -> bool {
    let script = "cat /proc/[0-9]*/task/[0-9]*/comm 2>/dev/null | grep -q '^wc-words/'";
    let look = pod.exec(node, &["sh", "-c", script]).output();
    look.expect("a look at the threads").status.success()
}

#[test]
#[ignore = "needs root and the built products"]
fn supervise_moves_a_dead_nodes_threads_and_restarts_a_dead_program() {
    let pod = up(&namespace_spec("team", 3));
    // Some hundred units of a second each, for nine threads: long enough for all that follows.
    let words = sample_text(6 << 20);
    load_job(&pod, "words", &words);
    let supervise = [
        "lupin-supervise",
        "--pause-ms",
        "10",
        "--threads",
        "2001-2009",
        "--",
    ];
    let work = ["lupin-wordcount", "work", "--job", "words", "--json"];
    let team = [
        "--team",
        "2001-2009",
        "--gather",
        "3",
        "--linger-ms",
        "1000",
    ];
    let argv: Vec<&str> = [&supervise[..], &work[..], &team[..]].concat();
    let mut parts: Vec<KillOnDrop> = (1..=3)
        .map(|node| {
            let mut command = pod.exec(node, &argv);
            let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
            KillOnDrop(command.spawn().expect("the supervisor starts"))
        })
        .collect();
    // Whatever order they start in: the team is whole, and each node has its part of it.
    for node in 1..=3 {
        let what = format!("threads of the team on node {node}");
        wait_until(&what, LIMIT, || works(&pod, node));
    }
    pod.exec_ok(1, &["sh", "-c", KILL_WORKER])
        .expect("a worker to kill");
    // Nobody waits for its restart: its threads begin again there or elsewhere.
    assert!(works(&pod, 2), "node 2 has nothing to do");
    signal(&pod, 2, Signal::SIGKILL);
    expect_failure(&pod, 2, 1, Cause::VmmExit, LIMIT);

    let mut lives = String::new();
    for (node, part) in (1..).zip(&mut parts) {
        wait_until(
            &format!("the end of the part of node {node}"),
            LIMIT,
            || part.0.try_wait().expect("a child").is_some(),
        );
        let status = part.0.wait().expect("it has ended");
        // 125: the node was lost, and its supervisor with it.
        let expected = if node == 2 { 125 } else { 0 };
        assert_eq!(status.code(), Some(expected), "node {node}");
        let mut out = part.0.stdout.take().expect("stdout");
        let mut report = String::new();
        std::io::Read::read_to_string(&mut out, &mut report).expect("a report");
        assert_eq!(report.is_empty(), node == 2, "{report}");
        lives += &report;
    }
    // What the dead node had is at work on the living ones, in new lives.
    let moved = lives.matches("\"from\":2").count();
    assert!(moved > 0, "{lives}");
    check_job(&pod, 3, "words", &words);
}
