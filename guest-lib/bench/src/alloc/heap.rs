//! The heap of a segment, against jemalloc, which survives nothing.

use std::cell::RefCell;
use std::error::Error;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;
use lupin_report::{Bar, Report, Row};
use tikv_jemalloc_sys as jemalloc;

use super::Audits;
use crate::measure::{Effort, alone, paired};
use crate::pod::{Pod, memory};
use crate::process::Child;

pub const HEAP_SIZE: u64 = 64 << 20;

/// Nanoseconds that a pair of 64 B may take.
const BAR: f64 = 30.0;

pub fn measure(
    report: &mut Report,
    audits: &mut Audits,
    effort: Effort,
) -> Result<(), Box<dyn Error>> {
    let pod = Pod::new(2)?;
    let me = pod.begin_thread(1, 1);
    let memory = memory("heap", HEAP_SIZE)?;
    let heap = Heap::create(&memory, &HeapSpec::default(), me, &pod.judge())?;
    let mut participant = heap.join(me, pod.judge())?;
    let (rounds, slice) = effort.of(1);
    let (hold, root) = (participant.hold(0), heap.root(0)?);
    for (bytes, text) in [
        (8, "8 B"),
        (64, "64 B"),
        (1024, "1 KiB"),
        (1 << 20, "1 MiB"),
    ] {
        let pair = paired(
            rounds,
            || alone(slice, || ours(&mut participant, hold, bytes)).0,
            || alone(slice, || theirs(bytes)).0,
        );
        let is_barred = bytes == 64;
        let bar = is_barred.then_some(Bar::AtMost(1.5));
        pair.rows(report, ["heap", "jemalloc"], &format!("{text} pair"), bar);
        if is_barred {
            report.push(
                Row::new(format!("heap, {text} pair, time"), pair.first.median, "ns")
                    .bar(Bar::AtMost(BAR))
                    .n(2 * rounds as u64)
                    .spread(pair.first.low, pair.first.high),
            );
        }
    }
    // A free from where others may free, too, asks them by a compare-and-swap.
    let party = RefCell::new(&mut participant);
    let through = |slot| {
        let mut party = party.borrow_mut();
        alone(slice, || ours(&mut party, slot, 64)).0
    };
    let pair = paired(rounds, || through(root), || through(hold));
    pair.rows(report, ["heap, root", "heap, own slot"], "64 B pair", None);
    two_processes(report, &pod, &memory, &mut participant, effort)?;
    participant.leave()?;
    // The second process was killed: its work is settled first.
    pod.raise_node(2);
    heap.recover(me, &pod.judge())?;
    audits.count(heap.audit()?.is_clean());
    Ok(())
}

/// One allocation into a slot, and its free.
#[inline(always)]
pub fn ours<J: Liveness>(participant: &mut Participant<'_, J>, slot: u64, bytes: u64) {
    let block = participant.alloc_into(slot, black_box(bytes));
    black_box(block.expect("a block fits into the heap"));
    participant
        .free_from(slot)
        .expect("the block was allocated just now");
}

#[inline(always)]
fn theirs(bytes: u64) {
    // SAFETY: frees what was allocated, once.
    unsafe {
        let block = jemalloc::malloc(black_box(bytes as usize));
        jemalloc::free(black_box(block));
    }
}

/// Words by which the second process is told to work, and tells that it does.
struct Signs {
    memory: Mapping,
}

impl Signs {
    fn new() -> Result<Self, Box<dyn Error>> {
        let memory = memory("signs", 4096)?;
        Ok(Self { memory })
    }

    fn go(&self) -> &AtomicU64 {
        self.memory.get(0).expect("the page has room for both")
    }

    fn done(&self) -> &AtomicU64 {
        self.memory.get(64).expect("the page has room for both")
    }

    /// Sets the sign and waits until the other process follows it.
    fn set(&self, go: bool) {
        let pause = || std::thread::sleep(Duration::from_micros(50));
        self.go().store(go.into(), Ordering::Release);
        loop {
            let before = self.done().load(Ordering::Acquire);
            pause();
            if (self.done().load(Ordering::Acquire) != before) == go {
                return;
            }
        }
    }
}

/// A second process, of another node, does the same in the same heap.
fn two_processes<J: Liveness>(
    report: &mut Report,
    pod: &Pod,
    memory: &Mapping,
    participant: &mut Participant<'_, J>,
    effort: Effort,
) -> Result<(), Box<dyn Error>> {
    let signs = Signs::new()?;
    let other = pod.begin_thread(2, 2);
    let _child = Child::fork(|| {
        let heap = Heap::open(memory, &pod.judge(), Duration::from_secs(1));
        let heap = heap.expect("the parent created the heap");
        let mut participant = heap.join(other, pod.judge()).expect("there are places");
        let slot = participant.hold(0);
        loop {
            if signs.go().load(Ordering::Acquire) == 0 {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            for _ in 0..64 {
                ours(&mut participant, slot, 64);
            }
            signs.done().fetch_add(64, Ordering::Release);
        }
    })?;
    let (rounds, slice) = effort.of(1);
    let slot = participant.hold(0);
    let mut in_state = |go| {
        signs.set(go);
        alone(slice, || ours(participant, slot, 64)).0
    };
    let (mut together, mut apart) = (Vec::new(), Vec::new());
    let mut ratios = Vec::new();
    for round in 0..=rounds {
        let times = [true, false, false, true].map(&mut in_state);
        if round > 0 {
            together.extend([times[0], times[3]]);
            apart.extend([times[1], times[2]]);
            ratios.push((times[0] + times[3]) / (times[1] + times[2]));
        }
    }
    let pair = crate::measure::Paired::of(ratios, together, apart);
    let names = ["heap, 2 processes", "heap, 1 process"];
    pair.rows(report, names, "64 B pair", Some(Bar::AtMost(1.2)));
    Ok(())
}
