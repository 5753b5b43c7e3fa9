//! The recoverable queue lock, and the table of its nodes.

use core::time::Duration;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::crash;
use lupin::liveness::Liveness;
use lupin::lock::{Acquired, LockError, LockState, McsLock, McsNodes};
use lupin::shm::Mapping;

use super::{Pair, equal, load, store};
use crate::case::{BYSTANDER, Case, FIRST_DEAD, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Lock, &TryLock, &Wait, &GiveUp, &Join];

const BYTES: u64 = 4096;
const NODES: u64 = 1024;
const COUNT: u16 = 12;
/// The value of the pair before the operation.
const BEFORE: u64 = 7;
/// Stores until a waiter stands in the queue: node claimed, lock noted, tail tried in vain, place in
/// front noted, tail swapped.
const LINKED: u64 = 5;

fn nodes(memory: &Mapping) -> McsNodes<'_> {
    McsNodes::new(memory, NODES, COUNT).expect("in bounds")
}

fn lock(memory: &Mapping) -> McsLock<'_> {
    McsLock::new(nodes(memory), Pair::LOCK).expect("in bounds")
}

/// Adds one to both halves in the lock; repairs first what a dead holder left.
fn change(memory: &Mapping, me: InstanceId, judge: &impl Liveness) {
    critical_section(memory, me, judge, || Pair(memory).add_one());
}

fn critical_section(memory: &Mapping, me: InstanceId, judge: &impl Liveness, body: impl FnOnce()) {
    let mut waiter = nodes(memory).join(me, judge).expect("there are nodes");
    let acquired = lock(memory).lock(&mut waiter, judge);
    let repaired = acquired.expect("nobody alive holds it").or_repair(|_| {
        Pair(memory).repair();
        Ok::<_, LockError>(())
    });
    let guard = repaired.expect("nobody declared the repairer dead");
    body();
    guard.unlock().expect("nobody declared the holder dead");
}

/// Takes the lock as `me`, and keeps node and hold.
fn hold(memory: &Mapping, me: InstanceId, judge: &impl Liveness) {
    let mut waiter = nodes(memory).join(me, judge).expect("there are nodes");
    std::mem::forget(
        lock(memory)
            .try_lock(&mut waiter, judge)
            .expect("it is free"),
    );
    std::mem::forget(waiter);
}

/// Enters the queue as `me` and dies there.
fn die_waiting(memory: &Mapping, me: InstanceId) {
    let judge = World::without_deaths();
    let _ = crash::dies_after(LINKED, || {
        let mut waiter = nodes(memory).join(me, &|_: InstanceId| true).expect("one");
        let timeout = Duration::from_micros(20);
        let _ = lock(memory).lock_timeout(&mut waiter, &judge, timeout);
    });
}

/// The words of a node: owner, version, place in front, lock.
fn node(memory: &Mapping, number: u64) -> [&AtomicU64; 4] {
    [0, 8, 16, 24].map(|at| {
        let at = NODES + (number - 1) * 64 + at;
        memory.get(at).expect("in bounds")
    })
}

/// The living holder ends its hold, as its own thread would.
fn bystander_releases(memory: &Mapping) {
    for number in 1..=u64::from(COUNT) {
        let [owner, version, ..] = node(memory, number);
        if owner.load(Ordering::Relaxed) == BYSTANDER.word() {
            let next = version.load(Ordering::Relaxed) + 1;
            version.store(next, Ordering::Release);
            owner.store(0, Ordering::Release);
        }
    }
}

/// Somebody enters the queue behind its last place, and is dead; not through the library, whose
/// stores are the victim's.
fn a_dead_one_enters(memory: &Mapping) {
    let number = u64::from(COUNT);
    let [owner, version, pred, at] = node(memory, number);
    if owner.load(Ordering::Relaxed) != 0 {
        return;
    }
    let tail: &AtomicU64 = memory.get(Pair::LOCK).expect("in bounds");
    owner.store(FIRST_DEAD.word(), Ordering::Relaxed);
    at.store(Pair::LOCK, Ordering::Relaxed);
    pred.store(tail.load(Ordering::Relaxed), Ordering::Relaxed);
    let place = (number << 48) | version.load(Ordering::Relaxed);
    tail.store(place, Ordering::Release);
}

fn prepare(memory: &Mapping, state: &str) {
    for at in [Pair::LEFT, Pair::RIGHT] {
        store(memory, at, BEFORE);
    }
    let everybody = |_: InstanceId| true;
    match state {
        "new" | Lock::SLEEPER => {}
        "used before by another" => critical_section(memory, BYSTANDER, &everybody, || {}),
        "dead holder" => hold(memory, PREDECESSOR, &everybody),
        "dead holder, half changed" => {
            hold(memory, PREDECESSOR, &everybody);
            store(memory, Pair::LEFT, BEFORE + 1);
        }
        "dead holder and dead waiters" => {
            hold(memory, PREDECESSOR, &everybody);
            store(memory, Pair::LEFT, BEFORE + 1);
            die_waiting(memory, FIRST_DEAD);
            die_waiting(memory, FIRST_DEAD);
        }
        "dead holder and dead recoverer" => {
            hold(memory, FIRST_DEAD, &everybody);
            store(memory, Pair::LEFT, BEFORE + 1);
            hold(memory, PREDECESSOR, &|instance| instance != FIRST_DEAD);
        }
        "dead waiter behind one who left" => {
            hold(memory, BYSTANDER, &everybody);
            die_waiting(memory, PREDECESSOR);
            bystander_releases(memory);
        }
        other => panic!("no such state: {other}"),
    }
}

/// The value before the operation, once a dead owner's change is repaired.
fn before(state: &str) -> u64 {
    match state {
        "dead holder, half changed"
        | "dead holder and dead waiters"
        | "dead holder and dead recoverer" => BEFORE + 1,
        _ => BEFORE,
    }
}

fn recover(memory: &Mapping, me: InstanceId, world: &World) {
    bystander_releases(memory);
    // With all nodes that can be had: nodes of the dead that the queue still knows cannot.
    let mut all = Vec::new();
    while let Ok(waiter) = nodes(memory).join(me, world) {
        all.push(waiter);
    }
    let mut waiter = all.pop().expect("the dead do not use all of them");
    let acquired = lock(memory).lock(&mut waiter, world);
    let repaired = acquired.expect("nobody alive holds it").or_repair(|_| {
        Pair(memory).repair();
        Ok::<_, LockError>(())
    });
    drop(repaired.expect("nobody declared the repairer dead"));
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
    equal(
        "the lock",
        lock(memory).inspect(world),
        Some(LockState::Free),
    )
}

fn go_on(memory: &Mapping, world: &World) -> Result<(), String> {
    bystander_releases(memory);
    let before = Pair(memory).value()?;
    change(memory, world.survivor(), world);
    // One more death inside, one behind it, and a repair by somebody else.
    hold(memory, PREDECESSOR, world);
    store(memory, Pair::LEFT, before + 2);
    die_waiting(memory, FIRST_DEAD);
    change(memory, BYSTANDER, world);
    equal("the value", Pair(memory).value()?, before + 3)?;
    equal(
        "the lock",
        lock(memory).inspect(world),
        Some(LockState::Free),
    )?;
    // No node is lost.
    let all: Result<Vec<_>, _> = (0..COUNT)
        .map(|_| nodes(memory).join(BYSTANDER, world))
        .collect();
    drop(all.map_err(|error| error.to_string())?);
    equal("nodes in use", nodes(memory).in_use(), 0)?;
    change(memory, world.survivor(), world);
    equal("the value", Pair(memory).value()?, before + 4)
}

macro_rules! common {
    () => {
        fn bytes(&self) -> u64 {
            BYTES
        }

        fn prepare(&self, memory: &Mapping, state: &str) {
            prepare(memory, state);
        }

        fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
            go_on(memory, world)
        }
    };
}

/// A critical section: join, lock, repair if need be, change, release, leave.
#[derive(Debug)]
struct Lock;

impl Lock {
    const SLEEPER: &str = "new, and one comes and sleeps behind it";
    /// The node that the victim gets where all are free.
    const VICTIMS: u64 = 2;

    /// The flag of sleepers of the victim's node, and their futex word.
    fn parking(memory: &Mapping) -> [&AtomicU32; 2] {
        [32, 36].map(|at| {
            let at = NODES + (Self::VICTIMS - 1) * 64 + at;
            memory.get(at).expect("in bounds")
        })
    }
}

impl Case for Lock {
    common!();

    fn name(&self) -> &'static str {
        "mcs.lock"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "new",
            "used before by another",
            "dead holder",
            "dead holder, half changed",
            "dead holder and dead waiters",
            "dead holder and dead recoverer",
            "dead waiter behind one who left",
            Self::SLEEPER,
        ]
    }

    fn run(&self, memory: &Mapping, state: &str) {
        critical_section(memory, VICTIM, &World::without_deaths(), || {
            Pair(memory).add_one();
            if state == Self::SLEEPER {
                // Of another node: not the victim's stores.
                a_dead_one_enters(memory);
                Self::parking(memory)[0].store(1, Ordering::Relaxed);
            }
        });
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            // Whoever goes past the dead frees their nodes.
            let sleeper = usize::from(state == Self::SLEEPER);
            equal("nodes in use", nodes(memory).in_use(), sleeper)?;
            let [flag, wakes] = Self::parking(memory).map(|word| word.load(Ordering::Relaxed));
            equal("wake-ups", wakes, sleeper as u32)?;
            equal("the flag of sleepers", flag, 0)?;
        }
        check(memory, state, world, 1)
    }
}

/// An attempt that does not wait; the hold is kept until death.
#[derive(Debug)]
struct TryLock;

impl Case for TryLock {
    common!();

    fn name(&self) -> &'static str {
        "mcs.try_lock"
    }

    fn states(&self) -> &'static [&'static str] {
        &["new", "dead holder", "dead holder and dead waiters"]
    }

    fn run(&self, memory: &Mapping, _: &str) {
        hold(memory, VICTIM, &World::without_deaths());
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let held = Some(LockState::Held(VICTIM));
        assert_ne!(lock(memory).inspect(world), held, "the dead hold nothing");
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world, 0)
    }

    fn lives_on(&self, _: &str) -> bool {
        false
    }
}

/// Waiting in the queue behind somebody alive, long enough to sleep.
#[derive(Debug)]
struct Wait;

impl Case for Wait {
    fn name(&self) -> &'static str {
        "mcs.lock_timeout"
    }

    fn states(&self) -> &'static [&'static str] {
        &["last", "with one behind", "released while it waits"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, _: &str) {
        prepare(memory, "new");
        hold(memory, BYSTANDER, &World::without_deaths());
    }

    fn run(&self, memory: &Mapping, state: &str) {
        let judge = |_: InstanceId| {
            match state {
                "with one behind" => a_dead_one_enters(memory),
                "released while it waits" => bystander_releases(memory),
                _ => {}
            }
            true
        };
        let mut waiter = nodes(memory).join(VICTIM, &judge).expect("there are nodes");
        let timeout = match state {
            "released while it waits" => Duration::MAX,
            _ => Duration::from_micros(20),
        };
        match lock(memory).lock_timeout(&mut waiter, &judge, timeout) {
            Ok(Acquired::Clean(guard)) => {
                Pair(memory).add_one();
                guard.unlock().expect("nobody declared the holder dead");
            }
            Err(LockError::Timeout { .. }) => assert_ne!(state, "released while it waits"),
            other => panic!("nobody died: {other:?}"),
        }
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() && state != "released while it waits" {
            // Who gives up leaves its node in the queue only if one behind it must pass it.
            let left = if state == "with one behind" { 2 } else { 0 };
            equal("nodes in use", nodes(memory).in_use(), 1 + left)?;
            let held = Some(LockState::Held(BYSTANDER));
            return equal("the lock", lock(memory).inspect(world), held);
        }
        let adds = u64::from(state == "released while it waits");
        check(memory, "new", world, adds)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}

/// A repair that is given up: the lock stays orphaned, under the first dead owner's name.
#[derive(Debug)]
struct GiveUp;

impl Case for GiveUp {
    common!();

    fn name(&self) -> &'static str {
        "mcs.give_up_repair"
    }

    fn states(&self) -> &'static [&'static str] {
        &["dead holder, half changed", "dead holder and dead waiters"]
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let judge = World::without_deaths();
        let mut waiter = nodes(memory).join(VICTIM, &judge).expect("there are nodes");
        match lock(memory).try_lock(&mut waiter, &judge) {
            Ok(Acquired::Orphaned(orphan)) => drop(orphan),
            other => panic!("expected an orphan: {other:?}"),
        }
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if !world.dead.is_empty() {
            return check(memory, state, world, 0);
        }
        let (previous, recoverer) = (PREDECESSOR, None);
        let orphaned = LockState::Orphaned {
            previous,
            recoverer,
        };
        equal("the lock", lock(memory).inspect(world), Some(orphaned))?;
        equal("the left half", load(memory, Pair::LEFT), BEFORE + 1)?;
        equal("the right half", load(memory, Pair::RIGHT), BEFORE)
    }

    fn lives_on(&self, _: &str) -> bool {
        false
    }
}

/// A node claimed and given back.
#[derive(Debug)]
struct Join;

impl Case for Join {
    fn name(&self) -> &'static str {
        "mcs.join"
    }

    fn states(&self) -> &'static [&'static str] {
        &["new", "dead holder and dead waiters", "no free node"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        if state != "no free node" {
            return prepare(memory, state);
        }
        prepare(memory, "dead holder and dead waiters");
        let everybody = |_: InstanceId| true;
        while let Ok(waiter) = nodes(memory).join(PREDECESSOR, &everybody) {
            std::mem::forget(waiter);
        }
        // One that was used for the lock, and left it.
        let [owner, _, _, at] = node(memory, u64::from(COUNT));
        assert_eq!(owner.load(Ordering::Relaxed), PREDECESSOR.word());
        at.store(Pair::LOCK, Ordering::Relaxed);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let judge = World::without_deaths();
        drop(
            nodes(memory)
                .join(VICTIM, &judge)
                .expect("the dead use none"),
        );
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            return Ok(());
        }
        let state = match state {
            "no free node" => "dead holder and dead waiters",
            state => state,
        };
        check(memory, state, world, 0)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }

    fn lives_on(&self, state: &str) -> bool {
        state == "new"
    }
}
