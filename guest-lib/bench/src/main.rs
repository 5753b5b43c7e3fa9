//! Measures the library against its peers.
//!
//! Always built alone, in the release profile: `cargo run --release -p lupin-bench -- locks`.
//! Built together with a crate that asks for the library's crash points, it would measure the
//! counted accesses of tests; it refuses to.

mod alloc;
mod locks;
mod measure;
mod peers;
mod pod;
mod process;
mod structures;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use lupin_report::{Report, Row};

use crate::measure::Effort;

/// Measures Lupin's library against its peers, paired in one run.
///
/// A subject and its peer alternate in short slices (subject, peer, peer, subject). A ratio is
/// the median over such rounds, a time the median over slices; spreads are the quartiles. Threads
/// are not pinned. Figures of one thread are processor time, of several wall-clock time per
/// operation of all together; processor time of waiters is that of all of them together. A missed
/// bar of speed is shown and is no failure; a result that is wrong is.
#[derive(Parser)]
struct Arguments {
    /// What to measure.
    suite: Suite,
    /// Also write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer and shorter rounds: some seconds instead of a minute or two, and a wider spread.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Suite {
    /// Locks, alone and contended.
    Locks,
    /// Allocators, alone and after deaths.
    Alloc,
    /// Maps and queues.
    Structures,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if lupin::HAS_CRASH_POINTS || cfg!(debug_assertions) {
        eprintln!(
            "error: this build is not the one to measure (debug assertions, or crash points that \
             another crate asked for): build lupin-bench alone, with --release"
        );
        return ExitCode::FAILURE;
    }
    match measure(&arguments) {
        Ok(report) => report.finish(arguments.json.as_deref()),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<Report, Box<dyn Error>> {
    let effort = Effort::new(arguments.quick);
    let mut report = match arguments.suite {
        Suite::Locks => locks::measure(effort),
        Suite::Alloc => alloc::measure(effort),
        Suite::Structures => structures::measure(effort),
    }?;
    let processors = std::thread::available_parallelism()?.get();
    report.push(Row::new("processors", processors as f64, "processors"));
    Ok(report)
}
