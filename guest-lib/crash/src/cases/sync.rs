//! Semaphore, once-cell and condition variable.

use core::time::Duration;
use std::sync::atomic::{AtomicU32, Ordering};

use lupin::InstanceId;
use lupin::crash;
use lupin::lock::{LockError, LockState};
use lupin::shm::Mapping;
use lupin::sync::condvar::{Condvar, CondvarWords};
use lupin::sync::once::{OnceCell, OnceError};
use lupin::sync::semaphore::{Permit, Semaphore, SemaphoreError};

use super::{Pair, equal, load, store};
use crate::case::{BYSTANDER, Case, PREDECESSOR, SURVIVOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Acquire, &Release, &Init, &FailedInit, &Notify, &Wait];

const BYTES: u64 = 4096;

// -- Semaphore ------------------------------------------------------------------------------------

const SEMAPHORE: u64 = 64;
const PERMITS: u32 = 3;

fn semaphore(memory: &Mapping) -> Semaphore<'_> {
    Semaphore::at(memory, SEMAPHORE, PERMITS).expect("in bounds")
}

fn prepare_semaphore(memory: &Mapping, state: &str) {
    let everybody = |_: InstanceId| true;
    let hold = |who, permits| {
        for _ in 0..permits {
            std::mem::forget(semaphore(memory).try_acquire(who, &everybody));
        }
    };
    match state {
        "free" => {}
        "one left by the living" => hold(BYSTANDER, 2),
        "all held by the dead" => hold(PREDECESSOR, 3),
        "one held by the dead, the others by the living" => {
            hold(BYSTANDER, 2);
            hold(PREDECESSOR, 1);
        }
        // In the high half: nobody was woken yet, and somebody may be asleep.
        "flag of a sleeper" => store(memory, SEMAPHORE, 1 << 32),
        other => panic!("no such state: {other}"),
    }
}

fn living_holders(state: &str) -> usize {
    if state.contains("living") { 2 } else { 0 }
}

/// Takes all permits that are not held by the living, says from whom, and releases them.
fn take_all(memory: &Mapping, me: InstanceId, world: &World) -> Vec<InstanceId> {
    let mut permits = Vec::new();
    loop {
        match semaphore(memory).try_acquire(me, world) {
            Ok(permit) => permits.push(permit),
            Err(SemaphoreError::Timeout { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let reclaimed = permits.iter().filter_map(Permit::reclaimed_from).collect();
    for permit in permits {
        permit.release().expect("nobody declared the holder dead");
    }
    reclaimed
}

fn recover_semaphore(memory: &Mapping, me: InstanceId, world: &World) {
    let known = [VICTIM, SURVIVOR, PREDECESSOR];
    let reclaimed = take_all(memory, me, world);
    assert!(reclaimed.iter().all(|dead| known.contains(dead)));
}

fn check_semaphore(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    if world.dead.is_empty() {
        if state == "flag of a sleeper" {
            // Whoever releases lowers the flag and changes the word that sleepers sleep on.
            equal("the flag and the futex word", load(memory, SEMAPHORE), 1)?;
        }
        return Ok(());
    }
    let holders: Vec<_> = semaphore(memory).holders().collect();
    equal(
        "the holders",
        holders,
        vec![BYSTANDER; living_holders(state)],
    )
}

fn go_on_with_semaphore(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    let everybody = |_: InstanceId| true;
    let semaphore = semaphore(memory);
    take_all(memory, world.survivor(), world);
    let held = semaphore.try_acquire(PREDECESSOR, &everybody);
    std::mem::forget(held.map_err(|error| error.to_string())?);
    let expected = vec![PREDECESSOR];
    equal(
        "whose permit is taken",
        take_all(memory, BYSTANDER, world),
        expected,
    )?;
    // What the living hold is theirs.
    let living = semaphore.holders().filter(|holder| *holder == BYSTANDER);
    equal("the living holders", living.count(), living_holders(state))
}

/// Takes a permit and keeps it until death.
#[derive(Debug)]
struct Acquire;

impl Case for Acquire {
    fn name(&self) -> &'static str {
        "semaphore.acquire"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "free",
            "one left by the living",
            "all held by the dead",
            "one held by the dead, the others by the living",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_semaphore(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let permit = semaphore(memory).try_acquire(VICTIM, &World::without_deaths());
        std::mem::forget(permit.expect("one is free or a dead one's"));
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover_semaphore(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check_semaphore(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        go_on_with_semaphore(memory, state, world)
    }

    fn lives_on(&self, _: &str) -> bool {
        false
    }
}

/// Takes a permit and gives it back.
#[derive(Debug)]
struct Release;

impl Case for Release {
    fn name(&self) -> &'static str {
        "semaphore.release"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "free",
            "one left by the living",
            "all held by the dead",
            "flag of a sleeper",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_semaphore(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let permit = semaphore(memory).try_acquire(VICTIM, &World::without_deaths());
        let permit = permit.expect("one is free or a dead one's");
        permit.release().expect("nobody declared the holder dead");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        if world.returned {
            let mut holders = semaphore(memory).holders();
            assert!(holders.all(|holder| holder != VICTIM), "it was released");
        }
        recover_semaphore(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check_semaphore(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        go_on_with_semaphore(memory, state, world)
    }
}

// -- Once-cell ------------------------------------------------------------------------------------

const ONCE: u64 = 64;
const WORDS: u32 = 3;

fn once(memory: &Mapping) -> OnceCell<'_> {
    OnceCell::at(memory, ONCE, WORDS).expect("in bounds")
}

/// The author of the value, which is computed if need be.
fn author(memory: &Mapping, me: InstanceId, world: &World) -> Result<InstanceId, String> {
    let words = |author: InstanceId| (0..WORDS as usize).map(move |n| author.word() ^ n as u64);
    let value = once(memory).get_or_init(me, world, |filler| {
        for (n, word) in words(me).enumerate() {
            filler.set(n, word);
        }
        Ok::<_, OnceError>(())
    });
    let value = value.map_err(|error| error.to_string())?;
    let author = InstanceId::from_word(value.get(0));
    match value.iter().eq(words(author)) {
        true => Ok(author),
        false => Err(format!(
            "a torn value: {:x?}",
            value.iter().collect::<Vec<_>>()
        )),
    }
}

fn prepare_once(memory: &Mapping, state: &str) {
    let compute = || author(memory, PREDECESSOR, &World::without_deaths());
    match state {
        "empty" => {}
        // In the high half of the word of the wake-ups: of which nodes somebody may sleep.
        "empty, and somebody sleeps" => store(memory, ONCE + 8, 1 << 32),
        "dead before it had published" => super::die_before_end(memory, 3, compute),
        "published" => drop(compute()),
        other => panic!("no such state: {other}"),
    }
}

fn check_once(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    equal("who computes", once(memory).computing(), None)?;
    let value = once(memory)
        .get()
        .map(|value| InstanceId::from_word(value.get(0)));
    let known = [VICTIM, SURVIVOR, world.survivor()];
    match value {
        Some(PREDECESSOR) if state == "published" => Ok(()),
        Some(VICTIM) if state != "published" => Ok(()),
        Some(author) if !world.returned && known.contains(&author) => Ok(()),
        other => Err(format!("the author is {other:?}")),
    }
}

/// Asks for a value, and computes it if it is not there.
#[derive(Debug)]
struct Init;

impl Case for Init {
    fn name(&self) -> &'static str {
        "once.get_or_init"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "empty",
            "empty, and somebody sleeps",
            "dead before it had published",
            "published",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_once(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        author(memory, VICTIM, &World::without_deaths()).expect("a whole value");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        author(memory, me, world).expect("a whole value");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() && state == "empty" {
            // Who waits sleeps on the word behind the state.
            equal("the wake-ups", load(memory, ONCE + 8), 1)?;
        }
        if world.dead.is_empty() && state == "empty, and somebody sleeps" {
            // Once before the set of sleepers is emptied, and once after it.
            equal("the wake-ups", load(memory, ONCE + 8), 2)?;
        }
        check_once(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let before = author(memory, world.survivor(), world)?;
        equal("the author", author(memory, BYSTANDER, world)?, before)
    }
}

/// A computation that fails leaves the cell to the next.
#[derive(Debug)]
struct FailedInit;

impl Case for FailedInit {
    fn name(&self) -> &'static str {
        "once.get_or_init_fails"
    }

    fn states(&self) -> &'static [&'static str] {
        &["empty", "dead before it had published"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_once(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let failed = once(memory).get_or_init(VICTIM, &World::without_deaths(), |filler| {
            filler.set(0, 7);
            Err(OnceError::NoInstance(InstanceId::NONE))
        });
        assert!(failed.is_err());
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        author(memory, me, world).expect("a whole value");
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        equal("who computes", once(memory).computing(), None)?;
        let value = once(memory)
            .get()
            .map(|value| InstanceId::from_word(value.get(0)));
        match value {
            None if world.dead.is_empty() => Ok(()),
            Some(SURVIVOR) => Ok(()),
            Some(author) if author == world.survivor() => Ok(()),
            other => Err(format!("the author is {other:?}")),
        }
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let before = author(memory, world.survivor(), world)?;
        equal("the author", author(memory, BYSTANDER, world)?, before)
    }
}

// -- Condition variable ---------------------------------------------------------------------------

const CONDVAR: u64 = 256;
/// The value of the pair before the operation.
const BEFORE: u64 = 7;

fn condvar(memory: &Mapping) -> Condvar<'_> {
    let words: &CondvarWords = memory.get(CONDVAR).expect("in bounds");
    Condvar::new(words)
}

/// How many notifications there were.
fn notifications(memory: &Mapping) -> u32 {
    let word: &AtomicU32 = memory.get(CONDVAR).expect("in bounds");
    word.load(Ordering::Relaxed)
}

fn prepare_pair(memory: &Mapping, state: &str) {
    let everybody = |_: InstanceId| true;
    for at in [Pair::LEFT, Pair::RIGHT] {
        store(memory, at, BEFORE);
    }
    match state {
        "free" => {}
        "dead owner, half changed" => {
            std::mem::forget(Pair(memory).lock().try_lock(PREDECESSOR, &everybody));
            store(memory, Pair::LEFT, BEFORE + 1);
        }
        other => panic!("no such state: {other}"),
    }
}

fn check_pair(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    let before = BEFORE + u64::from(state != "free");
    let value = Pair(memory).value()?;
    if value != before + 1 && (world.returned || value != before) {
        return Err(format!("{value} after {before}"));
    }
    equal(
        "the lock",
        Pair(memory).lock().inspect(world),
        LockState::Free,
    )
}

/// A wait that ends, and a change.
fn wait_and_change(memory: &Mapping, me: InstanceId, world: &World) {
    let pair = Pair(memory);
    let repair = |_: InstanceId| {
        pair.repair();
        Ok::<_, LockError>(())
    };
    let acquired = pair.lock().lock(me, world).expect("its holder lives not");
    let guard = acquired.or_repair(repair).expect("not declared dead");
    let woken = condvar(memory).wait_timeout(guard, world, Duration::ZERO);
    let acquired = woken.expect("not declared dead").acquired;
    let guard = acquired.or_repair(repair).expect("not declared dead");
    pair.add_one();
    guard.unlock().expect("not declared dead");
}

fn recover_pair(memory: &Mapping, me: InstanceId, world: &World) {
    let pair = Pair(memory);
    let acquired = pair.lock().lock(me, world).expect("its holder lives not");
    let repaired = acquired.or_repair(|_| {
        pair.repair();
        Ok::<_, LockError>(())
    });
    drop(repaired.expect("not declared dead"));
}

fn go_on_with_pair(memory: &Mapping, world: &World) -> Result<(), String> {
    let before = Pair(memory).value()?;
    for me in [world.survivor(), BYSTANDER] {
        wait_and_change(memory, me, world);
    }
    equal("the value", Pair(memory).value()?, before + 2)
}

/// A change, and the notification of it.
#[derive(Debug)]
struct Notify;

impl Case for Notify {
    fn name(&self) -> &'static str {
        "condvar.notify"
    }

    fn states(&self) -> &'static [&'static str] {
        &["free", "dead owner, half changed"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_pair(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        Pair(memory).change(VICTIM, &World::without_deaths());
        condvar(memory).notify_one();
        condvar(memory).notify_all();
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover_pair(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.returned {
            equal("the notifications", notifications(memory), 2)?;
        }
        check_pair(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        // Who dies before it notifies: whoever waits looks for itself.
        let (_, stores) = crash::count(|| condvar(memory).notify_one());
        let _ = crash::dies_after(stores - 1, || condvar(memory).notify_one());
        go_on_with_pair(memory, world)
    }
}

/// A wait whose time is over, and a change with the lock held again.
#[derive(Debug)]
struct Wait;

impl Case for Wait {
    fn name(&self) -> &'static str {
        "condvar.wait_timeout"
    }

    fn states(&self) -> &'static [&'static str] {
        &["free", "dead owner, half changed"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare_pair(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        wait_and_change(memory, VICTIM, &World::without_deaths());
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover_pair(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check_pair(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on_with_pair(memory, world)
    }
}
