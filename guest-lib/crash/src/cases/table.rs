//! The results table: creation, claims, commits, and cells that are given back.

use core::time::Duration;

use lupin::InstanceId;
use lupin::collections::{Claim, Claimed, CollectionError, Table, TableSpec};
use lupin::crash::{Ended, dies_after};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;

use super::creation::Creation;
use super::{equal, text};
use crate::case::{BYSTANDER, Case, Operation, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&CREATE, &CLAIM, &COMMIT, &GIVE_BACK];

const SPEC: TableSpec = TableSpec {
    cells: 3,
    bytes: 24,
};
const BYTES: u64 = 4096;
const STATES: &[&str] = &[
    "free",
    "claimed by a dead one",
    "half filled by a dead one",
    "one committed",
];

fn open<'m>(memory: &'m Mapping, judge: &impl Liveness) -> Table<'m> {
    Table::open(memory, 0, judge, Duration::ZERO).expect("it was created")
}

fn create(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<(), CollectionError> {
    Table::create(memory, 0, &SPEC, me, judge).map(drop)
}

/// The result of a cell: of another length in each, and not of whole words.
fn result(cell: u32) -> Vec<u8> {
    vec![0x40 + cell as u8; 11 + cell as usize * 4]
}

fn claim<'m>(memory: &'m Mapping, cell: u32, me: InstanceId, judge: &impl Liveness) -> Claimed<'m> {
    match open(memory, judge).claim(cell, me, judge) {
        Ok(Claim::Mine(claimed)) => claimed,
        other => panic!("nobody alive has cell {cell}: {other:?}"),
    }
}

fn prepare(memory: &Mapping, state: &str) {
    let everybody = |_: InstanceId| true;
    create(memory, BYSTANDER, &everybody).expect("the memory is new");
    let by = |me| {
        let claimed = claim(memory, 0, me, &everybody);
        claimed.commit(&result(0)).expect("it is the claimer's");
    };
    match state {
        "free" => {}
        "claimed by a dead one" => std::mem::forget(claim(memory, 0, PREDECESSOR, &everybody)),
        "half filled by a dead one" => {
            let ended = dies_after(3, || by(PREDECESSOR));
            assert!(matches!(ended, Ended::Died));
        }
        _ => by(BYSTANDER),
    }
}

/// Computes everything that nobody alive has.
fn compute_all(memory: &Mapping, me: InstanceId, judge: &impl Liveness) {
    for claimed in open(memory, judge).claims(me, judge) {
        let claimed = claimed.expect("it is there");
        let result = result(claimed.cell());
        claimed.commit(&result).expect("it is the claimer's");
    }
}

/// What is committed is right; after a recovery, everything is.
fn check(memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
    let table = open(memory, world);
    for cell in 0..SPEC.cells {
        match table.get(cell).map_err(text)? {
            Some(found) => equal("a result", found, result(cell))?,
            None if world.dead.is_empty() => {}
            None => return Err(format!("cell {cell} has no result")),
        }
    }
    let progress = table.progress().map_err(text)?;
    equal("cells", progress.cells, SPEC.cells)?;
    equal("results", table.iter().count() as u32, progress.done)
}

/// Finishes the table; then nobody can claim or change anything.
fn go_on(memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
    let mut world = world.clone();
    // A claim that the victim kept, if it lives, is no longer wanted.
    world.dead.push(VICTIM);
    compute_all(memory, world.survivor(), &world);
    check(memory, "", &world)?;
    let table = open(memory, &world);
    for cell in 0..SPEC.cells {
        let claim = table.claim(cell, BYSTANDER, &world).map_err(text)?;
        if !matches!(claim, Claim::Done(_)) {
            return Err(format!("cell {cell} could be claimed again: {claim:?}"));
        }
    }
    check(memory, "", &world)
}

const CREATE: Creation = Creation {
    name: "table.create",
    bytes: BYTES,
    create: |memory, me, world| create(memory, me, world),
    check: |memory, world| {
        let table = open(memory, world);
        equal("what it consists of", table.spec(), SPEC)?;
        equal("results", table.progress().map_err(text)?.done, 0)
    },
    go_on,
};

const CLAIM: Operation = Operation {
    name: "table.claim",
    states: &["free", "claimed by a dead one", "half filled by a dead one"],
    bytes: BYTES,
    prepare,
    run: |memory, _| std::mem::forget(claim(memory, 0, VICTIM, &World::without_deaths())),
    recover: |memory, _, me, world| compute_all(memory, me, world),
    check,
    go_on,
    lives_on: true,
};

const COMMIT: Operation = Operation {
    name: "table.commit",
    states: STATES,
    bytes: BYTES,
    prepare,
    run: |memory, _| compute_all(memory, VICTIM, &World::without_deaths()),
    recover: |memory, _, me, world| compute_all(memory, me, world),
    check: |memory, state, world| {
        check(memory, state, world)?;
        let done = open(memory, world).progress().map_err(text)?.done;
        equal("results", done, SPEC.cells)
    },
    go_on,
    lives_on: true,
};

const GIVE_BACK: Operation = Operation {
    name: "table.give_back",
    states: &["free", "half filled by a dead one"],
    bytes: BYTES,
    prepare,
    run: |memory, _| drop(claim(memory, 0, VICTIM, &World::without_deaths())),
    recover: |memory, _, me, world| compute_all(memory, me, world),
    check: |memory, state, world| {
        if world.dead.is_empty() {
            // While the victim lives: what it gave back is free for others.
            let world = World::without_deaths();
            drop(claim(memory, 0, BYSTANDER, &world));
        }
        check(memory, state, world)
    },
    go_on,
    lives_on: true,
};
