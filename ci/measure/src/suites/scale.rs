//! A thousand nodes for one manager.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lupin_abi::event::{Event, EventKind};
use lupin_abi::fabric::{FabricSection, NodeState, RingRead};
use lupin_abi::{Cause, NodeId};
use lupin_fabric::api::PodControl;
use lupin_fabric::manager::{Backends, Manager};
use lupin_fabric::podfile::Pod;
use lupin_fabric::sys::threads;
use lupin_report::{Bar, Report, Row};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Progress, Times};
use crate::rig::{RigError, go_on, system};
use crate::simulated::{Heart, Simulation};

const PERIOD: Duration = Duration::from_millis(8);
const POLL: Duration = Duration::from_millis(16);
const DEADLINE: Duration = Duration::from_millis(100);
/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments of the suite of that name.
#[derive(Debug, clap::Args)]
pub struct Scale {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: u32,
    /// How many of them stop beating, one after the other
    #[arg(long, value_name = "N", default_value_t = 20)]
    hangs: u32,
    /// For how long to count the manager's work while nothing happens
    #[arg(long, value_name = "S", default_value_t = 10)]
    seconds: u64,
    #[command(flatten)]
    pub(crate) common: crate::Common,
}

impl Scale {
    /// Counts what the looks of a manager cost, and how late they find what hangs.
    pub fn run(&self) -> Result<Report, RigError> {
        raise_descriptor_limit(u64::from(self.nodes) * 8 + 1024);
        let folder = tempfile::tempdir_in(shared_memory()).map_err(system("make a folder"))?;
        let pod = self.pod(folder.path())?;
        let memory = pod.memory.path.clone();
        let simulation = Simulation::new(folder.path()).map_err(system("make a socket"))?;
        let power: Arc<Simulation> = Arc::new(simulation);
        let backends = Backends {
            kvm: power.clone(),
            namespace: power,
        };
        let manager = Manager::open(pod, &folder.path().join("run"), backends)
            .map_err(|e| system("open the pod")(std::io::Error::other(e)))?;
        let handle = manager.handle();
        let heart = Heart::start(&memory, PERIOD).map_err(system("map the pod"))?;
        let (tell, tid) = std::sync::mpsc::channel();
        let running = std::thread::spawn(move || {
            let _ = tell.send(nix::unistd::gettid().as_raw().cast_unsigned());
            manager.run()
        });
        let tid = tid.recv().unwrap_or_default();
        let measured = self.measure(&*handle, &heart, tid);
        handle.down(Duration::ZERO);
        let ended = running.join();
        drop(heart);
        if !matches!(ended, Ok(Ok(_))) {
            return Err(system("end the pod")(std::io::Error::other(
                "the manager failed",
            )));
        }
        measured
    }

    fn pod(&self, folder: &Path) -> Result<Pod, RigError> {
        let mut text = format!(
            "name = \"scale\"\n[memory]\npath = \"pod\"\npool = \"2M\"\nnode_capacity = {}\n\
             [heartbeat]\nperiod_ms = {}\npoll_ms = {}\ndeadline_ms = {}\n\
             [defaults]\nbackend = \"namespace\"\n",
            self.nodes,
            PERIOD.as_millis(),
            POLL.as_millis(),
            DEADLINE.as_millis()
        );
        for id in 1..=self.nodes {
            text += &format!("[[node]]\nid = {id}\n");
        }
        let file = folder.join("pod.toml");
        // The manager keeps a copy.
        std::fs::write(&file, &text).map_err(system("write the pod file"))?;
        Pod::parse(&text, &file).map_err(|e| system("make the pod file")(std::io::Error::other(e)))
    }

    fn measure(&self, pod: &dyn PodControl, heart: &Heart, tid: u32) -> Result<Report, RigError> {
        let fabric = pod.fabric();
        let ids: Vec<NodeId> = (1..=self.nodes).filter_map(NodeId::new).collect();
        wait("the start of the nodes", || {
            let mut states = ids.iter().map(|id| fabric.entry(*id).state());
            states.all(|state| state == NodeState::Joined).then_some(())
        })?;
        // Starting is over: caches are warm, and no thread is being made.
        std::thread::sleep(Duration::from_secs(1));
        let work = |_: ()| threads::times(std::process::id(), tid).map_or(0, |t| t.run_ns);
        let (begin, looks, ran) = (Instant::now(), fabric.state().manager_beat(), work(()));
        std::thread::sleep(Duration::from_secs(self.seconds));
        let looks = fabric.state().manager_beat().wrapping_sub(looks);
        let ran_ns = work(()).saturating_sub(ran) as f64;
        let share = 100.0 * ran_ns / begin.elapsed().as_nanos() as f64;

        let mut late = Times::default();
        let mut progress = Progress::new("hangs among many");
        for round in 1..=self.hangs {
            let node = ids[(round as usize * 37) % ids.len()];
            let generation = fabric.entry(node).generation();
            let seen = fabric.state().ring_head();
            heart.hang(node, generation);
            let event = wait("the verdict on a node that hangs", || {
                find(fabric, seen, node)
            })?;
            let [_, available_ns, deadline_ns, ..] = event.evidence;
            late.push(deadline_ns, available_ns);
            wait("the return of the node", || {
                let entry = fabric.entry(node);
                (entry.state() == NodeState::Joined && entry.generation() > generation)
                    .then_some(())
            })?;
            progress.tell(round, self.hangs);
        }
        let raised: u32 = ids.iter().map(|id| fabric.entry(*id).generation()).sum();
        let wrong = f64::from(raised) - f64::from(self.nodes) - f64::from(self.hangs);

        let mut report = Report::new("scale");
        let row = Row::new(
            format!("poll loop, {} nodes", self.nodes),
            share,
            "% of a core",
        );
        report.push(row.bar(Bar::AtMost(2.0)).n(looks));
        let per_look = ran_ns / looks.max(1) as f64 / 1e3;
        report.push(Row::new("one look at all of them", per_look.round(), "us").n(looks));
        let expected = begin_looks(self.seconds);
        report.push(Row::new("looks made of those due", looks as f64 / expected, "x").n(looks));
        let bar = Bar::AtMost(POLL.as_micros() as f64);
        report.push(late.row("judged after the deadline, p50", 0.5));
        report.push(late.row("judged after the deadline, latest", 1.0).bar(bar));
        let row = Row::new("nodes killed that beat", wrong, "nodes");
        report.push(row.proof(Bar::AtMost(0.0)).n(self.nodes.into()));
        Ok(report)
    }
}

/// How many looks are due in so many seconds.
fn begin_looks(seconds: u64) -> f64 {
    seconds as f64 / POLL.as_secs_f64()
}

/// The detection of a hang of `node` behind position `seen` of the ring.
fn find(fabric: &FabricSection, seen: u64, node: NodeId) -> Option<Event> {
    (seen + 1..=fabric.state().ring_head()).find_map(|seq| match fabric.read(seq) {
        RingRead::Event(event)
            if event.kind == EventKind::FailureDetected
                && event.node == node.get()
                && event.cause == Cause::Hang =>
        {
            Some(event)
        }
        _ => None,
    })
}

fn wait<T>(what: &str, mut happens: impl FnMut() -> Option<T>) -> Result<T, RigError> {
    let begin = Instant::now();
    loop {
        go_on()?;
        if let Some(value) = happens() {
            return Ok(value);
        }
        if begin.elapsed() > PATIENCE {
            return Err(RigError::Late {
                what: what.into(),
                patience: PATIENCE,
                log: String::new(),
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where a sparse file of some gibibytes costs nothing.
fn shared_memory() -> &'static Path {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm } else { Path::new("/tmp") }
}

/// Three descriptors a node: its link, the link's wake-up, and the other end.
fn raise_descriptor_limit(wanted: u64) {
    // If it cannot be raised, connections fail, and are tried again; nodes live all the same.
    let _ = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted.min(hard)), hard)
    });
}
