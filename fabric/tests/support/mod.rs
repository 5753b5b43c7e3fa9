//! What the tests of the program share: a node program, and a manager to run it.
//!
//! The node program is the test binary itself: a script that stands where the agent belongs
//! executes it with the agent's arguments in the environment.
#![allow(dead_code, reason = "every test program uses another part")]

pub mod vmm;

use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::layout::{HEADER_SIZE, Range};
use lupin_abi::node::{AgentState, NodeSection};
use lupin_abi::{NodeId, PodHeader};
use lupin_fabric::api::{Client, PodStatus};

/// Arguments of the agent that the node program stands for.
const ARGS: &str = "LUPIN_TEST_NODE";
/// What the node program does: `beat`, `store` (both itself and a child store counters), `tree`
/// (it beats, and a child and a grandchild of node 1 count).
pub const MODE: &str = "LUPIN_TEST_MODE";
/// How long anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const FABRICD: &str = env!("CARGO_BIN_EXE_lupin-fabricd");

/// Writes the script that stands where the agent belongs.
pub fn agent_script(folder: &Path, test: &str, mode: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    script(
        &folder.join("agent"),
        &format!(
            "{ARGS}=\"$*\" {MODE}={mode} exec {} --exact {test} --ignored --nocapture",
            exe.display()
        ),
    )
}

/// Writes a program of one line.
pub fn script(path: &Path, line: &str) -> PathBuf {
    std::fs::write(path, format!("#!/bin/sh\n{line}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.into()
}

/// A pod memory, mapped whole by a test or by the node program.
pub struct Mapped {
    base: *mut u8,
    pub header: PodHeader,
}

// SAFETY: shared memory that lives as long as the process and is touched through atomics only.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub fn of_fd(fd: RawFd) -> Self {
        Self::with(fd, libc::PROT_READ | libc::PROT_WRITE)
    }

    pub fn read_only(fd: RawFd) -> Self {
        Self::with(fd, libc::PROT_READ)
    }

    fn with(fd: RawFd, protection: i32) -> Self {
        let map = |len: usize| {
            // SAFETY: a new mapping; the tests touch it through atomics only.
            let base = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            assert_ne!(base, libc::MAP_FAILED);
            base.cast::<u8>()
        };
        let first = map(2 << 20);
        // SAFETY: 2 MiB are mapped and stay mapped; atomics only.
        let fabric = unsafe { FabricSection::from_ptr(first) };
        let bytes = lupin_abi::layout::read_header::<HEADER_SIZE>(fabric.header_words());
        let header = PodHeader::decode(&bytes, u64::MAX).unwrap();
        let base = map(header.total_size() as usize);
        Self { base, header }
    }

    fn at(&self, range: Range) -> *mut u8 {
        assert!(range.end() <= self.header.total_size());
        // SAFETY: inside the mapping (asserted).
        unsafe { self.base.add(range.offset as usize) }
    }

    pub fn fabric(&self) -> &FabricSection {
        // SAFETY: mapped for ever, page aligned, atomics only.
        unsafe { FabricSection::from_ptr(self.base) }
    }

    pub fn node(&self, node: NodeId) -> &NodeSection {
        // SAFETY: as above.
        unsafe { NodeSection::from_ptr(self.at(self.header.node(node).unwrap())) }
    }

    /// A word of the pool.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < 1024);
        // SAFETY: as above; the pool is at least 2 MiB.
        unsafe { &*self.at(self.header.pool()).cast::<AtomicU64>().add(index) }
    }
}

/// The value that follows a flag of the agent.
fn flag(name: &str) -> u32 {
    let args = std::env::var(ARGS).unwrap();
    let mut words = args.split(' ').skip_while(|word| *word != name).skip(1);
    words.next().unwrap().parse().unwrap()
}

/// The life of the node program; returns only when it was not started as one.
#[allow(
    clippy::zombie_processes,
    reason = "children of a node's processes end with its namespace, which is what is tested"
)]
pub fn node_program() {
    let Ok(mode) = std::env::var(MODE) else {
        return;
    };
    let memory = Mapped::of_fd(flag("--pod-memory-fd") as RawFd);
    if mode == "child" {
        store_for_ever(memory.word(1));
    }
    if mode == "branch" {
        node_child("child");
        store_for_ever(memory.word(0));
    }
    assert_eq!(
        std::process::id(),
        1,
        "not the first process of a namespace"
    );
    let section = memory.node(NodeId::new(flag("--node")).unwrap());
    section.introduce(flag("--generation"), 1, 1);
    section.set_state(AgentState::Joined);
    if mode == "store" {
        // Both the first process and one that it starts; the child is found by its own pid.
        println!("child {:?}", node_child("child").id());
        store_for_ever(memory.word(0));
    }
    if mode == "tree" && flag("--node") == 1 {
        node_child("branch");
    }
    let entry = memory.fabric().entry(NodeId::new(flag("--node")).unwrap());
    loop {
        section.beat();
        if entry.state() == NodeState::Draining {
            // It has no groups.
            section.report_members_left(entry.since_ns(), 0);
        }
        std::thread::sleep(Duration::from_millis(8));
    }
}

/// Another process of the node.
fn node_child(mode: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "node_program", "--ignored", "--nocapture"])
        .env(MODE, mode)
        .spawn()
        .unwrap()
}

fn store_for_ever(word: &AtomicU64) -> ! {
    loop {
        word.fetch_add(1, Ordering::Relaxed);
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited for {what} in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pod of namespace nodes in a folder of its own, and the managers that run it.
pub struct TestPod {
    pub folder: tempfile::TempDir,
    pub file: PathBuf,
    pub manager: Option<Child>,
}

impl TestPod {
    pub fn new(nodes: u32, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut text = format!(
            "name = \"test\"\n[memory]\npath = \"pod\"\npool = \"2M\"\nnode_capacity = 4\n\
             [heartbeat]\ndeadline_ms = 500\n{more}[defaults]\nbackend = \"namespace\"\n"
        );
        for n in 1..=nodes {
            text += &format!("[[node]]\nid = {n}\n");
        }
        let file = folder.path().join("pod.toml");
        std::fs::write(&file, text).unwrap();
        agent_script(folder.path(), "node_program", "beat");
        Self {
            folder,
            file,
            manager: None,
        }
    }

    pub fn runtime(&self) -> PathBuf {
        self.folder.path().join("run/test")
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(FABRICD);
        let path = |name: &str| self.folder.path().join(name);
        command
            .arg("--pod-file")
            .arg(&self.file)
            .arg("--runtime-dir")
            .arg(path("run"))
            .arg("--agent")
            .arg(path("agent"))
            .arg("--vmm")
            .arg(path("vmm"))
            .arg("--log-file")
            .arg(path("log"))
            .args(["--grace-ms", "500"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Starts a manager and waits until it answers.
    pub fn start(&mut self) {
        self.manager = Some(self.command().spawn().unwrap());
        wait_until("the manager", || Client::connect(&self.runtime()).is_ok());
    }

    /// SIGKILL to the manager.
    pub fn kill_manager(&mut self) {
        let mut manager = self.manager.take().unwrap();
        manager.kill().unwrap();
        manager.wait().unwrap();
    }

    pub fn signal_manager(&self, signal: i32) {
        let pid = self.manager.as_ref().unwrap().id();
        let pid = nix::unistd::Pid::from_raw(pid as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::try_from(signal).unwrap()).unwrap();
    }

    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut manager = self.manager.take().unwrap();
        let begin = Instant::now();
        loop {
            if let Some(status) = manager.try_wait().unwrap() {
                return status;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "the manager does not end: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn status(&self) -> PodStatus {
        let mut client = Client::connect(&self.runtime()).unwrap();
        client.status().unwrap()
    }

    pub fn wait_joined(&self, generations: &[u32]) -> PodStatus {
        let mut last = None;
        let begin = Instant::now();
        loop {
            let status = self.status();
            let joined = status
                .nodes
                .iter()
                .zip(generations)
                .all(|(node, generation)| {
                    node.state == NodeState::Joined && node.generation == *generation
                });
            if joined {
                return status;
            }
            last.replace(status);
            assert!(begin.elapsed() < PATIENCE, "{last:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.runtime()).unwrap()
    }

    /// Whether a node has joined in this generation.
    pub fn has_joined(&self, name: &str, generation: u32) -> bool {
        let status = self.status();
        let node = status.find(name);
        node.is_some_and(|n| n.state == NodeState::Joined && n.generation == generation)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for TestPod {
    /// Leaves no process behind, whatever the test found.
    fn drop(&mut self) {
        // Without this file a backup takes the pod for brought down, and ends.
        let _ = std::fs::remove_file(self.runtime().join("manager.json"));
        let manager = lupin_fabric::runtime::RuntimeFolder::last_manager(&self.runtime());
        if let Some(name) = manager
            && let Ok(Some(manager)) = lupin_fabric::sys::process::Process::find(name)
        {
            let _ = manager.kill();
        }
        if let Some(mut manager) = self.manager.take() {
            let _ = manager.kill();
            let _ = manager.wait();
        }
        let folders = std::fs::read_dir(self.runtime().join("nodes"));
        for folder in folders.into_iter().flatten().flatten() {
            let record = std::fs::read(folder.path().join("node.json")).ok();
            let record = record.and_then(|bytes| {
                serde_json::from_slice::<lupin_fabric::runtime::NodeRecord>(&bytes).ok()
            });
            let process = record.and_then(|r| {
                lupin_fabric::sys::process::Process::find(r.process)
                    .ok()
                    .flatten()
            });
            if let Some(process) = process {
                let _ = process.kill();
            }
        }
    }
}
