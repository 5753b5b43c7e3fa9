//! `cargo xtask demo`: the frame around the story. Gets everything ready, chooses
//! where the pod's nodes run and says why, then tells the story there.

mod backend;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lupin_images::{ImageError, KernelTree};

use crate::host::{self, RunError, say};
use crate::leftovers::Watch;
use crate::nested::{self, Ending, Job, NestedError};
use crate::products::{self, Profile};
use crate::setup::{self, Cache, Component, Series, SetupError};
pub(crate) use backend::Wish;
use backend::{Backend, choose};

/// What the user asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Where the nodes run
    #[arg(long, value_enum, default_value_t = Wish::Auto)]
    backend: Wish,
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=16))]
    nodes: u32,
    /// The stock kernel that guests boot
    #[arg(long, value_name = "SERIES", default_value = "6.1")]
    kernel: Series,
}

/// The nested host's time for a whole story. It ends far earlier unless something hangs.
const NESTED_LIMIT: Duration = Duration::from_secs(900);

/// Why there was no story to tell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Nested(#[from] NestedError),
    #[error("cannot fill a temporary folder: {0}")]
    Folder(io::Error),
    #[error("backend kvm: /dev/kvm cannot run guests here: {0}; try --backend nested")]
    NoKvm(String),
}

/// Runs the demo; the status is that of the story.
pub(crate) fn run(args: &DemoArgs) -> Result<u8, DemoError> {
    let started = Instant::now();
    say!("== choosing the backend ==");
    let backend = choose(args.backend, || products::build(Profile::Release))?;

    say!("== building the products ==");
    let bin_dir = products::build(Profile::Release)?;

    say!("== set-up: kernels, tools and the text come from Debian packages ==");
    let mut needed = vec![Component::Text];
    if backend != Backend::Namespace {
        needed.extend([Component::Kernel(args.kernel), Component::Busybox]);
    }
    if backend == Backend::Nested {
        needed.extend([Component::Kernel(nested::HOST_KERNEL), Component::Qemu]);
    }
    let cache = setup::ensure(&needed)?;
    let folder = tempfile::Builder::new()
        .prefix("lupin-demo-files-")
        .tempdir()
        .map_err(DemoError::Folder)?;
    let parts = Parts::make(args, backend, &cache, &bin_dir, folder.path())?;
    say!("ready after {:.0} s", started.elapsed().as_secs_f32());

    say!("== the story ==");
    let status = match backend {
        Backend::Nested => tell_nested(args, &parts)?,
        Backend::Kvm | Backend::Namespace => tell_here(args, backend, &parts)?,
    };
    say!(
        "the demo took {:.0} s with everything",
        started.elapsed().as_secs_f32()
    );
    Ok(status)
}

/// What the story works with: files of this machine.
struct Parts {
    /// A copy of this program: cargo may replace the file that it was started from.
    storyteller: PathBuf,
    bin_dir: PathBuf,
    text: PathBuf,
    /// Kernel and image of guests.
    guest: Option<(PathBuf, PathBuf)>,
}

impl Parts {
    fn make(
        args: &DemoArgs,
        backend: Backend,
        cache: &Cache,
        bin_dir: &Path,
        folder: &Path,
    ) -> Result<Self, DemoError> {
        let storyteller = folder.join("xtask");
        fs::copy(host::this_program(), &storyteller).map_err(DemoError::Folder)?;
        let text = cache.text();
        let megabytes = fs::metadata(&text).map_or(0.0, |text| text.len() as f64 / 1e6);
        say!("the text: the Free On-line Dictionary of Computing, {megabytes:.1} MB of English");
        let guest = if backend == Backend::Namespace {
            None
        } else {
            let kernel = KernelTree::open(&cache.kernel(args.kernel))?;
            let image = folder.join("initramfs");
            products::guest_image(cache, bin_dir).write(&kernel, &image)?;
            say!("guests boot Debian's {} unchanged", kernel.release());
            Some((kernel.image().into(), image))
        };
        Ok(Self {
            storyteller,
            bin_dir: bin_dir.into(),
            text,
            guest,
        })
    }
}

/// Tells the story on this machine, in a process of its own that cleans up after itself.
fn tell_here(args: &DemoArgs, backend: Backend, parts: &Parts) -> Result<u8, DemoError> {
    let mut command = host::as_root(&parts.storyteller);
    command
        .args(["story", "--nodes", &args.nodes.to_string()])
        .arg("--bin-dir")
        .arg(&parts.bin_dir)
        .arg("--text")
        .arg(&parts.text);
    match (backend, &parts.guest) {
        (Backend::Kvm, Some((kernel, image))) => {
            command.args(["--backend", "kvm"]);
            command
                .arg("--kernel")
                .arg(kernel)
                .arg("--initramfs")
                .arg(image);
        }
        _ => {
            command.args(["--backend", "namespace"]);
        }
    }
    // The story takes its pod down; this is for the case that it could not.
    let _leftovers = Watch::new();
    let status = host::run(&mut command)?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// Tells the story inside the nested host.
fn tell_nested(args: &DemoArgs, parts: &Parts) -> Result<u8, DemoError> {
    let mut words: Vec<String> = [
        "story",
        "--backend",
        "kvm",
        "--bin-dir",
        "/opt/lupin/bin",
        "--text",
        "/opt/lupin/text.txt",
        "--kernel",
        "/opt/lupin/vmlinuz",
        "--initramfs",
        "/opt/lupin/initramfs",
        // An emulated guest has little time to beat in, beats with gaps and boots slowly.
        "--beat-ms",
        "100",
        "--deadline-ms",
        "5000",
        "--join-timeout-ms",
        "180000",
        // It is slow enough to be killed in the middle of its work, early, for a look at the
        // job takes a while too.
        "--linger-ms",
        "0",
        "--kill-at",
        "8",
        "--cmdline",
        nested::GUEST_WORDS,
        "--nodes",
    ]
    .map(str::to_owned)
    .into();
    words.push(args.nodes.to_string());
    let mut job = Job::new(host::this_program(), words);
    job.timeout = NESTED_LIMIT;
    job.files
        .push((parts.text.clone(), "/opt/lupin/text.txt".into()));
    if let Some((kernel, image)) = &parts.guest {
        job.files
            .push((kernel.clone(), "/opt/lupin/vmlinuz".into()));
        job.files
            .push((image.clone(), "/opt/lupin/initramfs".into()));
    }
    for name in products::built(&parts.bin_dir) {
        job.files
            .push((parts.bin_dir.join(name), format!("/opt/lupin/bin/{name}")));
    }
    say!("booting the nested host; everything in it is emulated, so times are long");
    Ok(nested::run(&job).map(Ending::status)?)
}
