//! `cargo xtask fence --nested`: the proof of the fence on guests with stock kernels, many of them
//! in one nested host.
//!
//! A guest here boots a kernel, two modules and one program that stores, and nothing else: a boot
//! takes a fraction of what it takes with an agent and its services, and there are hundreds.

use std::path::Path;
use std::time::Duration;

use lupin_images::{Archive, ImageError, KernelTree};

use crate::nested::{self, Ending, Job, NestedError};
use crate::products::{self, Profile};
use crate::prover::{self, Prover};
use crate::setup::{self, Component, Series};

/// The flag that asks for it.
pub(crate) const FLAG: &str = "--nested";
/// How long it may take, whatever was asked for.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// What the guests boot.
const SERIES: Series = Series::V6_1;
const FOLDER: &str = "/opt/lupin";

/// Runs the proof in the nested host; `words` are its arguments.
pub(crate) fn run(words: &[String]) -> Result<Ending, NestedError> {
    // Builds the products as well.
    let program = prover::command(Prover::Fence)?.get_program().to_owned();
    let program = Path::new(&program);
    let cache = setup::ensure(&[Component::Kernel(SERIES)])?;
    let kernel = KernelTree::open(&cache.kernel(SERIES))?;
    let folder = tempfile::tempdir().map_err(prepare("a temporary folder"))?;
    let initramfs = folder.path().join("initramfs");
    let image = guest(&kernel, program)?;
    std::fs::write(&initramfs, image.to_bytes()).map_err(prepare("the guests' image"))?;

    let there = |name: &str| format!("{FOLDER}/{name}");
    let (kernel_there, initramfs_there) = (there("vmlinuz"), there("initramfs"));
    let mut args: Vec<String> = words.iter().filter(|w| *w != FLAG).cloned().collect();
    args.extend(["--node".into(), "kernel".into()]);
    args.extend(["--bin-dir".into(), FOLDER.into()]);
    args.extend(["--kernel".into(), kernel_there.clone()]);
    args.extend(["--initramfs".into(), initramfs_there.clone()]);
    let mut job = Job::new(program, args);
    job.files.push((kernel.image().into(), kernel_there));
    job.files.push((initramfs, initramfs_there));
    let vmm = products::directory(Profile::Release).join("lupin-vmm");
    job.files.push((vmm, there("lupin-vmm")));
    job.timeout = LIMIT;
    nested::run(&job)
}

/// What such a guest boots: the program is its first process.
fn guest(kernel: &KernelTree, program: &Path) -> Result<Archive, ImageError> {
    let mut archive = Archive::new();
    archive.char_device("/dev/console", 0o600, 5, 1)?;
    for path in ["/proc", "/sys", "/dev"] {
        archive.directory(path, 0o755)?;
    }
    archive.host_program(program, "/init")?;
    archive.kernel_modules(kernel, &["dax_hmem", "device_dax"])?;
    Ok(archive)
}

fn prepare(what: &'static str) -> impl Fn(std::io::Error) -> NestedError {
    move |source| NestedError::Prepare { what, source }
}
