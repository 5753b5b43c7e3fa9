//! The nested host as a cargo test runner.
//!
//! Cargo calls a runner with a test binary and its arguments. The runner boots
//! the nested host, puts in what a test of the VMM needs, and runs the binary:
//!
//! | variable in there | meaning |
//! |---|---|
//! | `LUPIN_TEST_KERNEL` | a stock guest kernel |
//! | `LUPIN_TEST_INITRAMFS` | a guest image for it, with the agent if that was built |
//! | `LUPIN_BIN_DIR` | the directory of the products that were built |
//! | `LUPIN_TEST_CMDLINE` | words for the command line of guests, to save time |
//! | `LUPIN_TEST_DISK` | a disk with a whole system, if there is one |
//!
//! `LUPIN_NESTED_TIMEOUT` (seconds), `LUPIN_NESTED_CPUS`, `LUPIN_NESTED_MEMORY`,
//! `LUPIN_NESTED_CONSOLE` (a file) and `LUPIN_TEST_KERNEL_SERIES` (`6.1`, `6.12`)
//! on the outside change the defaults; `LUPIN_NESTED_DISK` (a file) is the disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use lupin_images::KernelTree;
use nix::sys::signal::Signal;

use super::{Ending, Job, NestedError};
use crate::host::{self, say};
use crate::products;
use crate::setup::{self, Cache, Component, Series};

/// Names the time limit of a test binary, in seconds.
pub(crate) const TIMEOUT: &str = "LUPIN_NESTED_TIMEOUT";

/// Names the file that becomes a disk of the host.
pub(crate) const DISK: &str = "LUPIN_NESTED_DISK";

/// Names the series of the guests' kernel.
pub(crate) const SERIES: &str = "LUPIN_TEST_KERNEL_SERIES";

/// What the VMM says when a guest's processor gives up. Stock kernels do not do that on a
/// processor that works; under emulation one in some hundred guests does.
const TRIPLE_FAULT: &str = "triple fault on vCPU";

const BIN_DIR: &str = "/opt/lupin/bin";
const BOOT_DIR: &str = "/opt/lupin/boot";

/// Runs a test binary in the nested host.
pub(crate) fn run(binary: &Path, args: Vec<String>) -> Result<Ending, NestedError> {
    // Cargo starts us; when it is killed, the tests end too.
    host::die_with_parent(Signal::SIGTERM);
    let binary = std::path::absolute(binary).map_err(|source| NestedError::Prepare {
        what: "the test's path",
        source,
    })?;
    if nothing_to_run(&binary, &args) {
        return Ok(Ending::Exited(0));
    }
    let series = series();
    let cache = setup::ensure(&[Component::Kernel(series), Component::Busybox])?;
    let folder = tempfile::tempdir().map_err(|source| NestedError::Prepare {
        what: "a temporary folder",
        source,
    })?;

    let mut job = Job::new(&binary, args);
    job.symptom = Some(TRIPLE_FAULT);
    guest_files(
        &mut job,
        &cache,
        series,
        &product_dir(&binary),
        folder.path(),
    )?;
    if let Some(disk) = std::env::var_os(DISK) {
        job.disks.push(disk.into());
        job.env.push(("LUPIN_TEST_DISK".into(), "/dev/vda".into()));
    }
    for (name, value) in std::env::vars() {
        let passed = ["LUPIN_", "RUST_", "CARGO_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if passed && !job.env.iter().any(|(there, _)| *there == name) && name != "LUPIN_CACHE" {
            job.env.push((name, value));
        }
    }
    job.timeout = Duration::from_secs(number(TIMEOUT).unwrap_or(1200));
    if let Some(cpus) = number("LUPIN_NESTED_CPUS").and_then(|n| u32::try_from(n).ok()) {
        job.cpus = cpus;
    }
    if let Ok(memory) = std::env::var("LUPIN_NESTED_MEMORY") {
        job.memory = memory;
    }
    job.console = std::env::var_os("LUPIN_NESTED_CONSOLE").map(PathBuf::from);
    super::run(&job)
}

/// Whether a test binary would run no test with these arguments. Booting a host for nothing takes
/// longer than asking.
fn nothing_to_run(binary: &Path, args: &[String]) -> bool {
    let list = Command::new(binary).args(args).arg("--list").output();
    // Whatever is not the test harness's answer is run.
    list.is_ok_and(|list| {
        let text = String::from_utf8_lossy(&list.stdout);
        let none = list.status.success()
            && text
                .lines()
                .any(|line| line.starts_with("0 tests, 0 bench"));
        if none {
            say!("{} has no such tests", binary.display());
        }
        none
    })
}

/// Puts the built products, a guest kernel and a guest image into the nested host.
fn guest_files(
    job: &mut Job,
    cache: &Cache,
    series: Series,
    directory: &Path,
    folder: &Path,
) -> Result<(), NestedError> {
    let kernel = KernelTree::open(&cache.kernel(series))?;
    let image_path = folder.join("initramfs");
    products::guest_image(cache, directory).write(&kernel, &image_path)?;

    let (kernel_there, image_there) = (
        format!("{BOOT_DIR}/vmlinuz-{series}"),
        format!("{BOOT_DIR}/initramfs-{series}"),
    );
    job.files
        .push((kernel.image().into(), kernel_there.clone()));
    job.files.push((image_path, image_there.clone()));
    for name in products::built(directory) {
        // Tests may name a product by the path that cargo compiled into them.
        let (here, there) = (directory.join(name), format!("{BIN_DIR}/{name}"));
        job.links
            .push((here.to_string_lossy().into_owned(), there.clone()));
        job.files.push((here, there));
    }
    job.env.push(("LUPIN_TEST_KERNEL".into(), kernel_there));
    job.env.push(("LUPIN_TEST_INITRAMFS".into(), image_there));
    job.env.push(("LUPIN_BIN_DIR".into(), BIN_DIR.into()));
    job.env
        .push(("LUPIN_TEST_CMDLINE".into(), super::GUEST_WORDS.into()));
    Ok(())
}

/// `target/TRIPLE/debug` for `target/TRIPLE/debug/deps/test-0123`.
fn product_dir(binary: &Path) -> PathBuf {
    let dir = binary.parent().unwrap_or(Path::new("/"));
    match dir.file_name() {
        Some(name) if name == "deps" || name == "examples" => dir.parent().unwrap_or(dir).into(),
        _ => dir.into(),
    }
}

fn series() -> Series {
    std::env::var(SERIES)
        .ok()
        .and_then(|name| Series::from_str(&name, true).ok())
        .unwrap_or(Series::V6_1)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}
