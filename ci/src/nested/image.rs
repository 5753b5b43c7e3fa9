//! The initramfs of the nested host, made anew for each run.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lupin_images::{Archive, KernelTree};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Job, NestedError};
use crate::host;
use crate::setup::Cache;

/// Modules of the nested host: the port to the outside, disks, and KVM.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "irqbypass",
    "kvm-amd",
];

/// What to run, as JSON.
pub(super) const JOB_PATH: &str = "/etc/nested-job.json";

/// A kernel and an initramfs that lives in memory only.
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: OwnedFd,
}

pub(super) fn build(cache: &Cache, job: &Job) -> Result<Image, NestedError> {
    let kernel = KernelTree::open(&cache.kernel(job.kernel))?;
    let mut archive = Archive::new();
    archive.char_device("/dev/console", 0o600, 5, 1)?;
    for path in [
        "/proc",
        "/sys",
        "/run",
        "/root",
        "/mnt",
        "/var/log",
        "/etc",
        "/usr/sbin",
    ] {
        archive.directory(path, 0o755)?;
    }
    archive.directory("/tmp", 0o1777)?;
    for (path, target) in [
        ("/bin", "usr/bin"),
        ("/sbin", "usr/sbin"),
        ("/lib", "usr/lib"),
    ] {
        archive.symlink(path, target)?;
    }
    archive.file(
        "/etc/passwd",
        0o644,
        *b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    archive.file("/etc/group", 0o644, *b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.host_program(&cache.busybox(), "/usr/bin/busybox")?;
    archive.host_program(host::this_program(), "/init")?;
    archive.kernel_modules(&kernel, &MODULES)?;

    let program = place_program(&mut archive, &job.program)?;
    for (here, there) in &job.files {
        archive.host_file(here, there)?;
    }
    for (link, target) in &job.links {
        archive.symlink(link, target)?;
    }
    let description = serde_json::json!({
        "program": program,
        "args": job.args,
        "env": job.env,
        "result": job.result.as_ref().map(|(there, _)| there),
    });
    archive.file(JOB_PATH, 0o644, description.to_string())?;

    let initramfs = memfd_create("nested-initramfs", MFdFlags::empty())
        .map_err(|errno| prepare("memory for the image")(errno.into()))?;
    let mut file = io::BufWriter::with_capacity(1 << 20, std::fs::File::from(initramfs));
    archive
        .write_to(&mut file)
        .map_err(prepare("writing the image"))?;
    file.flush().map_err(prepare("writing the image"))?;
    let file = file
        .into_inner()
        .map_err(|error| prepare("writing the image")(error.into_error()))?;
    Ok(Image {
        kernel: kernel.image().into(),
        initramfs: file.into(),
    })
}

/// Puts the program into the image and returns what to execute there. A bare name that is no file
/// here means a program of the nested host.
fn place_program(archive: &mut Archive, program: &Path) -> Result<String, NestedError> {
    let bare = program.components().count() == 1 && !program.exists();
    if bare {
        return Ok(program.to_string_lossy().into_owned());
    }
    if program == host::this_program() {
        return Ok("/init".into());
    }
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let there = format!("/opt/nested/{name}");
    archive.host_program(program, &there)?;
    Ok(there)
}

fn prepare(what: &'static str) -> impl Fn(io::Error) -> NestedError {
    move |source| NestedError::Prepare { what, source }
}
