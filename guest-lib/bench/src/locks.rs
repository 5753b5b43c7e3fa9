//! Locks around one shared counter.

use std::error::Error;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::liveness::ThreadLiveness;
use lupin::lock::{Acquired, RecoverableLock};
use lupin::shm::{Mapping, ShmError};
use lupin_report::{Bar, Report, Row};

use crate::measure::{Effort, Paired, Slice, contend, paired, thread_cpu_time};
use crate::peers::robust::RobustMutex;
use crate::peers::tatas::{Spinning, Tatas};
use crate::pod::{Pod, memory};

/// Threads of the crowded figures.
const CROWD: usize = 32;

/// A lock, as one of the pod's threads uses it.
trait Exclusive: Sync {
    fn exclusively(&self, me: InstanceId, work: impl FnOnce());
}

struct Recoverable<'a> {
    lock: RecoverableLock<'a>,
    judge: ThreadLiveness<'a>,
}

impl<'a> Recoverable<'a> {
    fn new(memory: &'a Mapping, at: u64, pod: &'a Pod) -> Result<Self, ShmError> {
        let words = memory.get::<LockWords>(at)?;
        Ok(Self {
            lock: RecoverableLock::new(words),
            judge: pod.judge(),
        })
    }
}

impl Exclusive for Recoverable<'_> {
    #[inline(always)]
    fn exclusively(&self, me: InstanceId, work: impl FnOnce()) {
        match self.lock.lock(me, &self.judge) {
            Ok(Acquired::Clean(guard)) => {
                work();
                guard.unlock().expect("nobody is declared dead here");
            }
            Ok(Acquired::Orphaned(orphan)) => panic!("{} died", orphan.previous()),
            Err(error) => panic!("{error}"),
        }
    }
}

macro_rules! peer {
    ($type:ty, $lock:ident, $unlock:ident) => {
        impl Exclusive for $type {
            #[inline(always)]
            fn exclusively(&self, _: InstanceId, work: impl FnOnce()) {
                self.$lock();
                work();
                self.$unlock();
            }
        }
    };
}
peer!(Tatas, lock, unlock);
peer!(Spinning, lock, unlock);
peer!(RobustMutex, lock, unlock);

/// In a cache line of its own, like the others.
#[repr(align(64))]
#[derive(Default)]
struct ParkingLot(parking_lot::Mutex<()>);

impl Exclusive for ParkingLot {
    #[inline(always)]
    fn exclusively(&self, _: InstanceId, work: impl FnOnce()) {
        let _guard = self.0.lock();
        work();
    }
}

/// A counter that a lock protects, in a cache line of its own.
#[repr(align(64))]
struct Counter<'l, L> {
    cell: AtomicU64,
    lock: &'l L,
    /// What the cell must hold.
    expected: AtomicU64,
}

impl<'l, L: Exclusive> Counter<'l, L> {
    fn new(lock: &'l L) -> Self {
        Self {
            cell: AtomicU64::new(0),
            lock,
            expected: AtomicU64::new(0),
        }
    }

    /// One slice: `threads` threads add one each time; nanoseconds per addition.
    fn slice(&self, crew: &[InstanceId], slice: Slice) -> f64 {
        let (cell, lock) = (&self.cell, black_box(self.lock));
        let (time, operations) = contend(crew, slice, |me| {
            // A load and a store: only the lock makes them one.
            lock.exclusively(me, || {
                cell.store(cell.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            });
        });
        self.expected.fetch_add(operations, Ordering::Relaxed);
        time
    }

    /// Updates that got lost, or happened twice.
    fn wrong(&self) -> u64 {
        let expected = self.expected.load(Ordering::Relaxed);
        expected.abs_diff(self.cell.load(Ordering::Relaxed))
    }
}

/// The locks of one run, and what went wrong under them.
struct Bench {
    report: Report,
    crew: Vec<InstanceId>,
    effort: Effort,
    wrong: u64,
    additions: u64,
}

impl Bench {
    fn pair(&mut self, threads: usize, first: &impl Exclusive, second: &impl Exclusive) -> Paired {
        let (first, second) = (Counter::new(first), Counter::new(second));
        let (rounds, slice) = self.effort.of(threads);
        let crew = &self.crew[..threads];
        let pair = paired(
            rounds,
            || first.slice(crew, slice),
            || second.slice(crew, slice),
        );
        self.wrong += first.wrong() + second.wrong();
        for expected in [&first.expected, &second.expected] {
            self.additions += expected.load(Ordering::Relaxed);
        }
        pair
    }

    fn push(&mut self, names: [&str; 2], threads: usize, pair: Paired, bar: Option<Bar>) {
        let crowd = match threads {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        pair.rows(&mut self.report, names, &crowd, bar);
    }
}

/// All figures of locks.
pub fn measure(effort: Effort) -> Result<Report, Box<dyn Error>> {
    let pod = Pod::new(1)?;
    let memory = memory("locks", 1 << 20)?;
    let mut bench = Bench {
        report: Report::new("locks"),
        crew: (1..=CROWD as u32)
            .map(|id| pod.begin_thread(id, 1))
            .collect(),
        effort,
        wrong: 0,
        additions: 0,
    };
    let recoverable = Recoverable::new(&memory, 0, &pod)?;
    let (plain, spinning) = (Tatas::default(), Spinning::default());
    let (robust, parking_lot) = (RobustMutex::new()?, ParkingLot::default());

    for threads in [1, 2, CROWD] {
        let pair = bench.pair(threads, &recoverable, &plain);
        let names = ["recoverable TATAS", "plain TATAS"];
        bench.push(names, threads, pair, Some(Bar::AtMost(1.03)));
    }
    // For the reader who asks what the waiting policy costs: its peer never sleeps.
    for threads in [1, 2] {
        let pair = bench.pair(threads, &recoverable, &spinning);
        bench.push(["recoverable TATAS", "spinning TATAS"], threads, pair, None);
    }
    let pair = bench.pair(1, &robust, &recoverable);
    let names = ["pthread robust shared mutex", "recoverable TATAS"];
    bench.push(names, 1, pair, Some(Bar::AtLeast(3.0)));
    for (threads, bar) in [(1, None), (2, None), (CROWD, Some(Bar::AtLeast(0.9)))] {
        // Times of the peer over times of the subject: the subject's throughput over the peer's.
        let pair = bench.pair(threads, &parking_lot, &recoverable);
        bench.push(["parking_lot", "recoverable TATAS"], threads, pair, bar);
    }

    for waiters in [1, CROWD - 1] {
        let used = waiting(&recoverable, &bench.crew, waiters, effort.hold);
        bench.report.push(
            Row::new(
                format!("recoverable TATAS, {waiters} waiting for a sleeping holder"),
                used * 100.0,
                "% of a core",
            )
            .bar(Bar::AtMost(10.0)),
        );
    }
    bench.report.push(
        Row::new("additions lost or doubled", bench.wrong as f64, "additions")
            .proof(Bar::AtMost(0.0))
            .n(bench.additions),
    );
    Ok(bench.report)
}

/// The processor time that all waiters together use while a holder sleeps for `hold`, as a
/// fraction of that time.
fn waiting(lock: &impl Exclusive, crew: &[InstanceId], waiters: usize, hold: Duration) -> f64 {
    let (holder, others) = (crew[0], &crew[1..=waiters]);
    let used = std::thread::scope(|scope| {
        let mut waits = Vec::new();
        lock.exclusively(holder, || {
            let start = Instant::now();
            for me in others {
                waits.push(scope.spawn(move || {
                    let before = thread_cpu_time();
                    // Its end is the end of the wait: what the hand-over costs is not meant.
                    let mut used = Duration::ZERO;
                    lock.exclusively(*me, || used = thread_cpu_time() - before);
                    used
                }));
            }
            std::thread::sleep(hold.saturating_sub(start.elapsed()));
        });
        waits
            .into_iter()
            .map(|wait| wait.join().unwrap_or(hold))
            .sum::<Duration>()
    });
    used.as_secs_f64() / hold.as_secs_f64()
}
