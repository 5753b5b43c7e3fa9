//! The program as its users run it: processes on the nodes of a pod, killed at any moment.

#[path = "../../../guest-lib/tests/common/mod.rs"]
mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::FakePod;

const MIB: u64 = 1 << 20;

/// A reproducible text of about `bytes` bytes with a long tail of rare words.
fn text(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = seed | 1;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut text = Vec::with_capacity(bytes + 32);
    while text.len() < bytes {
        // Few words often, many seldom: the smaller of two draws, twice.
        let mut rank = next() % 40_000;
        for _ in 0..3 {
            rank = rank.min(next() % 40_000);
        }
        let mut rest = rank + 1;
        while rest > 0 {
            text.push(b"etaoinshrdlucmfwypvbgkqjxzETAOIN'"[(rest % 33) as usize]);
            rest /= 33;
        }
        let separators: [&[u8]; 6] = [b" ", b" ", b" ", b", ", b".\n", b" 'a' "];
        text.extend_from_slice(separators[(next() % 6) as usize]);
    }
    text
}

fn command(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lupin-wordcount"));
    command
        .args(arguments)
        .env("LUPIN_AGENT_SOCKET", socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(socket: &Path, arguments: &[&str]) -> Output {
    command(socket, arguments).output().unwrap()
}

fn run_with(socket: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = command(socket, arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // It may end without reading everything.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    })
}

#[track_caller]
fn ok(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(output: &Output, code: i32, words: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(words), "{stderr}");
}

fn work(socket: &Path) -> Child {
    work_lingering(socket, "0")
}

fn work_lingering(socket: &Path, millis: &str) -> Child {
    let arguments = [
        "work",
        "--job",
        "t",
        "--threads",
        "2",
        "--linger-ms",
        millis,
    ];
    command(socket, &arguments).spawn().unwrap()
}

fn check_against_plain(socket: &Path, text: &[u8]) -> String {
    let result = ok(run(socket, &["result", "--job", "t"]));
    let plain = ok(run_with(socket, &["plain"], text));
    assert!(
        result == plain,
        "the pod's count differs from the plain one"
    );
    ok(run(socket, &["audit", "--job", "t"]))
}

#[test]
fn two_nodes_count_as_one_process_does() {
    let pod = FakePod::new(64 * MIB);
    let (one, two) = (pod.start_node(1), pod.start_node(2));
    let text = text(3 << 20, 1);
    let loaded = ok(run_with(&one, &["load", "--job", "t"], &text));
    assert!(loaded.contains("units"), "{loaded}");
    println!("{loaded}");
    let status = ok(run(&two, &["status", "--job", "t", "--json"]));
    assert!(
        status.starts_with("{\"job\":\"t\",\"percent\":0,"),
        "{status}"
    );
    fails(
        &run(&one, &["result", "--job", "t"]),
        1,
        "not complete: 0 %",
    );

    let workers = [work(&one), work(&two)];
    let waited = run(
        &one,
        &["status", "--job", "t", "--until", "100", "--timeout", "60"],
    );
    assert!(ok(waited).contains("100 % done"));
    for worker in workers {
        let said = ok(worker.wait_with_output().unwrap());
        assert!(said.contains("0 stolen from dead owners"), "{said}");
        println!("{said}");
    }
    let audit = check_against_plain(&two, &text);
    assert!(audit.contains("0 lost, 0 counted twice"), "{audit}");
    assert!(audit.contains("0 lost to crashes"), "{audit}");
    let json = ok(run(&two, &["audit", "--job", "t", "--json"]));
    assert!(json.contains("\"clean\":true"), "{json}");

    ok(run(&two, &["remove", "--job", "t"]));
    fails(&run(&two, &["status", "--job", "t"]), 3, "no job `t`");
    assert_eq!(pod.used(), 0);
}

#[test]
fn texts_that_are_hardly_texts_are_counted_too() {
    let pod = FakePod::new(64 * MIB);
    let node = pod.start_node(1);
    let long = [b'x'; 65_535];
    let many = b"'".repeat(100_000);
    let texts: [&[u8]; 6] = [b"", b"a", b"\0\xff", &long, &many, b"'''it's'''"];
    for text in texts {
        ok(run_with(
            &node,
            &["load", "--job", "t", "--unit-ms", "1"],
            text,
        ));
        ok(run(&node, &["work", "--job", "t", "--threads", "1"]));
        check_against_plain(&node, text);
        ok(run(&node, &["remove", "--job", "t"]));
    }
    let too_long = [b'x'; 65_536];
    let refused = run_with(&node, &["load", "--job", "t"], &too_long);
    fails(&refused, 1, "a word of 65536 bytes");
}

#[test]
fn mistakes_are_named_and_have_their_exit_codes() {
    let pod = FakePod::new(4 * MIB);
    let node = pod.start_node(1);
    fails(&run(&node, &["work", "--job", "none"]), 3, "no job `none`");
    fails(
        &run(&node, &["result", "--job", "none"]),
        3,
        "no job `none`",
    );
    fails(
        &run(&node, &["remove", "--job", "none"]),
        3,
        "no job `none`",
    );
    fails(&run(&node, &["work", "--job", "a/b"]), 2, "not a job name");
    fails(&run(&node, &["work"]), 2, "--job");
    fails(
        &run(&node, &["load", "--job", "t", "--unit-ms", "6"]),
        2,
        "unit-ms",
    );
    fails(
        &run(&node, &["status", "--job", "t", "--until", "101"]),
        2,
        "until",
    );
    fails(&run(&node, &["fly"]), 2, "fly");

    let large = text(8 << 20, 3);
    fails(
        &run_with(&node, &["load", "--job", "t"], &large),
        1,
        "MiB and the pod has no room",
    );
    ok(run_with(&node, &["load", "--job", "t"], b"a few words"));
    fails(
        &run_with(&node, &["load", "--job", "t"], b"a few words"),
        1,
        "exists",
    );
    fails(
        &run_with(&node, &["load", "--job", "t"], &large),
        1,
        "exists",
    );
    let late = run(
        &node,
        &["status", "--job", "t", "--until", "1", "--timeout", "0"],
    );
    fails(&late, 1, "is at 0 %");

    let nobody = node.with_file_name("nobody.sock");
    fails(
        &run(&nobody, &["status", "--job", "t"]),
        1,
        "no Lupin agent answers",
    );
}

#[test]
fn a_load_that_is_killed_is_loaded_again() {
    let pod = FakePod::new(64 * MIB);
    let node = pod.start_node(1);
    let text = text(2 << 20, 5);
    let (mut before, mut during, mut after) = (0, 0, 0);
    for round in 0..30u32 {
        let mut child = command(&node, &["load", "--job", "t"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&text).unwrap();
        // Between the end of the text and the end of the process lies all that matters.
        std::thread::sleep(Duration::from_millis(u64::from(round) * 3));
        child.kill().unwrap();
        child.wait().unwrap();
        let work = run(&node, &["work", "--job", "t", "--threads", "1"]);
        match work.status.code() {
            Some(0) => after += 1,
            Some(3) => before += 1,
            _ => {
                fails(&work, 1, "died before it was complete");
                during += 1;
            }
        }
        if !work.status.success() {
            ok(run_with(&node, &["load", "--job", "t"], &text));
            ok(run(&node, &["work", "--job", "t", "--threads", "1"]));
        }
        if round % 10 == 0 {
            check_against_plain(&node, &text);
        }
        ok(run(&node, &["remove", "--job", "t"]));
    }
    println!("killed {before} times before, {during} during, {after} after the creation");
    assert!(before + during + after == 30);
}

/// Processes and whole nodes die at random, new ones join, until the job is complete.
#[test]
fn any_node_may_die_at_any_point() {
    let pod = FakePod::new(128 * MIB);
    let text = text(4 << 20, 7);
    let end = Instant::now() + Duration::from_secs(20);
    let (mut random, mut rounds, mut kills, mut stolen) = (99u64, 0, 0, 0);
    while rounds < 4 || Instant::now() < end && rounds < 12 {
        let watcher = pod.start_node(9);
        ok(run_with(
            &watcher,
            &["load", "--job", "t", "--unit-ms", "1"],
            &text,
        ));
        let mut nodes: Vec<_> = (1..=3)
            .map(|id| (id, work_lingering(&pod.start_node(id), "1")))
            .collect();
        for step in 0..8 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            std::thread::sleep(Duration::from_millis(random >> 33 & 31));
            let (id, mut worker) = nodes.swap_remove((random >> 40) as usize % nodes.len());
            worker.kill().unwrap();
            worker.wait().unwrap();
            kills += 1;
            if step % 2 == 0 {
                // The whole node, and another one joins in the middle.
                pod.kill_node(id);
                let joins = 3 + id % 3;
                if nodes.iter().all(|(other, _)| *other != joins) {
                    nodes.push((joins, work_lingering(&pod.start_node(joins), "1")));
                    continue;
                }
            }
            nodes.push((id, work_lingering(&pod.start_node(id), "1")));
        }
        for (_, worker) in nodes {
            ok(worker.wait_with_output().unwrap());
        }
        let audit = check_against_plain(&watcher, &text);
        stolen += u32::from(!audit.contains("0 units begun more than once"));
        ok(run(&watcher, &["remove", "--job", "t"]));
        rounds += 1;
    }
    println!("{rounds} jobs, {kills} kills, {stolen} jobs with units begun again");
}

/// A process that stands still is not dead: its units are done by others, and when it wakes up
/// it does no harm.
#[test]
fn a_stopped_process_delays_nobody_for_long() {
    let pod = FakePod::new(64 * MIB);
    let (one, two) = (pod.start_node(1), pod.start_node(2));
    let text = text(3 << 20, 11);
    ok(run_with(
        &one,
        &["load", "--job", "t", "--unit-ms", "5"],
        &text,
    ));
    let sleeper = work(&one);
    ok(run(
        &two,
        &["status", "--job", "t", "--until", "10", "--timeout", "60"],
    ));
    // SAFETY: a signal to a child that was not waited for.
    unsafe { libc::kill(sleeper.id() as i32, libc::SIGSTOP) };
    let done = ok(work(&two).wait_with_output().unwrap());
    assert!(done.contains("is complete"), "{done}");
    // SAFETY: as above.
    unsafe { libc::kill(sleeper.id() as i32, libc::SIGCONT) };
    ok(sleeper.wait_with_output().unwrap());
    check_against_plain(&two, &text);
}
