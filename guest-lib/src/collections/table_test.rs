use super::super::test_support::{A, B, C, Random, all_but, memory};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;
use std::collections::HashSet;
use std::sync::RwLock;
use std::sync::atomic::AtomicU32;

const SPEC: TableSpec = TableSpec {
    cells: 3,
    bytes: 20,
};

fn table<'m>(memory: &'m Mapping, spec: &TableSpec) -> Table<'m> {
    Table::create(memory, 0, spec, A, &all_but(&[])).unwrap()
}

fn result_of(cell: u32) -> Vec<u8> {
    vec![cell as u8 + 1; 1 + cell as usize * 7]
}

fn work(table: &Table<'_>, me: InstanceId, dead: &[InstanceId]) {
    for claim in table.claims(me, &all_but(dead)) {
        let claim = claim.unwrap();
        let result = result_of(claim.cell());
        claim.commit(&result).unwrap();
    }
}

fn check(table: &Table<'_>) {
    assert!(table.progress().unwrap().is_complete());
    for (number, found) in table.iter().enumerate() {
        let (cell, bytes) = found.unwrap();
        assert_eq!((cell, bytes), (number as u32, result_of(cell)));
    }
}

#[test]
fn creation_is_taken_over_after_a_death_at_any_store() {
    let create = |memory: &Mapping, me: InstanceId, dead: &[InstanceId]| {
        Table::create(memory, 64, &SPEC, me, &all_but(dead)).map(drop)
    };
    let (_, stores) = count(|| create(&memory(4096), A, &[]).unwrap());
    for at in 0..stores {
        let memory = memory(4096);
        let ended = dies_after(at, || create(&memory, A, &[]));
        assert!(matches!(ended, Ended::Died));
        let open = |dead: &[InstanceId]| {
            Table::open(&memory, 64, &all_but(dead), Duration::from_millis(1))
        };
        if at > 0 {
            let error = open(&[]).unwrap_err();
            assert!(matches!(error, CollectionError::BeingCreated(A)));
            let error = create(&memory, B, &[]).unwrap_err();
            assert!(matches!(error, CollectionError::BeingCreated(A)));
        }
        create(&memory, B, &[A]).unwrap();
        let table = open(&[A]).unwrap();
        assert_eq!(table.spec(), SPEC);
        work(&table, C, &[A]);
        check(&table);
    }
}

#[test]
fn two_workers_may_die_anywhere_and_every_cell_is_committed_once() {
    let fresh = memory(4096);
    let prepared = table(&fresh, &SPEC);
    let (_, stores) = count(|| work(&prepared, A, &[]));
    for first in 0..=stores {
        for second in 0..=stores {
            let memory = memory(4096);
            let table = table(&memory, &SPEC);
            let _ = dies_after(first, || work(&table, A, &[]));
            let done: Vec<_> = table.iter().map(|found| found.unwrap().0).collect();
            let _ = dies_after(second, || work(&table, B, &[A]));
            for cell in done {
                let claim = table.claim(cell, C, &all_but(&[A, B])).unwrap();
                assert!(matches!(claim, Claim::Done(A)), "{claim:?}");
            }
            work(&table, C, &[A, B]);
            check(&table);
        }
    }
}

#[test]
fn a_claim_is_exclusive_and_can_be_given_back() {
    let memory = memory(4096);
    let table = table(&memory, &SPEC);
    let judge = all_but(&[]);
    let Claim::Mine(claimed) = table.claim(0, A, &judge).unwrap() else {
        panic!("the table is new")
    };
    assert!(matches!(
        table.claim(0, B, &judge).unwrap(),
        Claim::Theirs(A)
    ));
    let cells: Vec<_> = table
        .claims(B, &judge)
        .map(|claim| claim.unwrap().cell())
        .take(4)
        .collect();
    assert_eq!(cells, [1, 2, 1, 2], "dropped claims come again");
    drop(claimed);
    let Claim::Mine(claimed) = table.claim(0, B, &judge).unwrap() else {
        panic!("it was given back")
    };
    let error = claimed.commit(&[0; 21]).unwrap_err();
    assert!(matches!(error, CollectionError::Spec { value: 21, .. }));
    let Claim::Mine(zombie) = table.claim(0, A, &judge).unwrap() else {
        panic!("a result that is too long gives the cell back")
    };
    let Claim::Mine(claimed) = table.claim(0, B, &all_but(&[A])).unwrap() else {
        panic!("A is dead")
    };
    let error = zombie.commit(b"late").unwrap_err();
    assert!(matches!(error, CollectionError::Lost(A)));
    claimed.commit(b"").unwrap();
    assert_eq!(table.get(0).unwrap().unwrap(), b"");
    assert!(table.get(1).unwrap().is_none());
    assert!(table.get(3).is_err());
}

#[test]
fn a_damaged_result_is_named() {
    let memory = memory(4096);
    let table = table(&memory, &SPEC);
    work(&table, A, &[]);
    let (at, line) = table.line(1).unwrap();
    store64(&line.len, 1 << 40, Ordering::Relaxed);
    let error = table.get(1).unwrap_err();
    assert!(matches!(error, CollectionError::Damaged { at: a, .. } if a == at));
    store64(&line.len, 7, Ordering::Relaxed);
    let error = table.get(1).unwrap_err();
    assert!(matches!(error, CollectionError::Damaged { at: a, .. } if a == at));
}

#[test]
fn each_cell_counts_once_under_many_deaths() {
    for round in 0..10u64 {
        let memory = memory(1 << 16);
        let spec = TableSpec {
            cells: 300,
            bytes: 40,
        };
        let table = table(&memory, &spec);
        let dead = RwLock::new(HashSet::new());
        let judge = |instance: InstanceId| !dead.read().unwrap().contains(&instance);
        let (commits, deaths) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for id in 1..=3u32 {
                let (judge, dead, table) = (&judge, &dead, &table);
                let (commits, deaths) = (&commits, &deaths);
                scope.spawn(move || {
                    let mut random = Random::new(round * 3 + u64::from(id));
                    for generation in 1.. {
                        let me = InstanceId::new(id, generation);
                        let ended = dies_after(random.below(150), || {
                            for claim in table.claims(me, judge) {
                                let claim = claim.unwrap();
                                claim.commit(&me.word().to_le_bytes()).unwrap();
                                commits.fetch_add(1, Ordering::Relaxed);
                            }
                        });
                        if ended == Ended::Completed(()) && table.progress().unwrap().is_complete()
                        {
                            return;
                        }
                        dead.write().unwrap().insert(me);
                        deaths.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(commits.load(Ordering::Relaxed), 300);
        for found in table.iter() {
            let (cell, bytes) = found.unwrap();
            let committer = load64(&table.line(cell).unwrap().1.commit, Ordering::Relaxed);
            assert_eq!(bytes, committer.to_le_bytes());
        }
        assert!(deaths.load(Ordering::Relaxed) > 5);
    }
}
