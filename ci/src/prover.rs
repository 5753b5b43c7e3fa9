//! `cargo xtask crash|mutants|models|bench|fence`: the programs that prove and measure.
//! `bench` is two: one for the library, one for the pod.
//!
//! They are programs of their own, since most link the library in builds of their own: with its
//! accesses counted, or sent to a model checker, or as it is in products. Here they are built,
//! optimised and one at a time, so that no feature of one gets into another.

use std::process::Command;

use crate::host::{self, RunError, say};
use crate::products::{self, Profile};

/// A program that proves or measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prover {
    Crash,
    Mutants,
    Models,
    Bench,
    PodBench,
    Fence,
}

impl Prover {
    /// Its package, which is its name as well.
    fn package(self) -> &'static str {
        match self {
            Prover::Crash | Prover::Mutants => "lupin-crash",
            Prover::Models => "lupin-models",
            Prover::Bench => "lupin-bench",
            Prover::PodBench => "lupin-measure",
            Prover::Fence => "lupin-fence",
        }
    }

    /// Which of the program's commands it is.
    fn verb(self) -> Option<&'static str> {
        match self {
            Prover::Crash => Some("crash"),
            Prover::Mutants => Some("mutants"),
            Prover::Models | Prover::Bench | Prover::PodBench | Prover::Fence => None,
        }
    }
}

/// Arguments for the program; `--help` among them is answered by it.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct ProverArgs {
    /// Arguments for the program that does it; --help tells them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

impl ProverArgs {
    /// Whether a word is among them.
    pub(crate) fn has(&self, word: &str) -> bool {
        self.args.iter().any(|arg| arg == word)
    }
}

/// Builds a program and returns the command that runs it.
pub(crate) fn command(prover: Prover) -> Result<Command, RunError> {
    if matches!(prover, Prover::Fence | Prover::PodBench) {
        // They run the products.
        products::build(Profile::Release)?;
    }
    let package = prover.package();
    say!("building {package}");
    host::run_ok(host::cargo("build").args(["--release", "--quiet", "--package", package]))?;
    let mut command = Command::new(products::directory(Profile::Release).join(package));
    command.args(prover.verb());
    Ok(command)
}

/// Builds and runs a program; its exit status is ours.
pub(crate) fn run(prover: Prover, args: &ProverArgs) -> Result<u8, RunError> {
    let status = host::run(command(prover)?.args(&args.args))?;
    // Without a code it was killed by a signal, which is no verdict.
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX))
}
