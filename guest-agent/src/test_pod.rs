//! A pod in a memory file, for tests.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lupin_abi::event::{Cause, EVIDENCE_WORDS, Event, EventKind};
use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::layout::{FABRIC_SIZE, MIN_SYSTEM_SIZE, NODE_SIZE, PodHeader, SectionKind};
use lupin_abi::node::NodeSection;
use lupin_abi::{Generation, NodeId};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::identity::{DEFAULT_HEARTBEAT, Identity};
use crate::memory::mapping::Mapping;
use crate::memory::podfile::PodFile;
use crate::memory::{Attaching, PodMemory};

/// Nodes that the pod has room for.
pub const NODES: u32 = 4;
/// Bytes of its pool.
pub const POOL: u64 = 32 << 20;

/// Pod memory, formatted, with the host's view of it.
pub struct TestPod {
    file: File,
    header: PodHeader,
    fabric: Mapping,
}

impl TestPod {
    /// A new pod in which all nodes have joined with generation 1.
    pub fn new() -> Self {
        let header = PodHeader::new(0xfeed, "test", NODES, MIN_SYSTEM_SIZE, POOL).unwrap();
        let file = File::from(memfd_create("test-pod", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(header.total_size()).unwrap();
        let put = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).unwrap();
        for id in 1..=NODES {
            let range = header.node(NodeId::new(id).unwrap()).unwrap();
            let bytes = header.encode_section(SectionKind::Node, id, range.size);
            put(&bytes, range.offset);
        }
        for (kind, range) in [
            (SectionKind::Instances, header.instances()),
            (SectionKind::System, header.kernel()),
        ] {
            put(&header.encode_section(kind, 0, range.size), range.offset);
        }
        put(&header.encode(), 0);
        let fabric = Mapping::new(&file, 0, FABRIC_SIZE, true).unwrap();
        let pod = Self {
            file,
            header,
            fabric,
        };
        for id in 1..=NODES {
            pod.live(id, 1);
        }
        pod
    }

    pub fn header(&self) -> &PodHeader {
        &self.header
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn fd(&self) -> OwnedFd {
        self.file.as_fd().try_clone_to_owned().unwrap()
    }

    /// The fabric section, as the manager has it.
    pub fn fabric(&self) -> &FabricSection {
        // SAFETY: FABRIC_SIZE bytes, page aligned, alive as long as `self`.
        unsafe { FabricSection::from_ptr(self.fabric.base()) }
    }

    /// Makes a generation of a node the current one.
    pub fn live(&self, node: u32, generation: Generation) {
        let entry = self.fabric().entry(NodeId::new(node).unwrap());
        entry.set_generation(generation);
        entry.set_state(NodeState::Joined, 0);
    }

    /// A node's death, as the manager records it.
    pub fn kill(&self, node: u32) {
        let entry = self.fabric().entry(NodeId::new(node).unwrap());
        entry.set_generation(entry.generation() + 1);
        entry.set_state(NodeState::Restarting, 0);
    }

    /// Appends an event about a node.
    pub fn happen(&self, kind: EventKind, node: u32) -> u64 {
        self.fabric().append(&Event {
            seq: 0,
            time_ns: 1,
            epoch: 1,
            kind,
            node,
            old_generation: 1,
            generation: 2,
            cause: Cause::None,
            evidence: [0; EVIDENCE_WORDS],
        })
    }

    pub fn identity(&self, node: u32, generation: Generation) -> Identity {
        let ms = DEFAULT_HEARTBEAT.as_millis() as u64;
        Identity::new(node, generation, ms).unwrap()
    }

    pub fn backend(&self, node: u32, generation: Generation) -> PodFile {
        PodFile::new(self.fd(), self.identity(node, generation)).unwrap()
    }

    /// A node's agent's view.
    pub fn attach(&self, node: u32, generation: Generation) -> Arc<PodMemory> {
        let mut backend = self.backend(node, generation);
        let attaching = Attaching::new(&mut backend, self.identity(node, generation)).unwrap();
        Arc::new(attaching.finish(&mut backend).unwrap())
    }

    /// Runs `look` on a node's section as the manager has it.
    pub fn node<T>(&self, node: u32, look: impl FnOnce(&NodeSection) -> T) -> T {
        let range = self.header.node(NodeId::new(node).unwrap()).unwrap();
        let mapping = Mapping::new(&self.file, range.offset, NODE_SIZE, true).unwrap();
        // SAFETY: NODE_SIZE bytes, page aligned, alive during the call.
        look(unsafe { NodeSection::from_ptr(mapping.base()) })
    }
}
