//! A world without processes: what the state machine is tested against.
//!
//! A [`World`] outlives managers, as processes and pod memory do. It judges all that managers do
//! to it by the rules that make the system safe, at every step:
//!
//! * a life that can still store never has a generation other than the table's;
//! * no two lives of a node can store at the same time;
//! * no generation is lived twice;
//! * nobody is let run who is not on record.

mod driver;
mod kills;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lupin_abi::event::{Event, EventKind, FencePath};
use lupin_abi::fabric::{NodeState, RingRead};
use lupin_abi::{Cause, Generation, NodeId};

use crate::api::ControlError;
use crate::memory::{Geometry, PodMemory};
use crate::podfile::Pod;
use crate::power::{Exit, Fence, Instance, PowerControl, Prepared, StartError, StartRequest};
use crate::runtime::{NodeFolder, NodeRecord, RuntimeFolder};
use crate::sys::process::ProcessName;
use crate::sys::threads::ThreadTimes;

pub(super) use driver::{Agents, FakeManager};
pub(super) use kills::{Killed, Play, all_have_joined};

pub(super) fn id(n: u32) -> NodeId {
    NodeId::new(n).unwrap()
}

/// What firmware that switches power does instead of switching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Firmware {
    /// It fails.
    Refuses,
    /// It claims success.
    Lies,
}

/// What happened to the world, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Released(NodeId, Generation),
    /// With the generation that the table held at that moment.
    Fenced(NodeId, Generation, Generation),
    /// Who was rung, and the number of events that it could read.
    Rung(NodeId, u64),
    Killed(NodeId, Generation),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Held,
    Running,
    Gone,
}

struct Process {
    node: NodeId,
    generation: Generation,
    life: Life,
    fenced: bool,
    paused: bool,
    exit: Exit,
}

#[derive(Default)]
struct State {
    processes: BTreeMap<u32, Process>,
    seen: Vec<Seen>,
    refuse: BTreeMap<NodeId, bool>,
    /// A fence deletes memslots and leaves the process; else it kills.
    polite: bool,
    /// A VMM that was told to quit does.
    obedient: bool,
    /// Hooks that were run: node, failed generation, environment.
    hooks: Vec<(NodeId, Generation, BTreeMap<String, String>)>,
    /// What the next fences meet, before one works.
    firmware: VecDeque<Firmware>,
    /// How long a fence takes, in nanoseconds.
    fence_ns: u64,
    /// Nodes cannot be paused, or resumed.
    stiff: bool,
    /// The host lacks the means to look at the accounts of threads.
    blind: bool,
}

pub(super) struct World {
    pub memory: Arc<PodMemory>,
    pub runtime: RuntimeFolder,
    pub pod: Arc<Pod>,
    pub now: AtomicU64,
    state: Mutex<State>,
    _folder: tempfile::TempDir,
}

impl World {
    /// A formatted pod of three namespace nodes; `more` is appended to every `[[node]]`.
    pub fn new(more: &str) -> Arc<Self> {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm } else { Path::new("/tmp") };
        let folder = tempfile::tempdir_in(base).unwrap();
        let mut text = "name = \"fake\"\n[memory]\npath = \"pod\"\npool = \"2M\"\n\
                        node_capacity = 3\n[defaults]\nbackend = \"namespace\"\n"
            .to_string();
        for n in 1..=3 {
            text += &format!("[[node]]\nid = {n}\n{more}\n");
        }
        let pod = Pod::parse(&text, &folder.path().join("pod.toml")).unwrap();
        let memory = PodMemory::open(&pod.memory.path, &Geometry::of(&pod)).unwrap();
        let runtime = RuntimeFolder::open(&folder.path().join("run"), "fake", 2).unwrap();
        Arc::new(Self {
            memory: Arc::new(memory),
            runtime,
            pod: Arc::new(pod),
            now: AtomicU64::new(1_000_000_000),
            state: Mutex::new(State {
                obedient: true,
                ..State::default()
            }),
            _folder: folder,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn advance(&self, by: Duration) {
        self.now.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn set_polite(&self, polite: bool, obedient: bool) {
        let mut state = self.state();
        (state.polite, state.obedient) = (polite, obedient);
    }

    /// The environments of the hooks that were run for a life.
    pub fn hooks(&self, node: u32, failed: Generation) -> Vec<BTreeMap<String, String>> {
        let state = self.state();
        let of_life = |(n, g, _): &&(NodeId, Generation, _)| *n == id(node) && *g == failed;
        state
            .hooks
            .iter()
            .filter(of_life)
            .map(|(.., env)| env.clone())
            .collect()
    }

    /// From now on the power is switched by this firmware, which takes its time.
    pub fn set_firmware(&self, firmware: &[Firmware], takes: Duration) {
        let mut state = self.state();
        state.firmware = firmware.iter().copied().collect();
        state.fence_ns = takes.as_nanos() as u64;
    }

    /// The agent of a node that drains reports that so many members are left on it.
    pub fn report_left(&self, node: u32, members: u32) {
        let since_ns = self.memory.fabric().entry(id(node)).since_ns();
        let section = self.memory.node(id(node)).unwrap();
        section.report_members_left(since_ns, members);
    }

    fn fence_ns(&self) -> u64 {
        self.state().fence_ns
    }

    /// Whether nodes can neither be paused nor resumed.
    pub fn set_stiff(&self, stiff: bool) {
        self.state().stiff = stiff;
    }

    /// Whether the host lacks the means to look at what its scheduler does to nodes.
    pub fn set_blind(&self, blind: bool) {
        self.state().blind = blind;
    }

    /// Whether the running life of a node stands still.
    pub fn stands(&self, node: u32) -> bool {
        let state = self.state();
        let mut lives = state.processes.values();
        lives.any(|p| p.node == id(node) && p.life == Life::Running && p.paused)
    }

    /// From now on the node cannot be started; `permanent` if that will not change.
    pub fn refuse(&self, node: u32, permanent: bool) {
        self.state().refuse.insert(id(node), permanent);
    }

    pub fn allow(&self, node: u32) {
        self.state().refuse.remove(&id(node));
    }

    /// The running life of a node dies.
    pub fn die(&self, node: u32, cause: Cause) {
        let mut state = self.state();
        for process in state.processes.values_mut() {
            if process.node == id(node) && process.life == Life::Running {
                process.life = Life::Gone;
                process.exit.cause = cause;
            }
        }
    }

    /// The agents of all running lives report.
    pub fn join_all(&self) {
        for (node, generation) in self.running() {
            let section = self.memory.node(node).unwrap();
            section.introduce(generation, 1, 1);
            section.set_state(lupin_abi::node::AgentState::Joined);
        }
    }

    /// One heartbeat of every running node but some.
    pub fn beat_all_but(&self, silent: &[u32]) {
        for (node, _) in self.running() {
            if !silent.contains(&node.get()) && !self.stands(node.get()) {
                self.memory.node(node).unwrap().beat();
            }
        }
    }

    /// Node and generation of every life that can store to pod memory.
    pub fn running(&self) -> Vec<(NodeId, Generation)> {
        let state = self.state();
        let stores = |p: &&Process| p.life == Life::Running && !p.fenced;
        let lives = state.processes.values().filter(stores);
        lives.map(|p| (p.node, p.generation)).collect()
    }

    /// How many lives a node has had.
    pub fn lives(&self, node: u32) -> u32 {
        let released = |seen: &&Seen| matches!(seen, Seen::Released(n, _) if *n == id(node));
        self.state().seen.iter().filter(released).count() as u32
    }

    pub fn processes(&self) -> usize {
        let state = self.state();
        let exists = |p: &&Process| p.life != Life::Gone;
        state.processes.values().filter(exists).count()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    /// The rules, to be called at every step.
    fn check(&self) {
        let running = self.running();
        for (at, (node, generation)) in running.iter().enumerate() {
            let table = self.memory.fabric().entry(*node).generation();
            assert_eq!(*generation, table, "raised before the fence of node {node}");
            let twice = running[..at].iter().any(|(other, _)| other == node);
            assert!(!twice, "two lives of node {node} at once");
        }
    }

    pub fn events(&self) -> Vec<Event> {
        let fabric = self.memory.fabric();
        let read = |seq| match fabric.read(seq) {
            RingRead::Event(event) => event,
            other => panic!("event {seq}: {other:?}"),
        };
        (1..=fabric.state().ring_head()).map(read).collect()
    }

    /// The kinds of one node's events, in order.
    pub fn kinds(&self, node: u32) -> Vec<EventKind> {
        let of_node = self.events().into_iter().filter(|e| e.node == node);
        of_node.map(|e| e.kind).collect()
    }

    pub fn state_of(&self, node: u32) -> NodeState {
        self.memory.fabric().entry(id(node)).state()
    }

    pub fn generation_of(&self, node: u32) -> Generation {
        self.memory.fabric().entry(id(node)).generation()
    }
}

/// One process, as a manager holds it.
struct FakeInstance {
    world: Arc<World>,
    pid: u32,
}

impl FakeInstance {
    fn with<T>(&self, f: impl FnOnce(&mut Process) -> T) -> T {
        f(self.world.state().processes.get_mut(&self.pid).unwrap())
    }
}

impl FakeInstance {
    fn set_paused(&self, paused: bool) -> io::Result<()> {
        if self.world.state().stiff {
            return Err(io::Error::other("stiff"));
        }
        self.with(|process| process.paused = paused);
        Ok(())
    }
}

struct FakePower(Arc<World>);

impl PowerControl for FakePower {
    fn prepare(&self, request: &StartRequest<'_>) -> Result<Box<dyn Prepared>, StartError> {
        let mut state = self.0.state();
        if let Some(permanent) = state.refuse.get(&request.node.id) {
            return Err(StartError {
                message: "refused by the test".into(),
                errno: libc::EAGAIN,
                permanent: *permanent,
            });
        }
        let pid = 100 + state.processes.len() as u32;
        let process = Process {
            node: request.node.id,
            generation: request.generation,
            life: Life::Held,
            fenced: false,
            paused: false,
            exit: Exit::unknown(),
        };
        state.processes.insert(pid, process);
        drop(state);
        let instance = FakeInstance {
            world: self.0.clone(),
            pid,
        };
        Ok(Box::new(FakePrepared {
            instance: Some(instance),
            folder: request.folder.clone(),
        }))
    }

    fn adopt(
        &self,
        _request: &StartRequest<'_>,
        record: &NodeRecord,
    ) -> io::Result<Option<Arc<dyn Instance>>> {
        let instance = FakeInstance {
            world: self.0.clone(),
            pid: record.process.pid,
        };
        if instance.is_gone() {
            return Ok(None);
        }
        Ok(Some(Arc::new(instance)))
    }

    fn last_words(&self, _folder: &NodeFolder, record: &NodeRecord) -> Exit {
        self.0.state().processes[&record.process.pid].exit.clone()
    }
}

struct FakePrepared {
    instance: Option<FakeInstance>,
    folder: NodeFolder,
}

impl Prepared for FakePrepared {
    fn process(&self) -> ProcessName {
        self.instance.as_ref().unwrap().process()
    }

    fn release(mut self: Box<Self>) -> Result<Arc<dyn Instance>, StartError> {
        let instance = self.instance.take().unwrap();
        let record = self.folder.record().expect("released without a record");
        assert_eq!(record.process, instance.process(), "another's record");
        let (node, generation) = instance.with(|process| {
            process.life = Life::Running;
            (process.node, process.generation)
        });
        let released = Seen::Released(node, generation);
        let mut state = instance.world.state();
        assert!(!state.seen.contains(&released), "{released:?} lived twice");
        state.seen.push(released);
        drop(state);
        instance.world.check();
        Ok(Arc::new(instance))
    }
}

impl Drop for FakePrepared {
    fn drop(&mut self) {
        if let Some(instance) = &self.instance {
            instance.with(|process| process.life = Life::Gone);
        }
    }
}

impl Instance for FakeInstance {
    fn process(&self) -> ProcessName {
        ProcessName {
            pid: self.pid,
            start_time: 1,
        }
    }

    fn watch(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_gone(&self) -> bool {
        self.with(|process| process.life == Life::Gone)
    }

    fn confirm_fence(&self, _fence: &Fence) -> io::Result<()> {
        let fenced = self.with(|process| process.fenced || process.life == Life::Gone);
        if fenced {
            return Ok(());
        }
        Err(io::Error::other("its power is on"))
    }

    fn fence(&self) -> io::Result<Fence> {
        let firmware = self.world.state().firmware.pop_front();
        match firmware {
            Some(Firmware::Refuses) => return Err(io::Error::other("the BMC is busy")),
            Some(Firmware::Lies) => {
                return Ok(Fence {
                    path: FencePath::Killed,
                    nanos: 5,
                    slots: 0,
                });
            }
            None => {}
        }
        let polite = self.world.state().polite;
        let (node, generation, path) = self.with(|process| {
            let path = match (process.life, polite) {
                (Life::Gone, _) => FencePath::Exited,
                (_, true) => FencePath::Memslots,
                (_, false) => {
                    process.life = Life::Gone;
                    FencePath::Killed
                }
            };
            process.fenced = true;
            (process.node, process.generation, path)
        });
        let table = self.world.generation_of(node.get());
        let seen = Seen::Fenced(node, generation, table);
        self.world.state().seen.push(seen);
        Ok(Fence {
            path,
            nanos: 5,
            slots: 3,
        })
    }

    fn pause(&self) -> io::Result<()> {
        self.set_paused(true)
    }

    fn resume(&self) -> io::Result<()> {
        self.set_paused(false)
    }

    fn quit(&self) {
        let obedient = self.world.state().obedient;
        self.with(|process| {
            assert!(
                process.fenced || process.life == Life::Gone,
                "quit before the fence"
            );
            if obedient {
                process.life = Life::Gone;
            }
        });
    }

    fn kill(&self) {
        let (node, generation) = self.with(|process| {
            process.life = Life::Gone;
            (process.node, process.generation)
        });
        self.world.state().seen.push(Seen::Killed(node, generation));
    }

    fn ring(&self) -> bool {
        let node = self.with(|process| {
            assert!(!process.fenced, "rang a fenced life");
            process.node
        });
        let events = self.world.memory.fabric().state().ring_head();
        self.world.state().seen.push(Seen::Rung(node, events));
        true
    }

    fn exit(&self) -> Exit {
        self.with(|process| process.exit.clone())
    }

    fn thread_times(&self) -> Option<Vec<ThreadTimes>> {
        (!self.world.state().blind).then(Vec::new)
    }
}

/// The newest event of a kind about a node.
pub(super) fn newest(world: &World, node: u32, kind: EventKind) -> Event {
    let of_node = |e: &Event| e.node == node && e.kind == kind;
    world.events().into_iter().rfind(of_node).unwrap()
}

pub(super) fn is_wrong_state(refused: Result<(), ControlError>, word: &str) {
    let error = refused.unwrap_err();
    assert!(
        matches!(error, ControlError::WrongState { .. }) && error.to_string().contains(word),
        "{error}"
    );
}
