//! `cargo xtask fence --nested`: the proof of the fence on guests with stock kernels, many of them
//! in one nested host.
//!
//! A guest here boots a kernel, two modules and one program that stores, and nothing else: a boot
//! takes a fraction of what it takes with an agent and its services, and there are hundreds.

use std::path::Path;

use lupin_images::{Archive, ImageError, KernelTree};

use crate::nested::{Ending, NestedError};
use crate::nested_prover::{self, prepare};
use crate::prover::{self, Prover};
use crate::setup::{self, Component, Series};

/// What the guests boot.
const SERIES: Series = Series::V6_1;

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
    let mut words = words.to_vec();
    words.extend(["--node".into(), "kernel".into()]);
    nested_prover::run(program, &words, &kernel, initramfs, &["lupin-vmm"])
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
