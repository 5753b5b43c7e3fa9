//! The library's examples on pods of namespace nodes, of which one is killed in the middle.
//!
//! Needs root (namespaces), the built products and the built examples; `cargo xtask test` runs
//! them.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use common::*;
use lupin_abi::event::Cause;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(60);
/// The node that is killed.
const VICTIM: u32 = 2;
const SURVIVORS: [u32; 2] = [1, 3];
/// The exit status of a command whose node was lost.
const LOST: i32 = 125;

/// An example that runs on a node, with its output in a file: what a node's death leaves of it is
/// exactly what the example has written.
struct Running {
    node: u32,
    child: KillOnDrop,
    output: PathBuf,
}

impl Running {
    fn output(&self) -> String {
        std::fs::read_to_string(&self.output).expect("output")
    }

    /// Waits for the end; the status and the output.
    fn end(mut self) -> (ExitStatus, String) {
        let limit = format!("the example on node {}", self.node);
        wait_until(&limit, LIMIT, || self.has_ended());
        let status = self.child.0.wait().expect("it has ended");
        (status, self.output())
    }

    fn has_ended(&mut self) -> bool {
        let child: &mut Child = &mut self.child.0;
        child.try_wait().expect("a child").is_some()
    }

    /// Waits for the end of one that must succeed; its output.
    fn end_ok(self) -> String {
        let node = self.node;
        let (status, output) = self.end();
        assert!(status.success(), "on node {node}: {status}: {output}");
        output
    }
}

fn example(name: &str) -> String {
    let path: PathBuf = bin_dir().join("examples").join(name);
    path.to_str().expect("a path of text").into()
}

/// Starts an example on a node.
fn start(pod: &TestPod, node: u32, name: &str, arguments: &[&str]) -> Running {
    let output = (0..)
        .map(|n| pod.folder.join(format!("{name}-{node}-{n}.out")))
        .find(|path| !path.exists())
        .expect("a name that is free");
    std::fs::write(&output, "").expect("output");
    let program = example(name);
    let shell = ["sh", "-c", "exec \"$@\" > \"$0\" 2>&1"];
    let mut argv = shell.to_vec();
    argv.extend([path_text(&output), &program]);
    argv.extend(arguments);
    let mut command: Command = pod.exec(node, &argv);
    let command = command.stdin(Stdio::null());
    let child = KillOnDrop(command.spawn().expect("the example starts"));
    Running {
        node,
        child,
        output,
    }
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

/// Runs an example on a node to its end.
fn run(pod: &TestPod, node: u32, name: &str, arguments: &[&str]) -> String {
    start(pod, node, name, arguments).end_ok()
}

/// Kills the victim's node, whose example is at work, and waits until the node is back.
fn kill_node_of(pod: &TestPod, mut victim: Running) -> String {
    assert!(!victim.has_ended(), "{}", victim.output());
    signal(pod, victim.node, Signal::SIGKILL);
    expect_failure(pod, victim.node, 1, Cause::VmmExit, LIMIT);
    let (status, output) = victim.end();
    assert_eq!(status.code(), Some(LOST), "{output}");
    output
}

/// What the barrier's example computes, by one who never dies.
fn spread_heat(steps: u64) -> u64 {
    let mut row = [0u64; 96];
    row[32] = 1 << 40;
    for _ in 0..steps {
        let at = |cell: usize| row[cell.min(95)];
        row = std::array::from_fn(|cell| {
            (at(cell.saturating_sub(1)) + 2 * at(cell) + at(cell + 1)) / 4
        });
    }
    row.iter()
        .fold(0, |sum: u64, cell| sum.wrapping_mul(31).wrapping_add(*cell))
}

#[test]
#[ignore = "needs root and the built products"]
fn examples_barrier_computes_the_same_whoever_is_killed() {
    const STEPS: u64 = 150;
    let pod = up(&namespace_spec("barrier", 3));
    let steps = STEPS.to_string();
    // The victim lingers in each step, so that there is a middle.
    let begin = |node, pause| start(&pod, node, "barrier", &[&steps, pause]);
    let survivors = SURVIVORS.map(|node| begin(node, "5"));
    let victim = begin(VICTIM, "100");
    wait_until("the victim takes part", LIMIT, || {
        victim.output().contains("takes part")
    });
    std::thread::sleep(Duration::from_millis(500));
    kill_node_of(&pod, victim);
    let expected = format!("{:#018x}", spread_heat(STEPS));
    for survivor in survivors {
        let output = survivor.end_ok();
        assert!(output.contains(" died in round "), "{output}");
        assert!(output.trim_end().ends_with(&expected), "{output}");
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn examples_heap_loses_no_operation_and_no_block() {
    let pod = up(&namespace_spec("heap", 3));
    let survivors = SURVIVORS.map(|node| start(&pod, node, "heap", &["work", "1500", "1000"]));
    let victim = start(&pod, VICTIM, "heap", &["work", "1000000", "500"]);
    wait_until("the victim is at work", LIMIT, || {
        victim.output().contains("\n300 operations\n")
    });
    kill_node_of(&pod, victim);
    // Its next life goes on where it was: it refuses to allocate or to free twice.
    let output = run(&pod, VICTIM, "heap", &["work", "20000"]);
    let words: Vec<&str> = output.lines().flat_map(|line| line.split(' ')).collect();
    let number_after = |word: &str| -> u64 {
        let at = words.iter().position(|found| *found == word);
        let number = at.and_then(|at| words.get(at + 1)).expect("a number");
        number.trim_end_matches(':').parse().expect("a number")
    };
    let last = number_after("operation");
    assert!(
        last >= 299 && output.contains(" died in or after "),
        "{output}"
    );
    let happened = u64::from(output.contains("which happened"));
    let begins = format!("begins with operation {}\n", last + happened);
    assert!(output.contains(&begins), "{output}");
    for survivor in survivors {
        survivor.end_ok();
    }
    let audit = run(&pod, 3, "heap", &["audit"]);
    assert!(audit.contains("live_blocks: 0,"), "{audit}");
    assert!(audit.contains(&format!("operation {last}:")), "{audit}");
}

#[test]
#[ignore = "needs root and the built products"]
fn examples_queue_hands_each_number_to_one() {
    const COUNT: u64 = 1000;
    let pod = up(&namespace_spec("queue", 3));
    run(&pod, 1, "queue", &["push", &COUNT.to_string()]);
    let survivors = SURVIVORS.map(|node| start(&pod, node, "queue", &["work", "2", "3"]));
    let victim = start(&pod, VICTIM, "queue", &["work", "2", "1"]);
    wait_until("the victim is at work", LIMIT, || {
        victim.output().lines().count() > 50
    });
    let mut outputs = vec![kill_node_of(&pod, victim)];
    outputs.extend(survivors.map(Running::end_ok));
    outputs.push(run(&pod, VICTIM, "queue", &["work", "0"]));

    let mut seen = BTreeSet::new();
    for number in outputs.iter().flat_map(|output| output.lines()) {
        if let Ok(number) = number.parse::<u64>() {
            assert!(seen.insert(number), "{number} was popped twice");
        }
    }
    // Whoever starts is told what the dead one had in its hands, printed or not.
    let told: Vec<&str> = outputs.iter().flat_map(|output| output.lines()).collect();
    for missing in (1..=COUNT).filter(|number| !seen.contains(number)) {
        let tale = format!(" died with {missing} in its hands");
        let is_told = told.iter().any(|line| line.ends_with(&tale));
        assert!(is_told, "{missing} was lost: {:?}", outputs.last());
    }
}

#[test]
#[ignore = "needs root and the built products"]
fn examples_locks_map_and_pod_allocator_work_on_all_nodes() {
    let pod = up(&namespace_spec("examples", 3));
    let on_all = |name, arguments: &[&str]| {
        let running = [1, 2, 3].map(|node| start(&pod, node, name, arguments));
        running.map(Running::end_ok)
    };
    // The last of them sees the additions of all.
    let stands = on_all("locks", &["1000"]);
    let stood = stands
        .iter()
        .any(|output| output.contains("[3000, 3000, 300]"));
    assert!(stood, "{stands:?}");

    run(&pod, 1, "map", &["put", "answer", "42"]);
    run(&pod, 2, "map", &["put", "question", "?"]);
    assert_eq!(run(&pod, 3, "map", &["get", "answer"]), "42\n");
    run(&pod, 3, "map", &["remove", "question"]);
    assert_eq!(run(&pod, 2, "map", &["list"]), "answer = 42\n");

    for output in on_all("pod_allocator", &["1000"]) {
        assert!(output.contains("1000 chunks"), "{output}");
    }
}
