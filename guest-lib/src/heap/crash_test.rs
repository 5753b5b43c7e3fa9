//! Every operation, ended before every one of its stores, and its settlement likewise.

use super::heap_test::{A, B, all_but, memory, word};
use super::*;
use crate::mem::crash::{Ended, dies_after};
use lupin_abi::InstanceId;
use std::time::Duration;

const C: InstanceId = InstanceId::new(3, 1);
const D: InstanceId = InstanceId::new(4, 1);
const BYTES: u64 = 600 << 10;
const SPEC: HeapSpec = HeapSpec { participants: 4 };
const TAG: u64 = 77;

/// One operation in one state of the heap.
struct Scenario {
    name: &'static str,
    /// Brings the heap into the state; A does what is to be done as A, D as another.
    prepare: fn(&mut Party<'_>, &mut Party<'_>),
    run: fn(&mut Party<'_>) -> Result<(), HeapError>,
    oracle: Oracle,
}

#[derive(Clone, Copy, PartialEq)]
enum Oracle {
    /// Root 0 owns a block exactly if the outcome says so.
    Alloc,
    /// Root 0 is null exactly if the outcome says so.
    Free,
    /// Nothing is left but what the state had.
    Nothing,
}

type Party<'m> = Participant<'m, fn(InstanceId) -> bool>;

fn everybody(instance: InstanceId) -> bool {
    instance.generation() != 0
}

fn root(p: &Party<'_>, index: u32) -> u64 {
    p.heap().root(index).unwrap()
}

fn fill(p: &mut Party<'_>, bytes: u64, but: u32) {
    let (mut index, mut full) = (1, false);
    while !full {
        full = p.alloc_into(root(p, index), bytes).is_err();
        index += 1;
    }
    for index in index - 1 - but..index - 1 {
        p.free_from(root(p, index)).unwrap();
    }
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "alloc, the first slab of its class",
        prepare: |_, _| {},
        run: |a| a.alloc_into(root(a, 0), 16 << 10).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, the first slab with words of its own",
        prepare: |_, _| {},
        run: |a| a.alloc_into(root(a, 0), 896).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, from a slab that has blocks",
        prepare: |a, _| _ = a.alloc_into(root(a, 1), 64).unwrap(),
        run: |a| a.alloc_into(root(a, 0), 64).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, a block that lived before",
        prepare: |a, _| {
            for _ in 0..3 {
                a.alloc_into(root(a, 1), 64).unwrap();
                a.free_from(root(a, 1)).unwrap();
            }
        },
        run: |a| a.alloc_into(root(a, 0), 64).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, a block that another freed",
        prepare: |a, d| {
            for index in 1..=2 {
                a.alloc_into(root(a, index), 32 << 10).unwrap();
            }
            d.free_from(root(a, 1)).unwrap();
        },
        run: |a| a.alloc_into(root(a, 0), 32 << 10).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, when nothing is left",
        prepare: |a, _| fill(a, 32 << 10, 0),
        run: |a| match a.alloc_into(root(a, 0), 32 << 10) {
            Err(HeapError::OutOfMemory { .. }) => Ok(()),
            other => panic!("{other:?}"),
        },
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, when only another class has an empty slab",
        prepare: |a, _| {
            fill(a, 32 << 10, 2);
            let free = (1..ROOTS)
                .find(|n| word(a.memory(), root(a, *n)) == 0)
                .unwrap();
            a.alloc_into(root(a, free), 16 << 10).unwrap();
            a.free_from(root(a, free)).unwrap();
        },
        run: |a| a.alloc_into(root(a, 0), 8 << 10).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "free, one of many",
        prepare: |a, _| {
            a.alloc_into(root(a, 0), 64).unwrap();
            a.alloc_into(root(a, 1), 64).unwrap();
        },
        run: |a| a.free_from(root(a, 0)),
        oracle: Oracle::Free,
    },
    Scenario {
        name: "free, the last block of a slab that is not needed",
        prepare: |a, _| {
            for index in [0, 1, 2, 3, 4] {
                a.alloc_into(root(a, index), 32 << 10).unwrap();
            }
            for index in [2, 3, 1] {
                a.free_from(root(a, index)).unwrap();
            }
        },
        run: |a| a.free_from(root(a, 0)),
        oracle: Oracle::Free,
    },
    Scenario {
        name: "free, a block of another's slab",
        prepare: |_, d| {
            d.alloc_into(root(d, 0), 64).unwrap();
            d.alloc_into(root(d, 1), 64).unwrap();
        },
        run: |a| a.free_from(root(a, 0)),
        oracle: Oracle::Free,
    },
    Scenario {
        name: "alloc, a run of spans",
        prepare: |a, _| _ = a.alloc_into(root(a, 1), 64).unwrap(),
        run: |a| a.alloc_into(root(a, 0), 200_000).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "alloc, a run for which slabs must be given back",
        prepare: |a, _| {
            for index in 1..9 {
                a.alloc_into(root(a, index), 16 << 10 << (index % 2))
                    .unwrap();
            }
            for index in 1..9 {
                a.free_from(root(a, index)).unwrap();
            }
        },
        run: |a| a.alloc_into(root(a, 0), a.heap().largest_block()).map(drop),
        oracle: Oracle::Alloc,
    },
    Scenario {
        name: "free, a run of spans",
        prepare: |_, d| _ = d.alloc_into(root(d, 0), 200_000).unwrap(),
        run: |a| a.free_from(root(a, 0)),
        oracle: Oracle::Free,
    },
    Scenario {
        name: "alloc into holds",
        prepare: |_, d| _ = d.alloc_into(d.hold(0), 24).unwrap(),
        run: |a| {
            a.alloc_into(a.hold(0), 2048)?;
            a.alloc_into(a.hold(1), 70_000)?;
            a.free_from(a.hold(0))?;
            a.alloc_into(a.hold(2), 2048).map(drop)
        },
        oracle: Oracle::Nothing,
    },
    Scenario {
        name: "a chore after an operation",
        prepare: |a, _| {
            a.alloc_into(root(a, 1), 48).unwrap();
            a.alloc_into(root(a, 2), 70_000).unwrap();
        },
        run: |a| {
            a.alloc_into(root(a, 0), 48)?;
            a.free_chore_from(root(a, 1))?;
            a.free_chore_from(root(a, 2))
        },
        oracle: Oracle::Alloc,
    },
];

/// Lets A run the scenario up to a store, and never be heard of again.
fn run<'m>(scenario: &Scenario, memory: &'m Mapping, stores: u64) -> (Heap<'m>, bool) {
    let judge = everybody as fn(InstanceId) -> bool;
    let heap = Heap::create(memory, &SPEC, A, &judge).unwrap();
    let mut d = heap.join(D, judge).unwrap();
    let mut a = heap.join(A, judge).unwrap();
    (scenario.prepare)(&mut a, &mut d);
    a.tag(TAG);
    let ended = dies_after(stores, || (scenario.run)(&mut a).unwrap());
    core::mem::forget((a, d));
    (heap, ended == Ended::Died)
}

fn recover(heap: &Heap<'_>, me: InstanceId, dead: &[InstanceId]) {
    heap.recover(me, &all_but(dead)).unwrap();
}

fn check(scenario: &Scenario, heap: &Heap<'_>, dead: &[InstanceId], context: &str) {
    let context = format!("{}, {context}", scenario.name);
    let audit = heap.audit_with([]).unwrap();
    assert!(audit.is_clean(), "{context}: {audit:?}");
    let outcome = heap.outcome_of(A).expect("settled");
    let happened = outcome.tag == TAG && outcome.happened;
    let owned = word(heap.memory(), heap.root(0).unwrap());
    match scenario.oracle {
        Oracle::Alloc => {
            assert_eq!(happened, owned != 0, "{context}: {outcome:?}");
            assert_eq!(outcome.kind == KIND_ALLOC && happened, happened);
            assert_eq!(outcome.result * u64::from(happened), owned, "{context}");
        }
        Oracle::Free => {
            assert_eq!(happened, owned == 0, "{context}: {outcome:?}");
            assert!(!happened || outcome.kind == KIND_FREE, "{context}");
        }
        Oracle::Nothing => {}
    }
    go_on(heap, dead, &context);
}

/// Survivors can use every byte that is not in use, and free what the dead allocated.
fn go_on(heap: &Heap<'_>, dead: &[InstanceId], context: &str) {
    let judge = all_but(dead);
    let me = InstanceId::new(9, 1);
    let mut p = heap.join(me, &judge).unwrap();
    for index in 0..ROOTS {
        let slot = heap.root(index).unwrap();
        if word(heap.memory(), slot) != 0 {
            p.free_from(slot).unwrap();
        }
    }
    for bytes in [64, 900, 16 << 10, 32 << 10, 100_000] {
        let slot = heap.root(0).unwrap();
        p.alloc_into(slot, bytes).unwrap();
        p.free_from(slot).unwrap();
    }
    p.leave().unwrap();
    let audit = heap.audit_with([]).unwrap();
    assert!(audit.is_clean(), "{context}: {audit:?}");
    // D lives and may hold one block and some slabs.
    let held = usize::from(context.contains("holds"));
    assert_eq!(audit.live_blocks as usize, held, "{context}");
    let all_dead = [dead, &[D]].concat();
    let judge = all_but(&all_dead);
    let mut p = heap.join(me, &judge).unwrap();
    let slot = heap.root(0).unwrap();
    p.alloc_into(slot, heap.largest_block()).unwrap();
    p.free_from(slot).unwrap();
    p.leave().unwrap();
    let audit = heap.audit_with([]).unwrap();
    assert_eq!(audit.free_spans, audit.spans, "{context}: {audit:?}");
}

#[test]
fn a_death_at_any_store_neither_leaks_nor_shares() {
    for scenario in SCENARIOS {
        for at in 0.. {
            let memory = memory(BYTES);
            let (heap, died) = run(scenario, &memory, at);
            recover(&heap, B, &[A]);
            check(scenario, &heap, &[A], &format!("death before store {at}"));
            if !died {
                break;
            }
        }
    }
}

#[test]
fn the_survivor_that_settles_may_die_at_any_store_too() {
    for scenario in SCENARIOS {
        // Most of the stores of the long ones set the words of a new slab.
        for first in (0..40).chain((40..).step_by(7)) {
            let mut died = true;
            for second in 0.. {
                let memory = memory(BYTES);
                let heap;
                (heap, died) = run(scenario, &memory, first);
                let ended = dies_after(second, || recover(&heap, B, &[A]));
                recover(&heap, C, &[A, B]);
                let context = format!("deaths before stores {first} and {second}");
                check(scenario, &heap, &[A, B], &context);
                if ended == Ended::Completed(()) {
                    break;
                }
            }
            if !died {
                break;
            }
        }
    }
}

fn create_for(memory: &Mapping, participants: u32) -> Heap<'_> {
    let judge = everybody as fn(InstanceId) -> bool;
    Heap::create(memory, &HeapSpec { participants }, A, &judge).unwrap()
}

/// A creates, dies; B creates, dies; C creates.
#[test]
fn a_heap_survives_the_deaths_of_its_creators() {
    let shapes = [SPEC, HeapSpec { participants: 2 }];
    for spec in shapes {
        for first in 0.. {
            let mut died = Ended::Died;
            for second in 0.. {
                let memory = memory(300 << 10);
                died = dies_after(first, || {
                    Heap::create(&memory, &spec, A, &all_but(&[])).unwrap();
                });
                let ended = dies_after(second, || {
                    match Heap::create(&memory, &SPEC, B, &all_but(&[A])) {
                        Ok(_) | Err(HeapError::Exists) => {}
                        Err(error) => panic!("{error}"),
                    }
                });
                let judge = all_but(&[A, B]);
                let open = || Heap::open(&memory, &judge, Duration::ZERO);
                let is_there = open().is_ok();
                match Heap::create(&memory, &SPEC, C, &judge) {
                    Ok(_) => assert!(!is_there),
                    Err(HeapError::Exists) => assert!(is_there),
                    Err(error) => panic!("{first} {second}: {error}"),
                }
                let heap = open().unwrap();
                let audit = heap.audit_with([]).unwrap();
                assert_eq!(audit.free_spans, audit.spans, "{first} {second}");
                let mut p = heap.join(C, &judge).unwrap();
                p.alloc_into(heap.root(0).unwrap(), 100).unwrap();
                p.free_from(heap.root(0).unwrap()).unwrap();
                drop(p);
                if ended == Ended::Completed(()) {
                    break;
                }
            }
            if died == Ended::Completed(()) {
                break;
            }
        }
    }
}

#[test]
fn nobody_takes_a_heap_from_a_living_creator_or_waits_for_ever() {
    let memory = memory(300 << 10);
    let everybody = all_but(&[]);
    let open = || Heap::open(&memory, &all_but(&[]), Duration::from_millis(5));
    let error = open().unwrap_err();
    assert!(
        matches!(error, HeapError::BeingCreated(InstanceId::NONE)),
        "{error}"
    );
    let _ = dies_after(8, || Heap::create(&memory, &SPEC, A, &everybody));
    let error = open().unwrap_err();
    assert!(matches!(error, HeapError::BeingCreated(A)), "{error}");
    let error = Heap::create(&memory, &SPEC, B, &everybody).unwrap_err();
    assert!(matches!(error, HeapError::BeingCreated(A)), "{error}");
    let error = Heap::open(&memory, &all_but(&[A]), Duration::ZERO).unwrap_err();
    assert!(matches!(error, HeapError::Unfinished(A)), "{error}");
    Heap::create(&memory, &SPEC, B, &all_but(&[A])).unwrap();
    let error = Heap::create(&memory, &SPEC, C, &all_but(&[A])).unwrap_err();
    assert!(matches!(error, HeapError::Exists), "{error}");
    open().unwrap();
}

/// Joining and leaving, with the place of a dead one to be settled on the way, which held two
/// blocks privately.
#[test]
fn a_death_while_joining_or_leaving_loses_no_place_and_no_block() {
    for first in 0.. {
        let mut died = Ended::Died;
        for second in 0.. {
            let memory = memory(BYTES);
            let judge = everybody as fn(InstanceId) -> bool;
            let spec = HeapSpec { participants: 1 };
            let heap = Heap::create(&memory, &spec, A, &judge).unwrap();
            let mut a = heap.join(A, judge).unwrap();
            a.alloc_into(a.hold(0), 1 << 10).unwrap();
            a.alloc_into(a.hold(15), 1 << 17).unwrap();
            a.alloc_into(heap.root(0).unwrap(), 1 << 10).unwrap();
            core::mem::forget(a);
            let stay = |me, dead: &[InstanceId]| {
                let mut p = heap.join(me, all_but(dead)).unwrap();
                p.alloc_into(p.hold(1), 1 << 10).unwrap();
                p.alloc_into(p.hold(2), 1 << 17).unwrap();
                p.leave().unwrap();
            };
            died = dies_after(first, || stay(B, &[A]));
            let ended = dies_after(second, || stay(C, &[A, B]));
            let dead = [A, B, C];
            let judge = all_but(&dead);
            let mut p = heap.join(D, &judge).unwrap();
            let audit = heap.audit_with([]).unwrap();
            assert!(audit.is_clean(), "{first} {second}: {audit:?}");
            assert_eq!(audit.live_blocks, 1, "{first} {second}: {audit:?}");
            let slot = heap.root(0).unwrap();
            p.free_from(slot).unwrap();
            p.alloc_into(slot, heap.largest_block()).unwrap();
            if let Ended::Completed(()) = ended {
                break;
            }
        }
        if let Ended::Completed(()) = died {
            break;
        }
    }
}

/// A dies in the middle of every operation in turn; B only wants the application's lock.
#[test]
fn whoever_takes_the_lock_of_a_dead_one_finds_its_record_settled() {
    for at in 0.. {
        let memory = memory(BYTES);
        let judge = everybody as fn(InstanceId) -> bool;
        let heap = Heap::create(&memory, &SPEC, A, &judge).unwrap();
        let (mut a, root) = (heap.join(A, judge).unwrap(), heap.root(0).unwrap());
        let lock = a.alloc_into(root, 128).unwrap();
        memory.copy_in(lock, &[0; 128]).unwrap();
        let (left, right) = (lock + 64, lock + 72);
        let change = |p: &mut Participant<'_, _>| {
            let guard = p.lock(lock).unwrap();
            let mut record = p.begin(7).unwrap();
            let next = record.get(left).unwrap() + 1;
            record.set(left, next).unwrap();
            record.set(right, next).unwrap();
            record.commit(next).unwrap();
            guard.unlock().unwrap();
        };
        a.tag(TAG);
        let ended = dies_after(at, || change(&mut a));
        core::mem::forget(a);
        let mut b = heap.join(B, all_but(&[A])).unwrap();
        let guard = b.lock(lock).unwrap();
        let value = word(&memory, left);
        assert_eq!(word(&memory, right), value, "death before store {at}");
        guard.unlock().unwrap();
        heap.recover(B, &all_but(&[A])).unwrap();
        let outcome = heap.outcome_of(A).unwrap();
        let happened = (outcome.kind, outcome.tag, outcome.happened) == (7, TAG, true);
        assert_eq!(happened, value == 1, "{outcome:?}");
        if ended == Ended::Completed(()) {
            assert!(happened);
            break;
        }
    }
}

/// Lives of one thread, each dead in an allocation; each is told apart, the last eight are
/// remembered, and a death while one is written down damages no other.
#[test]
fn the_outcomes_of_eight_lives_are_remembered() {
    let judge = everybody as fn(InstanceId) -> bool;
    for at in 0.. {
        let memory = memory(BYTES);
        let heap = Heap::create(&memory, &SPEC, A, &judge).unwrap();
        let life = |generation| InstanceId::new(1, generation);
        let mut expected = Vec::new();
        let mut ended = Ended::Died;
        for generation in 1..=9 {
            let mut p = heap.join(life(generation), judge).unwrap();
            let slot = heap.root(generation).unwrap();
            p.tag(generation.into());
            let _ = dies_after(u64::from(generation % 5), || p.alloc_into(slot, 1 << 10));
            core::mem::forget(p);
            let dead = [life(generation)];
            if generation == 9 {
                // The one that takes the line of the first.
                ended = dies_after(at, || recover(&heap, B, &dead));
                recover(&heap, C, &[life(9), B]);
            } else {
                recover(&heap, B, &dead);
            }
            let outcome = heap.outcome_of(life(generation)).unwrap();
            assert_eq!(outcome.owner, life(generation));
            assert_eq!(outcome.happened, word(&memory, slot) != 0, "{outcome:?}");
            expected.push(outcome);
            let first = heap.outcome_of(life(1));
            assert!(
                first.is_none_or(|first| first == expected[0]),
                "{at}: {first:?}"
            );
            for outcome in &expected[1..] {
                assert_eq!(heap.outcome_of(outcome.owner), Some(*outcome), "{at}");
            }
        }
        if ended == Ended::Completed(()) {
            break;
        }
    }
}

#[test]
fn a_pin_of_a_dead_one_is_gone_when_its_place_is_taken() {
    let memory = memory(BYTES);
    let heap = create_for(&memory, 1);
    let judge = everybody as fn(InstanceId) -> bool;
    let mut a = heap.join(A, judge).unwrap();
    core::mem::forget(a.pin());
    core::mem::forget(a);
    let b = heap.join(B, all_but(&[A])).unwrap();
    assert_eq!(load64(&b.place().epoch.word, Ordering::Relaxed), 0);
}

#[test]
fn what_a_dead_one_had_retired_is_freed_when_memory_runs_out() {
    let memory = memory(BYTES);
    let heap = create_for(&memory, 4);
    let judge = everybody as fn(InstanceId) -> bool;
    let mut a = heap.join(A, judge).unwrap();
    for _ in 0..12 {
        a.alloc_into(a.hold(0), 32 << 10).unwrap();
        let hold = a.hold(0);
        let mut record = a.begin(1).unwrap();
        let block = record.get(hold).unwrap();
        a.retire_in(&mut record, block).unwrap();
        record.set(hold, 0).unwrap();
        record.commit(0).unwrap();
    }
    core::mem::forget(a);
    let mut b = heap.join(B, all_but(&[A])).unwrap();
    let mut allocated = 0;
    for index in 0..ROOTS {
        let slot = heap.root(index).unwrap();
        allocated += usize::from(b.alloc_into(slot, 32 << 10).is_ok());
    }
    assert!(allocated >= 12, "{allocated}");
    assert!(heap.audit_with([]).unwrap().is_clean());
}
