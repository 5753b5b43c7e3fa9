//! Measures how fast a pod of namespace nodes notices failures: `cargo xtask bench detect`,
//! `hang`, `failover`, `false-kills`, `scale`, `wakeup` and `notify`; and what its segments cost:
//! `segments`.
//!
//! Everything is the product: the manager, the agents, and an application in one node that is
//! told by the library. Times are of one clock, which all namespaces of a host share. What is
//! measured is what an application sees, from the signal that ends a node to the line that the
//! application writes.

mod maker;
mod member;
mod rig;
mod simulated;
mod sleeper;
mod suites;
mod watcher;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lupin_report::{Report, interrupt};

/// Measure how fast a pod of namespace nodes notices failures.
///
/// Needs root. A missed bar of speed is shown and exits with 0; a false kill, or a failure that
/// nobody noticed, exits with 1; 3 means that the measurement could not be made, and 130 that you
/// stopped it, with its pod.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Cli {
    #[command(subcommand)]
    program: Program,
}

#[derive(Debug, Subcommand)]
enum Program {
    #[command(flatten)]
    Suite(Suite),
    #[command(flatten)]
    Application(Application),
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// From the SIGKILL of a node to an application in another node
    Detect(Rounds),
    /// From the moment that a node stops running to an application in another node
    Hang(Rounds),
    /// The same as detect, with the manager killed at the same moment
    Failover(Rounds),
    /// Sixteen nodes that are busy, on few processors: none may be taken for hung, but those that are
    FalseKills(suites::FalseKills),
    /// A thousand nodes that have no process, looked at and judged by a real manager
    Scale(suites::Scale),
    /// From the release of a lock in one node to a sleeper in another
    Wakeup(suites::Wakeup),
    /// From the death of a process or of a node to the members of its group
    Notify(suites::Notify),
    /// A segment of 64 MiB created, opened and mapped, against plain mmap
    Segments(suites::Segments),
}

/// What the suites and tests start inside nodes, and what ends with its node.
#[derive(Debug, Subcommand)]
enum Application {
    /// Holds a lock or waits for it
    #[command(hide = true)]
    Sleeper(sleeper::Sleeper),
    /// Is a member of a group
    #[command(hide = true)]
    Member(member::Member),
    /// Starts members and kills them
    #[command(hide = true)]
    Killer(member::Killer),
    /// Makes segments
    #[command(hide = true)]
    Maker(maker::Maker),
    /// Learns of failures
    #[command(hide = true)]
    Watch {
        /// Where it writes.
        file: PathBuf,
    },
}

impl Application {
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        match self {
            Self::Sleeper(sleeper) => sleeper.run(),
            Self::Member(member) => member.run(),
            Self::Killer(killer) => killer.run(),
            Self::Maker(maker) => maker.run(),
            Self::Watch { file } => watcher::watch(file),
        }
    }
}

#[derive(Debug, Args)]
struct Rounds {
    /// How many failures
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Write the rows to a file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the products are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

impl Common {
    fn binaries(&self) -> PathBuf {
        let beside = || {
            let this = std::env::current_exe().unwrap_or_default();
            this.parent().map(PathBuf::from).unwrap_or_default()
        };
        self.bin_dir.clone().unwrap_or_else(beside)
    }
}

fn main() -> ExitCode {
    let suite = match Cli::parse().program {
        Program::Suite(suite) => suite,
        Program::Application(application) => {
            return match application.run() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: {error}");
                    ExitCode::FAILURE
                }
            };
        }
    };
    if let Err(error) = interrupt::catch() {
        eprintln!("error: cannot catch signals: {error}");
        return ExitCode::from(3);
    }
    let (report, json) = match suite {
        Suite::Notify(args) => (args.run(), args.common.json.clone()),
        Suite::Wakeup(args) => (args.run(), args.common.json.clone()),
        Suite::Segments(args) => (args.run(), args.common.json.clone()),
        Suite::Detect(args) => (
            suites::detect(&args.common.binaries(), args.rounds),
            args.common.json,
        ),
        Suite::Hang(args) => (
            suites::hang(&args.common.binaries(), args.rounds),
            args.common.json,
        ),
        Suite::Failover(args) => (
            suites::failover(&args.common.binaries(), args.rounds),
            args.common.json,
        ),
        Suite::FalseKills(args) => (args.run(), args.common.json.clone()),
        Suite::Scale(args) => (args.run(), args.common.json.clone()),
    };
    let finish = |report: Report| report.finish(json.as_deref());
    match report {
        Ok(report) => finish(report),
        Err(_) if interrupt::is_requested() => interrupt::exit(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}
