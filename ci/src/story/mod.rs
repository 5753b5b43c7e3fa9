//! The story of the demo: a pod comes up, counts words, loses a node in the middle, goes on,
//! takes the node back, and gives the right answer.
//!
//! Runs wherever the pod's host is: on this machine, or inside the nested test host.

mod count;
mod timeline;

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lupin_abi::event::EventKind;
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::pod::{Binaries, Guest, KillOnDrop, Pod, PodSpec};
use count::Comparison;
use timeline::Timeline;

/// What the story needs to be told.
#[derive(Clone, Debug, clap::Args)]
pub struct StoryArgs {
    /// What the nodes are: KVM guests or namespace nodes.
    #[arg(long, value_enum)]
    pub backend: NodeBackend,
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=16))]
    pub nodes: u32,
    /// Kernel of KVM guests.
    #[arg(long, required_if_eq("backend", "kvm"))]
    pub kernel: Option<PathBuf>,
    /// Initramfs of KVM guests.
    #[arg(long, required_if_eq("backend", "kvm"))]
    pub initramfs: Option<PathBuf>,
    /// Folder with the products.
    #[arg(long)]
    pub bin_dir: PathBuf,
    /// The text to count.
    #[arg(long)]
    pub text: PathBuf,
    /// Kill the node once this much of the job is done, in percent.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=90))]
    pub kill_at: u32,
    /// Milliseconds between two heartbeats; the manager looks half as often.
    #[arg(long, default_value_t = 8)]
    pub beat_ms: u64,
    /// Milliseconds without a heartbeat before a node is called hung; raise it on slow hosts.
    #[arg(long, default_value_t = 200)]
    pub deadline_ms: u64,
    /// Milliseconds that a node may take to join.
    #[arg(long, default_value_t = 60_000)]
    pub join_timeout_ms: u64,
    /// Milliseconds that workers sleep in each unit before its commit: on a fast machine the
    /// job would be over before anybody could be killed in the middle of it.
    #[arg(long, default_value_t = 20)]
    pub linger_ms: u64,
    /// Added to the command line of KVM guests. Every character on their console is an exit.
    #[arg(long, default_value = "quiet")]
    pub cmdline: String,
}

/// The kinds of node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NodeBackend {
    /// KVM guests.
    Kvm,
    /// Process trees in namespaces of their own.
    Namespace,
}

const POD: &str = "demo";
const JOB: &str = "text";

/// Prints lines with the time since the story began.
struct Narrator(Instant);

impl Narrator {
    fn say(&self, text: impl AsRef<str>) {
        for line in text.as_ref().lines() {
            println!("[{:7.2} s] {line}", self.0.elapsed().as_secs_f64());
        }
        let _ = io::stdout().flush();
    }
}

/// Tells the story; whether everything in it held.
///
/// # Errors
/// When a step could not be carried out at all.
pub fn run(args: &StoryArgs) -> io::Result<bool> {
    let narrator = Narrator(Instant::now());
    let folder = tempfile::Builder::new().prefix("lupin-demo-").tempdir()?;
    let pod = Pod::create(
        Binaries::in_folder(&args.bin_dir),
        folder.path(),
        &spec(args),
    )?;
    take_down_on_signal(&pod)?;

    narrator.say(format!("== {} nodes come up ==", args.nodes));
    if !pod.up()?.success() {
        return Err(io::Error::other(
            "the pod did not come up; its messages are above",
        ));
    }

    let bytes = std::fs::metadata(&args.text)?.len();
    narrator.say(format!(
        "== the text goes into pod memory: {:.1} MB ==",
        bytes as f64 / 1e6
    ));
    let mut load = pod.exec(1, &["lupin-wordcount", "load", "--job", JOB]);
    let status = load.stdin(File::open(&args.text)?).status()?;
    if !status.success() {
        return Err(io::Error::other(format!(
            "the text could not be loaded: {status}"
        )));
    }

    narrator.say(format!("== WordCount on {} nodes ==", args.nodes));
    if args.linger_ms > 0 {
        narrator.say(format!(
            "workers sleep {} ms in each unit, so that the job has a middle to be killed in",
            args.linger_ms
        ));
    }
    let mut workers = Vec::new();
    for node in 1..=args.nodes {
        workers.push((node, start_worker(&pod, node, args.linger_ms)?));
    }
    let victim = args.nodes.min(2);
    let before = wait_for(&pod, args.kill_at)?;
    narrator.say(format!(
        "{before}; node {victim} is killed now, with SIGKILL to its process"
    ));
    let old = pod.node(victim)?;
    let pid = old
        .pid
        .ok_or_else(|| io::Error::other("the node to kill has no process"))?;
    let killed_ns = monotonic_ns()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;

    let limit = Duration::from_millis(args.join_timeout_ms) + Duration::from_secs(30);
    let raised = old.generation + 1;
    pod.wait_event(EventKind::Rung, victim, raised, Duration::from_secs(30))?;
    let after = exec_status(&pod, &[])?;
    let after_ns = monotonic_ns()?;
    narrator.say(format!("the job after the kill, seen from node 1: {after}"));

    let mut survivors_ok = true;
    for (node, worker) in workers {
        let output = worker.finish()?;
        narrator.say(format!("node {node}: {output}"));
        survivors_ok &= node == victim || output.success;
    }
    let done = wait_for(&pod, 100)?;
    let done_ns = monotonic_ns()?;
    narrator.say(format!("the job is over: {done}"));

    narrator.say(format!("waiting for node {victim} to come back"));
    let events = pod.wait_event(EventKind::NodeJoined, victim, raised, limit)?;
    let again = start_worker(&pod, victim, 0)?.finish()?;
    narrator.say(format!(
        "node {victim}, in its new life, joins the job again: {again}"
    ));

    narrator.say("== what happened, from the pod's own records ==");
    let timeline = Timeline::find(&events, victim, killed_ns).map_err(io::Error::other)?;
    let seen = [
        (
            after_ns,
            format!("the job went on, seen from node 1: {after}"),
        ),
        (done_ns, format!("the job is over: {done}")),
    ];
    print!("{}", timeline.words(&seen));
    let order = timeline.check();

    narrator.say(format!(
        "== the answer, read on node {victim} in its new life =="
    ));
    let result = pod.exec_ok(victim, &["lupin-wordcount", "result", "--job", JOB])?;
    let audit = pod
        .exec(1, &["lupin-wordcount", "audit", "--job", JOB])
        .output()?;
    narrator.say(String::from_utf8_lossy(&audit.stdout).trim_end());
    let mut plain = pod.binaries.command("lupin-wordcount");
    let plain = plain.arg("plain").stdin(File::open(&args.text)?).output()?;
    let plain = String::from_utf8_lossy(&plain.stdout).into_owned();
    let comparison = Comparison::of(&plain, &result).map_err(io::Error::other)?;

    let down = pod.down()?;
    let verdicts = [
        (comparison.identical(), comparison.to_string()),
        (
            order.is_ok(),
            match &order {
                Ok(()) => "fence before generation before ring: proven by the records".into(),
                Err(why) => format!("the order of the records is wrong: {why}"),
            },
        ),
        (
            survivors_ok && again.success,
            "every worker but the killed one finished".into(),
        ),
        (
            after.percent < 100,
            "the node died in the middle of the job".into(),
        ),
        (
            audit.status.success(),
            "every unit has exactly one winner".into(),
        ),
        (
            down.status.success(),
            "the pod went down in an orderly way".into(),
        ),
    ];
    narrator.say("== verdict ==");
    for (holds, text) in &verdicts {
        println!("  {} {text}", if *holds { "ok  " } else { "FAIL" });
    }
    let all = verdicts.iter().all(|(holds, _)| *holds);
    println!(
        "{}",
        if all {
            "The demo succeeded."
        } else {
            "The demo FAILED."
        }
    );
    Ok(all)
}

fn spec(args: &StoryArgs) -> PodSpec {
    let guest = match (args.backend, &args.kernel, &args.initramfs) {
        (NodeBackend::Kvm, Some(kernel), Some(initramfs)) => Some(Guest {
            kernel: absolute(kernel),
            initramfs: absolute(initramfs),
            memory: "256M".into(),
            cpus: 1,
        }),
        _ => None,
    };
    PodSpec {
        name: POD.into(),
        nodes: args.nodes,
        pool: "512M".into(),
        beat_ms: args.beat_ms,
        deadline_ms: args.deadline_ms,
        join_timeout_ms: args.join_timeout_ms,
        guest,
        extra_defaults: match args.backend {
            NodeBackend::Kvm => format!("cmdline = {:?}", args.cmdline),
            NodeBackend::Namespace => String::new(),
        },
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// A worker on one node: a `pod exec` whose output is kept.
struct Worker(KillOnDrop);

/// How a worker ended.
struct WorkerEnd {
    success: bool,
    text: String,
}

impl std::fmt::Display for WorkerEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text.trim())
    }
}

fn start_worker(pod: &Pod, node: u32, linger_ms: u64) -> io::Result<Worker> {
    let linger = linger_ms.to_string();
    let argv = [
        "lupin-wordcount",
        "work",
        "--job",
        JOB,
        "--linger-ms",
        &linger,
    ];
    let mut command = pod.exec(node, &argv);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(Worker(KillOnDrop(command.spawn()?)))
}

impl Worker {
    fn finish(mut self) -> io::Result<WorkerEnd> {
        let child: &mut Child = &mut self.0.0;
        let mut text = String::new();
        if let Some(mut out) = child.stdout.take() {
            out.read_to_string(&mut text)?;
        }
        if let Some(mut err) = child.stderr.take() {
            err.read_to_string(&mut text)?;
        }
        let status = child.wait()?;
        if !status.success() {
            text = format!("{} ({status})", text.trim());
        }
        Ok(WorkerEnd {
            success: status.success(),
            text,
        })
    }
}

/// How far the job is.
struct Progress {
    percent: u64,
    text: String,
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Blocks until the job has come this far.
fn wait_for(pod: &Pod, percent: u32) -> io::Result<Progress> {
    exec_status(pod, &["--until", &percent.to_string()])
}

fn exec_status(pod: &Pod, extra: &[&str]) -> io::Result<Progress> {
    let mut argv = vec!["lupin-wordcount", "status", "--job", JOB, "--json"];
    argv.extend_from_slice(extra);
    let json: serde_json::Value = serde_json::from_str(&pod.exec_ok(1, &argv)?)?;
    let number = |value: &serde_json::Value| {
        let missing = || io::Error::other(format!("`status --json` is not understood: {json}"));
        value.as_u64().ok_or_else(missing)
    };
    let percent = number(&json["percent"])?;
    let phase = |name: &str| -> io::Result<String> {
        let (done, units) = (number(&json[name]["done"])?, number(&json[name]["units"])?);
        Ok(format!("{done} of {units} {name} units"))
    };
    let text = format!("{percent} % done: {}, {}", phase("map")?, phase("reduce")?);
    Ok(Progress { percent, text })
}

fn monotonic_ns() -> io::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// On Ctrl-C or SIGTERM: the pod goes down, its folder goes away, and so do we.
fn take_down_on_signal(pod: &Pod) -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let mut down = pod.verb("down");
    let folder = pod.folder.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("interrupted: taking the pod down");
                let _ = down.stdin(Stdio::null()).output();
                let _ = std::fs::remove_dir_all(folder);
                std::process::exit(128 + signal);
            }
        })?;
    Ok(())
}
