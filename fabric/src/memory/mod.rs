//! The pod memory: a file that outlives every process, and the part of it that a manager maps.
//!
//! A manager maps the fabric section and the node sections, nothing else: system and pool belong
//! to the nodes, and a manager that cannot reach them cannot damage them.
//!
//! At any time one manager at most has charge of a pod memory: [`PodMemory`] holds an exclusive
//! `flock` on the file itself, so that neither two pods nor two runtime folders can share it.
//!
//! | module | what it holds |
//! |---|---|
//! | `format` | creation: whole or not at all |
//! | `attach` | the checks that a file passes before anything in it is believed |
//! | `map` | the mapping, and the one place where it becomes typed sections |

mod attach;
mod format;
mod map;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use lupin_abi::fabric::FabricSection;
use lupin_abi::node::NodeSection;
use lupin_abi::{AttachError, NodeId, PodHeader};

use crate::podfile::Pod;
use map::Mapping;

/// The shape of a pod memory, as a pod file asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The pod's name.
    pub name: String,
    /// How many node sections.
    pub node_capacity: u32,
    /// Bytes of the system section.
    pub system: u64,
    /// Bytes of the pool.
    pub pool: u64,
}

/// A pod memory in the charge of this process.
#[derive(Debug)]
pub struct PodMemory {
    header: PodHeader,
    map: Mapping,
    path: PathBuf,
    /// Open file description that holds the lock; never handed to a child.
    _lock: File,
    /// A second description of the same file for children: a descriptor that shared ours would
    /// share the lock, and a node would keep it when the manager dies.
    file: File,
    formatted: bool,
}

/// Why a pod memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Somebody else has charge of it.
    #[error("{}: another fabric manager uses this pod memory; bring its pod down first, or give this pod a memory.path of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is not a pod memory, or not one that this program can read.
    #[error("{}: {source}; if nothing in it is needed any more, remove the file and it will be formatted anew", path.display())]
    Attach {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: AttachError,
    },
    /// It is another pod's.
    #[error("{}: this is the memory of pod {found:?}, not of pod {expected:?}; correct memory.path or the pod's name", path.display())]
    OtherPod {
        /// The file.
        path: PathBuf,
        /// Name in the file.
        found: String,
        /// Name in the pod file.
        expected: String,
    },
    /// The pod file asks for another shape than the file has.
    #[error("{}: the pod memory was formatted with {key} = {found}, and the pod file says {expected}; the shape of a pod memory cannot change: set {key} back, or remove the file and lose its contents", path.display())]
    Geometry {
        /// The file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What the file has.
        found: String,
        /// What the pod file asks for.
        expected: String,
    },
    /// It is no regular file.
    #[error("{}: not a regular file; name a file, which is created if it does not exist", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
}

impl Geometry {
    /// What a pod file asks for.
    pub fn of(pod: &Pod) -> Self {
        Self {
            name: pod.name.clone(),
            node_capacity: pod.memory.node_capacity,
            system: pod.memory.system,
            pool: pod.memory.pool,
        }
    }
}

impl PodMemory {
    /// Takes charge of the pod memory at `path`; creates and formats it if there is none.
    ///
    /// # Errors
    /// If somebody else has charge of it, or if it is not this pod's memory in this shape. The
    /// file is changed only if it did not exist.
    pub fn open(path: &Path, geometry: &Geometry) -> Result<Self, MemoryError> {
        let (lock, formatted) = loop {
            match attach::lock_existing(path)? {
                Some(lock) => break (lock, false),
                None => {
                    if let Some(lock) = format::create(path, geometry)? {
                        break (lock, true);
                    }
                    // Somebody created it between the two steps: look again.
                }
            }
        };
        let (header, map) = attach::attach(path, &lock, geometry)?;
        let file = attach::open_again(path, &lock)?;
        Ok(Self {
            header,
            map,
            path: path.into(),
            _lock: lock,
            file,
            formatted,
        })
    }

    /// The pod header.
    pub fn header(&self) -> &PodHeader {
        &self.header
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether [`open`](Self::open) created it.
    pub fn was_formatted(&self) -> bool {
        self.formatted
    }

    /// The fabric section.
    pub fn fabric(&self) -> &FabricSection {
        self.map.fabric()
    }

    /// A node's section; `None` if the pod has no room for that id.
    pub fn node(&self, node: NodeId) -> Option<&NodeSection> {
        self.header.node(node).map(|range| self.map.node(range))
    }

    /// A descriptor of the file that children may inherit: it carries no lock.
    pub fn inheritable(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Puts a system call's failure into words.
fn failed(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> MemoryError {
    let path = path.into();
    move |source| MemoryError::Io {
        path,
        action,
        source,
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod memory_test;
