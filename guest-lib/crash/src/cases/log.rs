//! The redo log.

use lupin::InstanceId;
use lupin::log::{Log, LogError, MAX_LOCKS, Outcome, log_size};
use lupin::shm::Mapping;

use super::{die_before_end, equal, load};
use crate::case::{BYSTANDER, Case, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Commit, &Settle];

const BYTES: u64 = 4096;
const ENTRIES: u32 = 4;
const LOG: u64 = 64;
/// The words that records change.
const DATA: u64 = LOG + log_size(ENTRIES);
const KIND: u32 = 7;
/// The values of the records before, and of the one under test.
const FIRST: u64 = 100;
const BEFORE: u64 = 200;
const AFTER: u64 = 300;

fn log(memory: &Mapping) -> Log<'_> {
    Log::new(memory, LOG, ENTRIES).expect("in bounds")
}

/// Words 0..4 become `value`, value + 1, ...; notes `locks` locks, of which it gets the first.
fn change(memory: &Mapping, me: InstanceId, value: u64, locks: u64) {
    let written = || -> Result<(), LogError> {
        let mut record = log(memory).begin(me, KIND, value)?;
        (1..=locks).for_each(|lock| record.intend(lock * 64));
        record.held(64);
        // Twice, and the last counts.
        record.set(DATA, 1)?;
        for n in 0..4 {
            record.set(DATA + n * 8, value + n)?;
        }
        record.commit(value + 9)
    };
    written().expect("an empty or settled log");
}

/// The value of the last record, if the words are those of a whole one.
fn value(memory: &Mapping) -> Result<u64, String> {
    let words: [u64; 4] = core::array::from_fn(|n| load(memory, DATA + n as u64 * 8));
    let value = words[0];
    if words != [0; 4] {
        equal("the data", words, [value, value + 1, value + 2, value + 3])?;
    }
    Ok(value)
}

/// Settles what `dead` left; of an earlier owner, if that was not done.
fn settle(memory: &Mapping, dead: InstanceId) -> Outcome {
    let settled = match log(memory).settle(dead) {
        Err(LogError::Unsettled { owner, .. }) => log(memory).settle(owner),
        settled => settled,
    };
    settled.expect("nothing is corrupt")
}

fn last(memory: &Mapping) -> Result<Outcome, String> {
    log(memory).last().map_err(|error| error.to_string())
}

fn go_on(memory: &Mapping, world: &World) -> Result<(), String> {
    for (me, value_then) in [(world.survivor(), 1000), (BYSTANDER, 2000)] {
        let seq = last(memory)?.seq;
        change(memory, me, value_then, 2);
        equal("the value", value(memory)?, value_then)?;
        let outcome = last(memory)?;
        let told = (outcome.owner, outcome.seq, outcome.tag, outcome.happened);
        equal("the outcome", told, (me, seq + 1, value_then, true))?;
        let locks: Vec<_> = outcome.locks.iter().collect();
        equal("the locks", locks, vec![(64, true), (128, false)])?;
    }
    Ok(())
}

/// A record from its beginning until it is retired.
#[derive(Debug)]
struct Commit;

impl Commit {
    fn before(state: &str) -> u64 {
        match state {
            "empty" => 0,
            _ => BEFORE,
        }
    }

    fn locks(state: &str) -> u64 {
        match state {
            "more locks than places" => MAX_LOCKS as u64 + 2,
            _ => 2,
        }
    }
}

impl Case for Commit {
    fn name(&self) -> &'static str {
        "log.commit"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "empty",
            "after others",
            "after one that was given up",
            "after a dead owner's",
            "more locks than places",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        if state == "empty" {
            return;
        }
        // Its head is used again, and had more locks.
        change(memory, VICTIM, FIRST, 5);
        if state == "after a dead owner's" {
            // Committed, half applied.
            die_before_end(memory, 3, || change(memory, PREDECESSOR, BEFORE, 3));
            return;
        }
        change(memory, VICTIM, BEFORE, 1);
        if state == "after one that was given up" {
            let mut record = log(memory).begin(VICTIM, KIND, 1).expect("settled");
            record.set(DATA, 1).expect("room");
        }
    }

    fn run(&self, memory: &Mapping, state: &str) {
        if state == "after a dead owner's" {
            settle(memory, PREDECESSOR);
        }
        change(memory, VICTIM, AFTER, Self::locks(state));
    }

    fn recover(&self, memory: &Mapping, _: &str, _: InstanceId, _: &World) {
        let outcome = settle(memory, VICTIM);
        assert_eq!(outcome, settle(memory, outcome.owner), "settled twice");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let (value, last) = (value(memory)?, last(memory)?);
        if world.returned && last.tag != AFTER {
            return Err(format!("the record is not there, but {last:?}"));
        }
        if last.tag != AFTER {
            return equal("the value", value, Self::before(state));
        }
        equal("the owner", (last.owner, last.kind), (VICTIM, KIND))?;
        if !last.happened {
            equal("returned", world.returned, false)?;
            return equal("the value", value, Self::before(state));
        }
        equal("the value", (value, last.result), (AFTER, AFTER + 9))?;
        let locks = Self::locks(state);
        equal("whether locks are missing", last.locks.are_cut(), locks > 7)?;
        let noted = if locks > 7 { 6 } else { locks };
        let expected: Vec<_> = (1..=noted).map(|lock| (lock * 64, lock == 1)).collect();
        equal("the locks", last.locks.iter().collect(), expected)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}

/// Finishing what a dead owner left.
#[derive(Debug)]
struct Settle;

impl Case for Settle {
    fn name(&self) -> &'static str {
        "log.settle"
    }

    fn states(&self) -> &'static [&'static str] {
        &["open", "committed", "half applied", "applied", "retired"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        change(memory, PREDECESSOR, FIRST, 1);
        change(memory, PREDECESSOR, BEFORE, 1);
        // From the end: retired, four words, committed, four words of the seal, ...
        let stores = match state {
            "open" => 7,
            "committed" => 5,
            "half applied" => 3,
            "applied" => 1,
            _ => return change(memory, PREDECESSOR, AFTER, 1),
        };
        die_before_end(memory, stores, || change(memory, PREDECESSOR, AFTER, 1));
    }

    fn run(&self, memory: &Mapping, _: &str) {
        settle(memory, PREDECESSOR);
    }

    fn recover(&self, memory: &Mapping, _: &str, _: InstanceId, _: &World) {
        settle(memory, PREDECESSOR);
    }

    fn check(&self, memory: &Mapping, state: &str, _: &World) -> Result<(), String> {
        let happened = state != "open";
        let expected = if happened { AFTER } else { BEFORE };
        equal("the value", value(memory)?, expected)?;
        let last = last(memory)?;
        let told = (last.owner, last.tag, last.happened);
        equal("the outcome", told, (PREDECESSOR, AFTER, happened))
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}
