//! `cargo xtask image --debian`: a Debian on a disk, with the agent's package installed.
//!
//! `mmdebstrap` makes the root file system from this machine's Debian archive, `dpkg` installs the
//! package as a user would, and `mke2fs` puts all of it into an image without mounting anything. The
//! kernel is the one of the initramfs, which loads the disk's driver and goes on to the root there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use lupin_images::KernelTree;

use crate::host::{self, RunError, say};
use crate::package::{self, PackageError};
use crate::products;
use crate::setup::{self, SetupError};

/// What the root file system holds besides the packages that every Debian has.
const PACKAGES: &str = "systemd-sysv,udev,kmod,procps,iproute2";

/// Documentation and translations: two thirds of a small system.
const LEFT_OUT: [&str; 4] = [
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// Room for what nodes write, in MiB.
const ROOM: u64 = 128;

/// Makes the root file system in `$1` a node's.
const CUSTOMIZE: &str = r#"#!/bin/sh
set -e
mkdir -p "$1/usr/lib/modules"
cp -a "$LUPIN_MODULES" "$1/usr/lib/modules/"
chroot "$1" depmod "${LUPIN_MODULES##*/}"
cp "$LUPIN_PACKAGE" "$1/root/agent.deb"
chroot "$1" dpkg --install /root/agent.deb
rm "$1/root/agent.deb"
for program in $LUPIN_PROGRAMS; do
    cp "$program" "$1/usr/bin/"
done
# On its console only: nothing in here listens on a network.
chroot "$1" passwd --delete root
# Every node makes its own.
: >"$1/etc/machine-id"
echo lupin >"$1/etc/hostname"
"#;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebianError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the size of the root file system is unknown: du says {0:?}")]
    Size(String),
}

fn at(path: &Path) -> impl Fn(io::Error) -> DebianError + '_ {
    move |source| DebianError::File {
        path: path.into(),
        source,
    }
}

/// Builds the image `out` for the kernel, with the products in `bin_dir`.
pub(crate) fn build(kernel: &KernelTree, bin_dir: &Path, out: &Path) -> Result<(), DebianError> {
    let started = Instant::now();
    need_mmdebstrap()?;
    let folder = tempfile::tempdir().map_err(at(Path::new("a temporary folder")))?;
    let path = |name: &str| folder.path().join(name);
    let package = package::build(bin_dir, folder.path())?;
    let hook = path("customize");
    fs::write(&hook, CUSTOMIZE).map_err(at(&hook))?;
    host::run_ok(Command::new("chmod").arg("755").arg(&hook))?;
    let sources = path("sources.list");
    fs::write(&sources, setup::debian_sources()?).map_err(at(&sources))?;
    let programs: Vec<String> = products::built(bin_dir)
        .into_iter()
        .filter(|name| {
            ![
                "lupin-vmm",
                "lupin-fabricd",
                "lupin-guest-agent",
                "lupin-supervise",
            ]
            .contains(name)
        })
        .map(|name| bin_dir.join(name).to_string_lossy().into_owned())
        .collect();

    let tree = Tree(path("root"));
    host::run_ok(
        host::as_root(Path::new("env"))
            .arg(variable("LUPIN_MODULES", kernel.modules_dir()))
            .arg(variable("LUPIN_PACKAGE", &package))
            .arg(format!("LUPIN_PROGRAMS={}", programs.join(" ")))
            .args(["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"])
            .arg(format!("--include={PACKAGES}"))
            .args(LEFT_OUT.map(|rule| format!("--dpkgopt={rule}")))
            .arg(format!("--customize-hook={}", hook.display()))
            .arg(setup::DEBIAN_SUITE)
            .arg(&tree.0)
            .arg(&sources)
            .stdout(host::our_stderr()),
    )?;
    let size = megabytes(&tree.0)? * 11 / 10 + ROOM;
    let beside = out.with_extension("new");
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(&beside)(e)),
        _ => {}
    }
    host::run_ok(
        host::as_root(Path::new("mke2fs"))
            .args(["-q", "-t", "ext4", "-L", "lupin", "-d"])
            .arg(&tree.0)
            .arg(&beside)
            .arg(format!("{size}M")),
    )?;
    fs::rename(&beside, out).map_err(at(out))?;
    say!(
        "Debian in {} ({size} MiB), after {:.0} s",
        out.display(),
        started.elapsed().as_secs_f32()
    );
    Ok(())
}

fn variable(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Installs it, if it is not there.
fn need_mmdebstrap() -> Result<(), RunError> {
    let there = Command::new("mmdebstrap")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if there {
        return Ok(());
    }
    say!("installing mmdebstrap, which makes Debian root file systems");
    host::run_ok(
        host::as_root(Path::new("apt-get"))
            .args(["install", "--yes", "--quiet", "--no-install-recommends"])
            .args(["mmdebstrap", "e2fsprogs"])
            .stdout(host::our_stderr()),
    )
}

fn megabytes(folder: &Path) -> Result<u64, DebianError> {
    let mut du = host::as_root(Path::new("du"));
    let said = host::output_of(du.args(["-sm", "--apparent-size"]).arg(folder))?;
    let number = said.split_whitespace().next().and_then(|n| n.parse().ok());
    number.ok_or(DebianError::Size(said))
}

/// A folder whose content is root's.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        // Only to save space: the temporary folder around it is removed as well.
        let _ = host::as_root(Path::new("rm"))
            .arg("-rf")
            .arg(&self.0)
            .status();
    }
}
