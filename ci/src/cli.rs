//! The command line.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use lupin_images::{ImageError, KernelTree};

use crate::bench::{self, Suite};
use crate::debian::{self, DebianError};
use crate::demo::{self, DemoArgs, DemoError};
use crate::fence;
use crate::host::{self, RunError, say};
use crate::nested::{self, Ending, Job, NestedError};
use crate::nested_prover;
use crate::package::{self, PackageArgs, PackageError};
use crate::products::{self, Profile};
use crate::prover::{self, Prover, ProverArgs};
use crate::segments;
use crate::setup::{self, Component, Series};
use crate::story::{self, StoryArgs};
use crate::test::{self, TestArgs, TestError};

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
    /// Build the products: static binaries
    Build {
        /// With optimisation
        #[arg(long)]
        release: bool,
    },
    /// Build a guest image (an initramfs) with the agent and the applications
    Image(ImageArgs),
    /// Build the agent's Debian package
    Package(PackageArgs),
    /// Run programs in the nested test host: an emulated machine with KVM
    #[command(subcommand)]
    Nested(Nested),
    /// Run every test: formatting, lints, unit tests, namespace pods, pods of KVM guests
    Test(TestArgs),
    /// Show a pod that loses a node in the middle of a job and gives the right answer
    Demo(DemoArgs),
    /// End every operation of the library at every instruction and every store, and recover it
    Crash(ProverArgs),
    /// Leave out one store of the library at a time; the crash suite must notice
    Mutants(ProverArgs),
    /// Check the library's algorithms with loom and shuttle
    Models(ProverArgs),
    /// Measure: the library against its peers, how fast a pod notices failures, what segments cost
    #[command(subcommand)]
    Bench(bench::Suite),
    /// Fence nodes that store as fast as they can, and look for stores that come later
    Fence(ProverArgs),
    /// Check licences, sources and advisories of all dependencies (installs cargo-deny)
    Deny,
    /// The demo's story, told on this very machine; `demo` runs it in the right place
    #[command(hide = true)]
    Story(StoryArgs),
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
    /// Give the host a file of this machine as a read-only disk: vda, vdb and so on
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
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

#[derive(Debug, Args)]
struct ImageArgs {
    /// The file to write
    #[arg(long, short, value_name = "FILE", default_value = "guest.cpio")]
    output: PathBuf,
    /// The kernel that it is for
    #[arg(
        long,
        value_name = "SERIES",
        default_value = "6.1",
        conflicts_with = "kernel_dir"
    )]
    kernel: Series,
    /// A directory with an unpacked kernel package of your own
    #[arg(long, value_name = "DIR")]
    kernel_dir: Option<PathBuf>,
    /// Load one more module; may be given several times
    #[arg(long = "module", value_name = "NAME")]
    modules: Vec<String>,
    /// Put a file of this machine into the image; may be given several times
    #[arg(long = "file", value_name = "HERE=THERE", value_parser = parse_pair)]
    files: Vec<(String, String)>,
    /// Build a Debian with the agent's package, too: a disk image for this initramfs, to be booted
    /// with root=/dev/vda on the command line (needs root)
    #[arg(long, value_name = "FILE")]
    debian: Option<PathBuf>,
    /// With the development build of the products instead of the release build
    #[arg(long, conflicts_with = "bin_dir")]
    dev: bool,
    /// With the products in this directory; build none
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

/// Runs what the command line asks for.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Story(args) = &cli.command {
        // It has its own way to end on Ctrl-C.
        return tell(args);
    }
    host::catch_signals();
    match dispatch(cli.command) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            say!("error: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn tell(args: &StoryArgs) -> ExitCode {
    match story::run(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say!("error: {error}");
            ExitCode::FAILURE
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

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        let status = if matches!(error, RunError::Interrupted) {
            130
        } else {
            1
        };
        Self {
            message: error.to_string(),
            status,
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self {
            message: error.to_string(),
            status: 1,
        }
    }
}

impl From<PackageError> for Failure {
    fn from(error: PackageError) -> Self {
        match error {
            PackageError::Run(error) => error.into(),
            error => Self {
                message: error.to_string(),
                status: 1,
            },
        }
    }
}

impl From<DebianError> for Failure {
    fn from(error: DebianError) -> Self {
        match error {
            DebianError::Run(error) => error.into(),
            DebianError::Setup(error) => error.into(),
            DebianError::Package(error) => error.into(),
            error => Self {
                message: error.to_string(),
                status: 1,
            },
        }
    }
}

impl From<TestError> for Failure {
    fn from(error: TestError) -> Self {
        match error {
            TestError::Run(error) => error.into(),
            TestError::Setup(error) => error.into(),
            TestError::Debian(error) => error.into(),
            TestError::Image(error) => error.into(),
            error @ TestError::Prepare(_) => Self {
                message: error.to_string(),
                status: 1,
            },
        }
    }
}

impl From<DemoError> for Failure {
    fn from(error: DemoError) -> Self {
        match error {
            DemoError::Run(error) => error.into(),
            DemoError::Setup(error) => error.into(),
            DemoError::Nested(error) => error.into(),
            error => Self {
                message: error.to_string(),
                status: 1,
            },
        }
    }
}

fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Setup => {
            let cache = setup::ensure(&Component::ALL)?;
            for series in [Series::V6_1, Series::V6_12] {
                let kernel = KernelTree::open(&cache.kernel(series))?;
                println!("kernel {series}: {}", kernel.image().display());
            }
            println!("text: {}", cache.text().display());
            Ok(0)
        }
        Command::Build { release } => {
            let profile = if release {
                Profile::Release
            } else {
                Profile::Dev
            };
            println!("{}", products::build(profile)?.display());
            Ok(0)
        }
        Command::Image(args) => {
            build_image(args)?;
            Ok(0)
        }
        Command::Package(args) => {
            println!("{}", package::run(&args)?.display());
            Ok(0)
        }
        Command::Test(args) => Ok(u8::from(!test::run(&args)?)),
        Command::Demo(args) => Ok(demo::run(&args)?),
        Command::Crash(args) => Ok(prover::run(Prover::Crash, &args)?),
        Command::Mutants(args) => Ok(prover::run(Prover::Mutants, &args)?),
        Command::Models(args) => Ok(prover::run(Prover::Models, &args)?),
        Command::Bench(suite) => {
            let nested = matches!(&suite, Suite::Segments(args) if args.has(nested_prover::FLAG));
            let (prover, args) = suite.program();
            match nested {
                true => Ok(segments::run(&args.args)?.status()),
                false => Ok(prover::run(prover, &args)?),
            }
        }
        Command::Fence(args) if args.has(nested_prover::FLAG) => {
            Ok(fence::run(&args.args)?.status())
        }
        Command::Fence(args) => Ok(prover::run(Prover::Fence, &args)?),
        Command::Deny => {
            deny()?;
            Ok(0)
        }
        Command::Story(_) => unreachable!("handled before signals are caught"),
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
            job.disks = run.disks;
            job.env = run.env;
            job.console = run.console;
            Ok(nested::run(&job).map(Ending::status)?)
        }
        Command::Nested(Nested::Runner { binary, args }) => {
            Ok(nested::runner::run(&binary, args).map(Ending::status)?)
        }
    }
}

fn build_image(args: ImageArgs) -> Result<(), Failure> {
    let bin_dir = match args.bin_dir {
        Some(dir) => dir,
        None if args.dev => products::build(Profile::Dev)?,
        None => products::build(Profile::Release)?,
    };
    let (cache, kernel) = match &args.kernel_dir {
        Some(dir) => (
            setup::ensure(&[Component::Busybox])?,
            KernelTree::open(dir)?,
        ),
        None => {
            let cache = setup::ensure(&[Component::Busybox, Component::Kernel(args.kernel)])?;
            let kernel = KernelTree::open(&cache.kernel(args.kernel))?;
            (cache, kernel)
        }
    };
    let mut image = products::guest_image(&cache, &bin_dir);
    for module in &args.modules {
        image = image.module(module);
    }
    for (here, there) in &args.files {
        image = image.file(here.as_ref(), there);
    }
    image.write(&kernel, &args.output)?;
    if let Some(debian) = &args.debian {
        debian::build(&kernel, &bin_dir, debian)?;
    }
    say!("{} is for this kernel:", args.output.display());
    println!("{}", kernel.image().display());
    Ok(())
}

fn deny() -> Result<(), RunError> {
    let there = host::cargo("deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !there {
        say!("installing cargo-deny; compiling it takes some minutes");
        // In a directory outside the checkout, so that the checkout's flags do not apply.
        host::run_ok(
            host::cargo("install")
                .args(["--locked", "cargo-deny"])
                .current_dir("/"),
        )?;
    }
    host::run_ok(host::cargo("deny").arg("check"))
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((left, right)) if !left.is_empty() => Ok((left.into(), right.into())),
        _ => Err("expected two parts with '=' between".into()),
    }
}
