//! Segments and deaths of threads in real guests: what stock kernels do with devices of several
//! pieces, with devices that are taken away under those who use them, and with threads that end.
//!
//! Needs what `pod_kvm.rs` needs; `cargo xtask test` runs it with guests of 6.1, and of 6.12.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use common::*;

const LIMIT: Duration = Duration::from_secs(150);
const MIB: u64 = 1 << 20;

/// A program on a node that does what it is told (`ci/src/bin/lupin-member.rs`).
struct Member {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    process: KillOnDrop,
    /// Its thread instance, once it has joined.
    thread: String,
}

impl Member {
    fn new(pod: &Pod, node: u32) -> Self {
        let mut command = pod.exec(node, &["lupin-member"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = KillOnDrop(command.spawn().expect("exec starts"));
        Self {
            input: process.0.stdin.take().expect("stdin"),
            output: BufReader::new(process.0.stdout.take().expect("stdout")),
            process,
            thread: String::new(),
        }
    }

    /// What it answers; `None` if it is gone.
    fn tell(&mut self, command: &str) -> Option<String> {
        // It may end over the command before this one.
        let _ = writeln!(self.input, "{command}");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("an answer");
        println!("{command}: {}", line.trim_end());
        (!line.is_empty()).then(|| line.trim_end().to_owned())
    }

    /// What it answers to a command that it must be able to carry out.
    fn ok(&mut self, command: &str) -> String {
        let answer = self.tell(command).expect("the program is there");
        let said = answer.strip_prefix("ok");
        said.unwrap_or_else(|| panic!("{command}: {answer}"))
            .trim()
            .to_owned()
    }

    /// What it answers to a command that must be refused.
    fn error(&mut self, command: &str) -> String {
        let answer = self.tell(command).expect("the program is there");
        assert!(answer.starts_with("error: "), "{command}: {answer}");
        answer
    }

    /// The next notification, which must begin so.
    fn hears(&mut self, expected: &str) -> String {
        let notice = self.ok(&format!("next {}", LIMIT.as_secs()));
        assert!(notice.starts_with(expected), "{notice}, not {expected}");
        notice
    }
}

/// Devices of segments that a node has at the moment, and their sizes in bytes.
fn devices(pod: &Pod, node: u32) -> Vec<u64> {
    // Sections are devices as well: those of the pool come after all others.
    let script = "pool=$(sed -n 's/.*pool@\\(0x[0-9a-f]*\\).*/\\1/p' /proc/cmdline); \
                  for d in /sys/bus/dax/devices/*; do \
                  [ $(($(cat $d/resource))) -ge $((pool)) ] && cat $d/size; done; true";
    let sizes = pod.exec_ok(node, &["sh", "-c", script]).expect("devices");
    let sizes = sizes.lines().map(|line| line.parse().expect("a size"));
    // The kernel's seed of a region has size 0.
    let mut sizes: Vec<u64> = sizes.filter(|size| *size > 0).collect();
    sizes.sort_unstable();
    sizes
}

/// Asks until a program that lost its memory has met that: its node hears of it a moment later.
fn loses(member: &mut Member, what: &str) {
    wait_until(what, LIMIT, || {
        member.ok("read 0");
        let intact = member.tell("intact").expect("guarded, it goes on");
        intact.starts_with("error: ")
    });
    assert_eq!(member.ok("read 0"), "0");
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn segments_grow_and_are_taken_away_and_threads_die_on_stock_kernels() {
    let pod = up(&kvm_spec("kvmsegments", 2));
    let kernel = pod.exec_ok(1, &["uname", "-r"]).expect("uname");
    println!("guests run {}", kernel.trim());
    let mut owner = Member::new(&pod, 1);
    owner.ok("group g");
    owner.thread = owner.ok("join g");
    let mut others = [(); 3].map(|()| {
        let mut member = Member::new(&pod, 2);
        member.thread = member.ok("join g");
        member
    });
    let threads: Vec<String> = others.iter().map(|other| other.thread.clone()).collect();
    for thread in [&owner.thread.clone()].into_iter().chain(&threads) {
        owner.hears(&format!("joined {thread}"));
    }

    // A segment of two pieces is two devices, on each node; a third piece is a third one.
    owner.ok(&format!("create s {}", 6 * MIB));
    assert_eq!(devices(&pod, 1), [2 * MIB, 4 * MIB]);
    let (second, third) = (5 * MIB, 9 * MIB);
    owner.ok(&format!("write {second} 11"));
    for other in &mut others {
        assert_eq!(other.ok("open s"), (6 * MIB).to_string());
        assert_eq!(other.ok(&format!("read {second}")), "11");
    }
    let [mut stays, mut guarded, mut bare] = others;
    stays.ok(&format!("grow {}", 10 * MIB));
    assert_eq!(devices(&pod, 2), [2 * MIB, 4 * MIB, 4 * MIB]);
    assert_eq!(owner.ok("refresh"), "true");
    owner.ok(&format!("write {third} 12"));
    assert_eq!(stays.ok(&format!("read {third}")), "12");
    guarded.error(&format!("read {third}"));

    // Two processes of node 2 are expelled. One asked for an error, the other did not; the third is
    // still a member, uses the same devices, and notices nothing.
    guarded.ok("guard");
    for thread in [&guarded.thread, &bare.thread] {
        let expel = format!("expel {}", thread.replace('.', " "));
        assert_eq!(owner.ok(&expel), "1 Nothing");
        owner.hears(&format!("expelled {thread}"));
        owner.error(&expel);
    }
    loses(&mut guarded, "the expelled process loses its memory");
    guarded.error("open s");
    wait_until("the other one ends", LIMIT, || {
        bare.tell(&format!("read {second}")).is_none()
    });
    let status = bare.process.0.wait().expect("it has ended");
    assert_eq!(status.code(), Some(128 + libc::SIGBUS), "{status}");
    assert_eq!(stays.ok(&format!("read {second}")), "11");
    assert_eq!(stays.ok(&format!("read {third}")), "12");
    stays.ok("write 0 13");
    assert_eq!(owner.ok("read 0"), "13");
    assert_eq!(devices(&pod, 2), [2 * MIB, 4 * MIB, 4 * MIB]);

    // A thread ends without a word, and its process goes on.
    let begin = Instant::now();
    let thread = stays.ok("thread");
    owner.hears(&format!("joined {thread}"));
    owner.hears(&format!("died(Thread) {thread}"));
    println!("a thread's whole life was told in {:?}", begin.elapsed());

    // Taken from everybody.
    for member in [&mut owner, &mut stays] {
        member.ok("guard");
    }
    owner.ok("revoke");
    for member in [&mut owner, &mut stays] {
        loses(member, "a revoked segment is gone");
    }
    for node in [1, 2] {
        assert_eq!(devices(&pod, node), [0; 0]);
        let script = "dmesg > /tmp/dmesg && [ -s /tmp/dmesg ] || exit; \
                      grep -E 'WARNING|BUG|Oops' /tmp/dmesg; true";
        let complaints = pod.exec_ok(node, &["sh", "-c", script]).expect("dmesg");
        assert_eq!(complaints, "", "the kernel of node {node} complains");
    }

    // And all processes of the node are killed.
    let kill = pod.exec_ok(2, &["killall", "-9", "lupin-member"]);
    kill.expect("somebody to kill");
    owner.hears(&format!("died(Killed(9)) {}", stays.thread));
}
