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
//! | a KVM guest with a stock kernel | the same |
//! | a namespace node | kill, stopped |
//!
//! The control leaves the fence out. It must see late stores; if it sees none, this program
//! could not have seen them either, and fails.

mod counters;
mod guest;
mod node;
mod payload;
mod rig;
mod round;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use lupin_report::{Bar, Report, Row, interrupt};
use rig::{Node, Rig, RoundError, Seat, Spec};
use round::{Sample, Way, round};

/// Rounds of the control.
const CONTROL_ROUNDS: u64 = 3;
/// Prove that nothing stores to pod memory after a fence.
///
/// Every row of the table counts stores that arrived after the fence: the bar is 0. The control
/// rows leave the fence out and must count some. Times are from the decision to fence to the
/// fence's completion. A kind of node that cannot run here is left out, unless it is asked for;
/// guests with a stock kernel run only when they are: `cargo xtask fence --nested` boots a
/// machine for them. Exit status: 0 proven, 1 not proven, 2 bad arguments, 3 the rounds could not
/// be made, 130 interrupted.
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
    /// The bzImage that guests with a stock kernel boot
    #[arg(long, value_name = "FILE", requires = "initramfs")]
    kernel: Option<PathBuf>,
    /// Their initramfs, in which this program is the first one
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initramfs: Option<PathBuf>,
    /// How many guests with a stock kernel are in the pod, and boot and store side by side
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    guests: u32,
    /// How many virtual processors each of them has [default: as other nodes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=counters::MOST))]
    cpus: Option<u64>,
    /// In the nested test host, with guests that boot a stock kernel; with
    /// --count, --path, --watch-ms, --guests and --cpus
    // The command that boots the host takes it; it is here to be told of.
    #[arg(long)]
    nested: bool,
}

fn main() -> ExitCode {
    if node::is_wanted() {
        node::run();
    }
    if guest::is_wanted() {
        guest::run();
    }
    // SAFETY: this process has one thread so far, so nobody reads the environment meanwhile.
    // The VMM inherits it: the payload runs where a kernel cannot, and must not be refused.
    unsafe { std::env::set_var("LUPIN_VMM_KVM_CHECK", "off") };
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("error"));
    let args = Args::parse();
    let proven = interrupt::catch()
        .map_err(rig::system("cannot catch signals"))
        .and_then(|()| prove(&args));
    match proven {
        Ok(report) => report.finish(args.json.as_deref()),
        // Whatever went wrong then: nodes get the signal of a terminal as well.
        Err(_) if interrupt::is_requested() => interrupt::exit(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}

fn prove(args: &Args) -> Result<Report, RoundError> {
    let here = std::env::current_exe().unwrap_or_default();
    let beside = here.parent().unwrap_or(Path::new("."));
    let mut report = Report::new("fence");
    for node in [Node::Payload, Node::Kernel, Node::Namespace] {
        let is_asked_for = args.node.contains(&node);
        if !is_asked_for && (!args.node.is_empty() || node == Node::Kernel) {
            continue;
        }
        if let Some(reason) = node.is_impossible()
            && !is_asked_for
        {
            eprintln!("{} left out: {reason}", name(node));
            continue;
        }
        let spec = Spec {
            node,
            nodes: if node == Node::Kernel { args.guests } else { 1 },
            storers: match (node, args.cpus) {
                (Node::Kernel, Some(cpus)) => cpus,
                _ => counters::storers(),
            },
            binaries: args.bin_dir.as_deref().unwrap_or(beside).into(),
            kernel: args.kernel.clone().zip(args.initramfs.clone()),
        };
        for way in [Way::Polite, Way::Kill, Way::Stopped] {
            let is_wanted = args.path.is_empty() || args.path.contains(&way);
            // A namespace node has no memslots.
            if is_wanted && (node, way) != (Node::Namespace, Way::Polite) {
                rounds(&mut report, &spec, way, args.count, args.watch_ms)?;
            }
        }
        let watch_ms = args.watch_ms.max(20);
        rounds(&mut report, &spec, Way::LeftOut, CONTROL_ROUNDS, watch_ms)?;
    }
    Ok(report)
}

/// What the nodes of one pod have done so far.
struct Done {
    begun: u64,
    samples: Vec<Sample>,
    /// Lives that ended before they stored, and so were no rounds.
    lost: u64,
    error: Option<RoundError>,
    shown: Instant,
}

fn rounds(
    report: &mut Report,
    spec: &Spec,
    way: Way,
    count: u64,
    watch_ms: u64,
) -> Result<(), RoundError> {
    let what = format!("{}, {}", name(spec.node), way.name());
    let rig = Rig::new(spec)?;
    let begin = Instant::now();
    let done = Mutex::new(Done {
        begun: 0,
        samples: Vec::new(),
        lost: 0,
        error: None,
        shown: begin,
    });
    let lock = || done.lock().unwrap_or_else(PoisonError::into_inner);
    // One thread a node: each makes rounds until there are enough.
    let serve = |mut seat: Seat| {
        loop {
            {
                let mut done = lock();
                if done.begun == count || done.error.is_some() {
                    return;
                }
                done.begun += 1;
            }
            let outcome = round(&rig, &mut seat, way, Duration::from_millis(watch_ms));
            let mut done = lock();
            match outcome {
                Ok(sample) => done.samples.push(sample),
                // Emulated kernels do not always come up, on a busy machine above all. It is
                // reported, and is no round.
                Err(error @ (RoundError::Ended(_) | RoundError::NotStoring { .. }))
                    if spec.node == Node::Kernel && done.lost <= count / 10 =>
                {
                    eprintln!("{what}: {error}");
                    done.begun -= 1;
                    done.lost += 1;
                }
                Err(error) => {
                    done.error.get_or_insert(error);
                    return;
                }
            }
            let number = done.samples.len() as u64;
            if done.shown.elapsed() > Duration::from_secs(5) || number == count {
                done.shown = Instant::now();
                let seconds = begin.elapsed().as_secs_f32();
                let late = done.samples.iter().filter(|sample| sample.late > 0).count();
                eprintln!(
                    "{what}: {number} of {count} rounds, {late} with late stores, {seconds:.0} s"
                );
            }
        }
    };
    let seats = rig.seats()?;
    std::thread::scope(|scope| {
        for seat in seats {
            scope.spawn(move || serve(seat));
        }
    });
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    match done.error {
        Some(error) => Err(error),
        None => {
            push(report, &what, way, done);
            Ok(())
        }
    }
}

fn push(report: &mut Report, what: &str, way: Way, done: Done) {
    let mut samples = done.samples;
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
        (samples[index].fence.as_secs_f64() * 1e6).round()
    };
    for (quantile, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0)] {
        let row = Row::new(format!("{what}: fence, {quantile}"), at(share), "us");
        report.push(row.n(rounds));
    }
    if done.lost > 0 {
        let lost = done.lost as f64;
        let name = format!("{what}: guests that ended before they stored");
        report.push(Row::new(name, lost, "guests").n(rounds + done.lost));
    }
}

fn name(node: Node) -> &'static str {
    match node {
        Node::Payload => "KVM guest",
        Node::Kernel => "stock kernel",
        Node::Namespace => "namespace node",
    }
}
