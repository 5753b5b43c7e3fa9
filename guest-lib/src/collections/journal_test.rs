use super::super::test_support::{A, B, C, Random, all_but, memory};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;
use std::collections::{HashMap, HashSet};
use std::sync::RwLock;

const SPEC: JournalSpec = JournalSpec {
    appenders: 2,
    bytes: 512,
};

fn journal<'m>(memory: &'m Mapping, spec: &JournalSpec) -> Journal<'m> {
    Journal::create(memory, 0, spec, A, &all_but(&[])).unwrap()
}

/// What an author says under a tag; the length varies with the tag.
fn text(author: InstanceId, tag: u64) -> Vec<u8> {
    let word = (author.word() ^ tag << 8).to_le_bytes();
    word.iter()
        .cycle()
        .take(tag as usize % 30)
        .copied()
        .collect()
}

fn append(journal: &Journal<'_>, me: InstanceId, dead: &[InstanceId]) {
    let mut appender = journal.join(me, &all_but(dead)).unwrap();
    for tag in [3, 20] {
        appender.append(tag, &text(me, tag)).unwrap();
    }
}

/// Reads all, checks each, and returns whose and which they are.
fn read(journal: &Journal<'_>, dead: &[InstanceId]) -> Vec<(InstanceId, u64)> {
    journal
        .records(&all_but(dead))
        .map(|record| {
            let record = record.unwrap();
            assert_eq!(record.bytes, text(record.author, record.tag));
            (record.author, record.tag)
        })
        .collect()
}

#[test]
fn creation_is_taken_over_after_a_death_at_any_store() {
    let create = |memory: &Mapping, me: InstanceId, dead: &[InstanceId]| {
        Journal::create(memory, 0, &SPEC, me, &all_but(dead)).map(drop)
    };
    let (_, stores) = count(|| create(&memory(4096), A, &[]).unwrap());
    for at in 0..stores {
        let memory = memory(4096);
        // What another journal left in the place is no record of this one.
        memory.copy_in(HEADER, &[0xff; 900]).unwrap();
        let ended = dies_after(at, || create(&memory, A, &[]));
        assert!(matches!(ended, Ended::Died));
        create(&memory, B, &[A]).unwrap();
        let journal = Journal::open(&memory, 0, &all_but(&[A]), Duration::ZERO).unwrap();
        append(&journal, C, &[A]);
        assert_eq!(read(&journal, &[A]), [(C, 3), (C, 20)]);
    }
}

#[test]
fn two_appenders_may_die_at_any_store_and_readers_see_whole_records() {
    let fresh = memory(4096);
    let prepared = journal(&fresh, &SPEC);
    let (_, stores) = count(|| append(&prepared, A, &[]));
    for first in 0..=stores {
        for second in 0..=stores {
            let memory = memory(4096);
            let journal = journal(&memory, &SPEC);
            let _ = dies_after(first, || append(&journal, A, &[]));
            // As long as A counts as alive, nobody knows what becomes of its record.
            let before = read(&journal, &[]);
            let _ = dies_after(second, || append(&journal, B, &[A]));
            append(&journal, C, &[A, B]);
            let after = read(&journal, &[A, B]);
            assert_eq!(before, after[..before.len()], "{first} {second}");
            for (author, generation) in [(A, 1), (B, 1), (C, 1)] {
                assert_eq!(author.generation(), generation);
                let of: Vec<_> = after.iter().filter(|(a, _)| *a == author).collect();
                assert!(of.len() <= 2 && of.iter().map(|(_, tag)| *tag).is_sorted());
            }
            assert!(after.ends_with(&[(C, 3), (C, 20)]) || second == stores);
            let audit = journal.audit().unwrap();
            assert_eq!((audit.records, audit.filling), (after.len() as u64, 0));
            assert!(audit.holes <= 2, "one a death: {audit:?}");
        }
    }
}

#[test]
fn readers_stop_at_a_record_that_is_being_filled_and_go_on_later() {
    let memory = memory(4096);
    let journal = journal(&memory, &SPEC);
    let judge = all_but(&[]);
    let mut a = journal.join(A, &judge).unwrap();
    let mut b = journal.join(B, &judge).unwrap();
    let error = journal.join(C, &judge).unwrap_err();
    assert!(matches!(error, CollectionError::Full { capacity: 2, .. }));
    let mut records = journal.records(&judge);
    let mut reservation = a.reserve(1, 4).unwrap();
    let position = b.append(2, b"after").unwrap();
    assert!(records.next().is_none());
    reservation.write(0, b"be").unwrap();
    reservation.write(2, b"fo").unwrap();
    assert!(reservation.write(3, b"re").is_err());
    reservation.commit().unwrap();
    assert_eq!(records.next().unwrap().unwrap().bytes, b"befo");
    assert_eq!(records.next().unwrap().unwrap().position, position);
    assert!(records.next().is_none());
    assert_eq!(journal.find(B, 2, &judge).unwrap(), Some(position));
    assert_eq!(journal.find(B, 3, &judge).unwrap(), None);
    // One that is given up, and one that is forgotten, are holes.
    drop(a.reserve(3, 8).unwrap());
    core::mem::forget(a.reserve(4, 8).unwrap());
    b.append(5, b"x").unwrap();
    assert!(records.next().is_none());
    a.append(6, b"y").unwrap();
    assert_eq!(records.next().unwrap().unwrap().tag, 5);
    core::mem::forget(a.reserve(7, 8).unwrap());
    drop(a);
    assert_eq!(journal.audit().unwrap().holes, 3);
    journal.join(C, &judge).unwrap();
}

#[test]
fn a_reader_without_the_right_to_store_skips_the_dead() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let memory = Mapping::new(&file, 0, 4096, Access::ReadWrite).unwrap();
    let journal = journal(&memory, &SPEC);
    let mut a = journal.join(A, &all_but(&[])).unwrap();
    core::mem::forget(a.reserve(1, 4).unwrap());
    core::mem::forget(a);
    journal
        .join(B, &all_but(&[]))
        .unwrap()
        .append(2, &text(B, 2))
        .unwrap();
    let read_only = Mapping::new(&file, 0, 4096, Access::ReadOnly).unwrap();
    let journal = Journal::open(&read_only, 0, &all_but(&[A]), Duration::ZERO).unwrap();
    assert_eq!(read(&journal, &[]), []);
    assert_eq!(read(&journal, &[A]), [(B, 2)]);
    assert_eq!(journal.audit().unwrap().filling, 1);
}

#[test]
fn the_end_is_an_error_and_damage_is_named() {
    let memory = memory(4096);
    let journal = journal(&memory, &SPEC);
    let mut a = journal.join(A, &all_but(&[])).unwrap();
    let error = a.append(0, &[0; 600]).unwrap_err();
    assert!(matches!(error, CollectionError::Full { capacity: 512, .. }));
    let mut appended = 0;
    while a.append(5, &text(A, 5)).is_ok() {
        appended += 1;
    }
    assert_eq!(appended, 512 / 32);
    assert_eq!(read(&journal, &[]).len(), appended);
    for word in [1, 2 << 56 | 2 << 32, 2 << 56 | 481, u64::MAX] {
        let cell = journal.word(480).unwrap();
        let old = load64(cell, Ordering::Relaxed);
        store64(cell, word, Ordering::Relaxed);
        let mut records = journal.records_from(448, &|_| true);
        assert!(records.next().unwrap().is_ok());
        let error = records.next().unwrap().unwrap_err();
        assert!(matches!(error, CollectionError::Damaged { .. }), "{error}");
        assert!(records.next().is_none());
        store64(cell, old, Ordering::Relaxed);
    }
}

/// Threads that die at random stores and come back; readers read along all the time.
#[test]
fn under_many_deaths_all_readers_see_one_sequence_of_whole_records() {
    let memory = memory(1 << 20);
    let spec = JournalSpec {
        appenders: 4,
        bytes: 400 << 10,
    };
    let journal = journal(&memory, &spec);
    let dead = RwLock::new(HashSet::new());
    let committed = RwLock::new(HashSet::new());
    let judge = |instance: InstanceId| !dead.read().unwrap().contains(&instance);
    let check = |record: Result<JournalRecord, CollectionError>| {
        let record = record.unwrap();
        assert_eq!(record.bytes, text(record.author, record.tag));
        record
    };
    std::thread::scope(|scope| {
        let appenders: Vec<_> = (1..=3u32)
            .map(|id| {
                let (judge, dead, committed, journal) = (&judge, &dead, &committed, &journal);
                scope.spawn(move || {
                    let mut random = Random::new(id.into());
                    for generation in 1..150 {
                        let me = InstanceId::new(id, generation);
                        let ended: Ended<()> = dies_after(random.below(250), || {
                            let mut appender = journal.join(me, judge).unwrap();
                            for tag in 1.. {
                                appender.append(tag, &text(me, tag)).unwrap();
                                committed.write().unwrap().insert((me, tag));
                            }
                        });
                        assert_eq!(ended, Ended::Died);
                        dead.write().unwrap().insert(me);
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            let mut records = journal.records(&judge);
            let mut seen = Vec::new();
            while appenders.iter().any(|appender| !appender.is_finished()) {
                seen.extend(records.by_ref().map(check));
            }
            seen.extend(records.by_ref().map(check));
            let all: Vec<_> = journal.records(&judge).map(check).collect();
            assert_eq!(seen, all);
        }
    });
    let mut last: HashMap<InstanceId, u64> = HashMap::new();
    for record in journal.records(&judge).map(check) {
        let before = last.insert(record.author, record.tag).unwrap_or(0);
        assert_eq!(record.tag, before + 1, "in order, each once");
        committed
            .write()
            .unwrap()
            .remove(&(record.author, record.tag));
    }
    assert!(
        committed.read().unwrap().is_empty(),
        "whatever returned is there"
    );
    let audit = journal.audit().unwrap();
    assert_eq!(audit.filling, 0);
    assert!(audit.holes > 100, "{audit:?}");
}
