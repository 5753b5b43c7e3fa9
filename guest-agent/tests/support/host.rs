//! Pod memory as a manager has it, and agents of several nodes.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use lupin_abi::NodeId;
use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::layout::{MIN_SYSTEM_SIZE, PodHeader};
use lupin_abi::node::{AgentState, NodeSection};
use lupin_guest_agent::memory::mapping::Mapping;
use nix::sys::eventfd::EventFd;

use crate::support::launch::{AGENT, Agent, pod_memory, spawn};

const NODES: u32 = 3;

/// Pod memory as the manager has it, and the agents' folder.
pub struct Host {
    header: PodHeader,
    file: File,
    memory: Mapping,
    pub folder: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let header = PodHeader::new(0xabcd, "groups", NODES, MIN_SYSTEM_SIZE, 16 << 20).unwrap();
        let file = pod_memory(&header, NODES);
        let memory = Mapping::new(&file, 0, header.total_size(), true).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self {
            header,
            file,
            memory,
            folder,
        }
    }

    pub fn socket(&self, node: u32) -> PathBuf {
        self.folder.path().join(format!("agent{node}.sock"))
    }

    pub fn live(&self, node: u32, generation: u32) {
        // SAFETY: the mapping begins with the fabric section and lives as long as `self`.
        let fabric = unsafe { FabricSection::from_ptr(self.memory.base()) };
        let entry = fabric.entry(NodeId::new(node).unwrap());
        entry.set_generation(generation);
        entry.set_state(NodeState::Joined, 0);
    }

    pub fn node(&self, node: u32) -> &NodeSection {
        let range = self.header.node(NodeId::new(node).unwrap()).unwrap();
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { NodeSection::from_ptr(self.memory.base().add(range.offset as usize)) }
    }

    /// Starts an agent and waits until it has joined.
    pub fn agent(&self, node: u32, generation: u32) -> Agent {
        let (doorbell, folder) = (EventFd::new().unwrap(), tempfile::tempdir().unwrap());
        let listener = UnixListener::bind(folder.path().join("manager.sock")).unwrap();
        let passed: [RawFd; 3] = [
            self.file.as_raw_fd(),
            listener.as_raw_fd(),
            doorbell.as_fd().as_raw_fd(),
        ];
        let mut command = Command::new(AGENT);
        command
            .args(["--namespace", "--heartbeat-ms=8"])
            .arg(format!("--node={node}"))
            .arg(format!("--generation={generation}"))
            .arg("--socket")
            .arg(self.socket(node));
        let agent = spawn(command, passed);
        let start = Instant::now();
        while self.node(node).agent() != (AgentState::Joined, generation)
            || self.node(node).agent_process().0 != agent.0.id()
        {
            assert!(start.elapsed() < Duration::from_secs(60), "no agent");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }
}
