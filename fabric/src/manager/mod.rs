//! The manager of a pod: the state machine, and the loop that drives it.
//!
//! One thread owns all state and is the only one that stores to the fabric section. Everybody
//! else, operators through [`PodControl`](crate::api::PodControl), fences, agents, talks to it
//! through a queue.
//!
//! | module | what it holds |
//! |---|---|
//! | `phase` | where a node stands, and what is under way with it |
//! | `state` | what is known of the pod and its nodes |
//! | `start`, `failure`, `down` | the transitions: a life begins, fails, ends with the pod |
//! | `adopt` | taking charge of a pod whose manager died |
//! | `pause` | a node stands still, and runs again |
//! | `drain` | a node is left alone before it is ended |
//! | `members` | nodes come, and leave for good |
//! | `order` | one node is ended on request, and what comes then; or started |
//! | `watch`, `judge` | the look at every node, and the judgement on its heartbeat |
//! | `backoff` | when a node is started again |
//! | `hook`, `hooks` | the programs that are told of failures, and when |
//! | `hand_over` | another program in the same process |
//! | `record` | every store to the fabric section |
//! | `driver` | the loop: pidfds, clock, queue |
//! | `handle` | what other threads see |

mod adopt;
mod backoff;
mod crash;
mod down;
mod drain;
mod driver;
mod failure;
mod hand_over;
mod handle;
mod hook;
mod hooks;
pub(crate) mod judge;
mod members;
mod order;
mod pause;
mod phase;
mod record;
mod relay;
mod start;
mod state;
mod watch;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::memory::{Geometry, MemoryError, PodMemory};
use crate::podfile::Pod;
use crate::runtime::{KeptPod, RuntimeError, RuntimeFolder};
use crate::sys::clock::monotonic_ns;
use crate::sys::mappings;
use crate::sys::process::Process;
use adopt::Unadopted;
pub use handle::ManagerHandle;
pub use state::Backends;
use state::Core;

/// A clock in nanoseconds. The product has one, tests turn their own.
pub(crate) type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Why a manager cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The runtime folder cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The pod memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A node runs that the pod file does not have.
    #[error(
        "node {node:?} of this pod runs (process {pid}) and the pod file does not have it any more; bring the pod down before you change its nodes"
    )]
    Stray {
        /// The name of the node.
        node: String,
        /// Its process.
        pid: u32,
    },
    /// A node runs and the pod file has another backend for it.
    #[error(
        "node {node:?} of this pod runs (process {pid}) with backend {found:?}, and the pod file says {expected:?}; bring the pod down before you change its nodes"
    )]
    OtherBackend {
        /// The name of the node.
        node: String,
        /// Its process.
        pid: u32,
        /// Backend that it was started with.
        found: String,
        /// Backend of the pod file.
        expected: &'static str,
    },
    /// Somebody has the pod memory mapped who is no node of this runtime folder.
    #[error("{}: process {pid} ({command}) can write to this pod memory and is no node that this manager knows; was the pod started with another --runtime-dir? End the process first", path.display())]
    StillMapped {
        /// The pod memory.
        path: PathBuf,
        /// The process.
        pid: u32,
        /// Its command.
        command: String,
    },
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why a manager has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The pod is down.
    Down,
    /// The nodes run, and this program shall take them over in this process.
    HandOver(PathBuf),
}

/// A manager in charge of a pod.
pub struct Manager {
    core: Core,
    unadopted: Vec<Unadopted>,
    runtime: RuntimeFolder,
    handle: Arc<ManagerHandle>,
    takeover: bool,
}

impl Manager {
    /// Takes charge of a pod: locks its runtime folder below `runtime_base` and its memory, which
    /// is created if there is none. Nodes that run are adopted; nothing is started or ended yet.
    ///
    /// # Errors
    /// If another manager has either of them, or if they cannot be used.
    pub fn open(pod: Pod, runtime_base: &Path, backends: Backends) -> Result<Self, ManagerError> {
        let longest = pod.nodes.iter().map(|node| node.name.len()).max();
        let runtime = RuntimeFolder::open(runtime_base, &pod.name, longest.unwrap_or(0))?;
        let (kept, memory) = open_memory(pod, &runtime)?;
        let pod_id = memory.header().pod_id();
        let takeover = runtime.is_takeover(pod_id);
        if takeover {
            refuse_strays(&runtime, &kept.pod)?;
        } else {
            refuse_unknown_writers(&memory)?;
            runtime.keep_pod_file(&kept.pod.file)?;
        }
        runtime.records().keep(&kept)?;
        let clock: Clock = Arc::new(monotonic_ns);
        let mut core = Core::new(kept, memory.clone(), &runtime, backends, clock)?;
        if !takeover {
            core.revive();
        }
        runtime.mark_running(pod_id)?;
        let pod = core.pod.clone();
        let handle = ManagerHandle::new(pod, memory, runtime.path(), core.recorder.epoch())
            .map_err(io_failed("make an eventfd"))?;
        let unadopted = core
            .adopt(takeover)
            .map_err(io_failed("look for the nodes of an earlier manager"))?;
        handle.publish(&core);
        Ok(Self {
            core,
            unadopted,
            runtime,
            handle: Arc::new(handle),
            takeover,
        })
    }

    /// What other threads steer the manager with.
    pub fn handle(&self) -> Arc<ManagerHandle> {
        self.handle.clone()
    }

    /// The pod's runtime folder.
    pub fn runtime(&self) -> &RuntimeFolder {
        &self.runtime
    }

    /// Whether nodes of a manager that died may run.
    pub fn is_takeover(&self) -> bool {
        self.takeover
    }

    /// Runs the pod until it is brought down, or another program is to run it.
    ///
    /// # Errors
    /// If the loop cannot be set up. Nodes that run go on running, and another manager may take
    /// over.
    pub fn run(self) -> Result<Outcome, ManagerError> {
        driver::run(self)
    }
}

/// The pod, and its memory. A pod that was left running is what it was then, and not what the pod
/// file says now: that is for [`reload`](crate::api::PodControl::reload).
fn open_memory(
    pod: Pod,
    runtime: &RuntimeFolder,
) -> Result<(KeptPod, Arc<PodMemory>), ManagerError> {
    let left = runtime.kept().filter(|_| runtime.was_left_running());
    // Whoever removed the memory has no use for it.
    if let Some(left) = left.filter(|left| left.pod.memory.path.exists()) {
        let memory = PodMemory::open(&left.pod.memory.path, &Geometry::of(&left.pod))?;
        if runtime.is_takeover(memory.header().pod_id()) {
            if left.pod != pod {
                log::warn!(
                    "{}: the pod file is not as the pod runs; `lupin-vmm pod reload` says what \
                     differs, and applies what can be",
                    pod.file.display()
                );
            }
            return Ok((left, Arc::new(memory)));
        }
    }
    let memory = PodMemory::open(&pod.memory.path, &Geometry::of(&pod))?;
    let added = Default::default();
    Ok((KeptPod { pod, added }, Arc::new(memory)))
}

/// A node that runs and is not in the pod file would be nobody's to watch.
fn refuse_strays(runtime: &RuntimeFolder, pod: &Pod) -> Result<(), ManagerError> {
    let folder = runtime.path().join("nodes");
    let entries = std::fs::read_dir(&folder).map_err(io_failed("list the folders of nodes"))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(record) = runtime.node(&name)?.record() else {
            continue;
        };
        let spec = pod.nodes.iter().find(|node| node.name == name);
        if spec.is_some_and(|node| node.backend.name() == record.backend) {
            continue;
        }
        let found = Process::find(record.process);
        if found.map_err(io_failed("look for a process"))?.is_none() {
            continue;
        }
        let pid = record.process.pid;
        return Err(match spec {
            None => ManagerError::Stray { node: name, pid },
            Some(node) => ManagerError::OtherBackend {
                node: name,
                pid,
                found: record.backend,
                expected: node.backend.name(),
            },
        });
    }
    Ok(())
}

/// Without a record of running nodes nobody may be able to store to the pod memory: a node that is
/// not known cannot be fenced.
fn refuse_unknown_writers(memory: &PodMemory) -> Result<(), ManagerError> {
    let writers = memory
        .inheritable()
        .try_clone_to_owned()
        .and_then(|file| std::fs::File::from(file).metadata())
        .and_then(|metadata| mappings::writers(metadata.dev(), metadata.ino()))
        .map_err(io_failed(
            "look for processes that have the pod memory mapped",
        ))?;
    match writers.into_iter().next() {
        None => Ok(()),
        Some((pid, command)) => Err(ManagerError::StillMapped {
            path: memory.path().into(),
            pid,
            command,
        }),
    }
}

fn io_failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ManagerError {
    move |source| ManagerError::Io {
        action,
        source: source.into(),
    }
}

#[cfg(test)]
mod drain_test;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod fence_test;
#[cfg(test)]
mod hook_test;
#[cfg(test)]
mod hostile_test;
#[cfg(test)]
mod manager_test;
#[cfg(test)]
mod members_test;
#[cfg(test)]
mod steer_test;
#[cfg(test)]
mod takeover_test;
