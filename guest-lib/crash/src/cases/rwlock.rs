//! The recoverable readers-writer lock.

use core::time::Duration;

use lupin::InstanceId;
use lupin::liveness::Liveness;
use lupin::lock::rwlock::MAX_READERS;
use lupin::lock::{Acquired, LockError, LockState, RwLock, RwLockWords};
use lupin::shm::Mapping;

use super::{Pair, equal, load, store};
use crate::case::{BYSTANDER, Case, FIRST_DEAD, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Write, &Read, &Wait, &Downgrade];

const BYTES: u64 = 4096;
const LOCK: u64 = 512;
/// Where the reader slots lie.
const SLOTS: u64 = LOCK + 128;
/// The value of the pair before the operation.
const BEFORE: u64 = 7;

fn lock(memory: &Mapping) -> RwLock<'_> {
    let words: &RwLockWords = memory.get(LOCK).expect("in bounds");
    RwLock::new(words)
}

/// Changes the pair as a writer; repairs first what a dead one left.
fn write(memory: &Mapping, me: InstanceId, judge: &impl Liveness, adds: bool) {
    let acquired = lock(memory).write(me, judge).expect("nobody alive has it");
    let repaired = acquired.or_repair(|_| {
        Pair(memory).repair();
        Ok::<_, LockError>(())
    });
    let guard = repaired.expect("nobody declared the repairer dead");
    if adds {
        Pair(memory).add_one();
    }
    guard.unlock().expect("nobody declared the writer dead");
}

/// Looks at the pair as a reader; repairs first what a dead writer left.
fn read(memory: &Mapping, me: InstanceId, judge: &impl Liveness) {
    let acquired = lock(memory).read(me, judge).expect("no writer lives");
    let repaired = acquired.or_repair(judge, |_| {
        Pair(memory).repair();
        Ok::<_, LockError>(())
    });
    let guard = repaired.expect("nobody declared the repairer dead");
    assert!(Pair(memory).value().is_ok(), "let in to broken data");
    guard.unlock().expect("nobody declared the reader dead");
}

fn prepare(memory: &Mapping, state: &str) {
    for at in [Pair::LEFT, Pair::RIGHT] {
        store(memory, at, BEFORE);
    }
    let everybody = |_: InstanceId| true;
    match state {
        "free" => {}
        "dead readers" => {
            for _ in 0..MAX_READERS {
                std::mem::forget(lock(memory).try_read(PREDECESSOR, &everybody));
            }
        }
        "dead writer, half changed" => {
            std::mem::forget(lock(memory).try_write(PREDECESSOR, &everybody));
            store(memory, Pair::LEFT, BEFORE + 1);
        }
        "dead writer, dead recoverer and dead reader" => {
            std::mem::forget(lock(memory).try_write(FIRST_DEAD, &everybody));
            store(memory, Pair::LEFT, BEFORE + 1);
            let judge = |instance| instance != FIRST_DEAD;
            std::mem::forget(lock(memory).try_read(PREDECESSOR, &judge));
            store(memory, SLOTS, FIRST_DEAD.word());
        }
        other => panic!("no such state: {other}"),
    }
}

/// The value before the operation, once a dead writer's change is repaired.
fn before(state: &str) -> u64 {
    match state {
        "dead writer, half changed" | "dead writer, dead recoverer and dead reader" => BEFORE + 1,
        _ => BEFORE,
    }
}

/// The living reader ends its hold, as its own thread would.
fn bystander_leaves(memory: &Mapping) {
    for slot in 0..MAX_READERS as u64 {
        if load(memory, SLOTS + slot * 8) == BYSTANDER.word() {
            store(memory, SLOTS + slot * 8, 0);
        }
    }
}

fn recover(memory: &Mapping, me: InstanceId, world: &World) {
    bystander_leaves(memory);
    write(memory, me, world, false);
}

fn check(memory: &Mapping, state: &str, world: &World, adds: u64) -> Result<(), String> {
    let (before, value) = (before(state), Pair(memory).value()?);
    let is_right = match world.returned {
        true => value == before + adds,
        false => value == before || value == before + adds,
    };
    if !is_right {
        return Err(format!("{value} after {before}"));
    }
    equal("the lock", lock(memory).inspect(world), LockState::Free)
}

fn go_on(memory: &Mapping, world: &World) -> Result<(), String> {
    bystander_leaves(memory);
    let before = Pair(memory).value()?;
    read(memory, world.survivor(), world);
    write(memory, world.survivor(), world, true);
    // One more death inside, beside a dead reader, and a repair by a reader.
    store(memory, SLOTS + 8, FIRST_DEAD.word());
    std::mem::forget(lock(memory).try_write(PREDECESSOR, world));
    store(memory, Pair::LEFT, before + 2);
    read(memory, BYSTANDER, world);
    write(memory, world.survivor(), world, true);
    equal("the value", Pair(memory).value()?, before + 3)?;
    equal("the lock", lock(memory).inspect(world), LockState::Free)?;
    let slots = (0..MAX_READERS as u64).map(|slot| load(memory, SLOTS + slot * 8));
    equal("slots in use", slots.filter(|slot| *slot != 0).count(), 0)
}

macro_rules! common {
    () => {
        fn bytes(&self) -> u64 {
            BYTES
        }

        fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
            recover(memory, me, world);
        }

        fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
            go_on(memory, world)
        }
    };
}

/// A writer's critical section.
#[derive(Debug)]
struct Write;

impl Case for Write {
    common!();

    fn name(&self) -> &'static str {
        "rwlock.write"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "free",
            "dead readers",
            "dead writer, half changed",
            "dead writer, dead recoverer and dead reader",
        ]
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        write(memory, VICTIM, &World::without_deaths(), true);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world, 1)
    }
}

/// A reader's critical section.
#[derive(Debug)]
struct Read;

impl Case for Read {
    common!();

    fn name(&self) -> &'static str {
        "rwlock.read"
    }

    fn states(&self) -> &'static [&'static str] {
        Write.states()
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        read(memory, VICTIM, &World::without_deaths());
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world, 0)
    }
}

/// A writer that waits for a living reader, and gives up.
#[derive(Debug)]
struct Wait;

impl Case for Wait {
    common!();

    fn name(&self) -> &'static str {
        "rwlock.write_timeout"
    }

    fn states(&self) -> &'static [&'static str] {
        &["read by another"]
    }

    fn prepare(&self, memory: &Mapping, _: &str) {
        prepare(memory, "free");
        let world = World::without_deaths();
        std::mem::forget(lock(memory).try_read(BYSTANDER, &world));
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let timeout = Duration::from_micros(20);
        let refused = lock(memory).write_timeout(VICTIM, &World::without_deaths(), timeout);
        assert!(
            matches!(refused, Err(LockError::Timeout { .. })),
            "{refused:?}"
        );
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            equal("readers", lock(memory).readers(world), vec![BYSTANDER])?;
        }
        check(memory, "free", world, 0)
    }
}

/// A writer that goes on as a reader.
#[derive(Debug)]
struct Downgrade;

impl Case for Downgrade {
    common!();

    fn name(&self) -> &'static str {
        "rwlock.downgrade"
    }

    fn states(&self) -> &'static [&'static str] {
        &["free", "dead readers"]
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World::without_deaths();
        let Ok(Acquired::Clean(guard)) = lock(memory).write(VICTIM, &world) else {
            panic!("no writer died")
        };
        Pair(memory).add_one();
        let reader = RwLock::downgrade(guard, &world).expect("nobody was declared dead");
        reader.unlock().expect("nobody declared the reader dead");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world, 1)
    }
}
