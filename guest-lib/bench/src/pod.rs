//! A pod in anonymous shared memory: the tables that judges read, and memory for the subjects.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use lupin::abi::fabric::FabricSection;
use lupin::abi::instances::{Holder, InstancesSection};
use lupin::abi::layout::{FABRIC_SIZE, INSTANCES_SIZE};
use lupin::liveness::{NodeLiveness, ThreadLiveness};
use lupin::shm::{Access, Mapping};
use lupin::{Generation, InstanceId, NodeId, ThreadId};

/// The tables of one pod, as the fabric manager and the agents would keep them.
pub struct Pod {
    fabric: Mapping,
    instances: Mapping,
}

impl Pod {
    /// A pod whose nodes 1 to `nodes` live.
    pub fn new(nodes: u32) -> io::Result<Self> {
        let pod = Self {
            fabric: memory("fabric", FABRIC_SIZE)?,
            instances: memory("instances", INSTANCES_SIZE)?,
        };
        for node in (1..=nodes).filter_map(NodeId::new) {
            pod.fabric().entry(node).set_generation(1);
        }
        Ok(pod)
    }

    fn fabric(&self) -> &FabricSection {
        // SAFETY: a mapping of that size for as long as `self`, page aligned, and used through
        // atomics only.
        unsafe { FabricSection::from_ptr(self.fabric.as_ptr()) }
    }

    fn instances(&self) -> &InstancesSection {
        // SAFETY: as in `fabric`.
        unsafe { InstancesSection::from_ptr(self.instances.as_ptr()) }
    }

    /// The judge of threads that applications have.
    pub fn judge(&self) -> ThreadLiveness<'_> {
        ThreadLiveness::new(self.fabric(), self.instances())
    }

    /// The judge of nodes that agents have.
    pub fn node_judge(&self) -> NodeLiveness<'_> {
        NodeLiveness::new(self.fabric())
    }

    /// Declares a node dead, and with it everything that it owned.
    pub fn raise_node(&self, id: u32) {
        let generation = self.node(id).generation() + 1;
        let node = NodeId::new(id).expect("a benchmark asks for nodes of the pod");
        self.fabric().entry(node).set_generation(generation);
    }

    /// A node's current instance.
    pub fn node(&self, id: u32) -> InstanceId {
        let node = NodeId::new(id).expect("a benchmark asks for nodes of the pod");
        InstanceId::of_node(node, self.fabric().entry(node).generation())
    }

    /// Begins a new life of a thread, on a node; what the thread was before is dead then.
    pub fn begin_thread(&self, id: u32, node: u32) -> InstanceId {
        let id = ThreadId::new(id).expect("a benchmark uses few threads");
        let entry = self.instances().thread(id);
        let generation: Generation = entry
            .raise()
            .expect("no thread lives four billion times in a benchmark");
        let holder = Holder {
            pid: std::process::id(),
            ..Holder::default()
        };
        entry.bind(self.node(node), holder);
        InstanceId::of_thread(id, generation)
    }
}

/// Anonymous memory that processes share.
pub fn memory(name: &str, bytes: u64) -> io::Result<Mapping> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` ends with a zero byte; the call has no other precondition.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Mapping::new(&file, 0, bytes, Access::ReadWrite).map_err(io::Error::other)
}
