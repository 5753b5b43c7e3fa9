//! Which pod is meant: from what an operator typed to a runtime folder.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use lupin_abi::layout::MAX_POD_NAME;
use lupin_fabric::api::{Client, ClientError};
use lupin_fabric::podfile::Pod;
use lupin_fabric::runtime::NodeRecord;
use lupin_fabric::sys::process::Process;

use super::{Failure, status};

/// A pod on this host.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) name: String,
    /// Its runtime folder; need not exist.
    pub(super) folder: PathBuf,
}

impl Place {
    pub(super) fn new(base: &Path, name: &str) -> Self {
        let folder = std::path::absolute(base)
            .unwrap_or_else(|_| base.into())
            .join(name);
        Self {
            name: name.into(),
            folder,
        }
    }

    /// Finds a pod by pod file or name. What looks like a path is a file; anything else is the
    /// name of a pod with a runtime folder, else a file.
    pub(super) fn find(base: &Path, given: &OsStr) -> Result<Self, Failure> {
        let path = Path::new(given);
        // Neither `..` nor anything with a slash is a name.
        let looks_like_a_file =
            path.file_name() != Some(given) || path.extension().is_some_and(|ext| ext == "toml");
        if !looks_like_a_file
            && let Some(name) = given.to_str()
            && name.len() <= MAX_POD_NAME
        {
            let place = Self::new(base, name);
            if place.folder.is_dir() {
                return Ok(place);
            }
            if !path.is_file() {
                let known = running(base).join(", ");
                let known = match known.as_str() {
                    "" => "no pod runs".to_string(),
                    known => format!("running: {known}"),
                };
                let base = base.display();
                return Err(Failure::new(
                    status::NOT_RUNNING,
                    format!("no pod is called {name} in {base}, nor is it a pod file ({known})"),
                ));
            }
        }
        let pod = load(path)?;
        Ok(Self::new(base, &pod.name))
    }

    /// Connects to the pod's manager.
    pub(super) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(&self.folder).map_err(|e| Failure::of_client(self, &e))
    }

    /// Whether a manager answers.
    pub(super) fn runs(&self) -> bool {
        match Client::connect(&self.folder) {
            Ok(_) => true,
            // It is there, but not ours.
            Err(ClientError::Io(e)) => e.kind() == std::io::ErrorKind::PermissionDenied,
            Err(_) => false,
        }
    }

    /// The sentence for a pod without a manager.
    pub(super) fn not_running(&self) -> Failure {
        let name = &self.name;
        let message = match self.orphans().as_slice() {
            [] => format!("pod {name} is not running"),
            orphans => format!(
                "pod {name} has no manager, but nodes still run: {}; `lupin-vmm pod up` with its \
                 pod file takes them over",
                orphans.join(", ")
            ),
        };
        Failure::new(status::NOT_RUNNING, message)
    }

    /// The nodes that a manager left running when it was killed.
    fn orphans(&self) -> Vec<String> {
        let Ok(folders) = std::fs::read_dir(self.folder.join("nodes")) else {
            return Vec::new();
        };
        let mut names: Vec<_> = folders
            .flatten()
            .filter(|folder| {
                std::fs::read(folder.path().join("node.json"))
                    .ok()
                    .and_then(|bytes| serde_json::from_slice::<NodeRecord>(&bytes).ok())
                    .and_then(|record| Process::find(record.process).ok().flatten())
                    .is_some_and(|process| !process.is_gone())
            })
            .map(|folder| folder.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Reads a pod file.
pub(super) fn load(file: &Path) -> Result<Pod, Failure> {
    Pod::load(file).map_err(|e| Failure::new(status::BAD_ARGUMENTS, e.to_string()))
}

/// The names of the pods that have a manager.
pub(super) fn running(base: &Path) -> Vec<String> {
    let Ok(folders) = std::fs::read_dir(base) else {
        return Vec::new();
    };
    let mut names: Vec<_> = folders
        .flatten()
        .filter_map(|folder| folder.file_name().into_string().ok())
        .filter(|name| Place::new(base, name).runs())
        .collect();
    names.sort();
    names
}
