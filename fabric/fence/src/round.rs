//! One node that stores, one fence, and a look at what moved afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lupin_abi::NodeId;
use lupin_abi::event::FencePath;
use lupin_fabric::memory::{Geometry, MemoryError, PodMemory};
use lupin_fabric::podfile::{Pod, PodFileError};
use lupin_fabric::power::namespace::NamespacePower;
use lupin_fabric::power::vmm::VmmPower;
use lupin_fabric::power::{Instance, PowerControl, StartError, StartRequest};
use lupin_fabric::runtime::{NodeFolder, RuntimeError, RuntimeFolder};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::node;
use crate::payload::{self, COUNTER_STRIDE, COUNTERS_AT};

const MIB: u64 = 1 << 20;
/// How long a node may take until all its processors store.
const START: Duration = Duration::from_secs(60);
/// How long the polite fence may take where it is to succeed.
const POLITE: Duration = Duration::from_secs(30);
/// And where the VMM cannot answer.
const IMPATIENT: Duration = Duration::from_millis(20);
/// So many stores of each processor make a node that stores.
const STORING: u64 = 100;

/// What stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Node {
    /// A KVM guest of a few instructions
    Payload,
    /// A namespace node
    Namespace,
}

impl Node {
    /// Why such a node cannot be started here, if that is known beforehand.
    pub fn is_impossible(self) -> Option<String> {
        match self {
            Self::Payload => File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .err()
                .map(|e| format!("/dev/kvm: {e}")),
            Self::Namespace => {
                let is_root = nix::unistd::geteuid().is_root();
                (!is_root).then(|| "namespaces need root".into())
            }
        }
    }
}

/// How it is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// The VMM deletes the memslots and lives on (KVM guests)
    Polite,
    /// The process is killed while it runs
    Kill,
    /// The process is stopped (SIGSTOP), does not answer, and is killed
    Stopped,
    /// Not at all: the control, which must see late stores
    #[value(skip)]
    LeftOut,
}

/// Why a round could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    #[error(transparent)]
    PodFile(#[from] PodFileError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot start the node: {}", .0.message)]
    Start(StartError),
    #[error("{action}: {source}")]
    System {
        action: &'static str,
        source: std::io::Error,
    },
    #[error(
        "after {} s only {storing} of {wanted} processors of the node store; its log says:\n{log}",
        START.as_secs()
    )]
    NotStoring {
        storing: usize,
        wanted: usize,
        log: String,
    },
    #[error("the fence took the path {took:?} instead of {wanted:?}")]
    WrongPath { wanted: Way, took: FencePath },
    #[error("the node was gone after a polite fence; its log says:\n{0}")]
    Gone(String),
}

fn system(action: &'static str) -> impl Fn(std::io::Error) -> RoundError {
    move |source| RoundError::System { action, source }
}

/// What a round showed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From the decision to fence to its completion.
    pub fence: Duration,
    /// Stores that arrived after the generation was raised.
    pub late: u64,
}

/// A pod of one node.
pub struct Rig {
    pod: Pod,
    memory: PodMemory,
    folder: NodeFolder,
    vmm: PathBuf,
    fabricd: PathBuf,
    node: Node,
    file: File,
    generation: u32,
    _runtime: RuntimeFolder,
    _scratch: tempfile::TempDir,
}

impl Rig {
    /// Makes a pod memory; `binaries` is where the products are.
    pub fn new(node: Node, binaries: &Path) -> Result<Self, RoundError> {
        let scratch = tempfile::tempdir().map_err(system("cannot make a folder"))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = scratch.path().join(name);
            std::fs::write(&path, bytes).map(|()| path)
        };
        let kernel = write("payload", &payload::image()).map_err(system("cannot write"))?;
        // It never looks at its initramfs.
        let initramfs = write("initramfs", &[0; 512]).map_err(system("cannot write"))?;
        let backend = match node {
            Node::Namespace => "backend = \"namespace\"".into(),
            Node::Payload => format!(
                "backend = \"kvm\"\nkernel = \"{}\"\ninitramfs = \"{}\"\nmemory = \"128M\"\ncpus = {}",
                kernel.display(),
                initramfs.display(),
                node::storers()
            ),
        };
        let text = format!(
            "name = \"fence\"\n[memory]\npath = \"pod\"\npool = \"2M\"\nnode_capacity = 1\n\
             [[node]]\nid = 1\nname = \"n1\"\n{backend}\n"
        );
        let pod = Pod::parse(&text, &scratch.path().join("pod.toml"))?;
        let geometry = Geometry {
            name: "fence".into(),
            node_capacity: 1,
            system: 4 * MIB,
            pool: 2 * MIB,
        };
        let memory = PodMemory::open(&pod.memory.path, &geometry)?;
        let runtime = RuntimeFolder::open(&scratch.path().join("run"), "fence", 2)?;
        let file = File::open(&pod.memory.path).map_err(system("cannot open pod memory"))?;
        Ok(Self {
            folder: runtime.node("n1")?,
            vmm: binaries.join("lupin-vmm"),
            fabricd: binaries.join("lupin-fabricd"),
            pod,
            memory,
            node,
            file,
            generation: 0,
            _runtime: runtime,
            _scratch: scratch,
        })
    }

    fn power(&self, path: Way) -> Result<Box<dyn PowerControl>, RoundError> {
        Ok(match self.node {
            Node::Payload => Box::new(VmmPower {
                program: self.vmm.clone(),
                fence_bound: if path == Way::Stopped {
                    IMPATIENT
                } else {
                    POLITE
                },
            }),
            Node::Namespace => Box::new(NamespacePower {
                init: self.fabricd.clone(),
                agent: std::env::current_exe().map_err(system("cannot find this program"))?,
            }),
        })
    }

    fn counters(&self) -> Result<Vec<u64>, RoundError> {
        let pool = self.memory.header().pool().offset;
        (0..node::storers())
            .map(|index| {
                let mut bytes = [0; 8];
                let at = pool + COUNTERS_AT + index * COUNTER_STRIDE;
                self.file
                    .read_exact_at(&mut bytes, at)
                    .map_err(system("cannot read pod memory"))?;
                Ok(u64::from_le_bytes(bytes))
            })
            .collect()
    }

    fn log(&self) -> String {
        let names = [self.folder.path().join("vmm.log"), self.folder.console()];
        let text = names.map(|name| std::fs::read_to_string(name).unwrap_or_default());
        text.concat()
    }

    /// Starts the node, fences it, and watches the counters for `watch`.
    pub fn round(&mut self, path: Way, watch: Duration) -> Result<Sample, RoundError> {
        self.generation += 1;
        self.folder.clean()?;
        let id = NodeId::new(1).unwrap_or_else(|| unreachable!("1 is a node id"));
        self.memory
            .fabric()
            .entry(id)
            .set_generation(self.generation);
        let before = self.counters()?;
        let request = StartRequest {
            node: &self.pod.nodes[0],
            generation: self.generation,
            folder: &self.folder,
            memory: &self.memory,
            heartbeat_period: Duration::from_millis(8),
        };
        let power = self.power(path)?;
        let instance = power.prepare(&request).map_err(RoundError::Start)?;
        let instance = instance.release().map_err(RoundError::Start)?;
        // However this ends, the node ends too.
        let instance = Ended(instance);
        self.wait_storing(&before)?;

        let begin = Instant::now();
        match path {
            Way::Polite | Way::LeftOut => {}
            Way::Kill => instance.0.kill(),
            Way::Stopped => {
                stop(instance.0.process().pid).map_err(system("cannot stop the node"))?;
            }
        }
        if path != Way::LeftOut {
            let fence = instance.0.fence().map_err(system("the fence failed"))?;
            let is_right = match path {
                Way::Polite => fence.path == FencePath::Memslots,
                // Gone already, or gone when asked.
                Way::Kill => fence.path != FencePath::Memslots,
                Way::Stopped => fence.path == FencePath::Killed,
                Way::LeftOut => true,
            };
            if !is_right {
                return Err(RoundError::WrongPath {
                    wanted: path,
                    took: fence.path,
                });
            }
        }
        let fence = begin.elapsed();
        self.generation += 1;
        self.memory
            .fabric()
            .entry(id)
            .set_generation(self.generation);
        let at_raise = self.counters()?;
        let late = self.watch(&at_raise, watch)?;
        if path == Way::Polite && instance.0.is_gone() {
            return Err(RoundError::Gone(self.log()));
        }
        Ok(Sample { fence, late })
    }

    fn wait_storing(&self, before: &[u64]) -> Result<(), RoundError> {
        let begin = Instant::now();
        loop {
            let now = self.counters()?;
            let storing = now.iter().zip(before).filter(|(n, b)| **n >= **b + STORING);
            let storing = storing.count();
            if storing == before.len() {
                return Ok(());
            }
            if begin.elapsed() > START {
                return Err(RoundError::NotStoring {
                    storing,
                    wanted: before.len(),
                    log: self.log(),
                });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// How many stores arrive within the time.
    fn watch(&self, at_raise: &[u64], time: Duration) -> Result<u64, RoundError> {
        let begin = Instant::now();
        loop {
            let now = self.counters()?;
            let late = now.iter().zip(at_raise).map(|(n, a)| n.wrapping_sub(*a));
            let late = late.fold(0, u64::saturating_add);
            if late > 0 || begin.elapsed() > time {
                return Ok(late);
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Stops a process; returns when its last thread has stopped, which may be a moment later.
fn stop(pid: u32) -> std::io::Result<()> {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP)?;
    let is_stopped = || -> std::io::Result<bool> {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let stat = std::fs::read_to_string(task?.path().join("stat"))?;
            // The name before the state may hold anything but ends at the last parenthesis.
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
            if state != Some(b'T') {
                return Ok(false);
            }
        }
        Ok(true)
    };
    while !is_stopped()? {
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// A node that is killed, and waited for, when this is dropped.
struct Ended(Arc<dyn Instance>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.kill();
        let begin = Instant::now();
        while !self.0.is_gone() && begin.elapsed() < START {
            std::thread::sleep(Duration::from_micros(200));
        }
        // Reaps it.
        self.0.exit();
    }
}
