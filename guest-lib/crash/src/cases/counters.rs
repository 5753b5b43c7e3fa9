//! Counters: creation, joining, and additions with and without a ticket of the application.

use core::time::Duration;

use lupin::InstanceId;
use lupin::collections::{CollectionError, Counters, CountersSpec, Shard};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;

use super::creation::Creation;
use super::{equal, text};
use crate::case::{BYSTANDER, Case, Operation, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&CREATE, &JOIN, &ADD, &ADD_ONCE];

const SPEC: CountersSpec = CountersSpec {
    counters: 2,
    shards: 3,
};
const BYTES: u64 = 4096;
/// The application's ticket of the addition under test.
const TICKET: u64 = 20;
const DELTA: u64 = 7;

fn open<'m>(memory: &'m Mapping, judge: &impl Liveness) -> Counters<'m> {
    Counters::open(memory, 0, judge, Duration::ZERO).expect("it was created")
}

fn create(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<(), CollectionError> {
    Counters::create(memory, 0, &SPEC, me, judge).map(drop)
}

/// The shard of the victim's thread id in its next life, whoever lives that one.
fn next_life<'m>(memory: &'m Mapping, generation: u32) -> Shard<'m> {
    // Of this id only the newest life is alive.
    let me = InstanceId::new(VICTIM.id(), generation);
    let judge = |instance: InstanceId| instance.id() != VICTIM.id() || instance == me;
    let shard = open(memory, &judge).join(me, &judge);
    shard.expect("no other life of the id is alive")
}

/// How many additions of ten the victim's shard has seen, and the other one.
fn before(state: &str) -> (u64, u64) {
    match state {
        "empty" | "new" => (0, 0),
        "after one addition" => (1, 0),
        "after two, beside another shard" => (2, 3),
        other => panic!("no such state: {other}"),
    }
}

fn prepare(memory: &Mapping, state: &str) {
    let world = World::without_deaths();
    create(memory, BYSTANDER, &world).expect("the memory is new");
    let (own, other) = before(state);
    let counters = open(memory, &world);
    if other > 0 {
        let mut shard = counters.join(BYSTANDER, &world).expect("there is room");
        for _ in 0..other {
            shard.add(0, 10).expect("it is there");
        }
    }
    if own > 0 {
        let mut shard = counters.join(VICTIM, &world).expect("there is room");
        for _ in 0..own {
            shard.add(0, 10).expect("it is there");
        }
    }
}

/// Sum of counter 0 and ticket of the victim's last addition.
fn found(memory: &Mapping, world: &World) -> Result<(u64, u64), String> {
    let counters = open(memory, world);
    equal("the other counter", counters.sum(1).map_err(text)?, 0)?;
    let last = counters.last(0, VICTIM.id()).map_err(text)?;
    Ok((counters.sum(0).map_err(text)?, last))
}

/// The next life of the victim's id, and somebody else, add one each.
fn go_on(memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
    let (sum, last) = found(memory, world)?;
    next_life(memory, 99).add(0, 1).map_err(text)?;
    let counters = open(memory, world);
    let mut other = counters.join(BYSTANDER, world).map_err(text)?;
    other.add(0, 1).map_err(text)?;
    equal("sum and ticket", found(memory, world)?, (sum + 2, last + 1))
}

const CREATE: Creation = Creation {
    name: "counters.create",
    bytes: BYTES,
    create: |memory, me, world| create(memory, me, world),
    check: |memory, world| {
        equal("what it consists of", open(memory, world).spec(), SPEC)?;
        equal("sum and ticket", found(memory, world)?, (0, 0))
    },
    go_on,
};

const JOIN: Operation = Operation {
    name: "counters.join",
    states: &["empty", "after two, beside another shard"],
    bytes: BYTES,
    prepare,
    run: |memory, _| {
        let world = World::without_deaths();
        let shard = open(memory, &world).join(VICTIM, &world);
        shard.expect("there is room");
    },
    recover: |memory, _, me, _| {
        next_life(memory, 1 + me.id());
    },
    check: |memory, state, world| {
        let (own, other) = before(state);
        equal(
            "sum and ticket",
            found(memory, world)?,
            (10 * (own + other), own),
        )
    },
    go_on,
    lives_on: true,
};

const ADD: Operation = Operation {
    name: "counters.add",
    states: &[
        "empty",
        "after one addition",
        "after two, beside another shard",
    ],
    bytes: BYTES,
    prepare,
    run: |memory, _| {
        let world = World::without_deaths();
        let shard = open(memory, &world).join(VICTIM, &world);
        let added = shard.expect("there is room").add(0, DELTA);
        added.expect("it is there");
    },
    recover: |memory, _, me, _| {
        next_life(memory, 1 + me.id());
    },
    check: |memory, state, world| {
        let (own, other) = before(state);
        let sum = 10 * (own + other);
        let found = found(memory, world)?;
        // Nothing at all, or the sum with its ticket.
        if found == (sum, own) && !world.returned {
            return Ok(());
        }
        equal("sum and ticket", found, (sum + DELTA, own + 1))
    },
    go_on,
    lives_on: true,
};

const ADD_ONCE: Operation = Operation {
    name: "counters.add_once",
    states: &[
        "empty",
        "after one addition",
        "after two, beside another shard",
    ],
    bytes: BYTES,
    prepare,
    run: |memory, _| {
        let world = World::without_deaths();
        let shard = open(memory, &world).join(VICTIM, &world);
        let added = shard.expect("there is room").add_once(0, TICKET, DELTA);
        assert!(added.expect("it is there"));
    },
    recover: |memory, _, me, world| {
        // The next life does the work again.
        let again = next_life(memory, 1 + me.id()).add_once(0, TICKET, DELTA);
        let again = again.expect("it is there");
        assert!(!(world.returned && again), "counted twice");
    },
    check: |memory, state, world| {
        let (own, other) = before(state);
        let sum = 10 * (own + other) + DELTA;
        equal("sum and ticket", found(memory, world)?, (sum, TICKET))
    },
    go_on,
    lives_on: true,
};
