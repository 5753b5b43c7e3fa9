//! A pod whose nodes store.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lupin_abi::NodeId;
use lupin_abi::layout::MIN_SYSTEM_SIZE;
use lupin_fabric::memory::{Geometry, MemoryError, PodMemory};
use lupin_fabric::podfile::{Pod, PodFileError};
use lupin_fabric::power::namespace::NamespacePower;
use lupin_fabric::power::vmm::VmmPower;
use lupin_fabric::power::{PowerControl, StartError};
use lupin_fabric::runtime::{NodeFolder, RuntimeError, RuntimeFolder};

use crate::counters;
use crate::{guest, payload};

const MIB: u64 = 1 << 20;
/// What saves a guest time that is not needed here: messages, mitigations, calibration, checks,
/// and waiting for grace periods.
const FAST: &str = "quiet mitigations=off tsc=reliable lpj=4000000 audit=0 apparmor=0 \
                    cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=1";

/// What stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Node {
    /// A KVM guest of a few instructions
    Payload,
    /// A KVM guest with a stock kernel
    Kernel,
    /// A namespace node
    Namespace,
}

impl Node {
    /// Why such a node cannot be started here, if that is known beforehand.
    pub fn is_impossible(self) -> Option<String> {
        match self {
            Self::Payload | Self::Kernel => File::options()
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
        .after.as_secs()
    )]
    NotStoring {
        after: Duration,
        storing: usize,
        wanted: usize,
        log: String,
    },
    #[error("the node ended before it stored; its log says:\n{0}")]
    Ended(String),
    #[error("the fence took the path {took} instead of {wanted}")]
    WrongPath { wanted: &'static str, took: String },
    #[error("the node was gone after a polite fence; its log says:\n{0}")]
    Gone(String),
    #[error("--node kernel needs --kernel and --initramfs; `cargo xtask fence --nested` has both")]
    NoKernel,
    #[error("a node that was left alive did not run for {} s, so that nothing could be seen", .0.as_secs())]
    NotRunning(Duration),
    #[error("interrupted")]
    Interrupted,
}

/// What to say of a system call that failed.
pub fn system(action: &'static str) -> impl Fn(std::io::Error) -> RoundError {
    move |source| RoundError::System { action, source }
}

/// What a pod is made of.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What its nodes are.
    pub node: Node,
    /// How many of them.
    pub nodes: u32,
    /// How many threads or virtual processors of each store.
    pub storers: u64,
    /// Where the products are.
    pub binaries: PathBuf,
    /// What guests with a stock kernel boot: kernel and initramfs.
    pub kernel: Option<(PathBuf, PathBuf)>,
}

/// A pod.
pub struct Rig {
    pub pod: Pod,
    pub memory: PodMemory,
    spec: Spec,
    file: File,
    runtime: RuntimeFolder,
    _scratch: tempfile::TempDir,
}

/// A node of the pod, between its lives.
pub struct Seat {
    pub id: NodeId,
    pub folder: NodeFolder,
    pub generation: u32,
}

impl Rig {
    /// Makes a pod memory; nothing is started.
    pub fn new(spec: &Spec) -> Result<Self, RoundError> {
        let scratch = tempfile::tempdir().map_err(system("cannot make a folder"))?;
        let mut text = "name = \"fence\"\n[memory]\npath = \"pod\"\npool = \"2M\"\n".to_owned();
        text += &format!("node_capacity = {}\n[defaults]\n", spec.nodes);
        text += &backend(spec, scratch.path())?;
        for id in 1..=spec.nodes {
            text += &format!("[[node]]\nid = {id}\nname = \"n{id}\"\n");
        }
        let pod = Pod::parse(&text, &scratch.path().join("pod.toml"))?;
        let geometry = Geometry {
            name: "fence".into(),
            node_capacity: spec.nodes,
            system: MIN_SYSTEM_SIZE,
            pool: 2 * MIB,
        };
        let memory = PodMemory::open(&pod.memory.path, &geometry)?;
        let file = File::open(&pod.memory.path).map_err(system("cannot open pod memory"))?;
        Ok(Self {
            runtime: RuntimeFolder::open(&scratch.path().join("run"), "fence", 2)?,
            pod,
            memory,
            spec: spec.clone(),
            file,
            _scratch: scratch,
        })
    }

    /// The nodes.
    pub fn seats(&self) -> Result<Vec<Seat>, RoundError> {
        let seat = |node: &lupin_fabric::podfile::Node| -> Result<Seat, RoundError> {
            Ok(Seat {
                id: node.id,
                folder: self.runtime.node(&node.name)?,
                generation: 0,
            })
        };
        self.pod.nodes.iter().map(seat).collect()
    }

    /// What starts and fences nodes, with the time that a polite fence may take.
    pub fn power(&self, fence_bound: Duration) -> Result<Box<dyn PowerControl>, RoundError> {
        Ok(match self.spec.node {
            Node::Payload | Node::Kernel => Box::new(VmmPower {
                program: self.spec.binaries.join("lupin-vmm"),
                fence_bound,
            }),
            Node::Namespace => Box::new(NamespacePower {
                init: self.spec.binaries.join("lupin-fabricd"),
                agent: std::env::current_exe().map_err(system("cannot find this program"))?,
            }),
        })
    }

    /// What the processors of a node have counted so far.
    pub fn counters(&self, seat: &Seat) -> Result<Vec<u64>, RoundError> {
        let pool = self.memory.header().pool().offset;
        (0..self.spec.storers)
            .map(|index| {
                let mut bytes = [0; 8];
                self.file
                    .read_exact_at(&mut bytes, pool + counters::place(seat.id.get(), index))
                    .map_err(system("cannot read pod memory"))?;
                Ok(u64::from_le_bytes(bytes))
            })
            .collect()
    }

    /// How long a node may take until all its processors store, and how often to look.
    pub fn patience(&self) -> (Duration, Duration) {
        match self.spec.node {
            // Its kernel boots, usually where everything is emulated.
            Node::Kernel => (Duration::from_secs(300), Duration::from_millis(10)),
            _ => (Duration::from_secs(60), Duration::from_micros(200)),
        }
    }
}

/// The pod file's words about the kind of node, and the files that they name.
fn backend(spec: &Spec, scratch: &Path) -> Result<String, RoundError> {
    let (kernel, initramfs, memory) = match (spec.node, &spec.kernel) {
        (Node::Namespace, _) => return Ok("backend = \"namespace\"\n".into()),
        (Node::Kernel, None) => return Err(RoundError::NoKernel),
        (Node::Kernel, Some((kernel, initramfs))) => (kernel.clone(), initramfs.clone(), "160M"),
        (Node::Payload, _) => {
            let write = |name: &str, bytes: &[u8]| {
                let path = scratch.join(name);
                let written = std::fs::write(&path, bytes).map(|()| path);
                written.map_err(system("cannot write"))
            };
            // It never looks at its initramfs.
            (
                write("payload", &payload::image())?,
                write("initramfs", &[0; 512])?,
                "128M",
            )
        }
    };
    Ok(format!(
        "backend = \"kvm\"\nkernel = {kernel:?}\ninitramfs = {initramfs:?}\nmemory = \"{memory}\"\n\
         cpus = {}\ncmdline = \"{FAST} -- {}\"\n",
        spec.storers,
        guest::WORD
    ))
}
