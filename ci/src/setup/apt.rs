//! A private apt: the machine's mirror, keys and proxy, but its own sources,
//! lists and archives, all inside the cache.
//!
//! The suites are always those of Debian 12 and its backports, whatever the
//! machine runs, so that tests see the same kernels everywhere. The list of
//! installed packages is empty for it: what QEMU needs is downloaded whole, and
//! runs with its own C library.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::components::{Component, Wanted};
use super::sources::Mirrors;
use super::{SetupError, create_dir, file_error};
use crate::host::{self, say};

/// Lists the packages of a component; its presence means that the component is complete.
pub(super) const MANIFEST: &str = "MANIFEST.json";

/// Debian 12.
pub(crate) const SUITE: &str = "bookworm";
const BACKPORTS: &str = "bookworm-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Older package lists are fetched again before anything is downloaded.
const LISTS_ARE_FRESH: Duration = Duration::from_secs(6 * 3600);

/// A downloaded package.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) path: PathBuf,
    sha256: String,
}

/// What `apt-get --print-uris` says about a package.
#[derive(Debug, PartialEq, Eq)]
struct Offer {
    file: String,
    bytes: u64,
    sha256: String,
}

pub(super) struct Apt {
    dir: PathBuf,
    updated: bool,
}

impl Apt {
    /// Prepares the private apt under `cache`. Nothing is downloaded yet.
    pub(super) fn open(cache: &Path) -> Result<Self, SetupError> {
        let dir = cache.join("apt");
        for part in [
            "state/lists/partial",
            "cache/archives/partial",
            "etc/empty",
            "debs",
        ] {
            create_dir(&dir.join(part))?;
        }
        let mirrors = Mirrors::find(Path::new("/etc/apt"))?;
        let apt = Self {
            dir,
            updated: false,
        };
        apt.write("state/status", "")?;
        apt.write("etc/sources.list", &sources_list(&mirrors))?;
        apt.write("etc/apt.conf", &apt.configuration()?)?;
        Ok(apt)
    }

    /// Downloads the packages of a component and checks them.
    pub(super) fn download(&mut self, component: Component) -> Result<Vec<Package>, SetupError> {
        if !self.updated && !self.lists_are_fresh() {
            self.update()?;
        }
        match self.try_download(component) {
            // The mirror may have moved on since the lists were fetched.
            Err(error) if !self.updated && !host::interrupted() => {
                say!("{error}; fetching the package lists again");
                self.update()?;
                self.try_download(component)
            }
            result => result,
        }
    }

    fn try_download(&self, component: Component) -> Result<Vec<Package>, SetupError> {
        let offers = self.find(component)?;
        let debs = self.dir.join("debs");
        let missing: Vec<&Offer> = offers
            .iter()
            .filter(|offer| !debs.join(&offer.file).is_file())
            .collect();
        if !missing.is_empty() {
            let megabytes = missing.iter().map(|o| o.bytes).sum::<u64>() as f64 / 1e6;
            say!("downloading {} packages, {megabytes:.1} MB", missing.len());
            host::run_ok(
                self.apt_get("download")
                    .args(missing.iter().filter_map(|offer| offer.name_and_version()))
                    .current_dir(&debs)
                    .stdout(host::our_stderr()),
            )?;
        }
        offers
            .into_iter()
            .map(|offer| {
                let path = debs.join(offer.file);
                check_hash(&path, &offer.sha256)?;
                Ok(Package {
                    path,
                    sha256: offer.sha256,
                })
            })
            .collect()
    }

    /// The packages of a component with their sizes and hashes.
    fn find(&self, component: Component) -> Result<Vec<Offer>, SetupError> {
        let suite = if component.is_in_backports() {
            BACKPORTS
        } else {
            SUITE
        };
        let printed = match component.wanted() {
            Wanted::Packages(names) => {
                host::output_of(self.apt_get("download").arg("--print-uris").args(names))?
            }
            Wanted::DependsOf { meta, prefix } => {
                let names = self.depends_of(meta, component.is_in_backports(), prefix)?;
                host::output_of(self.apt_get("download").arg("--print-uris").args(names))?
            }
            Wanted::Closure(name) => host::output_of(
                self.apt_get("install")
                    .args([
                        "--print-uris",
                        "--yes",
                        "--no-install-recommends",
                        "-t",
                        suite,
                    ])
                    .arg(name),
            )?,
        };
        let offers: Vec<Offer> = printed.lines().filter_map(Offer::parse).collect();
        if offers.is_empty() {
            return Err(SetupError::NoPackage {
                what: component.describe(),
                detail: format!("suite {suite}"),
            });
        }
        Ok(offers)
    }

    /// The dependencies of `meta` that start with `prefix`, as `name=version`.
    fn depends_of(
        &self,
        meta: &str,
        backports: bool,
        prefix: &str,
    ) -> Result<Vec<String>, SetupError> {
        // Without a suite, apt takes the newest of Debian 12 and its security updates: backports
        // rank lower.
        let wanted = if backports {
            format!("{meta}/{BACKPORTS}")
        } else {
            meta.to_owned()
        };
        let mut command = self.command("apt-cache");
        let shown = host::output_of(command.args(["show", "--no-all-versions"]).arg(&wanted))?;
        let depends = shown
            .lines()
            .find_map(|line| line.strip_prefix("Depends:"))
            .map(|list| exact_dependencies(list, prefix))
            .unwrap_or_default();
        if depends.is_empty() {
            return Err(SetupError::NoPackage {
                what: wanted,
                detail: format!("expected it to depend on {prefix}..."),
            });
        }
        Ok(depends)
    }

    fn update(&mut self) -> Result<(), SetupError> {
        say!("fetching Debian's package lists");
        host::run_ok(self.apt_get("update").stdout(host::our_stderr()))?;
        self.write("state/updated", "")?;
        self.updated = true;
        Ok(())
    }

    fn lists_are_fresh(&self) -> bool {
        fs::metadata(self.dir.join("state/updated"))
            .and_then(|stamp| stamp.modified())
            .is_ok_and(|then| then.elapsed().is_ok_and(|age| age < LISTS_ARE_FRESH))
    }

    fn apt_get(&self, verb: &str) -> Command {
        let mut command = self.command("apt-get");
        // One line for each download, no progress bar that redraws itself.
        command.args(["--quiet=1", verb]);
        command
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.dir.join("etc/apt.conf"))
            .env("LC_ALL", "C.UTF-8");
        command
    }

    fn configuration(&self) -> Result<String, SetupError> {
        let machine = host::output_of(Command::new("apt-config").arg("dump"))?;
        Ok(configuration(&self.dir, &machine))
    }

    fn write(&self, name: &str, content: &str) -> Result<(), SetupError> {
        let path = self.dir.join(name);
        fs::write(&path, content).map_err(file_error("cannot write", &path))
    }
}

impl Offer {
    /// `'URI' file bytes SHA256:hash`
    fn parse(line: &str) -> Option<Self> {
        let mut words = line
            .strip_prefix('\'')?
            .split_once("' ")?
            .1
            .split_whitespace();
        let file = words.next()?;
        let bytes = words.next()?.parse().ok()?;
        let sha256 = words.next()?.strip_prefix("SHA256:")?;
        let plain = !file.contains('/') && file.ends_with(".deb");
        plain.then(|| Self {
            file: file.into(),
            bytes,
            sha256: sha256.into(),
        })
    }

    /// `name=version` from the file's name, in which apt writes a colon as `%3a`.
    fn name_and_version(&self) -> Option<String> {
        let mut parts = self.file.split('_');
        let (name, version) = (parts.next()?, parts.next()?);
        Some(format!("{name}={}", version.replace("%3a", ":")))
    }
}

/// `a (= 1), b (>= 2)` with prefix `a` gives `a=1`.
fn exact_dependencies(list: &str, prefix: &str) -> Vec<String> {
    list.split(',')
        .filter_map(|dependency| {
            let mut words = dependency.split_whitespace();
            let name = words.next().filter(|name| name.starts_with(prefix))?;
            match (words.next(), words.next()) {
                (Some("(="), Some(version)) => {
                    Some(format!("{name}={}", version.trim_end_matches(')')))
                }
                _ => Some(name.to_owned()),
            }
        })
        .collect()
}

pub(super) fn sources_list(mirrors: &Mirrors) -> String {
    let keys = if Path::new(KEYRING).exists() {
        format!("signed-by={KEYRING} ")
    } else {
        String::new()
    };
    let mut list = String::new();
    let mut line = |uri: &str, suite: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(list, "deb [{keys}arch=amd64] {uri} {suite} main");
    };
    line(&mirrors.main, SUITE);
    line(&mirrors.main, BACKPORTS);
    if let Some(security) = &mirrors.security {
        line(security, &format!("{SUITE}-security"));
    }
    list
}

/// apt's configuration: our own directories, and how the machine reaches its mirrors.
fn configuration(dir: &Path, machine: &str) -> String {
    let dir = dir.display();
    let mut text = format!(
        r#"Dir::State "{dir}/state";
Dir::State::status "{dir}/state/status";
Dir::Cache "{dir}/cache";
Dir::Etc::main "{dir}/etc/none";
Dir::Etc::parts "{dir}/etc/empty";
Dir::Etc::sourcelist "{dir}/etc/sources.list";
Dir::Etc::sourceparts "{dir}/etc/empty";
Dir::Etc::preferences "{dir}/etc/none";
Dir::Etc::preferencesparts "{dir}/etc/empty";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Retries "3";
Debug::NoLocking "true";
"#
    );
    for line in machine.lines() {
        // Proxies, timeouts, validity checks; but not which lists the machine keeps, or how.
        let kept = line.starts_with("Acquire::")
            && ![
                "IndexTargets",
                "Languages",
                "ForceHash",
                "Retries",
                "GzipIndexes",
            ]
            .iter()
            .any(|name| line["Acquire::".len()..].starts_with(name));
        if kept {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn check_hash(path: &Path, wanted: &str) -> Result<(), SetupError> {
    let mut file = File::open(path).map_err(file_error("cannot open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file
            .read(&mut buffer)
            .map_err(file_error("cannot read", path))?
        {
            0 => break,
            length => hash.update(&buffer[..length]),
        }
    }
    let found = hash
        .finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
    if found == wanted {
        return Ok(());
    }
    // A damaged file must not be found again by the next attempt.
    let _ = fs::remove_file(path);
    Err(SetupError::Hash {
        path: path.into(),
        wanted: wanted.into(),
        found,
    })
}

/// Writes down which packages a component is made of.
pub(super) fn write_manifest(dir: &Path, packages: &[Package]) -> Result<(), SetupError> {
    let list: Vec<_> = packages
        .iter()
        .map(|package| {
            let file = package
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy();
            serde_json::json!({ "file": file, "sha256": package.sha256 })
        })
        .collect();
    let path = dir.join(MANIFEST);
    fs::write(&path, format!("{:#}\n", serde_json::Value::from(list)))
        .map_err(file_error("cannot write", &path))
}

#[cfg(test)]
#[path = "apt_test.rs"]
mod apt_test;
