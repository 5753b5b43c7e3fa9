//! WordCount on a pod: every node counts, any node may die, every word counts once.
//!
//! `load` puts a text into the pod as a job of small units; `work`, on as many nodes as there
//! are, computes them; `result` prints what `plain` would. A node that dies in the middle costs
//! the units that it was at: others take them over.

mod audit;
mod error;
mod load;
mod map;
mod plain;
mod plan;
mod reduce;
mod segment;
mod status;
mod table;
mod text;
mod work;

#[cfg(test)]
mod in_place_test;

use std::io::{self, BufWriter, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, value_parser};

use error::Error;

/// Counts words on a Lupin pod: every node counts, any node may die, every word counts once.
#[derive(Debug, Parser)]
#[command(version, about)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 bad arguments, 3 no such job.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the text on standard input into the pod as a job.
    Load {
        /// Name of the job, new in the pod.
        #[arg(long)]
        job: String,
        /// Milliseconds of work in a unit, on this machine.
        #[arg(long, default_value_t = 3, value_parser = value_parser!(u64).range(1..=5))]
        unit_ms: u64,
    },
    /// Work on a job until it is complete, whoever else works on it or dies.
    Work {
        /// Name of the job.
        #[arg(long)]
        job: String,
        /// Threads; by default one for each processor of this node.
        #[arg(long, value_parser = value_parser!(u32).range(1..=256))]
        threads: Option<u32>,
        /// Work as this node's part of a team: thread ids, as FIRST-LAST, spread over the nodes that
        /// name the same. Those of a node or process that dies are taken over by the living.
        #[arg(long, value_name = "IDS", value_parser = ids, conflicts_with = "threads")]
        team: Option<(u32, u32)>,
        /// Begin once so many nodes are in the team, or after ten seconds.
        #[arg(long, value_name = "NODES", default_value_t = 1, requires = "team", value_parser = value_parser!(u32).range(1..=1024))]
        gather: u32,
        /// Milliseconds to sleep in each unit before its result is committed: makes a small job
        /// long enough to be watched, and to be killed in the middle of a unit.
        #[arg(long, default_value_t = 0, value_parser = value_parser!(u64).range(0..=1000))]
        linger_ms: u64,
        /// Report as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Say how far a job is.
    Status {
        /// Name of the job.
        #[arg(long)]
        job: String,
        /// Wait until so many percent of all units are done.
        #[arg(long, value_parser = value_parser!(u32).range(0..=100))]
        until: Option<u32>,
        /// Seconds to wait at most with --until; by default without limit.
        #[arg(long, requires = "until")]
        timeout: Option<u32>,
        /// Report as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print the counts of a complete job: `WORD COUNT`, sorted by the bytes of the words.
    Result {
        /// Name of the job.
        #[arg(long)]
        job: String,
    },
    /// Check a complete job: every unit once, every word once, no memory lost.
    Audit {
        /// Name of the job.
        #[arg(long)]
        job: String,
        /// Report as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Remove a job and free its memory.
    Remove {
        /// Name of the job.
        #[arg(long)]
        job: String,
    },
    /// Count the text on standard input in this one process, without a pod, and print as `result`.
    Plain,
}

/// `FIRST-LAST`, or one id.
fn ids(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if 0 < first && first <= last => Ok((first, last)),
        _ => Err("not a range of thread ids, as in 1001-1008".into()),
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lupin-wordcount: {error}");
            error.exit_code()
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Load { job, unit_ms } => {
            let stdin = io::stdin().lock();
            println!(
                "{}",
                load::load(&job, Duration::from_millis(unit_ms), stdin)?
            );
        }
        Command::Work {
            job,
            threads,
            team,
            gather,
            linger_ms,
            json,
        } => {
            let processors = || std::thread::available_parallelism().map_or(1, |n| n.get());
            let threads = threads.map_or_else(processors, |threads| threads as usize);
            let linger = Duration::from_millis(linger_ms);
            let workers = match team {
                Some((first, last)) => work::Workers::Team(first..=last, gather),
                None => work::Workers::Own(threads),
            };
            let manner = work::Manner { workers, linger };
            say(&work::work(&job, manner, json)?)?;
        }
        Command::Status {
            job,
            until,
            timeout,
            json,
        } => {
            let timeout = timeout.map(|seconds| Duration::from_secs(seconds.into()));
            say(&status::status(&job, until, timeout, json)?)?;
        }
        Command::Result { job } => {
            status::result(&job, BufWriter::new(io::stdout().lock()))?;
        }
        Command::Audit { job, json } => say(&audit::audit(&job, json)?)?,
        Command::Remove { job } => {
            status::remove(&job)?;
            say(&format!("job {job} removed"))?;
        }
        Command::Plain => {
            let mut text = Vec::new();
            let failed = |what| move |source| Error::Io { what, source };
            io::stdin()
                .lock()
                .read_to_end(&mut text)
                .map_err(failed("cannot read the text"))?;
            let out = BufWriter::new(io::stdout().lock());
            plain::write_sorted(plain::count(&text), out)
                .map_err(failed("cannot write the result"))?;
        }
    }
    Ok(())
}

/// Prints a line; a closed pipe is an error like any other.
fn say(line: &str) -> Result<(), Error> {
    let what = "cannot write to standard output";
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").map_err(|source| Error::Io { what, source })
}
