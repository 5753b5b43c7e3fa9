//! Locks of a pod: counters that stay right whoever dies while changing them.
//!
//! Run it on one node or several, as often as you like, and kill any of them at any time:
//!
//! ```text
//! locks [ROUNDS]
//! ```
//!
//! Each process adds to three pairs of counters, each pair under a lock of another kind: one that
//! barges, one that serves in order, and one that readers share. The two counters of a pair are
//! equal outside of the lock. Whoever finds that a holder died makes them equal again.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin::abi::system::LockWords;
use lupin::lock::{LockError, McsLock, McsNodes, RecoverableLock, RwLock, RwLockWords};
use lupin::{Pod, Segment};

const MIB: u64 = 1 << 20;
/// Where things lie in the segment. All-zero memory is free locks and free nodes, so whoever comes
/// first has nothing to set up.
const BARGING: u64 = 0;
const QUEUE: u64 = 64;
const SHARED: u64 = 512;
/// Where the pairs lie.
pub const PAIRS: [u64; 3] = [1024, 1152, 1280];
const NODES: u64 = 4096;
const NODE_COUNT: u16 = 256;

/// Two counters that are equal outside of their lock.
struct Pair<'s>(&'s AtomicU64, &'s AtomicU64);

impl<'s> Pair<'s> {
    fn new(segment: &'s Segment, at: u64) -> Result<Self, Box<dyn Error>> {
        Ok(Self(segment.get(at)?, segment.get(at + 64)?))
    }

    fn add_one(&self) {
        let next = self.0.load(Ordering::Relaxed) + 1;
        self.0.store(next, Ordering::Relaxed);
        // A death here is what the repair is for.
        self.1.store(next, Ordering::Relaxed);
    }

    /// Repeatable: a repairer may die, too.
    fn repair(&self, what: &str, dead: lupin::InstanceId) -> Result<(), LockError> {
        println!("{what}: {dead} died with the lock; its addition is finished");
        let left = self.0.load(Ordering::Relaxed);
        self.1.store(left, Ordering::Relaxed);
        Ok(())
    }
}

/// Adds to all pairs, `rounds` times; returns where they stand.
pub fn count(pod: &Pod, rounds: u64) -> Result<[u64; 3], Box<dyn Error>> {
    let thread = pod.register_thread(None)?;
    let me = thread.instance();
    let judge = pod.threads_alive();
    let segment = pod.open_or_create_segment("locks", 2 * MIB, 0o660)?;

    let barging = RecoverableLock::new(segment.get::<LockWords>(BARGING)?);
    let nodes = McsNodes::new(&segment, NODES, NODE_COUNT)?;
    let queue = McsLock::new(nodes, QUEUE)?;
    let shared = RwLock::new(segment.get::<RwLockWords>(SHARED)?);
    let mut waiter = nodes.join(me, &judge)?;
    let [first, second, third] = [
        Pair::new(&segment, PAIRS[0])?,
        Pair::new(&segment, PAIRS[1])?,
        Pair::new(&segment, PAIRS[2])?,
    ];

    for round in 0..rounds {
        let guard = barging
            .lock(me, &judge)?
            .or_repair(|dead| first.repair("barging lock", dead))?;
        first.add_one();
        guard.unlock()?;

        let guard = queue
            .lock_timeout(&mut waiter, &judge, Duration::from_secs(60))?
            .or_repair(|dead| second.repair("queue", dead))?;
        second.add_one();
        guard.unlock()?;

        if round % 10 == 0 {
            let guard = shared
                .write(me, &judge)?
                .or_repair(|dead| third.repair("readers-writer lock", dead))?;
            third.add_one();
            guard.unlock()?;
        } else {
            let guard = shared
                .read(me, &judge)?
                .or_repair(&judge, |dead| third.repair("readers-writer lock", dead))?;
            let (left, right) = (&third.0, &third.1);
            assert_eq!(left.load(Ordering::Relaxed), right.load(Ordering::Relaxed));
            guard.unlock()?;
        }
    }
    Ok([first, second, third].map(|pair| pair.1.load(Ordering::Relaxed)))
}

#[allow(dead_code, reason = "a test calls count() itself")]
fn main() -> Result<(), Box<dyn Error>> {
    let rounds = match std::env::args().nth(1) {
        Some(rounds) => rounds.parse()?,
        None => 100_000,
    };
    let pod = Pod::attach()?;
    let start = Instant::now();
    let stand = count(&pod, rounds)?;
    let time = start.elapsed();
    println!("{rounds} rounds in {time:.1?}; the counters stand at {stand:?}");
    Ok(())
}
