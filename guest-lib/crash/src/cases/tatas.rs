//! The recoverable test-and-test-and-set lock.

use core::time::Duration;
use std::sync::atomic::Ordering;

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::lock::{Acquired, LockError, LockState};
use lupin::shm::Mapping;

use super::{Pair, equal, store};
use crate::case::{BYSTANDER, Case, FIRST_DEAD, PREDECESSOR, SURVIVOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Lock, &TryLock, &Wait, &GiveUp, &ResolveOwn];

const BYTES: u64 = 4096;
/// The value of the pair before the operation.
const BEFORE: u64 = 7;

fn prepare(memory: &Mapping, state: &str) {
    let pair = Pair(memory);
    for at in [Pair::LEFT, Pair::RIGHT] {
        store(memory, at, BEFORE);
    }
    let everybody = |_: InstanceId| true;
    match state {
        "free" => {}
        // With its hold, and nothing changed.
        "dead owner" => std::mem::forget(pair.lock().try_lock(PREDECESSOR, &everybody)),
        "dead owner, half changed" => {
            std::mem::forget(pair.lock().try_lock(PREDECESSOR, &everybody));
            store(memory, Pair::LEFT, BEFORE + 1);
        }
        "dead owner and dead recoverer" => {
            std::mem::forget(pair.lock().try_lock(FIRST_DEAD, &everybody));
            store(memory, Pair::LEFT, BEFORE + 1);
            let judge = |instance| instance != FIRST_DEAD;
            std::mem::forget(pair.lock().try_lock(PREDECESSOR, &judge));
        }
        // A sleeper set its flag right after the holder had looked for one.
        "flag of a sleeper" => {
            let words: &LockWords = memory.get(Pair::LOCK).expect("in bounds");
            words.waiters.store(1, Ordering::Relaxed);
        }
        other => panic!("no such state: {other}"),
    }
}

/// The value before the operation, once a dead owner's change is repaired.
fn before(state: &str) -> u64 {
    match state {
        "dead owner, half changed" | "dead owner and dead recoverer" => BEFORE + 1,
        _ => BEFORE,
    }
}

/// Whoever comes next gets in, and repairs first.
fn recover(memory: &Mapping, me: InstanceId, world: &World) {
    let pair = Pair(memory);
    let acquired = pair.lock().lock(me, world).expect("nobody alive holds it");
    let guard = acquired.or_repair(|_| {
        pair.repair();
        Ok::<_, LockError>(())
    });
    drop(guard.expect("nobody declared the recoverer dead"));
}

fn check(memory: &Mapping, state: &str, world: &World, adds: u64) -> Result<(), String> {
    let pair = Pair(memory);
    let (before, value) = (before(state), pair.value()?);
    let is_right = match world.returned {
        true => value == before + adds,
        false => value == before || value == before + adds,
    };
    if !is_right {
        return Err(format!("{value} after {before}"));
    }
    equal("the lock", pair.lock().inspect(world), LockState::Free)
}

fn go_on(memory: &Mapping, world: &World) -> Result<(), String> {
    let pair = Pair(memory);
    let before = pair.value()?;
    pair.change(world.survivor(), world);
    // One more death inside, and a repair by somebody who has nothing to do with the first.
    let everybody = |_: InstanceId| true;
    let held = pair.lock().try_lock(PREDECESSOR, &everybody);
    std::mem::forget(held.map_err(|error| error.to_string())?);
    store(memory, Pair::LEFT, before + 2);
    pair.change(BYSTANDER, world);
    equal("the value", pair.value()?, before + 3)?;
    equal("the lock", pair.lock().inspect(world), LockState::Free)
}

/// A critical section: acquire, repair if need be, change, release.
#[derive(Debug)]
struct Lock;

impl Case for Lock {
    fn name(&self) -> &'static str {
        "tatas.lock"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "free",
            "dead owner",
            "dead owner, half changed",
            "dead owner and dead recoverer",
            "flag of a sleeper",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        Pair(memory).change(VICTIM, &World::without_deaths());
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if state == "flag of a sleeper" && world.dead.is_empty() {
            // Whoever releases lowers the flag and changes the word that sleepers sleep on.
            let words: &LockWords = memory.get(Pair::LOCK).expect("in bounds");
            equal("the flag", words.waiters.load(Ordering::Relaxed), 0)?;
            equal("the futex word", words.wake.load(Ordering::Relaxed), 1)?;
        }
        check(memory, state, world, 1)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}

/// An attempt that does not wait; the hold is kept until death.
#[derive(Debug)]
struct TryLock;

impl Case for TryLock {
    fn name(&self) -> &'static str {
        "tatas.try_lock"
    }

    fn states(&self) -> &'static [&'static str] {
        &["free", "dead owner", "dead owner, half changed"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let acquired = Pair(memory)
            .lock()
            .try_lock(VICTIM, &World::without_deaths());
        std::mem::forget(acquired.expect("nobody alive holds it"));
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let lock = Pair(memory).lock();
        if world.returned {
            // Whoever got it, got it: the next one hears of the death. Unless the first to
            // recover already declared it repaired.
            let state = lock.inspect(world);
            assert_ne!(state, LockState::Held(VICTIM), "the dead hold nothing");
        }
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world, 0)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }

    fn lives_on(&self, _: &str) -> bool {
        false
    }
}

/// Waiting while somebody alive holds the lock: long enough to sleep.
#[derive(Debug)]
struct Wait;

impl Wait {
    const TIMEOUT: Duration = Duration::from_micros(20);
}

impl Case for Wait {
    fn name(&self) -> &'static str {
        "tatas.lock_timeout"
    }

    fn states(&self) -> &'static [&'static str] {
        &["held", "released while it sleeps"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, _: &str) {
        prepare(memory, "free");
        let world = World::without_deaths();
        std::mem::forget(Pair(memory).lock().try_lock(BYSTANDER, &world));
    }

    fn run(&self, memory: &Mapping, state: &str) {
        let pair = Pair(memory);
        if state == "held" {
            let refused = pair
                .lock()
                .lock_timeout(VICTIM, &World::without_deaths(), Self::TIMEOUT);
            assert!(
                matches!(refused, Err(LockError::Timeout { .. })),
                "{refused:?}"
            );
            return;
        }
        let words: &LockWords = memory.get(Pair::LOCK).expect("in bounds");
        // Once somebody sleeps, the holder releases and wakes: another node's stores, not ours.
        let judge = |_: InstanceId| {
            if words.waiters.load(Ordering::SeqCst) != 0 {
                words.owner.store(0, Ordering::SeqCst);
                words.waiters.store(0, Ordering::SeqCst);
                words.wake.fetch_add(1, Ordering::SeqCst);
            }
            true
        };
        let acquired = pair.lock().lock(VICTIM, &judge).expect("it is released");
        let Acquired::Clean(guard) = acquired else {
            panic!("nobody died: {acquired:?}")
        };
        pair.add_one();
        guard.unlock().expect("nobody declared the holder dead");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        // The holder, who lives, ends its hold: as an instance that is started again does.
        let own = Pair(memory).lock().resolve_own(BYSTANDER, world);
        if let Some(orphan) = own.expect("an instance") {
            drop(orphan.repaired().expect("it is its own"));
        }
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() && state == "held" {
            let held = LockState::Held(BYSTANDER);
            return equal("the lock", Pair(memory).lock().inspect(world), held);
        }
        if world.dead.is_empty() {
            // Whoever has slept passes the wake-up on when it releases.
            let words: &LockWords = memory.get(Pair::LOCK).expect("in bounds");
            equal("the futex word", words.wake.load(Ordering::Relaxed), 2)?;
        }
        check(memory, state, world, u64::from(state != "held"))
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            self.recover(memory, "", SURVIVOR, world);
        }
        go_on(memory, world)
    }
}

/// A repair that is given up: the lock stays orphaned, under the first dead owner's name.
#[derive(Debug)]
struct GiveUp;

impl Case for GiveUp {
    fn name(&self) -> &'static str {
        "tatas.give_up_repair"
    }

    fn states(&self) -> &'static [&'static str] {
        &["dead owner, half changed"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        match Pair(memory)
            .lock()
            .try_lock(VICTIM, &World::without_deaths())
        {
            Ok(Acquired::Orphaned(orphan)) => drop(orphan),
            other => panic!("expected an orphan: {other:?}"),
        }
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let pair = Pair(memory);
        let acquired = pair.lock().lock(me, world).expect("nobody alive holds it");
        let guard = acquired.or_repair(|previous| {
            // Not the name of who only tried to repair.
            let known = [PREDECESSOR, SURVIVOR];
            assert!(known.contains(&previous), "{previous}");
            pair.repair();
            Ok::<_, LockError>(())
        });
        drop(guard.expect("nobody declared the recoverer dead"));
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            let state = Pair(memory).lock().inspect(world);
            let (previous, recoverer) = (PREDECESSOR, None);
            let orphaned = LockState::Orphaned {
                previous,
                recoverer,
            };
            return equal("the lock", state, orphaned);
        }
        check(memory, state, world, 0)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            Pair(memory).change(SURVIVOR, world);
        }
        go_on(memory, world)
    }
}

/// A new process of the same instance looks after what its last one left.
#[derive(Debug)]
struct ResolveOwn;

impl ResolveOwn {
    fn resolve(memory: &Mapping, me: InstanceId, world: &World) {
        let pair = Pair(memory);
        let own = pair.lock().resolve_own(me, world).expect("an instance");
        if let Some(orphan) = own {
            pair.repair();
            drop(orphan.repaired().expect("nobody declared it dead"));
        }
    }
}

impl Case for ResolveOwn {
    fn name(&self) -> &'static str {
        "tatas.resolve_own"
    }

    fn states(&self) -> &'static [&'static str] {
        &["own hold, half changed", "free"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, "free");
        if state != "free" {
            let world = World::without_deaths();
            std::mem::forget(Pair(memory).lock().try_lock(VICTIM, &world));
            store(memory, Pair::LEFT, BEFORE + 1);
        }
    }

    fn run(&self, memory: &Mapping, _: &str) {
        Self::resolve(memory, VICTIM, &World::without_deaths());
    }

    fn recover(&self, memory: &Mapping, _: &str, _: InstanceId, world: &World) {
        // Started again each time, as the same instance: everybody takes it for alive.
        let mut world = world.clone();
        world.dead.retain(|instance| *instance != VICTIM);
        Self::resolve(memory, VICTIM, &world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let expected = if state == "free" { BEFORE } else { BEFORE + 1 };
        equal("the value", Pair(memory).value()?, expected)?;
        equal(
            "the lock",
            Pair(memory).lock().inspect(world),
            LockState::Free,
        )
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}
