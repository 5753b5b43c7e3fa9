//! How long a survivor needs for what a dead owner left, from the moment that it learns of the
//! death.
//!
//! The victims are processes that do nothing but operate, and are killed at whatever instruction
//! they are. The pod's judge is told (a generation is raised), and the clock starts.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin::buddy::PodAllocator;
use lupin::heap::{Heap, HeapSpec};
use lupin_report::{Bar, Report, Row};

use super::Audits;
use super::heap::{HEAP_SIZE, ours};
use super::pod::SPEC;
use crate::measure::{Effort, Spread};
use crate::pod::{Pod, memory};
use crate::process::Child;

/// Microseconds that a survivor may take.
const BAR: f64 = 10.0;
const VICTIM: u32 = 2;

pub fn measure(
    report: &mut Report,
    audits: &mut Audits,
    effort: Effort,
) -> Result<(), Box<dyn Error>> {
    let times = of_pod_allocator(audits, effort.deaths)?;
    push(report, "pod allocator", times);
    let times = of_heap(audits, effort.deaths)?;
    push(report, "heap", times);
    Ok(())
}

fn push(report: &mut Report, name: &str, mut times: Vec<f64>) {
    if times.is_empty() {
        // No victim died inside an operation: nothing was measured.
        times.push(f64::NAN);
    }
    let n = times.len() as u64;
    let Spread { low, median, high } = Spread::of(&mut times);
    report.push(
        Row::new(
            format!("{name}, a dead owner's operation finished"),
            median,
            "us",
        )
        .bar(Bar::AtMost(BAR))
        .n(n)
        .spread(low, high),
    );
}

/// Runs a victim until it has operated a while, and kills it.
fn kill(progress: &AtomicU64, round: u32, work: impl FnOnce()) -> Result<(), Box<dyn Error>> {
    progress.store(0, Ordering::Release);
    let child = Child::fork(work)?;
    while progress.load(Ordering::Acquire) < 100 {
        std::thread::sleep(Duration::from_micros(50));
    }
    // Not always at the same distance from its start.
    std::thread::sleep(Duration::from_micros(u64::from(round * 37 % 101)));
    drop(child);
    Ok(())
}

fn of_pod_allocator(audits: &mut Audits, deaths: u32) -> Result<Vec<f64>, Box<dyn Error>> {
    let pod = Pod::new(VICTIM)?;
    let (judge, me) = (pod.node_judge(), pod.node(1));
    let at = SPEC.metadata_size();
    let memory = memory("allocator", at + 64)?;
    let progress: &AtomicU64 = memory.get(at)?;
    let allocator = PodAllocator::create(&memory, 0, &SPEC, me, &judge)?;
    let mut times = Vec::new();
    for round in 0..deaths {
        let victim = pod.node(VICTIM);
        kill(progress, round, || {
            loop {
                let chunk = allocator.alloc(victim, &judge, 1 << 20);
                let chunk = chunk.expect("a chunk fits into the pod");
                allocator
                    .free(victim, &judge, chunk)
                    .expect("the chunk was allocated just now");
                progress.fetch_add(1, Ordering::Release);
            }
        })?;
        pod.raise_node(VICTIM);
        let start = Instant::now();
        let outcome = allocator.recover(me, &judge)?;
        let time = start.elapsed();
        // Without an outcome it died between two operations: nothing was left to finish.
        if outcome.is_some_and(|outcome| outcome.owner == victim) {
            times.push(time.as_secs_f64() * 1e6);
        }
        let left: Vec<_> = allocator.chunks_of(victim.word()).collect();
        for chunk in left {
            allocator.free_of(me, &judge, chunk.offset, victim.word(), 0)?;
        }
        let audit = allocator.audit(me, &judge);
        audits.count(audit.is_ok_and(|audit| audit.free == audit.units));
    }
    Ok(times)
}

fn of_heap(audits: &mut Audits, deaths: u32) -> Result<Vec<f64>, Box<dyn Error>> {
    let pod = Pod::new(VICTIM)?;
    let me = pod.begin_thread(1, 1);
    let (memory, sign) = (memory("heap", HEAP_SIZE)?, memory("sign", 4096)?);
    let progress: &AtomicU64 = sign.get(0)?;
    let heap = Heap::create(&memory, &HeapSpec::default(), me, &pod.judge())?;
    let mut times = Vec::new();
    for round in 0..deaths {
        let victim = pod.begin_thread(VICTIM, VICTIM);
        kill(progress, round, || {
            let mut participant = heap.join(victim, pod.judge()).expect("there are places");
            let slot = participant.hold(0);
            loop {
                ours(&mut participant, slot, 64);
                progress.fetch_add(1, Ordering::Release);
            }
        })?;
        pod.raise_node(VICTIM);
        let start = Instant::now();
        let outcomes = heap.recover(me, &pod.judge())?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
        let settled = outcomes.iter().any(|outcome| outcome.owner == victim);
        audits.count(settled && heap.audit()?.is_clean());
    }
    Ok(times)
}
