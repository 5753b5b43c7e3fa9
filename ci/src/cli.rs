//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::host::{self, say};
use crate::nested::{self, Ending, Job, NestedError};
use crate::setup::{self, Component, Series};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Lupin's own commands",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Download what tests and demo need (the other commands do it by themselves)
    Setup,
    /// Run programs in the nested test host: an emulated machine with KVM
    #[command(subcommand)]
    Nested(Nested),
}

#[derive(Debug, Subcommand)]
enum Nested {
    /// Run a static program in the nested test host
    ///
    /// Its output appears here as it is written, and its exit status is ours. 124 means that the
    /// time limit stopped it, 125 that the host failed, 130 that you did.
    Run(NestedRun),
    /// Run a test binary in the nested test host; for CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER
    Runner {
        /// The test binary
        binary: PathBuf,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct NestedRun {
    /// Stop the program after this time (booting not included)
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// Virtual processors [default: as many as this machine has, 2 to 8]
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory of the host, which also holds its files
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    memory: String,
    /// The host's own kernel
    #[arg(long, value_name = "SERIES", default_value = "6.1")]
    kernel: Series,
    /// Put a file of this machine into the host
    #[arg(long = "file", value_name = "HERE=THERE", value_parser = parse_pair)]
    files: Vec<(String, String)>,
    /// Set an environment variable of the program
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_pair)]
    env: Vec<(String, String)>,
    /// Copy the host's console into a file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// A static program of this machine, or the name of one in there (sh)
    #[arg(required = true)]
    program: PathBuf,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs what the command line asks for.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    host::catch_signals();
    match dispatch(cli.command) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            say!("error: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// An error on its way to the user.
struct Failure {
    message: String,
    status: u8,
}

impl From<NestedError> for Failure {
    fn from(error: NestedError) -> Self {
        Self {
            message: error.to_string(),
            status: error.status(),
        }
    }
}

impl From<setup::SetupError> for Failure {
    fn from(error: setup::SetupError) -> Self {
        NestedError::from(error).into()
    }
}

fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Setup => {
            setup::ensure(&Component::ALL)?;
            say!("everything is in {}", host::cache_dir().display());
            Ok(0)
        }
        Command::Nested(Nested::Run(run)) => {
            let mut job = Job::new(run.program, run.args);
            job.timeout = Duration::from_secs(run.timeout);
            job.cpus = run.cpus.unwrap_or(job.cpus);
            job.memory = run.memory;
            job.kernel = run.kernel;
            job.files = run
                .files
                .into_iter()
                .map(|(here, there)| (here.into(), there))
                .collect();
            job.env = run.env;
            job.console = run.console;
            Ok(nested::run(&job).map(Ending::status)?)
        }
        Command::Nested(Nested::Runner { binary, args }) => {
            Ok(nested::runner::run(&binary, args).map(Ending::status)?)
        }
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((left, right)) if !left.is_empty() => Ok((left.into(), right.into())),
        _ => Err("expected two parts with '=' between".into()),
    }
}
