//! The applications of the wake-up suite and of its tests: one holds a lock for a while, again
//! and again, and one waits for it in its sleep.

use std::cell::Cell;
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use lupin::abi::system::LockWords;
use lupin::liveness::Liveness;
use lupin::lock::{Acquired, LockError, RecoverableLock};
use lupin::shm::Access;
use lupin::{InstanceId, Pod, Segment};

use crate::watcher::now_ns;

const SEGMENT: &str = "sleepers";
/// How long either waits for the other to come, or to do its part of a round.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct Sleeper {
    #[command(subcommand)]
    role: Role,
    /// Where in the segment the two meet: a multiple of 4096
    #[arg(long, global = true, default_value_t = 0)]
    at: u64,
    /// How often
    #[arg(long, global = true, default_value_t = 1)]
    rounds: u64,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Holds the lock, and releases it while the other sleeps
    Hold {
        /// For how long
        #[arg(long, value_name = "MS")]
        ms: u64,
    },
    /// Waits for the lock. Writes a line for each time: the round, `clean` or `orphaned`, the
    /// nanoseconds since the release, how often it asked whether the holder lives, and the
    /// nanoseconds that the release before took
    Wait {
        /// Where it writes
        file: PathBuf,
    },
}

/// What the two share, beside the lock.
struct Shared<'m> {
    lock: RecoverableLock<'m>,
    /// The round in which the lock is held.
    held: &'m AtomicU64,
    /// The round in which somebody waits.
    waiting: &'m AtomicU64,
    /// The round that is over.
    done: &'m AtomicU64,
    released_at: &'m AtomicU64,
    release_ns: &'m AtomicU64,
}

impl<'m> Shared<'m> {
    fn new(segment: &'m Segment, at: u64) -> Result<Self, Box<dyn Error>> {
        let word = |index: u64| segment.get::<AtomicU64>(at + 64 * index);
        Ok(Self {
            lock: RecoverableLock::new(segment.get::<LockWords>(at)?),
            held: word(1)?,
            waiting: word(2)?,
            done: word(3)?,
            released_at: word(4)?,
            release_ns: word(5)?,
        })
    }
}

/// The segment, whoever of the two comes first.
fn segment(pod: &Pod) -> Result<Segment, Box<dyn Error>> {
    let begin = Instant::now();
    loop {
        let opened = pod
            .create_segment(SEGMENT, 2 << 20, 0o600)
            .or_else(|_| pod.open_segment(SEGMENT, Access::ReadWrite));
        match opened {
            Ok(segment) => return Ok(segment),
            // It is being scrubbed.
            Err(_) if begin.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_for(word: &AtomicU64, round: u64) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    while word.load(Ordering::Acquire) < round {
        if begin.elapsed() > PATIENCE {
            return Err(format!("the other did not do its part of round {round}").into());
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

impl Sleeper {
    /// Plays the part.
    pub fn run(&self) -> Result<(), Box<dyn Error>> {
        let pod = Pod::attach()?;
        let thread = pod.register_thread(None)?;
        let segment = segment(&pod)?;
        let shared = Shared::new(&segment, self.at)?;
        match &self.role {
            Role::Hold { ms } => {
                let length = Duration::from_millis(*ms);
                hold(&pod, &shared, thread.instance(), self.rounds, length)
            }
            Role::Wait { file } => wait(&pod, &shared, thread.instance(), self.rounds, file),
        }
    }
}

fn hold(
    pod: &Pod,
    shared: &Shared<'_>,
    me: InstanceId,
    rounds: u64,
    length: Duration,
) -> Result<(), Box<dyn Error>> {
    for round in 1..=rounds {
        let nothing_to_repair = |_| Ok::<_, LockError>(());
        let guard = shared
            .lock
            .lock(me, &pod.threads_alive())?
            .or_repair(nothing_to_repair)?;
        shared.held.store(round, Ordering::Release);
        wait_for(shared.waiting, round)?;
        std::thread::sleep(length);
        let begin = now_ns();
        shared.released_at.store(begin, Ordering::Release);
        guard.unlock()?;
        shared.release_ns.store(now_ns() - begin, Ordering::Release);
        wait_for(shared.done, round)?;
    }
    Ok(())
}

fn wait(
    pod: &Pod,
    shared: &Shared<'_>,
    me: InstanceId,
    rounds: u64,
    file: &PathBuf,
) -> Result<(), Box<dyn Error>> {
    let mut out = File::options().append(true).create(true).open(file)?;
    for round in 1..=rounds {
        wait_for(shared.held, round)?;
        let looks = Cell::new(0u64);
        let judge = |instance| {
            looks.set(looks.get() + 1);
            pod.threads_alive().is_alive(instance)
        };
        let release_ns = shared.release_ns.load(Ordering::Acquire);
        shared.waiting.store(round, Ordering::Release);
        let (kind, guard) = match shared.lock.lock(me, &judge)? {
            Acquired::Clean(guard) => ("clean", guard),
            Acquired::Orphaned(orphan) => ("orphaned", orphan.repaired()?),
        };
        let late = now_ns().saturating_sub(shared.released_at.load(Ordering::Acquire));
        guard.unlock()?;
        // One write, so that a reader never sees half a line.
        let line = format!("{round} {kind} {late} {} {release_ns}\n", looks.get());
        out.write_all(line.as_bytes())?;
        shared.done.store(round, Ordering::Release);
        if kind == "orphaned" {
            break;
        }
    }
    Ok(())
}
