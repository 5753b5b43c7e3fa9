//! The pod as it runs, on record: what a manager that takes over goes on with.
//!
//! The pod file belongs to its author, who may change it at any time; nodes run as it was when they
//! were started or added. So a manager that takes over does not read it, but `pod.json`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lupin_abi::NodeId;
use serde::{Deserialize, Serialize};

use super::{NodeFolder, RuntimeError, RuntimeFolder, make_folder, read_json, write_json};
use crate::podfile::Pod;

/// A pod, and how it came to be as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptPod {
    /// The pod.
    pub pod: Pod,
    /// The nodes that came while it ran.
    pub added: BTreeSet<NodeId>,
}

/// A pod's runtime folder, for whoever keeps records in it. Without the lock.
#[derive(Clone, Debug)]
pub struct PodFolder {
    path: PathBuf,
}

impl PodFolder {
    /// Puts on record which pod this is.
    ///
    /// # Errors
    /// Of the file system; the record before is still there then.
    pub fn keep(&self, kept: &KeptPod) -> Result<(), RuntimeError> {
        write_json(&pod_json(&self.path), kept)
    }

    /// The folder of one node, made if needed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn node(&self, name: &str) -> Result<NodeFolder, RuntimeError> {
        let path = self.path.join("nodes").join(name);
        make_folder(&path, None)?;
        Ok(NodeFolder { path })
    }
}

impl RuntimeFolder {
    /// The folder without its lock.
    pub fn records(&self) -> PodFolder {
        PodFolder {
            path: self.path.clone(),
        }
    }

    /// The pod on record; `None` if there is none, or none of this version.
    pub fn kept(&self) -> Option<KeptPod> {
        read_json(&pod_json(&self.path))
    }

    /// Whether a manager of this boot left the pod without bringing it down.
    pub fn was_left_running(&self) -> bool {
        Self::needs_manager(&self.path)
    }
}

fn pod_json(folder: &Path) -> PathBuf {
    folder.join("pod.json")
}
