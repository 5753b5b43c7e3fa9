use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::test_random::Random;
use std::collections::{HashMap, HashSet};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const LOG: u64 = 64;
const ENTRIES: u32 = 6;
/// The words that the tests change.
const DATA: u64 = LOG + log_size(ENTRIES);
const LEN: u64 = 4096;
const LOCK: u64 = 0x1000;

fn memory() -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LEN).unwrap();
    Mapping::new(&file, 0, LEN, Access::ReadWrite).unwrap()
}

fn log(memory: &Mapping) -> Log<'_> {
    Log::new(memory, LOG, ENTRIES).unwrap()
}

fn word(memory: &Mapping, at: u64) -> u64 {
    load64(memory.get(at).unwrap(), Ordering::Relaxed)
}

fn put(memory: &Mapping, at: u64, value: u64) {
    fill64(memory.get(at).unwrap(), value);
}

fn snapshot(memory: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    memory.copy_out(0, &mut bytes).unwrap();
    bytes
}

/// Words 0..4 become `value`, value + 1, ...; all of them or none.
fn change(memory: &Mapping, owner: InstanceId, value: u64) -> Result<(), LogError> {
    let mut record = log(memory).begin(owner, 7, value)?;
    record.intend(LOCK);
    record.held(LOCK);
    for n in 0..4 {
        record.set(DATA + n * 8, value + n)?;
    }
    record.commit(value * 2)
}

fn data(memory: &Mapping) -> [u64; 4] {
    core::array::from_fn(|n| word(memory, DATA + n as u64 * 8))
}

/// The value of the last change, if that is a whole one.
fn value(memory: &Mapping) -> Option<u64> {
    let words = data(memory);
    let is_whole = (0..4).all(|n| words[n] == words[0] + n as u64);
    (words == [0; 4] || is_whole).then_some(words[0])
}

/// Two records, one given up, and one that dies before its store `at`.
fn history(at: u64) -> (Mapping, Ended<()>) {
    let m = memory();
    change(&m, B, 10).unwrap();
    change(&m, A, 20).unwrap();
    drop(log(&m).begin(A, 1, 1).unwrap());
    let ended = dies_after(at, || change(&m, A, 30).unwrap());
    (m, ended)
}

fn stores() -> u64 {
    let m = memory();
    change(&m, B, 10).unwrap();
    change(&m, A, 20).unwrap();
    drop(log(&m).begin(A, 1, 1).unwrap());
    count(|| change(&m, A, 30).unwrap()).1
}

#[test]
fn a_record_is_applied_and_told() {
    let m = memory();
    assert_eq!(log(&m).last(), Ok(Outcome::nothing(InstanceId::NONE)));
    assert_eq!(log(&m).settle(A), Ok(Outcome::nothing(A)));
    assert_eq!(log(&m).owner(), Ok(InstanceId::NONE));
    for n in [10, 20, 30] {
        change(&m, A, n).unwrap();
        assert_eq!(value(&m), Some(n));
        let last = log(&m).last().unwrap();
        assert_eq!((last.owner, last.kind, last.tag), (A, 7, n));
        assert_eq!(
            (last.happened, last.result, last.seq),
            (true, n * 2, n / 10)
        );
        assert_eq!(last.locks.iter().collect::<Vec<_>>(), [(LOCK, true)]);
        assert_eq!(log(&m).settle(A), Ok(last));
        assert_eq!(log(&m).settle(B), Ok(Outcome::nothing(B)));
        assert_eq!(log(&m).owner(), Ok(A));
    }
}

#[test]
fn after_a_death_at_any_store_it_happened_or_not_and_the_log_knows() {
    let stores = stores();
    let mut happened = Vec::new();
    for at in 0..=stores {
        let (m, ended) = history(at);
        assert_eq!(ended == Ended::Completed(()), at == stores);
        // Unsettled, it is in nobody's way but says so.
        let before = log(&m).last().unwrap();
        if value(&m) == Some(20) && !before.happened {
            assert!(log(&m).settle(B) == Ok(Outcome::nothing(B)));
        } else if at < stores {
            let unsettled = LogError::Unsettled { owner: A, seq: 4 };
            assert_eq!(change(&m, B, 40), Err(unsettled));
            assert_eq!(log(&m).settle(B), Err(unsettled));
        }
        let outcome = log(&m).settle(A).unwrap();
        // Either the record that was given up is still the last, or this one is.
        match outcome.seq {
            3 => assert!(!outcome.happened && outcome.tag == 1),
            4 => assert_eq!((outcome.tag, outcome.kind), (30, 7)),
            seq => panic!("{seq}"),
        }
        assert_eq!(
            value(&m),
            Some(if outcome.happened { 30 } else { 20 }),
            "{at}"
        );
        assert_eq!(
            before, outcome,
            "what is told does not depend on who asks when"
        );
        happened.push(outcome.happened);
        // Again and again it is the same.
        let settled = snapshot(&m);
        assert_eq!(log(&m).settle(A), Ok(outcome));
        assert_eq!(snapshot(&m), settled);
        change(&m, B, 40).unwrap();
        assert_eq!(value(&m), Some(40));
        assert_eq!(log(&m).last().unwrap().owner, B);
    }
    assert!(happened.is_sorted(), "there is one commit point");
    assert!(happened.iter().filter(|yes| !**yes).count() > 10);
    assert!(happened.iter().filter(|yes| **yes).count() > 5);
}

#[test]
fn who_settles_may_die_at_any_store_too() {
    for at in 0..=stores() {
        for second in 0.. {
            let (m, _) = history(at);
            let before = log(&m).last().unwrap();
            let ended = dies_after(second, || log(&m).settle(A));
            let outcome = log(&m).settle(A).unwrap();
            assert_eq!(outcome, before);
            assert_eq!(value(&m), Some(if outcome.happened { 30 } else { 20 }));
            change(&m, B, 40).unwrap();
            assert_eq!(value(&m), Some(40));
            if matches!(ended, Ended::Completed(_)) {
                break;
            }
        }
    }
}

#[test]
fn the_next_owner_may_die_at_any_store_as_well() {
    for at in 0..=stores() {
        for second in 0.. {
            let (m, _) = history(at);
            let first = log(&m).settle(A).unwrap();
            let ended = dies_after(second, || change(&m, B, 40));
            // Until B's record is begun, A's outcome is still told.
            let outcome = log(&m).settle(B).unwrap();
            let last = log(&m).last().unwrap();
            match outcome.seq {
                0 => assert_eq!(last, first),
                _ => assert_eq!((outcome, outcome.seq), (last, first.seq + 1)),
            }
            let expected = match (outcome.happened, first.happened) {
                (true, _) => 40,
                (false, true) => 30,
                (false, false) => 20,
            };
            assert_eq!(value(&m), Some(expected));
            if ended == Ended::Completed(Ok(())) {
                assert!(outcome.happened);
                break;
            }
        }
    }
}

#[test]
fn any_corrupt_word_is_named_or_means_nothing() {
    let mut random = Random(9);
    let stores = stores();
    let mut named = 0;
    for at in 0..=stores {
        let (m, _) = history(at);
        let torn = snapshot(&m);
        let expected = log(&m).last().unwrap();
        log(&m).settle(A).unwrap();
        let whole = data(&m);
        for n in 0..log_size(ENTRIES) / 8 {
            let place = LOG + n * 8;
            m.copy_in(0, &torn).unwrap();
            let right = word(&m, place);
            let wrongs = [
                0,
                right.wrapping_add(1),
                right.wrapping_sub(1),
                !right,
                right ^ 1 << random.below(64),
                right.rotate_right(32),
                DATA + 8,
                random.next(),
            ];
            for wrong in wrongs {
                m.copy_in(0, &torn).unwrap();
                // A number that becomes what it just was, or is about to be, is one that was not
                // stored yet, or already: no log can tell. (3 was given up: 2, then 4.)
                let is_other_moment = match n as usize {
                    BEGUN => (2..=4).contains(&wrong),
                    COMMITTED | RETIRED => wrong == 2 || wrong == 4,
                    _ => false,
                };
                if wrong == right || is_other_moment {
                    continue;
                }
                put(&m, place, wrong);
                let before = data(&m);
                match log(&m).settle(A) {
                    Err(LogError::Corrupt { at, .. }) => {
                        assert!((LOG..LOG + log_size(ENTRIES)).contains(&at));
                        assert_eq!(data(&m), before, "applied in part");
                        named += 1;
                    }
                    Err(error) => panic!("{at} {n} {wrong:#x}: {error}"),
                    Ok(outcome) => {
                        let told = Outcome {
                            locks: expected.locks,
                            ..outcome
                        };
                        assert_eq!(told, expected, "{at} {n} {right:#x} {wrong:#x}");
                        assert_eq!(data(&m), whole, "{at} {n} {right:#x} {wrong:#x}");
                    }
                }
                // Whatever it is, nobody panics and nobody makes it worse.
                let _ = change(&m, B, 40);
                let _ = log(&m).last();
            }
        }
    }
    assert!(named > 2000, "{named}");
}

#[test]
fn a_sealed_record_with_an_impossible_offset_is_refused_whole() {
    for (wrong, n) in [
        (LEN, 2),
        (u64::MAX - 7, 3),
        (DATA + 4, 1),
        (LOG + 8, 0),
        (LOG, 3),
    ] {
        let m = memory();
        // Dies right after the commit, before anything is applied.
        let (_, apply) = count(|| change(&memory(), A, 10).unwrap());
        let _ = dies_after(apply - 5, || change(&m, A, 10));
        assert_eq!(
            (value(&m), log(&m).last().unwrap().happened),
            (Some(0), true)
        );
        // As if that owner had sealed it itself.
        let view = log(&m);
        fill64(&view.words[entry(n)], wrong);
        let state = view.state().unwrap();
        let intent = view.intent(state).unwrap();
        let seal = Seal {
            payload_sum: payload_sum(view.words, 4),
            ..view.seal(&intent).unwrap()
        };
        seal.write(view.words, 1, intent.sum());
        let at = LOG + entry(n) as u64 * 8;
        let corrupt = LogError::Corrupt {
            at,
            field: "entry's offset",
            found: wrong,
        };
        assert_eq!(view.settle(A), Err(corrupt));
        assert_eq!(value(&m), Some(0));
        // A length beyond the log, likewise.
        let seal = Seal {
            length: u64::from(ENTRIES) + 1,
            ..seal
        };
        seal.write(view.words, 1, intent.sum());
        let error = view.settle(A).unwrap_err();
        assert!(matches!(
            error,
            LogError::Corrupt {
                field: "length",
                found: 7,
                ..
            }
        ));
        assert_eq!(value(&m), Some(0));
    }
}

#[test]
fn a_record_sees_its_own_words() {
    let mut random = Random(4);
    let m = memory();
    let mut model: HashMap<u64, u64> = HashMap::new();
    for _ in 0..2000 {
        let mut record = log(&m).begin(A, 0, 0).unwrap();
        let mut own = model.clone();
        let mut entries = HashSet::new();
        for _ in 0..random.below(12) {
            let at = DATA + random.below(10) * 8;
            assert_eq!(record.get(at), Ok(own.get(&at).copied().unwrap_or(0)));
            let value = random.next();
            let is_full = entries.len() as u32 == ENTRIES && !entries.contains(&at);
            let result = record.set(at, value);
            if is_full {
                assert_eq!(result, Err(LogError::Full { entries: ENTRIES }));
            } else {
                assert_eq!(result, Ok(()));
                own.insert(at, value);
                entries.insert(at);
            }
            assert_eq!(record.room(), ENTRIES - entries.len() as u32);
            assert_eq!(word(&m, at), model.get(&at).copied().unwrap_or(0));
        }
        if random.below(3) > 0 {
            record.commit(0).unwrap();
            model = own;
        }
        for n in 0..10 {
            let at = DATA + n * 8;
            assert_eq!(word(&m, at), model.get(&at).copied().unwrap_or(0));
        }
    }
}

#[test]
fn sequence_numbers_never_repeat() {
    let m = memory();
    let mut seen = HashSet::new();
    for n in 0..40 {
        let mut began = None;
        let _ = dies_after(n, || {
            let record = log(&m).begin(A, 0, 0).unwrap();
            began = Some(record.seq());
            record.commit(0)
        });
        assert!(began.is_none_or(|seq| seen.insert(seq)));
        log(&m).settle(A).unwrap();
    }
    assert!(seen.len() > 20);
}

#[test]
fn locks_are_noted_for_the_record_that_took_them() {
    let m = memory();
    for used in [9u64, 3, 0, 7, 8, 1] {
        let mut record = log(&m).begin(A, 0, 0).unwrap();
        for lock in 1..=used {
            record.intend(lock * 64);
            if lock % 2 == 0 {
                record.held(lock * 64);
            }
        }
        drop(record);
        let outcome = log(&m).settle(A).unwrap();
        let max = MAX_LOCKS as u64;
        let kept = if used > max { max - 1 } else { used };
        let expected: Vec<_> = (1..=kept).map(|lock| (lock * 64, lock % 2 == 0)).collect();
        assert_eq!(outcome.locks.iter().collect::<Vec<_>>(), expected);
        assert_eq!(outcome.locks.are_cut(), used > max);
        // The other head in between.
        log(&m).begin(A, 0, 0).unwrap().commit(0).unwrap();
    }
    // A death while notes are cleared leaves none behind a gap.
    for at in 0..20 {
        let m = memory();
        let mut record = log(&m).begin(A, 0, 0).unwrap();
        (1..=7).for_each(|lock| record.held(lock * 64));
        record.commit(0).unwrap();
        log(&m).begin(A, 0, 0).unwrap().commit(0).unwrap();
        let _ = dies_after(at, || log(&m).begin(A, 0, 0).map(drop));
        let mut record = log(&m).begin(A, 0, 0).unwrap();
        if record.seq() == 4 {
            record = log(&m).begin(A, 0, 0).unwrap();
        }
        assert_eq!(log(&m).last().unwrap().locks.iter().count(), 0, "{at}");
        record.held(64);
        drop(record);
        assert_eq!(log(&m).last().unwrap().locks.iter().count(), 1, "{at}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let m = memory();
    for (at, entries) in [
        (8, 1),
        (32, 1),
        (LEN, 1),
        (LEN - 64, 1),
        (0, 65_536),
        (u64::MAX - 63, 1),
    ] {
        let error = Log::new(&m, at, entries).unwrap_err();
        assert!(matches!(error, LogError::Place { .. }), "{error}");
    }
    for entries in [0, MAX_ENTRIES + 1, u32::MAX] {
        assert_eq!(
            Log::new(&m, 0, entries).unwrap_err(),
            LogError::Entries(entries)
        );
    }
    for nobody in [
        InstanceId::NONE,
        InstanceId::new(1, 0),
        InstanceId::new(0, 1),
    ] {
        let error = log(&m).begin(nobody, 0, 0).unwrap_err();
        assert_eq!(error, LogError::NoInstance(nobody));
    }
    let mut record = log(&m).begin(A, 0, 0).unwrap();
    for at in [
        LEN,
        LEN - 4,
        u64::MAX,
        u64::MAX - 7,
        DATA + 1,
        LOG,
        DATA - 8,
    ] {
        let named = |error| matches!(error, LogError::Target { at: found, .. } if found == at);
        assert!(record.set(at, 1).is_err_and(named), "{at}");
        assert!(record.get(at).is_err_and(named), "{at}");
    }
    for at in [0, LOG - 8, DATA, LEN - 8] {
        record.set(at, at).unwrap();
    }
    record.commit(0).unwrap();
    assert_eq!(word(&m, LEN - 8), LEN - 8);
    // The last number there is.
    put(&m, LOG, u64::MAX);
    let error = log(&m).begin(A, 0, 0).unwrap_err();
    assert!(matches!(
        error,
        LogError::Corrupt {
            at: LOG,
            found: u64::MAX,
            ..
        }
    ));
}

#[test]
fn a_read_only_log_can_be_asked_but_not_written() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LEN).unwrap();
    let m = Mapping::new(&file, 0, LEN, Access::ReadWrite).unwrap();
    let (_, stores) = count(|| change(&memory(), A, 10).unwrap());
    let _ = dies_after(stores - 3, || change(&m, A, 10));
    let view = Mapping::new(&file, 0, LEN, Access::ReadOnly).unwrap();
    assert!(log(&view).last().unwrap().happened);
    let refused = LogError::ReadOnly { at: LOG };
    assert_eq!(log(&view).settle(A), Err(refused));
    assert_eq!(log(&view).begin(A, 0, 0).unwrap_err(), refused);
    log(&m).settle(A).unwrap();
    assert!(log(&view).settle(A).unwrap().happened);
    assert_eq!(value(&view), Some(10));
}
