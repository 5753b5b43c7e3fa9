//! One life of a node that stores, one fence, and a look at what moved afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lupin_abi::event::FencePath;
use lupin_fabric::power::{Instance, StartRequest};
use lupin_fabric::sys::threads::ThreadTimes;
use lupin_report::interrupt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rig::{Rig, RoundError, Seat, system};

/// How long the polite fence may take where it is to succeed.
const POLITE: Duration = Duration::from_secs(30);
/// And where the VMM cannot answer.
const IMPATIENT: Duration = Duration::from_millis(20);
/// How long a node may take to end when a round is over.
const END: Duration = Duration::from_secs(60);
/// How long the threads of a node that lives on may take to run once more.
const RUN: Duration = Duration::from_secs(60);
/// For so long: many times the tens of nanoseconds from one store to the next.
const RAN_NS: u64 = 100_000;
/// So many stores of each processor make a node that stores.
const STORING: u64 = 100;

/// How a node is fenced.
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

impl Way {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Polite => "polite",
            Self::Kill => "kill",
            Self::Stopped => "stopped",
            Self::LeftOut => "control without a fence",
        }
    }

    /// Whether a fence that is to go this way went it.
    fn is(self, path: FencePath) -> bool {
        match self {
            Self::Polite => path == FencePath::Memslots,
            // Gone already, or gone when asked.
            Self::Kill => path != FencePath::Memslots,
            Self::Stopped => path == FencePath::Killed,
            Self::LeftOut => false,
        }
    }
}

/// What a round showed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From the decision to fence to its completion.
    pub fence: Duration,
    /// Stores that arrived after the fence, by which time nothing of the generation's raise had
    /// begun.
    pub late: u64,
}

/// Starts a node, fences it, raises its generation, and watches the counters for `watch`.
pub fn round(rig: &Rig, seat: &mut Seat, way: Way, watch: Duration) -> Result<Sample, RoundError> {
    seat.generation += 1;
    seat.folder.clean()?;
    let entry = rig.memory.fabric().entry(seat.id);
    entry.set_generation(seat.generation);
    let before = rig.counters(seat)?;
    let node = rig.pod.node(seat.id).ok_or_else(|| RoundError::System {
        action: "cannot find the node",
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let request = StartRequest {
        node,
        generation: seat.generation,
        folder: &seat.folder,
        memory: &rig.memory,
        heartbeat_period: Duration::from_millis(8),
    };
    let bound = if way == Way::Stopped {
        IMPATIENT
    } else {
        POLITE
    };
    let instance = rig.power(bound)?.prepare(&request);
    let instance = instance.map_err(RoundError::Start)?;
    // However this ends, the node ends too.
    let instance = Ended(instance.release().map_err(RoundError::Start)?);
    wait_storing(rig, seat, &instance, &before)?;

    let begin = Instant::now();
    match way {
        Way::Polite | Way::LeftOut => {}
        Way::Kill => instance.0.kill(),
        Way::Stopped => {
            stop(instance.0.process().pid).map_err(system("cannot stop the node"))?;
        }
    }
    if way != Way::LeftOut {
        let fence = instance.0.fence().map_err(system("the fence failed"))?;
        if !way.is(fence.path) {
            return Err(RoundError::WrongPath {
                wanted: way.name(),
                took: fence.path.name().into(),
            });
        }
    }
    let fence = begin.elapsed();
    let at_fence = rig.counters(seat)?;
    seat.generation += 1;
    entry.set_generation(seat.generation);
    let late = late_stores(rig, seat, &instance, &at_fence, watch)?;
    if way == Way::Polite && instance.0.is_gone() {
        return Err(RoundError::Gone(log(seat)));
    }
    Ok(Sample { fence, late })
}

fn wait_storing(
    rig: &Rig,
    seat: &Seat,
    instance: &Ended,
    before: &[u64],
) -> Result<(), RoundError> {
    let (patience, pause) = rig.patience();
    let begin = Instant::now();
    loop {
        // Asked first: a node that stored and ended must not look like one that stores.
        let is_gone = instance.0.is_gone();
        let now = rig.counters(seat)?;
        let storing = now.iter().zip(before).filter(|(n, b)| **n >= **b + STORING);
        let storing = storing.count();
        if interrupt::is_requested() {
            return Err(RoundError::Interrupted);
        }
        if is_gone {
            return Err(RoundError::Ended(log(seat)));
        }
        // Its threads are known once it has said hello; what lives on after a fence is watched by
        // them.
        if storing == before.len() && instance.0.thread_times().is_some_and(|t| !t.is_empty()) {
            return Ok(());
        }
        if begin.elapsed() > patience {
            return Err(RoundError::NotStoring {
                after: patience,
                storing,
                wanted: before.len(),
                log: log(seat),
            });
        }
        std::thread::sleep(pause);
    }
}

/// How many stores arrive within the time. What still exists of the node must have run meanwhile,
/// every thread that could store: else nothing was to be seen, and the time does not count.
fn late_stores(
    rig: &Rig,
    seat: &Seat,
    instance: &Ended,
    at_fence: &[u64],
    time: Duration,
) -> Result<u64, RoundError> {
    let threads = instance.0.thread_times();
    let threads = threads.ok_or(RoundError::NotRunning(Duration::ZERO))?;
    let begin = Instant::now();
    loop {
        let now = rig.counters(seat)?;
        let late = now.iter().zip(at_fence).map(|(n, a)| n.wrapping_sub(*a));
        let late = late.fold(0, u64::saturating_add);
        let waited = begin.elapsed();
        if late > 0 || (waited > time && have_run(instance, &threads)) {
            return Ok(late);
        }
        if waited > RUN {
            return Err(RoundError::NotRunning(RUN));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Whether each of these threads has run since its account was read, or is gone.
fn have_run(instance: &Ended, before: &[ThreadTimes]) -> bool {
    if instance.0.is_gone() {
        return true;
    }
    let Some(now) = instance.0.thread_times() else {
        return false;
    };
    before.iter().all(|before| {
        let now = now.iter().find(|now| now.tid == before.tid);
        now.is_none_or(|now| now.run_ns >= before.run_ns + RAN_NS)
    })
}

/// What the node's process and its console say.
fn log(seat: &Seat) -> String {
    let names = [seat.folder.path().join("vmm.log"), seat.folder.console()];
    let text = names.map(|name| std::fs::read_to_string(name).unwrap_or_default());
    text.concat()
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
        while !self.0.is_gone() && begin.elapsed() < END {
            std::thread::sleep(Duration::from_micros(200));
        }
        // Reaps it.
        self.0.exit();
    }
}
