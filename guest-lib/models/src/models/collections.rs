//! Counters, results tables and journals.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lupin::InstanceId;
use lupin::collections::{Claim, Counters, CountersSpec, Journal, JournalSpec, Table, TableSpec};

use crate::history::{History, Spec};
use crate::model::{LoomRun, Model};
use crate::scene::{Here, Judge, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "counters.two",
        scene: || counters(2, 1),
        loom: Some(LoomRun::new(1, 2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "counters.three",
        scene: || counters(3, 3),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "counters.watched",
        scene: || watched(3),
        loom: Some(LoomRun::long(2).orders(2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "table.one_cell",
        scene: || table(2, 1),
        loom: Some(LoomRun::new(1, 2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "table.three",
        scene: || table(3, 3),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "journal.two",
        scene: || journal(2, 1),
        loom: Some(LoomRun::new(1, 2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "journal.three",
        scene: || journal(3, 3),
        ..Model::WITH_DEATHS
    },
];

const CREATOR: InstanceId = InstanceId::new(8, 1);

/// Each adds to its shard while one reads the sum, which never goes back.
fn counters(actors: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(8192);
    let spec = CountersSpec {
        counters: 1,
        shards: 4,
    };
    let counters = Counters::create(scene.memory(), 64, &spec, CREATOR, &Judge).expect("room");
    let done = Arc::new(AtomicU64::new(0));
    for id in 1..=actors {
        let shard = counters
            .join(InstanceId::new(id, 1), &Judge)
            .expect("a shard");
        let (mut shard, done) = (shard, done.clone());
        scene.actor(move |_| {
            for ticket in 1..=rounds {
                assert!(shard.add_once(0, ticket, 1).expect("sane"));
                done.fetch_add(1, Ordering::Relaxed);
                assert!(!shard.add_once(0, ticket, 1).expect("sane"), "added twice");
            }
        });
    }
    scene.immortal(move |_| {
        let first = counters.sum(0).expect("sane");
        let second = counters.sum(0).expect("sane");
        assert!(first <= second, "a sum went back from {first} to {second}");
    });
    scene.finally(move |end| {
        let sum = counters.sum(0).expect("sane");
        let done = done.load(Ordering::Relaxed);
        let most = done + u64::from(end.dead.is_some());
        assert!((done..=most).contains(&sum), "{sum} after {done} additions");
    });
    scene
}

/// One adds until both slots of its cell have been used again; the other sees no addition without
/// its value, and no value that was not added yet.
fn watched(rounds: u64) -> Scene {
    let mut scene = Scene::new(8192);
    let spec = CountersSpec {
        counters: 1,
        shards: 1,
    };
    let counters = Counters::create(scene.memory(), 64, &spec, CREATOR, &Judge).expect("room");
    let adder = InstanceId::new(1, 1);
    let mut shard = counters.join(adder, &Judge).expect("a shard");
    scene.actor(move |_| {
        for ticket in 1..=rounds {
            assert!(shard.add_once(0, ticket, 1).expect("sane"));
        }
    });
    scene.immortal(move |_| {
        let first = counters.sum(0).expect("sane");
        let ticket = counters.last(0, adder.id()).expect("sane");
        let second = counters.sum(0).expect("sane");
        assert!(first <= ticket, "{first} of {ticket} additions");
        assert!(ticket <= second, "{second} of {ticket} additions");
    });
    scene
}

/// A cell of a results table: the first result stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Cell(Option<u8>);

#[derive(Clone, Debug)]
enum CellOp {
    Commit(u8),
    Get,
}

impl Spec for Cell {
    type Op = CellOp;
    type Answer = Option<u8>;

    fn apply(&mut self, op: &CellOp) -> Option<u8> {
        match op {
            CellOp::Commit(result) => Some(*self.0.get_or_insert(*result)),
            CellOp::Get => self.0,
        }
    }
}

/// Each cell gets one result, whole.
fn table(actors: u32, cells: u32) -> Scene {
    let mut scene = Scene::new(8192);
    let spec = TableSpec { cells, bytes: 16 };
    let table = Table::create(scene.memory(), 64, &spec, CREATOR, &Judge).expect("room");
    let histories: Vec<History<Cell>> = (0..cells).map(|_| History::default()).collect();
    for _ in 0..actors {
        let histories = histories.clone();
        scene.actor(move |actor| {
            for (cell, history) in (0..cells).zip(&histories) {
                match table.claim(cell, actor.me, &actor.judge).expect("sane") {
                    Claim::Mine(claimed) => {
                        // Lost to a slower one that was thought to be dead: nobody is, here.
                        let result = actor.me.id() as u8;
                        history.run(actor, CellOp::Commit(result), || {
                            claimed.commit(&[result; 16]).expect("its own");
                            Some(result)
                        });
                    }
                    Claim::Done(_) | Claim::Theirs(_) => {}
                }
                history.run(actor, CellOp::Get, || {
                    let bytes = table.get(cell).expect("sane")?;
                    assert_eq!(bytes, [bytes[0]; 16], "half a result");
                    Some(bytes[0])
                });
            }
        });
    }
    scene.finally(move |end| {
        let heir = InstanceId::new(8, 1);
        for (cell, history) in (0..cells).zip(histories) {
            history.check(Cell::default(), end.time);
            if let Claim::Mine(claimed) = table.claim(cell, heir, &end.judge).expect("sane") {
                assert!(end.dead.is_some(), "a cell was left out");
                claimed.commit(&[8; 16]).expect("its own");
            }
            assert!(table.get(cell).expect("sane").is_some());
        }
    });
    scene
}

/// Every record that an append returned for is there once, whole; no other is.
fn journal(actors: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(8192);
    let spec = JournalSpec {
        appenders: 4,
        bytes: 1024,
    };
    let journal = Journal::create(scene.memory(), 64, &spec, CREATOR, &Judge).expect("room");
    let appended: Arc<Mutex<BTreeSet<(u64, u64)>>> = Arc::default();
    for id in 1..=actors {
        let me = InstanceId::new(id, 1);
        let appender = Here(journal.join(me, &Judge).expect("a place"));
        let appended = appended.clone();
        scene.actor(move |actor| {
            let mut appender = appender.into_inner();
            for tag in 1..=rounds {
                appender.append(tag, &[tag as u8; 9]).expect("room");
                appended
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert((me.word(), tag));
            }
            for record in journal.records(&actor.judge) {
                let record = record.expect("sane");
                assert_eq!(record.bytes, [record.tag as u8; 9], "half a record");
            }
        });
    }
    scene.finally(move |end| {
        let appended = appended.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = BTreeSet::new();
        for record in journal.records(&end.judge) {
            let record = record.expect("sane");
            let key = (record.author.word(), record.tag);
            assert!(seen.insert(key), "{key:x?} is there twice");
            let is_known = appended.contains(&key) || Some(record.author) == end.dead;
            assert!(is_known, "{key:x?} was never appended");
        }
        assert!(
            seen.is_superset(&appended),
            "{seen:x?} lacks some of {appended:x?}"
        );
    });
    scene
}
