//! `cargo xtask fence --nested`: the proof of the fence on guests with stock kernels, many of them
//! in one nested host.
//!
//! A guest here boots a kernel, two modules and one program that stores, and nothing else: a boot
//! takes a fraction of what it takes with an agent and its services, and there are hundreds.

use std::path::{Path, PathBuf};
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
/// The program's flag for its report as JSON, and where it writes that in the nested host.
const REPORT: &str = "--json";
const REPORT_THERE: &str = "/tmp/report.json";

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
    let report = take_report(&mut args);
    if report.is_some() {
        args.extend([REPORT.into(), REPORT_THERE.into()]);
    }
    args.extend(["--node".into(), "kernel".into()]);
    args.extend(["--bin-dir".into(), FOLDER.into()]);
    args.extend(["--kernel".into(), kernel_there.clone()]);
    args.extend(["--initramfs".into(), initramfs_there.clone()]);
    let mut job = Job::new(program, args);
    job.files.push((kernel.image().into(), kernel_there));
    job.files.push((initramfs, initramfs_there));
    let vmm = products::directory(Profile::Release).join("lupin-vmm");
    job.files.push((vmm, there("lupin-vmm")));
    job.result = report.map(|here| (REPORT_THERE.into(), here));
    job.timeout = LIMIT;
    nested::run(&job)
}

/// Takes the file of the report out of the arguments: it is one of this machine.
fn take_report(args: &mut Vec<String>) -> Option<PathBuf> {
    let at = args
        .iter()
        .position(|word| word == REPORT || word.starts_with("--json="))?;
    let word = args.remove(at);
    match word.split_once('=') {
        Some((_, file)) => Some(file.into()),
        // Without a file the program complains, as it does everywhere.
        None if at == args.len() => {
            args.push(word);
            None
        }
        None => Some(args.remove(at).into()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_written_here_and_not_in_the_nested_host() {
        let taken = |words: &[&str]| {
            let mut args: Vec<String> = words.iter().map(ToString::to_string).collect();
            (take_report(&mut args), args.join(" "))
        };
        let here = Some(PathBuf::from("r.json"));
        assert_eq!(taken(&["--count", "3"]), (None, "--count 3".into()));
        assert_eq!(
            taken(&["--json", "r.json", "-v"]),
            (here.clone(), "-v".into())
        );
        assert_eq!(taken(&["-v", "--json=r.json"]), (here, "-v".into()));
        assert_eq!(taken(&["-v", "--json"]), (None, "-v --json".into()));
    }
}
