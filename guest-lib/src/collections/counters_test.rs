use super::super::test_support::{A, B, C, Random, all_but, memory};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use std::collections::HashSet;
use std::sync::RwLock;

const SPEC: CountersSpec = CountersSpec {
    counters: 2,
    shards: 4,
};

fn create(memory: &Mapping, me: InstanceId, dead: &[InstanceId]) -> Result<(), CollectionError> {
    Counters::create(memory, 0, &SPEC, me, &all_but(dead)).map(drop)
}

fn open<'m>(memory: &'m Mapping, dead: &[InstanceId]) -> Result<Counters<'m>, CollectionError> {
    Counters::open(memory, 0, &all_but(dead), Duration::ZERO)
}

#[test]
fn creation_is_taken_over_after_a_death_at_any_store() {
    let (_, stores) = count(|| create(&memory(4096), A, &[]).unwrap());
    for first in 0..=stores {
        for second in 0..=stores {
            let memory = memory(4096);
            let first_ended = dies_after(first, || create(&memory, A, &[]).unwrap());
            let opened = open(&memory, &[A]);
            match first {
                0 => assert!(matches!(opened, Err(CollectionError::Absent(_)))),
                _ if first < stores => {
                    assert!(matches!(opened, Err(CollectionError::Unfinished(A))));
                }
                _ => assert!(opened.is_ok() && first_ended == Ended::Completed(())),
            }
            let again = dies_after(second, || create(&memory, B, &[A]));
            if first == stores {
                assert!(matches!(
                    again,
                    Ended::Completed(Err(CollectionError::Exists(_)))
                ));
            }
            match create(&memory, C, &[A, B]) {
                Ok(()) => assert!(first < stores && second < stores),
                Err(CollectionError::Exists(_)) => assert!(first == stores || second == stores),
                Err(error) => panic!("{error}"),
            }
            let counters = open(&memory, &[A, B]).unwrap();
            let mut shard = counters.join(C, &all_but(&[A, B])).unwrap();
            shard.add(1, 3).unwrap();
            assert_eq!((counters.sum(0).unwrap(), counters.sum(1).unwrap()), (0, 3));
        }
    }
}

#[test]
fn an_addition_happens_or_not_and_its_ticket_says_which() {
    let add = |memory: &Mapping, me: InstanceId, dead: &[InstanceId]| {
        let counters = open(memory, dead).unwrap();
        let mut shard = counters.join(me, &all_but(dead)).unwrap();
        for ticket in [5, 6, 9] {
            shard.add_once(0, ticket, 10 * ticket).unwrap();
        }
    };
    let prepared = || {
        let memory = memory(4096);
        create(&memory, A, &[]).unwrap();
        memory
    };
    let sum_up_to = |last| {
        (
            10 * [5, 6, 9].iter().filter(|t| **t <= last).sum::<u64>(),
            last,
        )
    };
    let fresh = prepared();
    let (_, stores) = count(|| add(&fresh, A, &[]));
    assert_eq!(stores, 7);
    let a2 = InstanceId::new(A.id(), 2);
    let a3 = InstanceId::new(A.id(), 3);
    for first in 0..=stores {
        for second in 0..=stores {
            let memory = prepared();
            let _ = dies_after(first, || add(&memory, A, &[]));
            let counters = open(&memory, &[A]).unwrap();
            let last = counters.last(0, A.id()).unwrap();
            assert_eq!((counters.sum(0).unwrap(), last), sum_up_to(last));
            let _ = dies_after(second, || add(&memory, a2, &[A]));
            let last = counters.last(0, A.id()).unwrap();
            assert_eq!((counters.sum(0).unwrap(), last), sum_up_to(last));
            add(&memory, a3, &[A, a2]);
            add(&memory, B, &[A, a2]);
            assert_eq!(counters.sum(0).unwrap(), 2 * 200, "{first} {second}");
        }
    }
}

#[test]
fn a_shard_belongs_to_one_living_life_of_its_id() {
    let memory = memory(4096);
    create(&memory, A, &[]).unwrap();
    let counters = open(&memory, &[]).unwrap();
    let judge = all_but(&[]);
    counters.join(A, &judge).unwrap().add(0, 1).unwrap();
    let a2 = InstanceId::new(A.id(), 2);
    assert!(matches!(
        counters.join(a2, &judge),
        Err(CollectionError::InUse { holder: A, .. })
    ));
    counters
        .join(a2, &all_but(&[A]))
        .unwrap()
        .add(0, 1)
        .unwrap();
    assert_eq!(counters.last(0, A.id()).unwrap(), 2);
    for id in 2..=4 {
        counters.join(InstanceId::new(id, 1), &judge).unwrap();
    }
    let full = counters.join(InstanceId::new(5, 1), &judge);
    assert!(matches!(
        full,
        Err(CollectionError::Full { capacity: 4, .. })
    ));
    assert!(counters.join(InstanceId::NONE, &judge).is_err());
    assert!(counters.sum(2).is_err());
    assert_eq!(counters.sum(0).unwrap(), 2);
}

#[test]
fn a_damaged_cell_is_named() {
    let memory = memory(4096);
    create(&memory, A, &[]).unwrap();
    let counters = open(&memory, &[]).unwrap();
    counters.join(A, &all_but(&[])).unwrap().add(0, 1).unwrap();
    let (at, cell) = counters.cell(counters.at + HEADER, 0).unwrap();
    store64(&cell[0][1], 1, Ordering::Relaxed);
    let error = counters.sum(0).unwrap_err();
    assert!(matches!(error, CollectionError::Damaged { at: a, .. } if a == at));
    for word in 3..7u64 {
        let memory = self::memory(4096);
        create(&memory, A, &[]).unwrap();
        let cell: &AtomicU64 = memory.get(word * 8).unwrap();
        store64(cell, 77, Ordering::Relaxed);
        assert!(matches!(
            open(&memory, &[]),
            Err(CollectionError::Damaged { .. })
        ));
    }
}

/// Threads that die at random stores, redo their work under the next life, and a reader that
/// never sees a sum that cannot be.
#[test]
fn every_ticket_counts_once_under_many_deaths() {
    const TICKETS: u64 = 3000;
    let memory = memory(4096);
    create(&memory, A, &[]).unwrap();
    let dead = RwLock::new(HashSet::new());
    let judge = |instance: InstanceId| !dead.read().unwrap().contains(&instance);
    let counters = open(&memory, &[]).unwrap();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=3u32)
            .map(|id| {
                let (judge, dead) = (&judge, &dead);
                scope.spawn(move || {
                    let mut random = Random::new(id.into());
                    for generation in 1.. {
                        let me = InstanceId::new(id, generation);
                        let ended = dies_after(random.below(200), || {
                            let mut shard = counters.join(me, judge).unwrap();
                            for ticket in shard.last(0).unwrap() + 1..=TICKETS {
                                assert!(shard.add_once(0, ticket, 7).unwrap());
                                assert!(!shard.add_once(0, ticket, 7).unwrap());
                            }
                        });
                        if ended == Ended::Completed(()) {
                            assert!(generation > 3);
                            return;
                        }
                        dead.write().unwrap().insert(me);
                    }
                })
            })
            .collect();
        let mut before = 0;
        while workers.iter().any(|worker| !worker.is_finished()) {
            let sum = counters.sum(0).unwrap();
            assert!(sum.is_multiple_of(7) && sum >= before);
            before = sum;
        }
    });
    assert_eq!(counters.sum(0).unwrap(), 3 * 7 * TICKETS);
}
