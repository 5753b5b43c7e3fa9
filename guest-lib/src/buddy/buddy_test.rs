use super::*;
use crate::log::{Log, LogError, log_size};
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::Access;
use crate::test_random::Random;
use std::collections::BTreeMap;

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const ENTRIES: u32 = 16;
/// Not at the start, so that an offset that lacks its base is noticed.
const LOG: u64 = 64;
const BUDDY: u64 = LOG + log_size(ENTRIES);

fn spec(units: u32) -> BuddySpec {
    let unit = 4096;
    BuddySpec { units, unit }
}

fn memory(spec: &BuddySpec) -> Mapping {
    let len = (BUDDY + metadata_size(spec)).next_multiple_of(4096);
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    Mapping::new(&file, 0, len, Access::ReadWrite).unwrap()
}

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

fn create(memory: &Mapping, units: u32) -> Buddy<'_> {
    Buddy::create(memory, BUDDY, &spec(units), A, &all_but(&[])).unwrap()
}

fn record<'m>(buddy: &Buddy<'m>) -> Record<'m> {
    let log = Log::new(buddy.memory, LOG, ENTRIES).unwrap();
    log.begin(A, 0, 0).unwrap()
}

fn alloc(buddy: &Buddy<'_>, units: u32, owner: u64) -> Result<u32, BuddyError> {
    let mut record = record(buddy);
    let first = buddy.alloc_in(&mut record, units, owner)?;
    record.commit(0)?;
    Ok(first)
}

fn free(buddy: &Buddy<'_>, first: u32, owner: u64) -> Result<(), BuddyError> {
    let mut record = record(buddy);
    buddy.free_in(&mut record, first, owner)?;
    Ok(record.commit(0)?)
}

#[test]
fn random_operations_agree_with_a_model() {
    let mut random = Random(7);
    for units in [1, 2, 63, 64, 65, 100, 511, 513, 1000, 4097] {
        let memory = memory(&spec(units));
        let buddy = create(&memory, units);
        let mut model: BTreeMap<u32, (u32, u64)> = BTreeMap::new();
        for step in 0..1500 {
            match random.below(4) {
                0 | 1 => {
                    let bound = 1 << random.below(10);
                    let wanted = 1 + random.below(bound) as u32;
                    let owner = 1 + random.below(3);
                    match alloc(&buddy, wanted, owner) {
                        Ok(first) => {
                            let order = wanted.next_power_of_two().ilog2();
                            assert_eq!(first >> order << order, first);
                            assert_eq!(model.insert(first, (order, owner)), None);
                        }
                        Err(BuddyError::NoRoom { units, largest }) => {
                            assert_eq!(units, u64::from(wanted.next_power_of_two()));
                            assert!(largest < units);
                            assert_eq!(buddy.audit().unwrap().largest, largest);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                2 => {
                    let n = random.below(model.len().max(1) as u64) as usize;
                    if let Some((first, (_, owner))) = model.iter().nth(n).map(|(f, c)| (*f, *c)) {
                        free(&buddy, first, owner).unwrap();
                        model.remove(&first);
                    }
                }
                _ => {
                    // Any unit in any name: an error that names what is wrong, or its own free.
                    let (first, owner) = (
                        random.below(u64::from(units) + 2) as u32,
                        1 + random.below(3),
                    );
                    let result = free(&buddy, first, owner);
                    let chunk = model.get(&first).copied();
                    match (chunk, result) {
                        (Some((_, own)), Ok(())) if own == owner => {
                            model.remove(&first);
                        }
                        (Some((_, own)), Err(BuddyError::Foreign { first: f, owner })) => {
                            assert_eq!((f, owner), (first.into(), own));
                        }
                        (None, Err(BuddyError::NotAChunk { first: f })) => {
                            assert_eq!(f, first.into());
                        }
                        (None, Err(BuddyError::DoubleFree { first: f, .. })) => {
                            assert_eq!(f, first.into());
                            assert_eq!(buddy.chunk_around(first), None);
                        }
                        (chunk, result) => panic!("{first} {owner}: {chunk:?} {result:?}"),
                    }
                }
            }
            if step % 50 == 0 {
                let live: u64 = model.values().map(|(order, _)| 1 << order).sum();
                let audit = buddy.audit().unwrap();
                assert_eq!((audit.live, audit.chunks), (live, model.len() as u64));
                assert_eq!(audit.free + audit.live, u64::from(units));
            }
        }
        for owner in 1..=3 {
            let found: Vec<_> = buddy.chunks_of(owner).map(|c| (c.first, c.order)).collect();
            let expected = model.iter().filter(|(_, (_, own))| *own == owner);
            let expected: Vec<_> = expected
                .map(|(first, (order, _))| (*first, *order))
                .collect();
            assert_eq!(found, expected);
        }
        for (first, (order, owner)) in &model {
            for unit in *first..*first + (1 << order) {
                assert_eq!(buddy.chunk_around(unit).unwrap().first, *first);
            }
            free(&buddy, *first, *owner).unwrap();
        }
        assert_eq!(buddy.audit().unwrap().free, u64::from(units));
    }
}

#[test]
fn misuse_is_named() {
    let memory = memory(&spec(16));
    let buddy = create(&memory, 16);
    let first = alloc(&buddy, 3, 5).unwrap();
    assert!(matches!(alloc(&buddy, 0, 5), Err(BuddyError::Nothing)));
    assert!(matches!(alloc(&buddy, 1, 0), Err(BuddyError::Nothing)));
    assert!(matches!(
        alloc(&buddy, 17, 5),
        Err(BuddyError::NoRoom {
            units: 32,
            largest: 8
        })
    ));
    assert!(matches!(
        alloc(&buddy, u32::MAX, 5),
        Err(BuddyError::NoRoom { .. })
    ));
    assert!(matches!(
        free(&buddy, first, 6),
        Err(BuddyError::Foreign { owner: 5, .. })
    ));
    assert!(matches!(
        free(&buddy, first + 1, 5),
        Err(BuddyError::NotAChunk { .. })
    ));
    assert!(matches!(
        free(&buddy, 16, 5),
        Err(BuddyError::NotAChunk { first: 16 })
    ));
    free(&buddy, first, 5).unwrap();
    assert!(matches!(
        free(&buddy, first, 5),
        Err(BuddyError::DoubleFree { owner: 5, .. })
    ));
    // What was freed and is now inside of another's chunk is no double free.
    let inner = alloc(&buddy, 1, 5).unwrap();
    let other = alloc(&buddy, 1, 5).unwrap();
    free(&buddy, inner, 5).unwrap();
    free(&buddy, other, 5).unwrap();
    let whole = alloc(&buddy, 16, 9).unwrap();
    assert_eq!((whole, other), (0, 1));
    assert!(matches!(
        free(&buddy, other, 5),
        Err(BuddyError::NotAChunk { .. })
    ));
    // Given away, it is the new owner's.
    let mut record = record(&buddy);
    assert!(matches!(
        buddy.give_in(&mut record, 0, 5, 6),
        Err(BuddyError::Foreign { owner: 9, .. })
    ));
    assert!(matches!(
        buddy.give_in(&mut record, 1, 9, 6),
        Err(BuddyError::NotAChunk { .. })
    ));
    buddy.give_in(&mut record, 0, 9, 6).unwrap();
    record.commit(0).unwrap();
    assert!(matches!(
        free(&buddy, 0, 9),
        Err(BuddyError::Foreign { owner: 6, .. })
    ));
    free(&buddy, 0, 6).unwrap();
    buddy.audit().unwrap();
}

#[test]
fn several_operations_in_one_record_are_one() {
    let memory = memory(&spec(130));
    let buddy = create(&memory, 130);
    let mut record = record(&buddy);
    let firsts: Vec<_> = (0..3)
        .map(|_| buddy.alloc_in(&mut record, 1, 1).unwrap())
        .collect();
    buddy.free_in(&mut record, firsts[1], 1).unwrap();
    assert_eq!(buddy.audit().unwrap().chunks, 0);
    record.commit(0).unwrap();
    assert_eq!(buddy.audit().unwrap().chunks, 2);
    // More than the log can hold: an error, and nothing has happened.
    let mut record = super::buddy_test::record(&buddy);
    let error = loop {
        if let Err(error) = buddy.alloc_in(&mut record, 1, 1) {
            break error;
        }
    };
    assert!(matches!(
        error,
        BuddyError::Log(LogError::Full { entries: ENTRIES })
    ));
    drop(record);
    assert_eq!(buddy.audit().unwrap().chunks, 2);
}

#[test]
fn a_creator_may_die_at_any_store_and_so_may_the_next() {
    let (units, other) = (70, 200);
    let (_, stores) = count(|| {
        create(&memory(&spec(units)), units);
    });
    for at in (0..stores).step_by(3).chain([1, 2, stores - 1, stores]) {
        for second in (0..=stores).step_by(11) {
            let memory = memory(&spec(other));
            let ended = dies_after(at, || {
                create(&memory, units);
            });
            assert_eq!(ended == Ended::Completed(()), at == stores);
            let judge = all_but(&[A]);
            if ended == Ended::Died {
                // Nobody but a judge who knows of the death takes it over.
                let open = Buddy::open(&memory, BUDDY);
                assert!(matches!(open, Err(BuddyError::Unfinished(by)) if by == A || by.is_none()));
                if at >= 2 {
                    let live = Buddy::create(&memory, BUDDY, &spec(other), B, &all_but(&[]));
                    assert!(matches!(live, Err(BuddyError::BeingCreated(A))));
                }
            }
            // The next wants another shape, as long as there is none.
            let wanted = if at == stores { units } else { other };
            let ended = dies_after(second, || {
                Buddy::create(&memory, BUDDY, &spec(wanted), B, &judge).map(|_| ())
            });
            assert!(matches!(ended, Ended::Died | Ended::Completed(Ok(()))));
            let judge = all_but(&[A, B]);
            let buddy = Buddy::create(&memory, BUDDY, &spec(wanted), C, &judge).unwrap();
            assert_eq!(buddy.audit().unwrap().free, u64::from(wanted));
            let first = alloc(&buddy, 64, 1).unwrap();
            let again = Buddy::open(&memory, BUDDY).unwrap();
            assert_eq!(again.chunk(first).unwrap().owner, 1);
            let error = Buddy::create(&memory, BUDDY, &spec(wanted + 1), C, &judge);
            assert!(matches!(error, Err(BuddyError::NotThis { .. })));
        }
    }
}

#[test]
fn every_corrupt_word_is_found_by_the_audit() {
    let units = 100;
    let shape = spec(units);
    let mut random = Random(5);
    let memory = memory(&shape);
    let buddy = create(&memory, units);
    for (wanted, owner) in [(1, 1), (20, 2), (4, 1), (1, 3)] {
        alloc(&buddy, wanted, owner).unwrap();
    }
    let freed = alloc(&buddy, 2, 4).unwrap();
    free(&buddy, freed, 4).unwrap();
    for word in 0..metadata_size(&shape) / 8 {
        let at = BUDDY + word * 8;
        let cell: &AtomicU64 = memory.get(at).unwrap();
        let right = load64(cell, Ordering::Relaxed);
        for wrong in [
            right ^ 1,
            right ^ 1 << random.below(64),
            !right,
            random.next(),
            0,
        ] {
            if wrong == right {
                continue;
            }
            fill64(cell, wrong);
            if word < 8 {
                let is_creator = word == 1;
                assert_eq!(Buddy::open(&memory, BUDDY).is_ok(), is_creator, "{word}");
            } else if word < 8 + buddy.tree.words() {
                let error = buddy.audit().unwrap_err();
                assert!(matches!(error, BuddyError::Corrupt { at: found, .. } if found == at));
            } else {
                // Owner words of free units mean nothing; those of chunks may be any but 0; a
                // state may have become that of a unit that was used before.
                let chunk = (word - 8 - buddy.tree.words()) / 2;
                let live = buddy.chunk(chunk as u32).is_some();
                let is_state = (word - buddy.tree.words()) % 2 == 1;
                if live && (is_state || wrong == 0) {
                    assert!(buddy.audit().is_err(), "{word} {wrong:#x}");
                }
                let _ = buddy.audit();
                let _ = free(&buddy, chunk.min(99) as u32, wrong ^ 1);
            }
            fill64(cell, right);
            buddy.audit().unwrap();
        }
    }
}
