//! Proves that nothing stores to pod memory after a fence: `cargo xtask fence`.
//!
//! Each round starts a node whose every processor increments a counter in pod memory as fast as
//! it can, fences it in the way that the manager does, raises the generation, and then watches
//! the counters: they must stand still. The product's own power control starts and fences the
//! nodes, and the product's own VMM and namespace set-up run them.
//!
//! | node | ways |
//! |---|---|
//! | a KVM guest of a few instructions | polite (memslots deleted), kill, stopped |
//! | a namespace node | kill, stopped |
//!
//! The control leaves the fence out. It must see late stores; if it sees none, this program
//! could not have seen them either, and fails.

mod node;
mod payload;
mod round;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use lupin_report::{Bar, Report, Row};
use round::{Node, Rig, RoundError, Sample, Way};

/// Rounds of the control.
const CONTROL_ROUNDS: u64 = 3;

/// Prove that nothing stores to pod memory after a fence.
///
/// Every row of the table counts stores that arrived after the generation was raised: the bar is
/// 0. The control rows leave the fence out and must count some. Times are from the decision to
/// fence to the fence's completion. A kind of node that cannot run here is left out, unless it is
/// asked for. Exit status: 0 proven, 1 not proven, 2 bad arguments, 3 the
/// rounds could not be made.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask fence", bin_name = "cargo xtask fence")]
struct Args {
    /// Rounds for each node and path
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Only this path; may be given several times
    #[arg(long, value_enum)]
    path: Vec<Way>,
    /// Only this kind of node; may be given several times
    #[arg(long, value_enum)]
    node: Vec<Node>,
    /// How long to watch the counters after each fence
    #[arg(long, value_name = "MS", default_value_t = 2)]
    watch_ms: u64,
    /// Write the rows to a file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where lupin-vmm and lupin-fabricd are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    if node::is_wanted() {
        node::run();
    }
    // SAFETY: this process has one thread so far, so nobody reads the environment meanwhile.
    // The VMM inherits it: the payload runs where a kernel cannot, and must not be refused.
    unsafe { std::env::set_var("LUPIN_VMM_KVM_CHECK", "off") };
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("error"));
    let args = Args::parse();
    match prove(&args) {
        Ok(report) => report.finish(args.json.as_deref()),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}

fn prove(args: &Args) -> Result<Report, RoundError> {
    let here = std::env::current_exe().unwrap_or_default();
    let beside = here.parent().unwrap_or(Path::new("."));
    let binaries = args.bin_dir.as_deref().unwrap_or(beside);
    let mut report = Report::new("fence");
    for node in [Node::Payload, Node::Namespace] {
        if !args.node.is_empty() && !args.node.contains(&node) {
            continue;
        }
        if let Some(reason) = node.is_impossible()
            && args.node.is_empty()
        {
            eprintln!("{} left out: {reason}", name(node));
            continue;
        }
        for way in [Way::Polite, Way::Kill, Way::Stopped] {
            let is_wanted = args.path.is_empty() || args.path.contains(&way);
            // A namespace node has no memslots.
            if is_wanted && (node, way) != (Node::Namespace, Way::Polite) {
                let samples = rounds(node, way, args.count, binaries, args.watch_ms)?;
                push(&mut report, node, way, samples);
            }
        }
        let samples = rounds(
            node,
            Way::LeftOut,
            CONTROL_ROUNDS,
            binaries,
            args.watch_ms.max(20),
        )?;
        push(&mut report, node, Way::LeftOut, samples);
    }
    Ok(report)
}

fn rounds(
    node: Node,
    way: Way,
    count: u64,
    binaries: &Path,
    watch_ms: u64,
) -> Result<Vec<Sample>, RoundError> {
    let what = format!("{}, {}", name(node), words(way));
    let mut rig = Rig::new(node, binaries)?;
    let mut samples = Vec::new();
    let begin = Instant::now();
    let mut shown = begin;
    for number in 1..=count {
        samples.push(rig.round(way, Duration::from_millis(watch_ms))?);
        if shown.elapsed() > Duration::from_secs(5) || number == count {
            shown = Instant::now();
            let seconds = begin.elapsed().as_secs_f32();
            eprintln!("{what}: {number} of {count} rounds, {seconds:.0} s");
        }
    }
    Ok(samples)
}

fn push(report: &mut Report, node: Node, way: Way, mut samples: Vec<Sample>) {
    let what = format!("{}, {}", name(node), words(way));
    let rounds = samples.len() as u64;
    let late = samples.iter().filter(|sample| sample.late > 0).count() as f64;
    let row = Row::new(format!("{what}: rounds with late stores"), late, "rounds").n(rounds);
    if way == Way::LeftOut {
        // All of them: a node that nobody stops stores on.
        report.push(row.proof(Bar::AtLeast(rounds as f64)));
        return;
    }
    report.push(row.proof(Bar::AtMost(0.0)));
    samples.sort_by_key(|sample| sample.fence);
    let at = |share: f64| {
        let index = ((samples.len() - 1) as f64 * share).round() as usize;
        samples[index].fence.as_secs_f64() * 1e6
    };
    for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
        let row = Row::new(
            format!("{what}: fence, {quantile}"),
            at(share).round(),
            "us",
        );
        report.push(row.n(rounds).spread(at(0.0).round(), at(1.0).round()));
    }
}

fn name(node: Node) -> &'static str {
    match node {
        Node::Payload => "KVM guest",
        Node::Namespace => "namespace node",
    }
}

fn words(way: Way) -> &'static str {
    match way {
        Way::Polite => "polite",
        Way::Kill => "kill",
        Way::Stopped => "stopped",
        Way::LeftOut => "control without a fence",
    }
}
