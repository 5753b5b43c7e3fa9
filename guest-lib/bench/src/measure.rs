//! Paired measurement: two programs alternate in short slices of one run.
//!
//! A machine that others use as well is slower at one moment than at the next, by more than what
//! is to be told apart here. So the subject and its peer take turns, in the order subject, peer,
//! peer, subject: a drift during one such round cancels. A round gives one ratio; the figure is
//! the median over the rounds, with the quartiles as its spread. Absolute times are medians of
//! the same slices, and hold for this machine at this hour only.

use std::panic::resume_unwind;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use lupin_report::{Bar, Report, Row};

/// Median and quartiles of samples.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    /// Of at least one sample.
    pub fn of(samples: &mut [f64]) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |quarter: usize| samples[(samples.len() - 1) * quarter / 4];
        Self {
            low: at(1),
            median: at(2),
            high: at(3),
        }
    }
}

/// What a pair showed.
#[derive(Clone, Copy, Debug)]
pub struct Paired {
    /// First over second, per round.
    pub ratio: Spread,
    /// The first's slices.
    pub first: Spread,
    /// The second's slices.
    pub second: Spread,
    pub rounds: usize,
}

impl Paired {
    /// From the ratios of rounds and the times of slices.
    pub fn of(mut ratios: Vec<f64>, mut firsts: Vec<f64>, mut seconds: Vec<f64>) -> Self {
        Self {
            ratio: Spread::of(&mut ratios),
            first: Spread::of(&mut firsts),
            second: Spread::of(&mut seconds),
            rounds: ratios.len(),
        }
    }

    /// The ratio, held against `bar`, and the two times behind it.
    pub fn rows(&self, report: &mut Report, names: [&str; 2], where_: &str, bar: Option<Bar>) {
        let n = self.rounds as u64;
        let [first, second] = names;
        let Spread { low, median, high } = self.ratio;
        let mut row = Row::new(format!("{first} / {second}, {where_}"), median, "x")
            .n(n)
            .spread(low, high);
        if let Some(bar) = bar {
            row = row.bar(bar);
        }
        report.push(row);
        for (name, time) in [(first, self.first), (second, self.second)] {
            report.push(
                Row::new(format!("  {name}, {where_}"), time.median, "ns")
                    .n(2 * n)
                    .spread(time.low, time.high),
            );
        }
    }
}

/// Lets two programs alternate. Each call runs one slice and returns its nanoseconds per
/// operation.
pub fn paired(
    rounds: usize,
    mut first: impl FnMut() -> f64,
    mut second: impl FnMut() -> f64,
) -> Paired {
    // Warm caches, page tables and branch predictors; not counted.
    first();
    second();
    let (mut ratios, mut firsts, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (a, b) = (first(), second());
        let (c, d) = (second(), first());
        ratios.push((a + d) / (b + c));
        firsts.extend([a, d]);
        seconds.extend([b, c]);
    }
    Paired::of(ratios, firsts, seconds)
}

/// How long a slice lasts.
pub type Slice = Duration;

/// How much time is spent on a figure.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Rounds of a figure of one thread, and the length of a slice of it.
    short: (usize, Slice),
    /// Rounds of a figure of several threads, and the length of a slice of it.
    long: (usize, Slice),
    /// How long a holder sleeps while others wait for it.
    pub hold: Duration,
    /// How many victims are killed.
    pub deaths: u32,
}

impl Effort {
    /// Some seconds for a suite if `quick`, else about a minute.
    pub fn new(quick: bool) -> Self {
        let millis = Duration::from_millis;
        match quick {
            true => Self {
                short: (50, millis(1)),
                long: (24, millis(10)),
                hold: millis(300),
                deaths: 100,
            },
            false => Self {
                short: (400, millis(1)),
                long: (100, millis(20)),
                hold: millis(2000),
                deaths: 1000,
            },
        }
    }

    /// For a figure of so many threads. Short slices fit between two preemptions; several threads
    /// need long ones, or their start would be measured.
    pub fn of(&self, threads: usize) -> (usize, Slice) {
        if threads == 1 { self.short } else { self.long }
    }
}

/// How many operations a thread of several makes between two looks at the flag that ends its
/// slice.
const BATCH: u64 = 16;

/// Runs `work` in a loop on as many threads as there are names in `crew`, one each, on what
/// `begin` made of the name on that thread. Returns wall-clock nanoseconds per operation of all
/// together, and the operations; of one thread, see [`alone`].
///
/// The threads are not pinned: the scheduler of the operating system is part of what is
/// compared.
pub fn contend<N: Copy + Send + Sync, S>(
    crew: &[N],
    slice: Slice,
    begin: impl Fn(N) -> S + Sync,
    work: impl Fn(&mut S) + Sync,
) -> (f64, u64) {
    if let [only] = crew {
        let mut state = begin(*only);
        return alone(slice, || work(&mut state));
    }
    let (ready, stop) = (Barrier::new(crew.len() + 1), AtomicBool::new(false));
    let one = |name: N| {
        let mut state = begin(name);
        ready.wait();
        let start = Instant::now();
        let mut operations = 0;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..BATCH {
                work(&mut state);
            }
            operations += BATCH;
        }
        (start, Instant::now(), operations)
    };
    let runs: Vec<(Instant, Instant, u64)> = std::thread::scope(|scope| {
        let one = &one;
        let spawned: Vec<_> = crew
            .iter()
            .map(|name| scope.spawn(move || one(*name)))
            .collect();
        ready.wait();
        std::thread::sleep(slice);
        stop.store(true, Ordering::Relaxed);
        let join = |run: ScopedJoinHandle<'_, _>| match run.join() {
            Ok(run) => run,
            Err(panic) => resume_unwind(panic),
        };
        spawned.into_iter().map(join).collect()
    });
    // By the threads' own clocks: the one that started them may not have run for a while.
    let first = runs.iter().map(|run| run.0).min();
    let last = runs.iter().map(|run| run.1).max();
    let operations: u64 = runs.iter().map(|run| run.2).sum();
    match (first, last) {
        (Some(first), Some(last)) => (nanos(last - first) / operations as f64, operations),
        _ => (f64::NAN, 0),
    }
}

/// Runs `work` in a loop on the calling thread; as [`contend`], but in the thread's processor
/// time: that is wall-clock time for who never sleeps, less the moments at which the machine ran
/// somebody else.
pub fn alone(slice: Slice, mut work: impl FnMut()) -> (f64, u64) {
    let start = thread_cpu_time();
    // Doubled as long as the look at the clock is a visible part of the time.
    let (mut operations, mut batch) = (0, BATCH);
    loop {
        for _ in 0..batch {
            work();
        }
        operations += batch;
        let elapsed = thread_cpu_time() - start;
        if elapsed >= slice {
            return (nanos(elapsed) / operations as f64, operations);
        }
        if elapsed < slice / 8 {
            batch = operations;
        }
    }
}

/// A duration as a number of nanoseconds.
pub fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// Processor time that the calling thread has used.
pub fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the kernel to write.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "Linux has this clock for every thread");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
#[path = "measure_test.rs"]
mod measure_test;
