//! Where the demo's nodes run.

use std::path::{Path, PathBuf};

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
    let probe = || -> Result<Result<String, String>, RunError> {
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
            Ok(how) => (
                Backend::Kvm,
                format!("you asked for it, and /dev/kvm {how}"),
            ),
            Err(reason) => return Err(DemoError::NoKvm(reason)),
        },
        Wish::Auto => match probe()? {
            Ok(how) => (Backend::Kvm, format!("/dev/kvm {how}")),
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

/// Asks the VMM whether `/dev/kvm` can run a stock kernel. Its reason either way, in words.
fn probe(bin_dir: &Path) -> Result<Result<String, String>, RunError> {
    let mut command = host::as_root(&bin_dir.join("lupin-vmm"));
    let output = match host::output(command.args(["probe", "--json"])) {
        // Without root and without sudo there is no way to /dev/kvm, but one to the nested host.
        Err(error @ RunError::Start { .. }) => return Ok(Err(error.to_string())),
        output => output?,
    };
    let reason = reason_of(&String::from_utf8_lossy(&output.stdout))
        .unwrap_or_else(|| format!("the probe ended with {}", output.status));
    Ok(if output.status.success() {
        Ok(reason)
    } else {
        Err(reason)
    })
}

fn reason_of(said: &str) -> Option<String> {
    let report: serde_json::Value = serde_json::from_str(said).ok()?;
    Some(report["reason"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_build() -> Result<PathBuf, RunError> {
        panic!("nothing has to be built to know this");
    }

    #[test]
    fn a_wish_that_needs_no_kvm_is_granted_without_a_probe() {
        assert_eq!(choose(Wish::Nested, no_build).unwrap(), Backend::Nested);
        assert_eq!(
            choose(Wish::Namespace, no_build).unwrap(),
            Backend::Namespace
        );
    }

    #[test]
    fn the_probes_reason_is_found_in_its_report() {
        let said = r#"{"usable":false,"reason":"it crawls","micros":9}"#;
        assert_eq!(reason_of(said).as_deref(), Some("it crawls"));
        assert_eq!(reason_of("no JSON"), None);
    }
}
