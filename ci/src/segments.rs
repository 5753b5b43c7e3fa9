//! `cargo xtask bench segments --nested`: what a segment costs in a guest with a stock kernel, where
//! each is a device of its own.

use std::path::Path;

use lupin_images::KernelTree;

use crate::nested::{Ending, NestedError};
use crate::nested_prover::{self, prepare};
use crate::products::{self, Profile};
use crate::prover::{self, Prover};
use crate::setup::{self, Component, Series};

/// What the guest boots.
const SERIES: Series = Series::V6_1;

/// Runs the suite in the nested host; `words` are its arguments.
pub(crate) fn run(words: &[String]) -> Result<Ending, NestedError> {
    // Builds the products as well.
    let program = prover::command(Prover::PodBench)?.get_program().to_owned();
    let program = Path::new(&program);
    let cache = setup::ensure(&[Component::Kernel(SERIES), Component::Busybox])?;
    let kernel = KernelTree::open(&cache.kernel(SERIES))?;
    let folder = tempfile::tempdir().map_err(prepare("a temporary folder"))?;
    let initramfs = folder.path().join("initramfs");
    products::guest_image(&cache, &products::directory(Profile::Release))
        .program(program, "/usr/bin/lupin-measure")
        .write(&kernel, &initramfs)?;
    let products = ["lupin-vmm", "lupin-fabricd"];
    nested_prover::run(program, words, &kernel, initramfs, &products)
}
