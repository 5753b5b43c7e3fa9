//! Busy nodes on few processors: none may be taken for hung but those that are.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use lupin_abi::Cause;
use lupin_abi::event::{Event, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::Client;
use lupin_fabric::api::client::StreamItem;
use lupin_report::{Bar, Report, Row};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::Progress;
use crate::rig::{Rig, RigError, go_on, signal, system};

/// What keeps a node busy.
const BUSY: [&str; 3] = ["sh", "-c", "while :; do :; done"];
/// How long an injected hang may take to be found.
const FOUND: Duration = Duration::from_secs(60);

/// Arguments of the suite of that name.
#[derive(Debug, clap::Args)]
pub struct FalseKills {
    /// How many nodes, each with a process that never rests
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=64))]
    nodes: u32,
    /// On how many processors, manager and all
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// How long
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// How many nodes to stop in that time, one after the other
    #[arg(long, value_name = "N", default_value_t = 5)]
    hangs: u32,
    /// With `clock = "wall"` in the pod file: time in which the host did not let a node run counts
    /// against it. What this finds is no proof of anything, and no bar is held against it
    #[arg(long)]
    no_starvation_rule: bool,
    #[command(flatten)]
    pub(crate) common: crate::Common,
}

/// One life of a node.
type Life = (u32, u32);

/// A pod of busy nodes, and what became of them.
struct Busy<'a> {
    rig: &'a mut Rig,
    /// The generation in which each node was made busy last.
    busy: BTreeMap<u32, u32>,
    detected: Receiver<Event>,
    /// Failures that were seen, with their cause.
    failures: BTreeMap<Life, Cause>,
}

impl FalseKills {
    /// Busy nodes, and hangs among them.
    pub fn run(&self) -> Result<Report, RigError> {
        self.keep_to_processors()?;
        let clock = if self.no_starvation_rule {
            "wall"
        } else {
            "available"
        };
        let words = format!("[heartbeat]\nclock = \"{clock}\"\n");
        let mut rig = Rig::start(&self.common.binaries(), self.nodes, &words)?;
        let mut pod = Busy::new(&mut rig)?;
        let (begin, all) = (Instant::now(), Duration::from_secs(60 * self.minutes));
        let mut progress = Progress::new("hangs among busy nodes");
        let mut injected = Vec::new();
        while begin.elapsed() < all || injected.len() < self.hangs as usize {
            go_on()?;
            pod.keep_busy()?;
            let share = begin.elapsed().as_secs_f64() / all.as_secs_f64();
            let due = (share * f64::from(self.hangs)) as usize;
            if injected.len() < self.hangs as usize && injected.len() <= due {
                let node = 1 + injected.len() as u32 % self.nodes;
                if let Some(life) = pod.hang(node)? {
                    injected.push(life);
                }
                progress.tell(injected.len() as u32, self.hangs);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        pod.look();
        let failures = &pod.failures;
        let is_found = |life: &&Life| failures.get(*life) == Some(&Cause::Hang);
        let found = injected.iter().filter(is_found).count() as f64;
        let starved = failures.keys().filter(|life| !injected.contains(life));
        let starved = starved.count() as f64;
        let seconds = begin.elapsed().as_secs();
        let mut report = Report::new("false-kills");
        let row = Row::new("nodes killed that were only starved", starved, "nodes").n(seconds);
        report.push(if self.no_starvation_rule {
            row
        } else {
            row.proof(Bar::AtMost(0.0))
        });
        let n = injected.len() as u64;
        let row = Row::new("hangs found", found, "hangs").n(n);
        report.push(row.proof(Bar::AtLeast(n as f64)));
        Ok(report)
    }

    /// Everything that is started from now on shares so many processors.
    fn keep_to_processors(&self) -> Result<(), RigError> {
        let me = Pid::from_raw(0);
        let may = sched_getaffinity(me).map_err(|e| system("read the affinity")(e.into()))?;
        let mut few = CpuSet::new();
        let own = (0..CpuSet::count()).filter(|cpu| may.is_set(*cpu).unwrap_or(false));
        for cpu in own.take(self.cpus as usize) {
            // In range: the number came from such a set.
            let _ = few.set(cpu);
        }
        sched_setaffinity(me, &few).map_err(|e| system("set the affinity")(e.into()))
    }
}

impl<'a> Busy<'a> {
    fn new(rig: &'a mut Rig) -> Result<Self, RigError> {
        let (sender, detected) = channel();
        let mut events = Client::connect(&rig.runtime())?.events(None, true)?;
        // Ends with the pod.
        std::thread::spawn(move || {
            while let Ok(Some(item)) = events.next_item() {
                if let StreamItem::Event(event) = item
                    && event.kind == EventKind::FailureDetected
                    && sender.send(event).is_err()
                {
                    return;
                }
            }
        });
        Ok(Self {
            rig,
            busy: BTreeMap::new(),
            detected,
            failures: BTreeMap::new(),
        })
    }

    /// Takes note of failures.
    fn look(&mut self) {
        for event in self.detected.try_iter() {
            self.failures
                .insert((event.node, event.old_generation), event.cause);
        }
    }

    /// Makes every node busy that has come back idle.
    fn keep_busy(&mut self) -> Result<(), RigError> {
        self.look();
        for node in self.rig.status()?.nodes {
            let is_new = self.busy.get(&node.id) != Some(&node.generation);
            // It may be killed at this moment, and is made busy in its next life then.
            if node.state == NodeState::Joined
                && is_new
                && self.rig.run_in(&node.name, &BUSY).is_ok()
            {
                self.busy.insert(node.id, node.generation);
            }
        }
        Ok(())
    }

    /// Stops a node and waits until that is found; `None` if it was killed first.
    fn hang(&mut self, id: u32) -> Result<Option<Life>, RigError> {
        let node = self.rig.wait_joined(id, 0)?;
        let life = (id, node.generation);
        if signal(node.pid.unwrap_or_default(), Signal::SIGSTOP).is_err() {
            return Ok(None);
        }
        let begin = Instant::now();
        self.look();
        if self.failures.contains_key(&life) {
            return Ok(None);
        }
        while !self.failures.contains_key(&life) && begin.elapsed() < FOUND {
            go_on()?;
            std::thread::sleep(Duration::from_millis(5));
            self.look();
        }
        Ok(Some(life))
    }
}
