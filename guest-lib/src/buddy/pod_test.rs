use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::Access;

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
        let mine: Vec<u64> = pod.chunks_of(A.word()).map(|(at, _)| at).collect();
        let new: Vec<(u64, u64)> = pod.chunks_of(77).collect();
        match self.operation {
            Operation::Alloc(units) => {
                assert_eq!(mine, chunks);
                assert!(
                    new.iter()
                        .all(|(_, len)| *len == units.next_power_of_two() * UNIT)
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
