use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use std::fs::File;

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const LOG: u64 = 64;
const ENTRIES: u32 = 6;
/// The words that the tests change.
const DATA: u64 = LOG + log_size(ENTRIES);
const LEN: u64 = 4096;

fn memory() -> Mapping {
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(LEN).unwrap();
    Mapping::new(&file, 0, LEN, Access::ReadWrite).unwrap()
}

fn log(memory: &Mapping) -> Log<'_> {
    Log::new(memory, LOG, ENTRIES).unwrap()
}

fn word(memory: &Mapping, n: u64) -> u64 {
    load64(memory.get(DATA + n * 8).unwrap(), Ordering::Relaxed)
}

/// Words 0..4 become `value`, value + 1, ...; all of them or none.
fn change(memory: &Mapping, owner: InstanceId, value: u64) -> Result<(), LogError> {
    let mut record = log(memory).begin(owner, 7, value)?;
    record.intend(0x1000);
    record.held(0x1000);
    for n in 0..4 {
        record.set(DATA + n * 8, value + n)?;
    }
    record.commit(value * 2)
}

fn value(memory: &Mapping) -> Result<u64, String> {
    let words: Vec<u64> = (0..4).map(|n| word(memory, n)).collect();
    if words == [0; 4] {
        return Ok(0);
    }
    match (0..4).all(|n| words[n as usize] == words[0] + n) {
        true => Ok(words[0]),
        false => Err(format!("half changed: {words:?}")),
    }
}

#[test]
fn a_record_is_applied_and_told() {
    let m = memory();
    for value in [10, 20, 30] {
        change(&m, A, value).unwrap();
        assert_eq!(super::log_test::value(&m), Ok(value));
        let last = log(&m).last().unwrap();
        assert_eq!((last.owner, last.kind, last.tag), (A, 7, value));
        assert_eq!((last.happened, last.result), (true, value * 2));
        assert_eq!(last.locks.iter().collect::<Vec<_>>(), [(0x1000, true)]);
        assert_eq!(log(&m).settle(A), Ok(last));
    }
}

#[test]
fn after_a_death_at_any_store_it_happened_or_not() {
    let ((), stores) = count(|| change(&memory(), A, 10).unwrap());
    for at in 0..=stores {
        let m = memory();
        let ended = dies_after(at, || change(&m, A, 10));
        assert_eq!(ended == Ended::Completed(Ok(())), at == stores);
        let outcome = log(&m).settle(A).unwrap();
        assert_eq!(value(&m), Ok(if outcome.happened { 10 } else { 0 }));
        change(&m, B, 20).unwrap();
        assert_eq!(value(&m), Ok(20));
    }
}
