//! An agent as its users start it, in a pod of a memory file, with the test as its manager.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

pub mod launch;

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

pub use launch::{AGENT, Agent};
use launch::{pod_memory, spawn};
use lupin_abi::event::{Cause, EVIDENCE_WORDS, Event, EventKind};
use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::{MIN_SYSTEM_SIZE, PodHeader};
use lupin_abi::node::{AgentState, NodeSection};
use lupin_abi::port::{Decoder, ExecStatus, ToAgent, ToManager};
use lupin_abi::{ABI_VERSION, NodeId};
use lupin_guest_agent::memory::mapping::Mapping;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

pub struct Pod {
    pub header: PodHeader,
    pub file: File,
    memory: Mapping,
    folder: tempfile::TempDir,
}

impl Pod {
    pub fn new() -> Self {
        let header = PodHeader::new(0xabcd, "end-to-end", 2, MIN_SYSTEM_SIZE, 16 << 20).unwrap();
        let file = pod_memory(&header, 1);
        let memory = Mapping::new(&file, 0, header.total_size(), true).unwrap();
        let pod = Self {
            header,
            file,
            memory,
            folder: tempfile::tempdir().unwrap(),
        };
        pod.fabric()
            .entry(NodeId::new(1).unwrap())
            .set_generation(1);
        pod
    }

    pub fn fabric(&self) -> &FabricSection {
        // SAFETY: the mapping begins with the fabric section and lives as long as `self`.
        unsafe { FabricSection::from_ptr(self.memory.base()) }
    }

    pub fn node(&self) -> &NodeSection {
        let range = self.header.node(NodeId::new(1).unwrap()).unwrap();
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { NodeSection::from_ptr(self.memory.base().add(range.offset as usize)) }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/agent.sock")
    }

    pub fn happen(&self) -> u64 {
        self.fabric().append(&Event {
            seq: 0,
            time_ns: 0,
            epoch: 1,
            kind: EventKind::Rung,
            node: 0,
            old_generation: 0,
            generation: 0,
            cause: Cause::None,
            evidence: [0; EVIDENCE_WORDS],
        })
    }

    pub fn start(&self, wrapper: &[&str], arguments: &[&str]) -> Agent {
        let path = self.folder.path().join("manager.sock");
        // Left by an agent before.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let doorbell = EventFd::new().unwrap();
        let passed = [
            self.file.as_raw_fd(),
            listener.as_raw_fd(),
            doorbell.as_fd().as_raw_fd(),
        ];
        let words: Vec<&str> = wrapper.iter().copied().chain([AGENT]).collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(["--namespace", "--node=1", "--generation=1"])
            .arg("--heartbeat-ms=2")
            .arg("--socket")
            .arg(self.socket())
            .args(arguments);
        spawn(command, passed)
    }

    pub fn joined(&self) {
        until("the agent joins", || {
            self.node().agent() == (AgentState::Joined, 1)
        });
    }

    pub fn manager(&self) -> Manager {
        let stream = UnixStream::connect(self.folder.path().join("manager.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Manager {
            stream,
            decoder: Decoder::new(),
        }
    }
}

impl Agent {
    pub fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(20), "the agent stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub struct Manager {
    stream: UnixStream,
    decoder: Decoder,
}

impl Manager {
    pub fn send(&mut self, message: &ToAgent) {
        let frame = lupin_abi::port::encode(message).unwrap();
        self.stream.write_all(&frame).unwrap();
    }

    /// Says Hello; returns the doorbell that comes with the answer.
    pub fn hello(&mut self) -> OwnedFd {
        let version = ABI_VERSION;
        self.send(&ToAgent::Hello {
            version,
            pod_id: 0xabcd,
        });
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 2]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let fd = self.stream.as_raw_fd();
        let flags = MsgFlags::empty();
        let message = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags).unwrap();
        let fds: Vec<RawFd> = message
            .cmsgs()
            .unwrap()
            .flat_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds,
                _ => Vec::new(),
            })
            .collect();
        let len = message.bytes;
        self.decoder.push(&buffer[..len]);
        match self.receive() {
            ToManager::Hello {
                node, generation, ..
            } => assert_eq!((node, generation), (1, 1)),
            other => panic!("{other:?}"),
        }
        assert_eq!(fds.len(), 1);
        // SAFETY: just received, known to nobody else.
        unsafe { OwnedFd::from_raw_fd(fds[0]) }
    }

    pub fn receive(&mut self) -> ToManager {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return message;
            }
            let count = self.stream.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the agent hung up");
            self.decoder.push(&buffer[..count]);
        }
    }

    pub fn run(&mut self, script: &str) -> (String, ExecStatus) {
        let channel = 1;
        self.send(&ToAgent::Exec {
            channel,
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: Vec::new(),
            cwd: None,
        });
        let mut text = String::new();
        loop {
            match self.receive() {
                ToManager::Output { data, .. } => text += std::str::from_utf8(&data).unwrap(),
                ToManager::Exited { status, .. } => return (text, status),
                _ => {}
            }
        }
    }
}

pub fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
