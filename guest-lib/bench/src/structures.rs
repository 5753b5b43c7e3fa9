//! Data structures: what a change that survives its maker costs, beside structures that nothing
//! survives. There are no bars: the peers do less.

mod map;
mod queue;

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin::InstanceId;
use lupin_report::{Bar, Report, Row};

use crate::measure::{Effort, Slice};
use crate::pod::Pod;

/// Threads of the crowded figures.
const CROWD: u32 = 32;
const HEAP_SIZE: u64 = 256 << 20;

/// What all figures share.
struct Bench<'p> {
    report: Report,
    pod: &'p Pod,
    crew: Vec<InstanceId>,
    effort: Effort,
    wrong: Wrong,
}

impl Bench<'_> {
    /// Rounds and slices of a figure: there are many figures and no bars.
    fn effort(&self, threads: usize) -> (usize, Slice) {
        let (rounds, slice) = self.effort.of(threads);
        (rounds / 3, slice)
    }
}

/// Results that cannot be, among so many.
#[derive(Default)]
struct Wrong {
    results: AtomicU64,
    operations: AtomicU64,
}

impl Wrong {
    fn unless(&self, is_right: bool) {
        if !is_right {
            self.results.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts the operations of a slice; returns its time.
    fn of(&self, (time, operations): (f64, u64)) -> f64 {
        self.operations.fetch_add(operations, Ordering::Relaxed);
        time
    }
}

/// "1 thread", "2 threads".
fn threads_text(threads: usize) -> String {
    match threads {
        1 => "1 thread".into(),
        n => format!("{n} threads"),
    }
}

/// A generator of pseudo-random numbers (Marsaglia, "Xorshift RNGs", J. Stat. Softw. 2003).
struct Random(u64);

impl Random {
    /// Another sequence for each instance.
    fn new(me: InstanceId) -> Self {
        Self(u64::from(me.id()).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// All figures of data structures.
pub fn measure(effort: Effort) -> Result<Report, Box<dyn Error>> {
    let pod = Pod::new(1)?;
    let mut bench = Bench {
        report: Report::new("structures"),
        pod: &pod,
        crew: (1..=CROWD).map(|id| pod.begin_thread(id, 1)).collect(),
        effort,
        wrong: Wrong::default(),
    };
    map::measure(&mut bench)?;
    queue::measure(&mut bench)?;
    let Bench {
        mut report, wrong, ..
    } = bench;
    let (results, operations) = (wrong.results.into_inner(), wrong.operations.into_inner());
    report.push(
        Row::new("wrong results", results as f64, "results")
            .proof(Bar::AtMost(0.0))
            .n(operations),
    );
    Ok(report)
}
