//! `cargo xtask package`: the agent's Debian package.
//!
//! The files are laid out in a folder and packed by `dpkg-deb`, which is on every machine that has
//! apt, and so on every machine that this project is built on. The same inputs give the same bytes.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::{self, RunError, say};
use crate::products::{self, Profile};

/// The time that everything in the package carries: that of its changelog.
const TIME: &str = "1793491200";

/// The program that the package is for, and named after.
const AGENT: &str = "lupin-guest-agent";

/// What it installs in `/usr/bin`.
const PROGRAMS: [&str; 2] = [AGENT, "lupin-supervise"];

/// Where the files of the package are in the checkout.
const SOURCES: &str = "guest-agent/debian";

/// Source, place in the package, mode.
const FILES: [(&str, &str, u32); 10] = [
    (
        "lupin-guest-agent.service",
        "usr/lib/systemd/system/lupin-guest-agent.service",
        0o644,
    ),
    (
        "sysusers.conf",
        "usr/lib/sysusers.d/lupin-guest-agent.conf",
        0o644,
    ),
    (
        "modules-load.conf",
        "usr/lib/modules-load.d/lupin.conf",
        0o644,
    ),
    ("modprobe.conf", "usr/lib/modprobe.d/lupin.conf", 0o644),
    ("sysctl.conf", "usr/lib/sysctl.d/50-lupin.conf", 0o644),
    (
        "lintian-overrides",
        "usr/share/lintian/overrides/lupin-guest-agent",
        0o644,
    ),
    (
        "copyright",
        "usr/share/doc/lupin-guest-agent/copyright",
        0o644,
    ),
    (
        "README.Debian",
        "usr/share/doc/lupin-guest-agent/README.Debian",
        0o644,
    ),
    (
        "grub.cfg",
        "usr/share/doc/lupin-guest-agent/examples/grub.cfg",
        0o644,
    ),
    // Packed below, which gives it its Debian name.
    (
        "changelog",
        "usr/share/doc/lupin-guest-agent/changelog",
        0o644,
    ),
];

const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Arguments of `cargo xtask package`.
#[derive(Debug, clap::Args)]
pub(crate) struct PackageArgs {
    /// The folder to write the package into
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    output: PathBuf,
    /// With the development build of the agent instead of the release build
    #[arg(long, conflicts_with = "bin_dir")]
    dev: bool,
    /// With the agent in this directory; build none
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackageError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl Fn(io::Error) -> PackageError + '_ {
    move |source| PackageError::File {
        path: path.into(),
        source,
    }
}

/// Builds the agent and its package; returns where that is.
pub(crate) fn run(args: &PackageArgs) -> Result<PathBuf, PackageError> {
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None if args.dev => products::build(Profile::Dev)?,
        None => products::build(Profile::Release)?,
    };
    build(&bin_dir, &args.output)
}

/// Packs the programs in `bin_dir` into a package in `folder`; returns where that is.
pub(crate) fn build(bin_dir: &Path, folder: &Path) -> Result<PathBuf, PackageError> {
    let staged = tempfile::tempdir().map_err(at(Path::new("a temporary folder")))?;
    let root = staged.path();
    // Inside the temporary folder, which is closed to others.
    let tree = root.join("tree");
    let version = env!("CARGO_PKG_VERSION");
    let sources = host::checkout().join(SOURCES);
    let read = |name: &str| {
        let path = sources.join(name);
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        Ok::<_, PackageError>(text.replace("@VERSION@", version))
    };

    for name in PROGRAMS {
        let program = bin_dir.join(name);
        put(&tree.join("usr/bin").join(name), 0o755, |to| {
            fs::copy(&program, to).map(|_| ()).map_err(at(&program))
        })?;
    }
    for (source, place, mode) in FILES {
        let text = read(source)?;
        put(&tree.join(place), mode, |to| {
            fs::write(to, &text).map_err(at(to))
        })?;
    }
    let changelog = tree.join("usr/share/doc/lupin-guest-agent/changelog");
    host::run_ok(Command::new("gzip").arg("-9n").arg(&changelog))?;

    let size = tree_size(&tree)?.div_ceil(1024).to_string();
    let control = read("control")?.replace("@SIZE@", &size);
    put(&tree.join("DEBIAN/control"), 0o644, |to| {
        fs::write(to, &control).map_err(at(to))
    })?;
    for script in SCRIPTS {
        let text = read(script)?;
        put(&tree.join("DEBIAN").join(script), 0o755, |to| {
            fs::write(to, &text).map_err(at(to))
        })?;
    }

    fs::create_dir_all(folder).map_err(at(folder))?;
    let package = folder.join(format!("{AGENT}_{version}_amd64.deb"));
    host::run_ok(
        Command::new("dpkg-deb")
            .env("SOURCE_DATE_EPOCH", TIME)
            // xz, which every Debian's dpkg can unpack.
            .args(["--root-owner-group", "-Zxz", "--build"])
            .arg(&tree)
            .arg(&package)
            .stdout(Stdio::null()),
    )?;
    say!("the agent's package is {}", package.display());
    Ok(package)
}

/// Makes a file with its folders, whatever the umask is.
fn put(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&Path) -> Result<(), PackageError>,
) -> Result<(), PackageError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let missing: Vec<&Path> = folder.ancestors().take_while(|f| !f.exists()).collect();
    fs::create_dir_all(folder).map_err(at(folder))?;
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(at(path))
    };
    for folder in missing {
        set(folder, 0o755)?;
    }
    write(path)?;
    set(path, mode)
}

fn tree_size(folder: &Path) -> Result<u64, PackageError> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let path = entry.map_err(at(folder))?.path();
        let meta = fs::symlink_metadata(&path).map_err(at(&path))?;
        bytes += if meta.is_dir() {
            tree_size(&path)?
        } else {
            meta.len()
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(flag: &str, package: &Path) -> String {
        host::output_of(Command::new("dpkg-deb").arg(flag).arg(package)).unwrap()
    }

    #[test]
    fn a_package_holds_what_it_should_and_is_the_same_every_time() {
        let folder = tempfile::tempdir().unwrap();
        for name in PROGRAMS {
            fs::write(folder.path().join(name), b"a program").unwrap();
        }
        let package = build(folder.path(), folder.path()).unwrap();
        let contents = ask("--contents", &package);
        for (_, place, _) in FILES {
            assert!(contents.contains(place), "{place}: {contents}");
        }
        assert!(contents.contains("changelog.gz"), "{contents}");
        assert!(
            contents.lines().all(|line| line.contains(" root/root ")),
            "{contents}"
        );
        let programs: Vec<_> = contents.lines().filter(|l| l.starts_with("-rwx")).collect();
        assert_eq!(programs.len(), PROGRAMS.len(), "{programs:?}");
        for (line, name) in programs.iter().zip(PROGRAMS) {
            assert!(line.ends_with(&format!("usr/bin/{name}")), "{line}");
        }
        let control = ask("--field", &package);
        for blank in ["@VERSION@", "@SIZE@"] {
            assert!(!control.contains(blank), "{control}");
        }
        let first = fs::read(&package).unwrap();
        build(folder.path(), folder.path()).unwrap();
        assert!(fs::read(&package).unwrap() == first);
    }

    #[test]
    fn a_missing_agent_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = build(Path::new("/nonexistent"), folder.path()).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/lupin-guest-agent"),
            "{error}"
        );
    }
}
