//! A program that proves or measures, run in the nested host with guests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lupin_images::KernelTree;

use crate::nested::{self, Ending, Job, NestedError};
use crate::products::{self, Profile};

/// The flag that asks for it.
pub(crate) const FLAG: &str = "--nested";
/// How long it may take, whatever was asked for.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
const FOLDER: &str = "/opt/lupin";
/// The programs' flag for their report as JSON, and where they write that in the nested host.
const REPORT: &str = "--json";
const REPORT_THERE: &str = "/tmp/report.json";

/// Runs `program` with `words` there, but for [`FLAG`], and with guests that boot this kernel and
/// initramfs. `products` are the others that it runs.
pub(crate) fn run(
    program: &Path,
    words: &[String],
    kernel: &KernelTree,
    initramfs: PathBuf,
    products: &[&str],
) -> Result<Ending, NestedError> {
    let there = |name: &str| format!("{FOLDER}/{name}");
    let (kernel_there, initramfs_there) = (there("vmlinuz"), there("initramfs"));
    let mut args: Vec<String> = words.iter().filter(|w| *w != FLAG).cloned().collect();
    let report = take_report(&mut args);
    if report.is_some() {
        args.extend([REPORT.into(), REPORT_THERE.into()]);
    }
    args.extend(["--bin-dir".into(), FOLDER.into()]);
    args.extend(["--kernel".into(), kernel_there.clone()]);
    args.extend(["--initramfs".into(), initramfs_there.clone()]);
    let mut job = Job::new(program, args);
    job.files.push((kernel.image().into(), kernel_there));
    job.files.push((initramfs, initramfs_there));
    for name in products {
        let here = products::directory(Profile::Release).join(name);
        job.files.push((here, there(name)));
    }
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

/// What could not be prepared.
pub(crate) fn prepare(what: &'static str) -> impl Fn(std::io::Error) -> NestedError {
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
