//! Downloads what tests and demo need, once, into the cache directory.
//!
//! Everything comes from Debian packages: kernels, a static busybox, QEMU 10 and
//! a text to count. They are downloaded and unpacked, not installed, so set-up
//! needs no root and changes nothing outside the cache:
//!
//! ```text
//! .cache/apt/          a private state of apt: its own sources, lists and archives
//! .cache/kernel-6.1/   one directory for each component, with a MANIFEST.json that
//! .cache/qemu/         names the packages in it and their hashes
//! ```
//!
//! A component appears complete or not at all (unpack beside, then rename), and
//! finished downloads are kept until then, so that an interrupted set-up goes on
//! where it stopped. A lock keeps two set-ups apart.

mod apt;
mod components;
mod sources;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::host::{self, RunError, say};
use apt::Apt;
pub(crate) use apt::SUITE as DEBIAN_SUITE;
pub(crate) use components::{Component, Series};

/// Why set-up did not finish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("{what} {}: {source}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "found no Debian archive in this machine's apt sources ({looked}); \
         set LUPIN_DEBIAN_MIRROR to the URI of one"
    )]
    NoMirror { looked: String },
    #[error("the package index has no {what}; is the mirror complete? ({detail})")]
    NoPackage { what: String, detail: String },
    #[error(
        "{} does not have the hash of the signed package index: wanted {wanted}, found {found}; \
         it was removed, run the same command again",
        path.display()
    )]
    Hash {
        path: PathBuf,
        wanted: String,
        found: String,
    },
    #[error("package {package} holds no {what}")]
    Content { package: String, what: String },
}

/// The downloaded components.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Where a component is unpacked.
    pub(crate) fn dir(&self, component: Component) -> PathBuf {
        self.root.join(component.dir_name())
    }

    /// The unpacked kernel package of a series.
    pub(crate) fn kernel(&self, series: Series) -> PathBuf {
        self.dir(Component::Kernel(series))
    }

    /// The static busybox.
    pub(crate) fn busybox(&self) -> PathBuf {
        let dir = self.dir(Component::Busybox);
        ["bin/busybox", "usr/bin/busybox"]
            .iter()
            .map(|path| dir.join(path))
            .find(|path| path.exists())
            .unwrap_or_else(|| dir.join("bin/busybox"))
    }

    /// An English text of several megabytes.
    pub(crate) fn text(&self) -> PathBuf {
        self.dir(Component::Text).join(components::TEXT_FILE)
    }

    fn has(&self, component: Component) -> bool {
        self.dir(component).join(apt::MANIFEST).is_file()
    }
}

/// An apt sources list of this machine's Debian archive.
pub(crate) fn debian_sources() -> Result<String, SetupError> {
    let mirrors = sources::Mirrors::find(Path::new("/etc/apt"))?;
    Ok(apt::sources_list(&mirrors))
}

/// Makes sure that the components are in the cache. Quick if they are.
pub(crate) fn ensure(components: &[Component]) -> Result<Cache, SetupError> {
    let cache = Cache {
        root: host::cache_dir(),
    };
    if components.iter().all(|component| cache.has(*component)) {
        return Ok(cache);
    }
    create_dir(&cache.root)?;
    let _lock = lock(&cache.root.join("setup.lock"))?;
    let missing: Vec<Component> = components
        .iter()
        .copied()
        .filter(|component| !cache.has(*component))
        .collect();
    if missing.is_empty() {
        return Ok(cache);
    }
    let started = Instant::now();
    let mut apt = Apt::open(&cache.root)?;
    for (index, component) in missing.iter().enumerate() {
        say!(
            "set-up {}/{}: {}",
            index + 1,
            missing.len(),
            component.describe()
        );
        install(&cache, &mut apt, *component)?;
    }
    say!(
        "set-up finished in {:.0} s; kept in {}",
        started.elapsed().as_secs_f32(),
        cache.root.display()
    );
    Ok(cache)
}

fn install(cache: &Cache, apt: &mut Apt, component: Component) -> Result<(), SetupError> {
    let packages = apt.download(component)?;
    let target = cache.dir(component);
    let beside = cache.root.join(format!("{}.new", component.dir_name()));
    remove_dir(&beside)?;
    create_dir(&beside)?;
    for package in &packages {
        host::run_ok(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(&package.path)
                .arg(&beside),
        )?;
    }
    component.finish(&beside)?;
    apt::write_manifest(&beside, &packages)?;
    // What is there lacks a manifest: it is not ours or from an older version.
    remove_dir(&target)?;
    fs::rename(&beside, &target).map_err(file_error("cannot move to", &target))?;
    for package in packages {
        // Only to save space.
        let _ = fs::remove_file(package.path);
    }
    Ok(())
}

fn lock(path: &Path) -> Result<Flock<File>, SetupError> {
    let open = || {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
    };
    let mut file = open().map_err(file_error("cannot open", path))?;
    let mut told = false;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, errno)) => return Err(file_error("cannot lock", path)(errno.into())),
        }
        if !told {
            say!("waiting for another set-up that holds {}", path.display());
            told = true;
        }
        if host::interrupted() {
            return Err(RunError::Interrupted.into());
        }
        std::thread::sleep(host::POLL);
    }
}

fn create_dir(path: &Path) -> Result<(), SetupError> {
    fs::create_dir_all(path).map_err(file_error("cannot create", path))
}

fn remove_dir(path: &Path) -> Result<(), SetupError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn file_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SetupError + 'a {
    move |source| SetupError::File {
        what,
        path: path.into(),
        source,
    }
}
