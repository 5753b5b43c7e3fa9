//! Locks around one shared counter.

use std::error::Error;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::liveness::ThreadLiveness;
use lupin::lock::mcs::{McsLock, McsNodes, McsWaiter};
use lupin::lock::{Acquired, RecoverableLock};
use lupin::shm::{Mapping, ShmError};
use lupin_report::{Bar, Report, Row};

use crate::measure::{Effort, Paired, Slice, contend, paired, thread_cpu_time};
use crate::peers::mcs::{self, Mcs};
use crate::peers::robust::RobustMutex;
use crate::peers::tatas::{Spinning, Tatas};
use crate::pod::{Pod, memory};

/// Threads of the crowded figures.
const CROWD: usize = 32;

/// A lock, as the pod's threads use it.
trait Exclusive: Sync {
    /// What a thread has to use it.
    type Session;
    fn begin(&self, me: InstanceId) -> Self::Session;
    fn exclusively(&self, session: &mut Self::Session, work: impl FnOnce());
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
    type Session = InstanceId;

    fn begin(&self, me: InstanceId) -> InstanceId {
        me
    }

    #[inline(always)]
    fn exclusively(&self, me: &mut InstanceId, work: impl FnOnce()) {
        match self.lock.lock(*me, &self.judge) {
            Ok(Acquired::Clean(guard)) => {
                work();
                drop(guard);
            }
            Ok(Acquired::Orphaned(orphan)) => panic!("{} died", orphan.previous()),
            Err(error) => panic!("{error}"),
        }
    }
}

struct Queue<'a> {
    nodes: McsNodes<'a>,
    lock: McsLock<'a>,
    judge: ThreadLiveness<'a>,
}

impl<'a> Queue<'a> {
    fn new(memory: &'a Mapping, at: u64, pod: &'a Pod) -> Result<Self, ShmError> {
        let nodes = McsNodes::new(memory, at + 64, 2 * CROWD as u16)?;
        Ok(Self {
            nodes,
            lock: McsLock::new(nodes, at)?,
            judge: pod.judge(),
        })
    }
}

impl<'a> Exclusive for Queue<'a> {
    type Session = McsWaiter<'a>;

    fn begin(&self, me: InstanceId) -> McsWaiter<'a> {
        let waiter = self.nodes.join(me, &self.judge);
        waiter.expect("there are nodes for all")
    }

    #[inline(always)]
    fn exclusively(&self, waiter: &mut McsWaiter<'a>, work: impl FnOnce()) {
        match self.lock.lock(waiter, &self.judge) {
            Ok(Acquired::Clean(guard)) => {
                work();
                drop(guard);
            }
            Ok(Acquired::Orphaned(orphan)) => panic!("{} died", orphan.previous()),
            Err(error) => panic!("{error}"),
        }
    }
}

impl<'a> Exclusive for Mcs<'a> {
    type Session = mcs::Waiter<'a>;

    fn begin(&self, me: InstanceId) -> mcs::Waiter<'a> {
        self.join(me.id())
    }

    #[inline(always)]
    fn exclusively(&self, waiter: &mut mcs::Waiter<'a>, work: impl FnOnce()) {
        self.lock(*waiter);
        work();
        self.unlock(*waiter);
    }
}

macro_rules! peer {
    ($type:ty) => {
        impl Exclusive for $type {
            type Session = ();

            fn begin(&self, _: InstanceId) {}

            #[inline(always)]
            fn exclusively(&self, (): &mut (), work: impl FnOnce()) {
                self.lock();
                work();
                self.unlock();
            }
        }
    };
}
peer!(Tatas<'_>);
peer!(Spinning);
peer!(RobustMutex);

/// In a cache line of its own, like the others.
#[repr(align(64))]
#[derive(Default)]
struct ParkingLot(parking_lot::Mutex<()>);

impl Exclusive for ParkingLot {
    type Session = ();

    fn begin(&self, _: InstanceId) {}

    #[inline(always)]
    fn exclusively(&self, (): &mut (), work: impl FnOnce()) {
        let _guard = self.0.lock();
        work();
    }
}

/// A counter that a lock protects, in a cache line of its own.
struct Counter<'l, L> {
    cell: &'l AtomicU64,
    lock: &'l L,
    /// What the cell must hold.
    expected: AtomicU64,
}

impl<'l, L: Exclusive> Counter<'l, L> {
    fn new(lock: &'l L, cell: &'l AtomicU64) -> Self {
        cell.store(0, Ordering::Relaxed);
        Self {
            cell,
            lock,
            expected: AtomicU64::new(0),
        }
    }

    /// One slice: `threads` threads add one each time; nanoseconds per addition.
    fn slice(&self, crew: &[InstanceId], slice: Slice) -> f64 {
        let (cell, lock) = (self.cell, black_box(self.lock));
        // A load and a store: only the lock makes them one.
        let add = || cell.store(cell.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let (time, operations) = contend(
            crew,
            slice,
            |me| lock.begin(me),
            |session| lock.exclusively(session, add),
        );
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
struct Bench<'a> {
    /// The counters of the two that are compared, in the pod's memory.
    cells: [&'a AtomicU64; 2],
    report: Report,
    crew: Vec<InstanceId>,
    effort: Effort,
    wrong: u64,
    additions: u64,
}

impl Bench<'_> {
    fn pair(&mut self, threads: usize, first: &impl Exclusive, second: &impl Exclusive) -> Paired {
        let [one, other] = self.cells;
        let (first, second) = (Counter::new(first, one), Counter::new(second, other));
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
        // Lines that share no set of the caches with the locks': a processor that compares only
        // the low bits of an address with those of the stores before it takes the one for the
        // other, and waits.
        cells: [memory.get(0x8f00)?, memory.get(0x8f80)?],
        report: Report::new("locks"),
        crew: (1..=CROWD as u32)
            .map(|id| pod.begin_thread(id, 1))
            .collect(),
        effort,
        wrong: 0,
        additions: 0,
    };
    // A subject and its peer lie in the same memory, in lines that differ in the page only.
    let recoverable = Recoverable::new(&memory, 0, &pod)?;
    let (plain, spinning) = (Tatas::new(memory.get(0x1000)?), Spinning::default());
    let queue = Queue::new(&memory, 0x2000, &pod)?;
    let plain_queue = Mcs::new(&memory, 0x4000, CROWD)?;
    let (robust, parking_lot) = (RobustMutex::new()?, ParkingLot::default());

    for threads in [1, 2, CROWD] {
        let pair = bench.pair(threads, &recoverable, &plain);
        let names = ["recoverable TATAS", "plain TATAS"];
        bench.push(names, threads, pair, Some(Bar::AtMost(1.03)));
    }
    for threads in [1, 2, CROWD] {
        let pair = bench.pair(threads, &queue, &plain_queue);
        let names = ["recoverable MCS", "plain MCS"];
        bench.push(names, threads, pair, Some(Bar::AtMost(1.06)));
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
        let used = [
            (
                "TATAS",
                waiting(&recoverable, &bench.crew, waiters, effort.hold),
            ),
            ("MCS", waiting(&queue, &bench.crew, waiters, effort.hold)),
        ];
        for (name, used) in used {
            let name = format!("recoverable {name}, {waiters} waiting for a sleeping holder");
            bench
                .report
                .push(Row::new(name, used * 100.0, "% of a core").bar(Bar::AtMost(10.0)));
        }
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
        lock.exclusively(&mut lock.begin(holder), || {
            let start = Instant::now();
            for me in others {
                waits.push(scope.spawn(move || {
                    let mut session = lock.begin(*me);
                    let before = thread_cpu_time();
                    let mut used = Duration::ZERO;
                    lock.exclusively(&mut session, || used = thread_cpu_time() - before);
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
