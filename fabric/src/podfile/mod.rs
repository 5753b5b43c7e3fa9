//! The pod file: which nodes a pod has, and what they share.
//!
//! TOML, read strictly: a key that Lupin does not know is an error, because a mistyped key that is
//! silently ignored is a pod that runs with another configuration than its operator believes.
//! Every complaint names the file, the key, the value and what to do about it. Paths are
//! relative to the pod file, so that a pod can be started from any folder.
//!
//! | module | what it holds |
//! |---|---|
//! | `raw` | the file as written, in serde's terms |
//! | `disks` | which nodes share which images |
//! | `compare` | the pod file beside the pod that runs |
//! | `check` | from the raw file to a checked [`Pod`], and the check against the host |
//! | `policy` | what is done when a node ends |
//! | `line` | where in the file a key stands |
//! | [`size`] | sizes such as `256M` |

mod check;
mod compare;
mod complaint;
mod disks;
mod line;
mod policy;
mod raw;
pub mod size;

use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lupin_abi::NodeId;
use serde::{Deserialize, Serialize};

pub use check::HostLimits;
pub use compare::{Difference, Effect, compare};
pub use policy::{Policies, Restart, RestartKind};
pub use raw::{BackendKind, DeadlineClock, DiskAccess};

/// A pod file that was read and checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Where it was read from.
    pub file: PathBuf,
    /// The pod's name.
    pub name: String,
    /// The memory that the nodes share.
    pub memory: Memory,
    /// How often nodes show that they live, and how long they may be silent.
    pub heartbeat: Heartbeat,
    /// How long a VMM may take to fence its guest before it is killed.
    pub fence_timeout: Duration,
    /// Whether a second manager stands by.
    pub backup: Backup,
    /// Who may ask by HTTP.
    pub api: Api,
    /// The nodes, by id.
    pub nodes: Vec<Node>,
}

/// The `[memory]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The file; absolute.
    pub path: PathBuf,
    /// Bytes of the pool: segments.
    pub pool: u64,
    /// Bytes of the system section.
    pub system: u64,
    /// How many node sections there are: the largest node id that the pod can ever have.
    pub node_capacity: u32,
}

/// The `[manager]` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Whether the manager starts one, and another whenever that ends.
    pub wanted: bool,
    /// How long a manager may show no work before its backup ends it and takes over.
    pub timeout: Duration,
}

/// The `[api]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Api {
    /// Whether HTTP is served on a UNIX socket in the runtime folder.
    pub socket: bool,
    /// Whether it is served over TCP.
    pub tcp: Option<ApiTcp>,
}

/// HTTP over TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTcp {
    /// Address and port.
    pub listen: SocketAddr,
    /// The file with the token that clients must show; absolute.
    pub token_file: PathBuf,
}

/// The `[heartbeat]` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Between two beats of an agent.
    pub period: Duration,
    /// Between two looks of the manager.
    pub poll: Duration,
    /// How long a node may be silent, in time of this clock.
    pub deadline: Duration,
    /// How long a node may take from its start until its agent uses pod memory.
    pub join_timeout: Duration,
    /// What counts towards the deadline.
    pub clock: DeadlineClock,
}

/// One `[[node]]`, with the `[defaults]` applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its name, unique in the pod; also the name of its runtime folder.
    pub name: String,
    /// What runs it.
    pub backend: Backend,
    /// What to do when it ends.
    pub policies: Policies,
}

/// What runs a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    /// A KVM guest.
    Kvm(Guest),
    /// A process tree in namespaces of its own.
    Namespace,
}

impl Backend {
    /// The name used in the pod file.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "kvm",
            Self::Namespace => "namespace",
        }
    }
}

/// What a KVM guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The kernel image (bzImage); absolute.
    pub kernel: PathBuf,
    /// The initramfs; absolute.
    pub initramfs: PathBuf,
    /// Words appended to the kernel command line.
    pub cmdline: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Bytes of the guest's own memory.
    pub memory: u64,
    /// Its disks, in the order of their names in the guest.
    pub disks: Vec<Disk>,
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The image or block device; absolute.
    pub path: PathBuf,
    /// What the node may do with it.
    pub access: DiskAccess,
    /// Where a kept overlay is; absolute, and different for every disk of every node.
    pub kept: Option<PathBuf>,
    /// The serial number that the guest sees.
    pub id: Option<String>,
}

/// Why a pod file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PodFileError {
    /// The file cannot be read.
    #[error("{}: cannot read the pod file: {source}", file.display())]
    Read {
        /// The pod file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or a key is unknown or of the wrong type.
    #[error("{}: {message}", file.display())]
    Syntax {
        /// The pod file.
        file: PathBuf,
        /// Line, column, and what is wrong there.
        message: String,
    },
    /// A value cannot be used.
    #[error("{}{}: {key} = {value}: {problem}; {advice}", file.display(), at(*line))]
    Value {
        /// The pod file.
        file: PathBuf,
        /// The line, if the key stands in the file.
        line: Option<usize>,
        /// The key, with its table.
        key: Box<str>,
        /// The value as written.
        value: Box<str>,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        advice: String,
    },
}

impl Pod {
    /// Reads and checks a pod file, without looking at the host.
    ///
    /// # Errors
    /// For the first thing that is wrong.
    pub fn load(file: &Path) -> Result<Self, PodFileError> {
        let text = std::fs::read_to_string(file).map_err(|source| PodFileError::Read {
            file: file.into(),
            source,
        })?;
        Self::parse(&text, file)
    }

    /// Checks the text of a pod file; `file` is where its paths are relative to.
    ///
    /// # Errors
    /// For the first thing that is wrong.
    pub fn parse(text: &str, file: &Path) -> Result<Self, PodFileError> {
        let raw: raw::PodFile = toml::from_str(text).map_err(|e| PodFileError::Syntax {
            file: file.into(),
            message: e.to_string().trim_end().into(),
        })?;
        check::check(raw, text, file)
    }

    /// Checks what depends on the machine: that kernels and images are there, and that the sizes
    /// fit into it.
    ///
    /// # Errors
    /// For the first thing that is wrong.
    pub fn check_host(&self, limits: &HostLimits) -> Result<(), PodFileError> {
        check::check_host(self, limits)
    }

    /// Checks that no image is written by one node and used by another.
    pub(crate) fn check_sharing(&self) -> Result<(), PodFileError> {
        check::check_sharing(self)
    }

    /// The node of an id.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }
}

/// `:LINE`, as compilers write it.
fn at(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(":{line}"))
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} ({})", self.id, self.name)
    }
}

/// The folder that paths in a pod file are relative to.
fn base_of(file: &Path) -> PathBuf {
    let parent = file.parent().filter(|p| *p != OsStr::new(""));
    let parent = parent.unwrap_or(Path::new("."));
    std::path::absolute(parent).unwrap_or_else(|_| parent.into())
}

#[cfg(test)]
#[path = "podfile_test.rs"]
mod podfile_test;

#[cfg(test)]
#[path = "policy_test.rs"]
mod policy_test;
