//! `lupin-crash`: see the library's documentation.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lupin_crash::SuiteError;
use lupin_crash::suite::{self, Options};

#[derive(Debug, Parser)]
#[command(
    about = "Ends the library's operations at every instruction and every store",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A death at every instruction, and at every pair of stores of operation and recovery
    Crash(Crash),
    /// The same in programs that each lack one store: all must be found out
    Mutants(Which),
}

#[derive(Debug, Args)]
struct Crash {
    #[command(flatten)]
    which: Which,
    /// List operations and states, and do nothing else
    #[arg(long)]
    list: bool,
    /// Run a case that is broken on purpose; the suite must call it bad
    #[arg(long, conflicts_with = "op")]
    control: bool,
}

#[derive(Debug, Args)]
struct Which {
    /// Only this operation (heap.alloc_into), or those of this module (heap)
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// Write the report as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A sample that takes less than a minute
    #[arg(long)]
    short: bool,
}

impl Which {
    fn options(&self, control: bool) -> Options {
        Options {
            op: self.op.clone(),
            short: self.short,
            control,
        }
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Crash(args) => crash(&args),
        Command::Mutants(which) => lupin_crash::mutants::mutants(&which.options(false))
            .map(|report| report.finish(which.json.as_deref())),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        match error {
            SuiteError::NoSuchOperation(_) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    })
}

fn crash(args: &Crash) -> Result<ExitCode, SuiteError> {
    let options = args.which.options(args.control);
    if args.list {
        for case in options.cases()? {
            println!("{}: {}", case.name(), case.states().join("; "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let report = suite::crash(&options)?;
    Ok(report.finish(args.which.json.as_deref()))
}
