//! Where the demo's nodes run.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::DemoError;
use crate::host::{self, RunError, say};

/// What the user wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wish {
    /// KVM if this machine can run guests, else the nested host
    Auto,
    /// Guests on this machine's /dev/kvm
    Kvm,
    /// Guests on the emulated KVM of the nested test host
    Nested,
    /// Process trees in namespaces of their own; no guests
    Namespace,
}

/// What it becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    Kvm,
    Nested,
    Namespace,
}

/// Chooses, and says what and why. `build` builds the products if the VMM is needed for it.
pub(super) fn choose(
    wish: Wish,
    build: impl FnOnce() -> Result<PathBuf, RunError>,
) -> Result<Backend, DemoError> {
    let probe = || -> Result<Result<(), String>, DemoError> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Err("there is none".into()));
        }
        say!("there is a /dev/kvm; when the VMM is built, it will try a small guest on it");
        probe(&build()?)
    };
    let (backend, reason) = match wish {
        Wish::Nested => (Backend::Nested, "you asked for it".to_owned()),
        Wish::Namespace => (Backend::Namespace, "you asked for it".to_owned()),
        Wish::Kvm => match probe()? {
            Ok(()) => (
                Backend::Kvm,
                "you asked for it, and /dev/kvm runs guests".to_owned(),
            ),
            Err(reason) => return Err(DemoError::NoKvm(reason)),
        },
        Wish::Auto => match probe()? {
            Ok(()) => (Backend::Kvm, "/dev/kvm runs guests".to_owned()),
            Err(reason) => (
                Backend::Nested,
                format!("/dev/kvm is of no use here: {reason}"),
            ),
        },
    };
    let words = match backend {
        Backend::Kvm => "kvm: guests on this machine",
        Backend::Nested => "nested: guests on the KVM of an emulated machine (QEMU)",
        Backend::Namespace => "namespace: process trees on this machine, no guests",
    };
    say!("backend {words}; reason: {reason}");
    Ok(backend)
}

/// Asks the VMM whether `/dev/kvm` can run a stock kernel; if not, why.
fn probe(bin_dir: &Path) -> Result<Result<(), String>, DemoError> {
    let mut command = host::as_root(&bin_dir.join("lupin-vmm"));
    command.args(["probe", "--json"]).stdout(Stdio::piped());
    let output = host::output(&mut command)?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(Err(reason_of(&said).unwrap_or_else(|| {
        format!("the probe ended with {}", output.status)
    })))
}

/// The probe's reason, in words.
fn reason_of(said: &str) -> Option<String> {
    let report: serde_json::Value = serde_json::from_str(said).ok()?;
    let reason = ["reason", "detail", "message", "error"]
        .iter()
        .find_map(|key| report[*key].as_str())
        .filter(|reason| !reason.is_empty())?;
    Some(reason.to_owned())
}
