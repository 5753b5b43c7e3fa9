//! The journal: creation, joining, appending, giving up a record, and reading past a dead one's.

use core::time::Duration;

use lupin::InstanceId;
use lupin::collections::{CollectionError, Journal, JournalSpec};
use lupin::crash::{Ended, dies_after};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;

use super::creation::Creation;
use super::{equal, text};
use crate::case::{BYSTANDER, Case, Operation, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&CREATE, &JOIN, &APPEND, &GIVE_UP, &READ];

const SPEC: JournalSpec = JournalSpec {
    appenders: 2,
    bytes: 1024,
};
const BYTES: u64 = 4096;
/// The victim's number for its record.
const TAG: u64 = 77;
const TEXT: &[u8] = b"the victim's word";
/// The number of further records.
const LATER: u64 = 100;
const STATES: &[&str] = &[
    "empty",
    "with records",
    "dead appender, reserved",
    "dead appender, half filled",
];

type Record = (InstanceId, u64, Vec<u8>);

fn open<'m>(memory: &'m Mapping, judge: &impl Liveness) -> Journal<'m> {
    Journal::open(memory, 0, judge, Duration::ZERO).expect("it was created")
}

fn create(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<(), CollectionError> {
    Journal::create(memory, 0, &SPEC, me, judge).map(drop)
}

fn append(memory: &Mapping, me: InstanceId, judge: &impl Liveness, tag: u64, bytes: &[u8]) {
    let mut appender = open(memory, judge).join(me, judge).expect("there is room");
    appender.append(tag, bytes).expect("there is room");
}

fn prepare(memory: &Mapping, state: &str) {
    let everybody = |_: InstanceId| true;
    create(memory, BYSTANDER, &everybody).expect("the memory is new");
    if state != "empty" {
        append(memory, BYSTANDER, &everybody, 1, b"first");
        append(memory, BYSTANDER, &everybody, 2, b"");
    }
    let stores = match state {
        // Lock, note, head; then hint, author, tag, two words of text.
        "dead appender, reserved" => 3,
        "dead appender, half filled" => 7,
        _ => return,
    };
    let ended = dies_after(stores, || append(memory, PREDECESSOR, &everybody, 3, TEXT));
    assert!(matches!(ended, Ended::Died));
}

fn records(memory: &Mapping, judge: &impl Liveness) -> Result<Vec<Record>, String> {
    open(memory, judge)
        .records(judge)
        .map(|record| record.map(|record| (record.author, record.tag, record.bytes)))
        .collect::<Result<_, _>>()
        .map_err(text)
}

/// What was there before the operation.
fn before(state: &str) -> Vec<Record> {
    let first = (BYSTANDER, 1, b"first".to_vec());
    let second = (BYSTANDER, 2, Vec::new());
    match state {
        "empty" | "new" => Vec::new(),
        _ => vec![first, second],
    }
}

/// Whoever comes next takes a place, and finds that of the dead if it needs one.
fn recover(memory: &Mapping, _: &str, me: InstanceId, world: &World) {
    let journal = open(memory, world);
    // Both places, so that the dead one's is among them.
    let one = journal.join(me, world).expect("there is room");
    let other = journal.join(me, world).expect("there is room");
    // Nobody alive fills a record, although somebody alive has the dead one's place.
    let audit = journal.audit().expect("it is whole");
    assert_eq!(audit.filling, 0, "{audit:?}");
    drop((one, other));
    records(memory, world).expect("all records are whole");
}

/// The records of before, and behind them the victim's if `appended` allows or demands it.
fn check(memory: &Mapping, state: &str, world: &World, appends: bool) -> Result<(), String> {
    let mut expected = before(state);
    let found = records(memory, world)?;
    let happened = found.len() > expected.len();
    if happened || (world.returned && appends) {
        expected.push((VICTIM, TAG, TEXT.to_vec()));
    }
    equal("the journal", &found, &expected)?;
    if happened && !appends {
        return Err("a record that nobody committed".into());
    }
    let journal = open(memory, world);
    let named = journal.find(VICTIM, TAG, world).map_err(text)?;
    equal("whether it is found", named.is_some(), happened)?;
    let audit = journal.audit().map_err(text)?;
    equal("records", audit.records, expected.len() as u64)?;
    equal("records that are still filled", audit.filling, 0)
}

/// Two more records, by two appenders.
fn go_on(memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
    let mut expected = records(memory, world)?;
    for me in [world.survivor(), BYSTANDER] {
        append(memory, me, world, LATER, b"later");
        expected.push((me, LATER, b"later".to_vec()));
    }
    equal("the journal", records(memory, world)?, expected)?;
    let audit = open(memory, world).audit().map_err(text)?;
    equal("records that are still filled", audit.filling, 0)
}

const CREATE: Creation = Creation {
    name: "journal.create",
    bytes: BYTES,
    create: |memory, me, world| create(memory, me, world),
    check: |memory, world| {
        equal("what it consists of", open(memory, world).spec(), SPEC)?;
        check(memory, "new", world, false)
    },
    go_on,
};

const JOIN: Operation = Operation {
    name: "journal.join",
    states: STATES,
    bytes: BYTES,
    prepare,
    run: |memory, _| {
        let world = World::without_deaths();
        std::mem::forget(open(memory, &world).join(VICTIM, &world));
    },
    recover,
    check: |memory, state, world| check(memory, state, world, false),
    go_on,
    lives_on: false,
};

const APPEND: Operation = Operation {
    name: "journal.append",
    states: STATES,
    bytes: BYTES,
    prepare,
    run: |memory, _| append(memory, VICTIM, &World::without_deaths(), TAG, TEXT),
    recover,
    check: |memory, state, world| check(memory, state, world, true),
    go_on,
    lives_on: true,
};

const GIVE_UP: Operation = Operation {
    name: "journal.give_up",
    states: &["empty", "with records"],
    bytes: BYTES,
    prepare,
    run: |memory, _| {
        let world = World::without_deaths();
        let journal = open(memory, &world);
        let mut appender = journal.join(VICTIM, &world).expect("there is room");
        let reserved = appender.reserve(TAG, TEXT.len());
        let mut reserved = reserved.expect("there is room");
        reserved.write(0, &TEXT[..8]).expect("it is long enough");
    },
    recover,
    check: |memory, state, world| check(memory, state, world, false),
    go_on,
    lives_on: true,
};

const READ: Operation = Operation {
    name: "journal.read",
    states: &["dead appender, reserved", "dead appender, half filled"],
    bytes: BYTES,
    prepare,
    run: |memory, state| {
        let found = records(memory, &World::without_deaths());
        assert_eq!(found.as_ref(), Ok(&before(state)));
    },
    recover: |memory, state, _, world| {
        assert_eq!(records(memory, world).as_ref(), Ok(&before(state)));
    },
    check: |memory, state, world| check(memory, state, world, false),
    go_on,
    lives_on: true,
};
