//! `cargo xtask test`: everything that is promised, tested, with one verdict.
//!
//! The steps go on after a failure, so that one run tells all; a table at the end
//! says how each went and how long it took. Tests that need more than a plain
//! process are marked `#[ignore]` with their need, and are run here where that
//! need is met:
//!
//! * `ci/tests/pod_namespace*.rs`: as root on this machine;
//! * `ci/tests/pod_kvm*.rs` and the ignored tests of the VMM: in the nested host, with guests of 6.1;
//!   `pod_kvm_segments.rs` with guests of 6.12 as well;
//! * `ci/tests/pod_debian*.rs`: in there as well, and only when asked for, since two
//!   emulated guests take minutes to start all that a Debian starts.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lupin_images::{ImageError, KernelTree};

use crate::debian::{self, DebianError};
use crate::host::{self, RunError, say};
use crate::leftovers::Watch;
use crate::nested::{HOST_KERNEL, RETRY_REPORT, runner};
use crate::products::{self, Profile};
use crate::prover::{self, Prover};
use crate::setup::{self, Component, Series, SetupError};

/// Seconds that the tests of one binary may take in the nested host.
const NESTED_LIMIT: u64 = 900;
/// The same for guests that start all that a Debian starts, twice.
const DEBIAN_LIMIT: u64 = 1800;

const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";

/// What to test.
#[derive(Debug, clap::Args)]
pub(crate) struct TestArgs {
    /// Run only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Only this step; may be given several times
    #[arg(long, value_enum)]
    only: Vec<Step>,
    /// Not this step; may be given several times
    #[arg(long, value_enum)]
    skip: Vec<Step>,
    /// Stop everything after this many minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 55)]
    time_limit: u64,
}

/// A step of the test run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Step {
    /// Formatting
    Format,
    /// Compiler and clippy warnings
    Lint,
    /// Tests that need nothing but a process
    Unit,
    /// The short forms of the crash suite, of its mutants, and of the fence's proof
    Proofs,
    /// Pods of namespace nodes, natively; needs root
    Namespace,
    /// Tests that need KVM, in the nested host
    Nested,
    /// Pods of whole Debian systems, in the nested host; needs root; runs only when named
    Debian,
}

const STEPS: [Step; 7] = [
    Step::Format,
    Step::Lint,
    Step::Unit,
    Step::Proofs,
    Step::Namespace,
    Step::Nested,
    Step::Debian,
];

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Step::Format => "formatting",
            Step::Lint => "lints",
            Step::Unit => "unit tests",
            Step::Proofs => "proofs",
            Step::Namespace => "namespace pods",
            Step::Nested => "nested host",
            Step::Debian => "Debian pods",
        })
    }
}

/// Why the test run could not even fail properly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TestError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Debian(#[from] DebianError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot prepare the test run: {0}")]
    Prepare(#[from] io::Error),
}

struct Outcome {
    step: Step,
    time: Duration,
    failure: Option<String>,
}

/// Runs the steps; whether all passed.
pub(crate) fn run(args: &TestArgs) -> Result<bool, TestError> {
    let folder = tempfile::Builder::new().prefix("lupin-xtask-").tempdir()?;
    let context = Context::new(args, folder.path())?;
    let leftovers = Watch::new();
    let started = Instant::now();
    let mut outcomes = Vec::new();
    for step in STEPS {
        let wanted = match args.only.is_empty() {
            true => step != Step::Debian,
            false => args.only.contains(&step),
        };
        if !wanted || args.skip.contains(&step) {
            continue;
        }
        say!("== {step} ==");
        let begun = Instant::now();
        let failure = match context.step(step) {
            Ok(()) => None,
            Err(
                TestError::Run(RunError::Interrupted)
                | TestError::Setup(SetupError::Run(RunError::Interrupted))
                | TestError::Debian(DebianError::Run(RunError::Interrupted)),
            ) => {
                return Err(RunError::Interrupted.into());
            }
            Err(error) => Some(error.to_string()),
        };
        leftovers.sweep();
        if let Some(failure) = &failure {
            say!("{step}: FAILED: {failure}");
        }
        outcomes.push(Outcome {
            step,
            time: begun.elapsed(),
            failure,
        });
    }
    Ok(verdict(&outcomes, started.elapsed(), context.retries()))
}

/// Prints the table, on stdout since it is the result.
fn verdict(outcomes: &[Outcome], time: Duration, retries: usize) -> bool {
    let mut out = io::stdout().lock();
    let mut line = |text: String| {
        // A closed stdout does not change the verdict.
        let _ = writeln!(out, "{text}");
    };
    line(String::new());
    for outcome in outcomes {
        let word = if outcome.failure.is_none() {
            "ok"
        } else {
            "FAILED"
        };
        line(format!(
            "  {:<16} {:<8} {:>6.0} s",
            outcome.step,
            word,
            outcome.time.as_secs_f32()
        ));
    }
    line(format!(
        "  {:<16} {:<8} {:>6.0} s",
        "all",
        "",
        time.as_secs_f32()
    ));
    if retries > 0 {
        line(format!("  {retries} retries of the nested host"));
    }
    let failed: Vec<String> = outcomes
        .iter()
        .filter(|outcome| outcome.failure.is_some())
        .map(|outcome| outcome.step.to_string())
        .collect();
    line(if outcomes.is_empty() {
        "\nverdict: NOTHING WAS TESTED".into()
    } else if failed.is_empty() {
        "\nverdict: everything passed".into()
    } else {
        format!("\nverdict: FAILED: {}", failed.join(", "))
    });
    failed.is_empty() && !outcomes.is_empty()
}

struct Context {
    filter: Option<String>,
    /// A copy of this program: cargo may replace the original while tests run.
    runner: PathBuf,
    retry_report: PathBuf,
    /// Goes away with the run.
    folder: PathBuf,
    deadline: Instant,
}

impl Context {
    fn new(args: &TestArgs, folder: &Path) -> Result<Self, TestError> {
        let runner = folder.join("xtask");
        fs::copy(host::this_program(), &runner)?;
        Ok(Self {
            filter: args.filter.clone(),
            runner,
            retry_report: folder.join("retries"),
            folder: folder.to_owned(),
            deadline: Instant::now() + Duration::from_secs(args.time_limit * 60),
        })
    }

    fn step(&self, step: Step) -> Result<(), TestError> {
        match step {
            Step::Format => {
                need_component("fmt", "rustfmt")?;
                self.cargo(host::cargo("fmt").args(["--all", "--check"]))?;
            }
            Step::Lint => {
                need_component("clippy", "clippy")?;
                self.cargo(host::cargo("clippy").args([
                    "--workspace",
                    "--all-targets",
                    "--",
                    "-D",
                    "warnings",
                ]))?;
            }
            Step::Unit => {
                let mut cargo = host::cargo("test");
                cargo.args(["--workspace", "--no-fail-fast"]);
                self.run_tests(&mut cargo, &[])?;
            }
            Step::Proofs => {
                for prover in [Prover::Crash, Prover::Mutants] {
                    self.cargo(prover::command(prover)?.arg("--short"))?;
                }
                self.cargo(prover::command(Prover::Fence)?.args(["--count", "20"]))?;
            }
            Step::Namespace => {
                products::build(Profile::Dev)?;
                let mut cargo = host::cargo("test");
                cargo.args([
                    "--package",
                    "xtask",
                    "--test",
                    "pod_namespace*",
                    "--no-fail-fast",
                ]);
                if !nix::unistd::geteuid().is_root() {
                    cargo.env(RUNNER, "sudo --preserve-env --");
                }
                // Pods measure time: one after the other.
                self.run_tests(&mut cargo, &["--ignored", "--test-threads=1"])?;
            }
            Step::Nested => {
                setup::ensure(&[
                    Component::Kernel(HOST_KERNEL),
                    Component::Kernel(Series::V6_1),
                    Component::Kernel(Series::V6_12),
                    Component::Busybox,
                    Component::Qemu,
                ])?;
                products::build(Profile::Dev)?;
                let mut vmm = host::cargo("test");
                // No documentation tests: they are no static programs.
                vmm.args(["--package", "lupin-vmm", "--lib", "--bins", "--tests"]);
                vmm.arg("--no-fail-fast");
                let mut pods = host::cargo("test");
                pods.args(["--package", "xtask", "--test", "pod_kvm*", "--no-fail-fast"]);
                // What depends most on the kernel, on the other one as well.
                let mut newer = host::cargo("test");
                newer.args(["--package", "xtask", "--test", "pod_kvm_segments"]);
                newer.env(runner::SERIES, Series::V6_12.to_string());
                let mut result = Ok(());
                for cargo in [&mut vmm, &mut pods, &mut newer] {
                    match self.run_nested(cargo, NESTED_LIMIT) {
                        Err(TestError::Run(RunError::Interrupted)) => {
                            return Err(RunError::Interrupted.into());
                        }
                        outcome => result = result.and(outcome),
                    }
                }
                result?;
            }
            Step::Debian => {
                let cache = setup::ensure(&[
                    Component::Kernel(HOST_KERNEL),
                    Component::Kernel(Series::V6_1),
                    Component::Busybox,
                    Component::Qemu,
                ])?;
                products::build(Profile::Dev)?;
                let kernel = KernelTree::open(&cache.kernel(Series::V6_1))?;
                let disk = self.folder.join("debian.img");
                debian::build(&kernel, &products::directory(Profile::Dev), &disk)?;
                let mut pods = host::cargo("test");
                pods.args(["--package", "xtask", "--test", "pod_debian*"]);
                pods.env(runner::DISK, &disk);
                self.run_nested(&mut pods, DEBIAN_LIMIT)?;
            }
        }
        Ok(())
    }

    fn run_nested(&self, cargo: &mut Command, limit: u64) -> Result<(), TestError> {
        cargo
            .env(RUNNER, format!("{} nested runner", self.runner.display()))
            .env(RETRY_REPORT, &self.retry_report);
        let left = self
            .deadline
            .saturating_duration_since(Instant::now())
            .as_secs();
        cargo.env(runner::TIMEOUT, left.clamp(1, limit).to_string());
        // Emulated guests are slow enough one at a time.
        self.run_tests(cargo, &["--ignored", "--test-threads=1"])
    }

    fn run_tests(&self, cargo: &mut Command, args: &[&str]) -> Result<(), TestError> {
        cargo.arg("--").args(args).args(&self.filter);
        self.cargo(cargo)
    }

    fn cargo(&self, cargo: &mut Command) -> Result<(), TestError> {
        Ok(host::run_ok_until(cargo, Some(self.deadline))?)
    }

    fn retries(&self) -> usize {
        fs::read_to_string(&self.retry_report).map_or(0, |report| report.lines().count())
    }
}

/// Makes sure that cargo knows a command, through rustup if need be.
fn need_component(command: &str, component: &str) -> Result<(), TestError> {
    let known = host::cargo(command)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !known {
        say!("cargo has no '{command}' here; adding it with rustup");
        host::run_ok(
            Command::new("rustup")
                .args(["component", "add", component])
                .current_dir(host::checkout()),
        )?;
    }
    Ok(())
}
