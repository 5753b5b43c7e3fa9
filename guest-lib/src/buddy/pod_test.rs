use super::*;
use crate::lock::LockError;
use crate::log::LogError;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::Access;
use crate::test_random::Random;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const UNIT: u64 = 1 << 20;
/// Where the words begin; not at the start, so that an offset that lacks its base is noticed.
const AT: u64 = 128;

fn spec(units: u32) -> PodAllocatorSpec {
    let unit = UNIT;
    PodAllocatorSpec {
        nodes: 3,
        chunks: BuddySpec { units, unit },
        also: 0,
    }
}

fn memory(spec: &PodAllocatorSpec) -> Mapping {
    let len = (AT + spec.metadata_size()).next_multiple_of(4096);
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    Mapping::new(&file, 0, len, Access::ReadWrite).unwrap()
}

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

fn create(memory: &Mapping, units: u32) -> PodAllocator<'_> {
    PodAllocator::create(memory, AT, &spec(units), C, &all_but(&[])).unwrap()
}

/// What an operation is tried on.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    units: u32,
    /// Allocated before, in units, each freed again if negative.
    before: &'static [i64],
    /// Allocated by the operation, in units; or freed, the chunk of that index in `before`.
    operation: Operation,
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Alloc(u64),
    Free(usize),
}

const CASES: &[Case] = &[
    Case {
        name: "alloc: empty",
        units: 1,
        before: &[],
        operation: Operation::Alloc(1),
    },
    Case {
        name: "alloc: split",
        units: 600,
        before: &[],
        operation: Operation::Alloc(3),
    },
    Case {
        name: "alloc: split at the top",
        units: 512,
        before: &[],
        operation: Operation::Alloc(1),
    },
    Case {
        name: "alloc: last unit",
        units: 65,
        before: &[64],
        operation: Operation::Alloc(1),
    },
    Case {
        name: "alloc: large",
        units: 600,
        before: &[1],
        operation: Operation::Alloc(128),
    },
    Case {
        name: "alloc: full",
        units: 64,
        before: &[64],
        operation: Operation::Alloc(1),
    },
    Case {
        name: "free: no coalesce",
        units: 8,
        before: &[1, 1],
        operation: Operation::Free(0),
    },
    Case {
        name: "free: to the top",
        units: 512,
        before: &[1],
        operation: Operation::Free(0),
    },
    Case {
        name: "free: large",
        units: 600,
        before: &[256, 1],
        operation: Operation::Free(0),
    },
];

impl Case {
    /// Brings a new allocator into the state; the chunks are A's.
    fn prepare<'m>(&self, memory: &'m Mapping) -> (PodAllocator<'m>, Vec<u64>) {
        let pod = create(memory, self.units);
        let judge = all_but(&[]);
        let alloc = |units: &i64| pod.alloc(A, &judge, *units as u64 * UNIT).unwrap();
        let chunks = self.before.iter().map(alloc).collect();
        (pod, chunks)
    }

    fn run(&self, pod: &PodAllocator<'_>, chunks: &[u64]) -> Result<u64, BuddyError> {
        match self.operation {
            Operation::Alloc(units) => pod.alloc_for(A, &all_but(&[]), units * UNIT, 77, 5),
            Operation::Free(n) => {
                let at = chunks[n];
                pod.free_of(A, &all_but(&[]), at, A.word(), 5).map(|()| at)
            }
        }
    }

    /// Whether it happened, by what is there: it did or did not, and nothing else changed.
    fn happened(&self, pod: &PodAllocator<'_>, chunks: &[u64]) -> bool {
        let mine: Vec<u64> = pod.chunks_of(A.word()).map(|c| c.offset).collect();
        let new: Vec<u64> = pod.chunks_of(77).map(|c| c.bytes).collect();
        match self.operation {
            Operation::Alloc(units) => {
                assert_eq!(mine, chunks);
                assert!(
                    new.iter()
                        .all(|bytes| *bytes == units.next_power_of_two() * UNIT)
                );
                assert!(new.len() <= 1);
                !new.is_empty()
            }
            Operation::Free(n) => {
                assert!(new.is_empty());
                let left: Vec<_> = chunks
                    .iter()
                    .filter(|at| **at != chunks[n])
                    .copied()
                    .collect();
                assert!(mine == chunks || mine == left);
                mine == left
            }
        }
    }

    /// Further use by a survivor, down to the last unit.
    fn go_on(&self, pod: &PodAllocator<'_>, me: InstanceId, judge: &impl Liveness) {
        let audit = pod.audit(me, judge).unwrap();
        assert_eq!(audit.free + audit.live, self.units.into());
        let mut taken = Vec::new();
        while let Ok(at) = pod.alloc(me, judge, UNIT) {
            taken.push(at);
        }
        assert_eq!(taken.len() as u64, audit.free);
        assert_eq!(pod.audit(me, judge).unwrap().free, 0);
        for at in taken {
            pod.free(me, judge, at).unwrap();
        }
        assert_eq!(pod.audit(me, judge).unwrap(), audit);
    }
}

#[test]
fn after_a_death_at_any_store_a_survivor_knows_and_goes_on() {
    for case in CASES {
        let full = case.name == "alloc: full";
        let stores = {
            let memory = memory(&spec(case.units));
            let (pod, chunks) = case.prepare(&memory);
            count(|| case.run(&pod, &chunks).is_ok()).1
        };
        let mut at = 0;
        loop {
            let memory = memory(&spec(case.units));
            let (pod, chunks) = case.prepare(&memory);
            let before = pod.last(A.node().unwrap()).unwrap();
            let ended = dies_after(at, || case.run(&pod, &chunks).is_ok());
            let judge = all_but(&[A]);
            let outcome = pod.recover(B, &judge).unwrap();
            let happened = case.happened(&pod, &chunks);
            let last = pod.last(A.node().unwrap()).unwrap();
            assert!(outcome.is_none_or(|outcome| outcome.seq == 0 || outcome == last));
            // The log tells the truth: the operation before, or this one and what became of it.
            if last.seq == before.seq {
                assert!(!happened, "{} at {at}", case.name);
                assert_eq!(last, before);
            } else {
                assert_eq!(
                    (last.tag, last.happened),
                    (5, happened),
                    "{} at {at}",
                    case.name
                );
            }
            case.go_on(&pod, B, &judge);
            if let Ended::Completed(ok) = ended {
                assert_eq!((ok, happened), (!full, !full), "{}", case.name);
                break;
            }
            at += 1;
        }
        assert_eq!(at, stores, "{}", case.name);
    }
}

#[test]
fn the_survivor_may_die_at_any_store_too() {
    for case in CASES {
        for first in 0.. {
            let mut done = false;
            for second in 0.. {
                let memory = memory(&spec(case.units));
                let (pod, chunks) = case.prepare(&memory);
                done = dies_after(first, || case.run(&pod, &chunks).is_ok()) != Ended::Died;
                let ended = dies_after(second, || pod.recover(B, &all_but(&[A])).map(|_| ()));
                let judge = all_but(&[A, B]);
                pod.recover(C, &judge).unwrap();
                let happened = case.happened(&pod, &chunks);
                let last = pod.last(A.node().unwrap()).unwrap();
                assert_eq!(last.tag == 5 && last.happened, happened);
                let audit = pod.audit(C, &judge).unwrap();
                assert_eq!(audit.free + audit.live, case.units.into());
                if second % 4 == 0 {
                    case.go_on(&pod, C, &judge);
                }
                if matches!(ended, Ended::Completed(_)) {
                    break;
                }
            }
            if done {
                break;
            }
        }
    }
}

#[test]
fn a_node_that_starts_again_finishes_its_own_past() {
    let case = &CASES[1];
    let next_life = InstanceId::new(1, 2);
    for at in 0..40 {
        // As a new instance: its old one is dead.
        let memory = memory(&spec(case.units));
        let (pod, chunks) = case.prepare(&memory);
        let _ = dies_after(at, || case.run(&pod, &chunks).is_ok());
        let judge = all_but(&[A]);
        let first = pod.alloc(next_life, &judge, UNIT).unwrap();
        assert!(pod.chunks_of(77).all(|chunk| chunk.offset != first));
        case.happened(&pod, &chunks);
        let last = pod.last(A.node().unwrap()).unwrap();
        assert_eq!((last.owner, last.happened), (next_life, true));
        pod.free(next_life, &judge, first).unwrap();
        case.go_on(&pod, next_life, &judge);

        // As the same instance, whom everybody takes for alive.
        let memory = super::pod_test::memory(&spec(case.units));
        let (pod, chunks) = case.prepare(&memory);
        let ended = dies_after(at, || case.run(&pod, &chunks).is_ok());
        let judge = all_but(&[]);
        let held = pod.lock_state(&judge).unwrap() == LockState::Held(A);
        assert!(!held || ended == Ended::Died);
        if held {
            let error = pod.alloc(A, &judge, UNIT).unwrap_err();
            assert!(matches!(
                error,
                BuddyError::Lock(LockError::Deadlock(A))
                    | BuddyError::Log(LogError::Unsettled { owner: A, .. })
            ));
        }
        let outcome = pod.recover(A, &judge).unwrap();
        assert_eq!(outcome.is_some(), held);
        case.happened(&pod, &chunks);
        case.go_on(&pod, A, &judge);
    }
}

#[test]
fn a_dead_owner_in_the_lock_is_settled_by_whoever_comes_next() {
    for case in CASES {
        for at in 0..60 {
            let memory = memory(&spec(case.units));
            let (pod, chunks) = case.prepare(&memory);
            // C dies in an operation of its own; A, who knows, goes on with the case.
            let world = all_but(&[]);
            let _ = dies_after(at, || pod.alloc_for(C, &world, UNIT, 88, 6).is_ok());
            let judge = all_but(&[C]);
            pod.audit(A, &judge).unwrap();
            let happened = pod.chunks_of(88).count() == 1;
            let last = pod.last(C.node().unwrap()).unwrap();
            assert_eq!(
                last.tag == 6 && last.happened,
                happened,
                "{} {at}",
                case.name
            );
            // Full because of C's chunk, perhaps.
            let _ = case.run(&pod, &chunks);
            case.happened(&pod, &chunks);
            for chunk in pod.chunks_of(88) {
                pod.free_of(A, &judge, chunk.offset, 88, 0).unwrap();
            }
            case.go_on(&pod, B, &judge);
        }
    }
}

#[test]
fn creation_is_taken_over_from_whoever_dies_in_it() {
    let shape = spec(70);
    let (_, stores) = count(|| {
        let memory = memory(&shape);
        PodAllocator::create(&memory, AT, &shape, A, &all_but(&[])).map(drop)
    });
    for at in (0..=stores)
        .step_by(7)
        .chain([1, 2, stores - 2, stores - 1, stores])
    {
        for second in (0..=stores).step_by(13) {
            let memory = memory(&shape);
            let _ = dies_after(at, || {
                PodAllocator::create(&memory, AT, &shape, A, &all_but(&[])).map(drop)
            });
            let judge = all_but(&[A]);
            if at < stores {
                let open = PodAllocator::open(&memory, AT, &judge, Duration::ZERO);
                assert!(
                    matches!(open, Err(BuddyError::Unfinished(_))),
                    "{at} {open:?}"
                );
            }
            let _ = dies_after(second, || {
                PodAllocator::create(&memory, AT, &shape, B, &judge).map(drop)
            });
            let judge = all_but(&[A, B]);
            let pod = PodAllocator::create(&memory, AT, &shape, C, &judge).unwrap();
            assert_eq!(pod.audit(C, &judge).unwrap().free, 70);
            let opened = PodAllocator::open(&memory, AT, &judge, Duration::ZERO).unwrap();
            assert_eq!(opened.spec(), shape);
            pod.alloc(C, &judge, UNIT).unwrap();
            assert_eq!(opened.audit(C, &judge).unwrap().free, 69);
        }
    }
}

#[test]
fn a_living_creator_is_waited_for_but_not_for_ever() {
    let shape = spec(70);
    let memory = memory(&shape);
    let everybody = all_but(&[]);
    let _ = dies_after(20, || {
        PodAllocator::create(&memory, AT, &shape, A, &everybody).map(drop)
    });
    let patience = Duration::from_millis(20);
    let error = PodAllocator::open(&memory, AT, &everybody, patience).unwrap_err();
    assert!(matches!(error, BuddyError::BeingCreated(A)));
    let error = PodAllocator::create(&memory, AT, &shape, B, &everybody).unwrap_err();
    assert!(matches!(error, BuddyError::BeingCreated(A)));
    std::thread::scope(|scope| {
        let open = scope.spawn(|| {
            let patience = Duration::from_secs(20);
            PodAllocator::open(&memory, AT, &all_but(&[]), patience).map(|pod| pod.spec())
        });
        std::thread::sleep(patience);
        // The creator is started again, as the same instance.
        PodAllocator::create(&memory, AT, &shape, A, &everybody).unwrap();
        assert_eq!(open.join().unwrap().unwrap(), shape);
    });
}

#[test]
fn who_has_no_log_and_what_is_no_offset_is_named() {
    let memory = memory(&spec(70));
    let pod = create(&memory, 70);
    let judge = all_but(&[]);
    for stranger in [
        InstanceId::NONE,
        InstanceId::new(4, 1),
        InstanceId::new(1, 0),
    ] {
        let error = pod.alloc(stranger, &judge, 1).unwrap_err();
        assert!(
            matches!(error, BuddyError::NotANode { instance, nodes: 3 } if instance == stranger)
        );
    }
    for offset in [1, UNIT - 1, UNIT * 70, UNIT << 32, u64::MAX] {
        let error = pod.free(A, &judge, offset).unwrap_err();
        assert!(matches!(error, BuddyError::NotAChunk { .. }), "{error}");
    }
    assert!(matches!(pod.alloc(A, &judge, 0), Err(BuddyError::Nothing)));
    for bytes in [UNIT * 71, UNIT << 32, u64::MAX] {
        assert!(matches!(
            pod.alloc(A, &judge, bytes),
            Err(BuddyError::NoRoom { .. })
        ));
    }
    let at = pod.alloc(A, &judge, 1).unwrap();
    let error = pod.free(B, &judge, at).unwrap_err();
    assert!(matches!(error, BuddyError::Foreign { owner, .. } if owner == A.word()));
    pod.give(B, &judge, at, A.word(), B.word(), 0).unwrap();
    pod.free(B, &judge, at).unwrap();
    assert!(matches!(
        pod.free(B, &judge, at),
        Err(BuddyError::DoubleFree { .. })
    ));
    for nodes in [0, 1025] {
        let wrong = PodAllocatorSpec { nodes, ..spec(70) };
        let error = PodAllocator::create(&memory, AT, &wrong, A, &judge).unwrap_err();
        assert!(matches!(error, BuddyError::Spec { .. }));
    }
    let wrong = PodAllocatorSpec {
        also: 1025,
        ..spec(70)
    };
    let error = PodAllocator::create(&memory, AT, &wrong, A, &judge).unwrap_err();
    assert!(matches!(error, BuddyError::Spec { .. }));
    for (units, unit) in [(0, 4096), (1, 0), (1, 3), (1, 1 << 32)] {
        let chunks = BuddySpec { units, unit };
        let wrong = PodAllocatorSpec { chunks, ..spec(70) };
        let error = PodAllocator::create(&memory, AT, &wrong, A, &judge).unwrap_err();
        assert!(matches!(error, BuddyError::Spec { .. }));
    }
    let error = PodAllocator::create(&memory, AT, &spec(71), A, &judge).unwrap_err();
    assert!(matches!(error, BuddyError::NotThis { .. }));
    let error = PodAllocator::create(&memory, AT, &spec(1 << 20), A, &judge).unwrap_err();
    assert!(matches!(error, BuddyError::Memory(_)));
}

#[test]
fn what_may_only_be_read_is_not_written() {
    let shape = spec(70);
    let len = (AT + shape.metadata_size()).next_multiple_of(4096);
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let written = Mapping::new(&file, 0, len, Access::ReadWrite).unwrap();
    let read = Mapping::new(&file, 0, len, Access::ReadOnly).unwrap();
    let judge = all_but(&[]);
    let refused = |error| matches!(error, BuddyError::Log(LogError::ReadOnly { .. }));
    assert!(PodAllocator::create(&read, AT, &shape, A, &judge).is_err_and(refused));
    let nobody = PodAllocator::create(&written, AT, &shape, InstanceId::NONE, &judge);
    assert!(matches!(
        nobody,
        Err(BuddyError::Lock(LockError::NoInstance(_)))
    ));
    let pod = create(&written, 70);
    let at = pod.alloc(A, &judge, UNIT).unwrap();
    let view = PodAllocator::open(&read, AT, &judge, Duration::ZERO).unwrap();
    assert_eq!(view.chunks_of(A.word()).next().unwrap().offset, at);
    assert_eq!(view.lock_state(&judge).unwrap(), LockState::Free);
    assert_eq!(view.last(A.node().unwrap()).unwrap().result, at);
    assert!(view.alloc(A, &judge, UNIT).is_err_and(refused));
    assert!(view.alloc(B, &judge, UNIT).is_err_and(refused));
    assert!(view.free(A, &judge, at).is_err_and(refused));
    assert!(view.recover(A, &judge).is_err_and(refused));
}

/// Frees what former lives of a node own.
fn clear_up(
    pod: &PodAllocator<'_>,
    me: InstanceId,
    judge: &impl Liveness,
    mark: &impl Fn(u64, u64, Option<u64>, u64),
) {
    for chunk in pod.chunks().collect::<Vec<_>>() {
        let owner = InstanceId::from_word(chunk.owner);
        if owner.id() == me.id() && owner != me {
            mark(chunk.offset, chunk.bytes, None, 0);
            pod.free_of(me, judge, chunk.offset, chunk.owner, 0)
                .unwrap();
        }
    }
}

#[test]
fn nodes_that_die_all_the_time_lose_and_share_no_unit() {
    const UNITS: u32 = 300;
    let memory = memory(&spec(UNITS));
    let pod = create(&memory, UNITS);
    let generations: [AtomicU32; 4] = core::array::from_fn(|_| AtomicU32::new(1));
    let judge = |node: InstanceId| {
        let generation = generations.get(node.id() as usize);
        generation.is_some_and(|now| now.load(Ordering::SeqCst) == node.generation())
    };
    // Who uses a unit, apart from all that is tested.
    let users: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
    let mark = |at: u64, len: u64, from: Option<u64>, to: u64| {
        for unit in at / UNIT..(at + len) / UNIT {
            let user = users[unit as usize].swap(to, Ordering::SeqCst);
            assert!(
                from.is_none_or(|from| from == user),
                "unit {unit}: {user:#x}"
            );
        }
    };
    let deaths = AtomicU32::new(0);
    let live = |id: u32| {
        let mut random = Random(id.into());
        for generation in 1..=150 {
            let me = InstanceId::new(id, generation);
            let _ = dies_after(random.below(1500), || {
                // What the life before left, whatever it was.
                pod.recover(me, &judge).unwrap();
                clear_up(&pod, me, &judge, &mark);
                let mut mine = Vec::new();
                for _ in 0..60 {
                    if random.below(5) < 3 {
                        let units = 1 + random.below(20);
                        match pod.alloc(me, &judge, units * UNIT) {
                            Ok(at) => {
                                let len = units.next_power_of_two() * UNIT;
                                mark(at, len, Some(0), me.word());
                                mine.push((at, len));
                            }
                            Err(BuddyError::NoRoom { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    } else if let Some((at, len)) = mine.pop() {
                        mark(at, len, Some(me.word()), 0);
                        pod.free(me, &judge, at).unwrap();
                    }
                }
                for (at, len) in mine.drain(..) {
                    mark(at, len, Some(me.word()), 0);
                    pod.free(me, &judge, at).unwrap();
                }
            });
            // The verdict, and only then the next life.
            deaths.fetch_add(1, Ordering::Relaxed);
            generations[id as usize].store(generation + 1, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        for id in 1..=3 {
            scope.spawn(move || live(id));
        }
    });
    assert_eq!(deaths.load(Ordering::Relaxed), 450);
    let me = InstanceId::new(1, 151);
    pod.recover(me, &judge).unwrap();
    let audit = pod.audit(me, &judge).unwrap();
    assert_eq!(audit.free + audit.live, UNITS.into());
    for id in 1..=3 {
        clear_up(&pod, InstanceId::new(id, 151), &judge, &mark);
    }
    assert_eq!(pod.audit(me, &judge).unwrap().free, UNITS.into());
    assert!(users.iter().all(|user| user.load(Ordering::SeqCst) == 0));
}

#[test]
fn a_chunk_and_the_callers_words_change_together_or_not_at_all() {
    const WORDS: u64 = 3;
    let shape = PodAllocatorSpec {
        also: WORDS as u32,
        ..spec(70)
    };
    let judge = all_but(&[]);
    // The words say where the one chunk is, or that there is none.
    let put = |record: &mut Record<'_>, at: u64, value: u64| -> Result<(), BuddyError> {
        for n in 0..WORDS {
            record.set(at + n * 8, value)?;
        }
        Ok(())
    };
    for name in ["alloc", "free", "change"] {
        for at in 0.. {
            let memory = memory(&PodAllocatorSpec {
                also: 1024,
                ..spec(70)
            });
            let pod = PodAllocator::create(&memory, AT, &shape, C, &judge).unwrap();
            let words = (AT + shape.metadata_size()).next_multiple_of(64);
            let alloc = |me| {
                pod.alloc_with(me, &judge, 5 * UNIT, 7, 0, |record, offset| {
                    put(record, words, offset + 1)
                })
            };
            if name != "alloc" {
                alloc(B).unwrap();
            }
            let ended = dies_after(at, || match name {
                "alloc" => drop(alloc(A).unwrap()),
                "free" => pod
                    .free_with(A, &judge, 0, 7, 0, |record| put(record, words, 0))
                    .unwrap(),
                _ => pod
                    .change(A, &judge, 0, |record| put(record, words, 9))
                    .unwrap(),
            });
            pod.recover(B, &all_but(&[A])).unwrap();
            let found: Vec<u64> = (0..WORDS)
                .map(|n| {
                    let word: &AtomicU64 = memory.get(words + n * 8).unwrap();
                    word.load(Ordering::Relaxed)
                })
                .collect();
            let chunks: Vec<u64> = pod.chunks_of(7).map(|c| c.offset).collect();
            match found[..] {
                [0, 0, 0] => assert!(chunks.is_empty(), "{name} {at}"),
                [1, 1, 1] => assert_eq!(chunks, [0], "{name} {at}"),
                [9, 9, 9] if name == "change" => assert_eq!(chunks, [0]),
                _ => panic!("{name} {at}: {found:?}"),
            }
            pod.audit(B, &all_but(&[A])).unwrap();
            if ended == Ended::Completed(()) {
                assert!(at > 10);
                break;
            }
        }
    }
    let memory = memory(&shape);
    let pod = PodAllocator::create(&memory, AT, &shape, C, &judge).unwrap();
    let full = pod.change(A, &judge, 0, |record| {
        (0..1000).try_for_each(|n| Ok(record.set(AT + 4096 + n * 8, 0)?))
    });
    assert!(matches!(full, Err(BuddyError::Log(_))));
    // Given up, and nobody waits for it.
    assert!(pod.alloc(B, &judge, UNIT).is_ok());
}

#[test]
fn who_is_impatient_is_told_who_has_the_lock() {
    let memory = memory(&spec(70));
    let pod = create(&memory, 70).with_patience(Duration::from_millis(20));
    let judge = all_but(&[]);
    let held = pod.acquire(B, &judge, &mut None).unwrap();
    let error = pod.alloc(A, &judge, UNIT).unwrap_err();
    assert!(matches!(
        error,
        BuddyError::Lock(LockError::Timeout { holder, .. }) if holder == B
    ));
    held.unlock().unwrap();
    assert!(pod.alloc(A, &judge, UNIT).is_ok());
}
