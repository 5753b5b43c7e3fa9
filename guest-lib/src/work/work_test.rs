use super::*;
use crate::liveness::Liveness;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::{Access, Mapping};
use lupin_abi::InstanceId;
use std::collections::HashSet;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const KIND: u64 = 42;

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

fn memory(size: u64) -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Mapping::new(&file, 0, size, Access::ReadWrite).unwrap()
}

fn spec() -> JobSpec {
    JobSpec {
        kind: KIND,
        phases: vec![3, 2],
        input: 24,
        arena: 16 * BLOCK,
        params: [7; PARAMS],
    }
}

const INPUT: [u8; 24] = *b"the input of a small job";

fn create(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<(), WorkError> {
    let creation = Job::create(memory, &spec(), me, judge)?;
    creation.write_input(0, &INPUT)?;
    creation.publish()?;
    Ok(())
}

fn open<'m>(memory: &'m Mapping, judge: &impl Liveness) -> Result<Job<'m>, WorkError> {
    Job::open(memory, KIND, judge, Duration::from_millis(20)).map_err(|error| match error {
        // All zero: the patience of these tests is shorter than the time for that verdict.
        WorkError::BeingCreated(InstanceId::NONE) => WorkError::Unfinished(InstanceId::NONE),
        other => other,
    })
}

/// A unit of phase 0 copies its eight bytes of input; one of phase 1 concatenates phase 0.
fn work(job: &Job<'_>, worker: &mut Worker<impl Liveness>) {
    let first = job.phase(0).unwrap();
    let result = first.run(worker, |unit, out| {
        out.resize(8, 0);
        job.read_input(u64::from(unit) * 8, out)
    });
    result.unwrap();
    assert!(first.progress().unwrap().is_complete());
    let result = job.phase(1).unwrap().run(worker, |_, out| {
        for unit in 0..first.units() {
            out.extend(first.result(unit)?.expect("complete").read_all()?);
        }
        Ok::<_, WorkError>(())
    });
    result.unwrap();
}

fn check(job: &Job<'_>) -> JobAudit {
    let second = job.phase(1).unwrap();
    for unit in 0..2 {
        let block = second.result(unit).unwrap().expect("committed");
        assert_eq!(block.read_all().unwrap(), INPUT);
    }
    let audit = job.audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
    assert_eq!(audit.arena.allocated, audit.arena.reachable);
    audit
}

#[test]
fn a_job_survives_the_death_of_its_creator_at_any_store() {
    let (_, stores) = count(|| create(&memory(16 << 10), A, &all_but(&[])).unwrap());
    assert!(stores > 30);
    for at in 0..=stores {
        let memory = memory(16 << 10);
        let ended = dies_after(at, || create(&memory, A, &all_but(&[])).unwrap());
        let judge = all_but(&[A]);
        let opened = open(&memory, &judge);
        let again = create(&memory, B, &judge);
        if at == stores {
            assert_eq!(ended, Ended::Completed(()));
            opened.unwrap();
            assert!(matches!(again, Err(WorkError::Exists)));
        } else {
            assert!(matches!(opened, Err(WorkError::Unfinished(_))), "{at}");
            again.unwrap();
        }
        let job = open(&memory, &judge).unwrap();
        assert_eq!(*job.spec(), spec());
        work(&job, &mut Worker::new(C, judge));
        check(&job);
    }
}

#[test]
fn the_successor_of_a_dead_creator_may_die_too() {
    let (_, stores) = count(|| create(&memory(16 << 10), A, &all_but(&[])).unwrap());
    for first in (0..stores).step_by(5) {
        for second in (0..stores).step_by(3) {
            let memory = memory(16 << 10);
            let _ = dies_after(first, || create(&memory, A, &all_but(&[])));
            let _ = dies_after(second, || create(&memory, B, &all_but(&[A])));
            let judge = all_but(&[A, B]);
            create(&memory, C, &judge).unwrap();
            let job = open(&memory, &judge).unwrap();
            work(&job, &mut Worker::new(C, judge));
            check(&job);
        }
    }
}

#[test]
fn nobody_takes_a_job_from_a_living_creator_or_waits_for_ever() {
    let memory = memory(16 << 10);
    let everybody = all_but(&[]);
    let creation = Job::create(&memory, &spec(), A, &everybody).unwrap();
    let start = Instant::now();
    let error = open(&memory, &everybody).unwrap_err();
    assert!(matches!(error, WorkError::BeingCreated(A)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
    let error = create(&memory, B, &everybody).unwrap_err();
    assert!(matches!(error, WorkError::BeingCreated(A)), "{error}");
    // B succeeds A, which was wrongly thought dead: A learns it and does not seal B's job.
    let successor = Job::create(&memory, &spec(), B, &all_but(&[A])).unwrap();
    assert!(matches!(
        creation.publish(),
        Err(WorkError::BeingCreated(B))
    ));
    successor.write_input(0, &INPUT).unwrap();
    successor.publish().unwrap();
}

#[test]
fn a_worker_may_die_at_any_store_and_every_unit_counts_once() {
    let job_memory = || {
        let memory = memory(16 << 10);
        create(&memory, A, &all_but(&[])).unwrap();
        memory
    };
    let prepared = job_memory();
    let job = open(&prepared, &all_but(&[])).unwrap();
    let (_, stores) = count(|| work(&job, &mut Worker::new(A, all_but(&[]))));
    assert!(stores > 25, "{stores}");
    for at in 0..=stores {
        let memory = job_memory();
        let job = open(&memory, &all_but(&[])).unwrap();
        let ended = dies_after(at, || work(&job, &mut Worker::new(A, all_but(&[]))));
        assert_eq!(ended == Ended::Completed(()), at == stores, "{at}");
        let mut worker = Worker::new(B, all_but(&[A]));
        work(&job, &mut worker);
        let audit = check(&job);
        let attempts: u64 = audit.phases.iter().map(|p| p.attempts).sum();
        assert!(attempts <= 6, "one death costs one unit: {audit:?}");
        assert!(worker.stats.stolen <= 1);
    }
}

#[test]
fn two_workers_may_die_one_after_the_other() {
    for first in 0..60 {
        for second in 0..60 {
            let memory = memory(16 << 10);
            create(&memory, A, &all_but(&[])).unwrap();
            let job = open(&memory, &all_but(&[])).unwrap();
            let _ = dies_after(first, || work(&job, &mut Worker::new(A, all_but(&[]))));
            let _ = dies_after(second, || work(&job, &mut Worker::new(B, all_but(&[A]))));
            work(&job, &mut Worker::new(C, all_but(&[A, B])));
            check(&job);
        }
    }
}

#[test]
fn a_unit_of_someone_alive_but_stuck_is_done_by_others() {
    let memory = memory(16 << 10);
    create(&memory, A, &all_but(&[])).unwrap();
    let job = open(&memory, &all_but(&[])).unwrap();
    // A dies, but for everybody it lives: a stopped process.
    let _ = dies_after(2, || work(&job, &mut Worker::new(A, all_but(&[]))));
    let mut worker = Worker::new(B, all_but(&[]));
    work(&job, &mut worker);
    assert_eq!(worker.stats.stolen, 0);
    assert!(worker.stats.redone <= 1);
    check(&job);
}

#[test]
fn a_late_attempt_does_no_harm_and_counts_for_nothing() {
    let memory = memory(16 << 10);
    create(&memory, A, &all_but(&[])).unwrap();
    let job = open(&memory, &all_but(&[])).unwrap();
    let mut late = Worker::new(A, all_but(&[]));
    let result = job.phase(0).unwrap().run(&mut late, |unit, out| {
        if unit == 0 {
            // While A computes, B is told that A is dead, and does the whole job.
            work(&job, &mut Worker::new(B, all_but(&[A])));
        }
        out.resize(8, 0);
        job.read_input(u64::from(unit) * 8, out)
    });
    result.unwrap();
    assert_eq!((late.stats.done, late.stats.lost), (0, 1));
    check(&job);
}

#[test]
fn an_impure_unit_is_caught_before_it_writes_over_others() {
    let memory = memory(16 << 10);
    create(&memory, A, &all_but(&[])).unwrap();
    let job = open(&memory, &all_but(&[])).unwrap();
    let phase = job.phase(0).unwrap();
    // Dies after the place is chosen: cursor, claim, attempts, arena, place.
    let _ = dies_after(5, || work(&job, &mut Worker::new(A, all_but(&[]))));
    let mut worker = Worker::new(B, all_but(&[A]));
    let result = phase.run(&mut worker, |_, out| {
        out.resize(1000, 1);
        Ok::<_, WorkError>(())
    });
    assert!(matches!(result, Err(WorkError::NotPure { unit: 0, .. })));
}

#[test]
fn an_arena_that_is_too_small_is_an_error_and_not_an_overflow() {
    let memory = memory(16 << 10);
    create(&memory, A, &all_but(&[])).unwrap();
    let job = open(&memory, &all_but(&[])).unwrap();
    let mut worker = Worker::new(A, all_but(&[]));
    let result = job.phase(0).unwrap().run(&mut worker, |_, out| {
        out.resize(2000, 1);
        Ok::<_, WorkError>(())
    });
    assert!(matches!(result, Err(WorkError::ArenaFull { .. })));
}

#[test]
fn damage_and_strangers_are_refused_with_a_reason() {
    let judge = all_but(&[]);
    let memory = memory(16 << 10);
    create(&memory, A, &judge).unwrap();
    let other = Job::open(&memory, KIND + 1, &judge, Duration::ZERO).unwrap_err();
    assert!(matches!(other, WorkError::NotThisJob(_)));
    for word in 0..25u64 {
        let cell: &AtomicU64 = memory.get(word * 8).unwrap();
        let old = cell.fetch_xor(1 << 20, Ordering::Relaxed);
        let opened = open(&memory, &judge);
        if word == 1 {
            opened.expect("the creator does not matter once the job is sealed");
        } else {
            opened.expect_err("damaged");
        }
        cell.store(old, Ordering::Relaxed);
    }
    open(&memory, &judge).unwrap();

    let small = self::memory(4096);
    let error = Job::create(&small, &spec(), A, &judge).unwrap_err();
    assert!(matches!(error, WorkError::TooSmall { .. }), "{error}");
    for wrong in [
        JobSpec {
            phases: vec![],
            ..spec()
        },
        JobSpec {
            phases: vec![1, 0],
            ..spec()
        },
        JobSpec {
            phases: vec![1 << 20, 1],
            ..spec()
        },
        JobSpec {
            phases: vec![1; 9],
            ..spec()
        },
        JobSpec {
            arena: 17,
            ..spec()
        },
        JobSpec {
            arena: u64::MAX - 255,
            ..spec()
        },
        JobSpec {
            input: u64::MAX,
            ..spec()
        },
    ] {
        assert!(matches!(wrong.segment_size(), Err(WorkError::Spec { .. })));
    }
    let foreign = self::memory(16 << 10);
    foreign.copy_in(0, b"something").unwrap();
    let error = create(&foreign, A, &judge).unwrap_err();
    assert!(matches!(error, WorkError::NotThisJob(_)), "{error}");
    let error = open(&foreign, &judge).unwrap_err();
    assert!(matches!(error, WorkError::NotThisJob(_)), "{error}");
}

/// Threads that die at random stores and come back under new generations, all at once.
#[test]
fn many_workers_and_many_deaths_at_once() {
    for round in 0..20u64 {
        let memory = memory(1 << 20);
        let spec = JobSpec {
            kind: KIND,
            phases: vec![400],
            input: 8,
            arena: 400 * BLOCK,
            params: [0; PARAMS],
        };
        let creation = Job::create(&memory, &spec, A, &all_but(&[])).unwrap();
        let job = creation.publish().unwrap();
        let dead = RwLock::new(HashSet::new());
        let judge =
            |instance: InstanceId| !instance.is_none() && !dead.read().unwrap().contains(&instance);
        let deaths = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for id in 1..=3u32 {
                let (job, judge, dead, deaths) = (&job, &judge, &dead, &deaths);
                scope.spawn(move || {
                    let mut random =
                        (u64::from(id) + round * 3 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for generation in 1.. {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let me = InstanceId::new(id, generation);
                        let ended = dies_after(random % 100, || {
                            let phase = job.phase(0).unwrap();
                            let result = phase.run(&mut Worker::new(me, judge), |unit, out| {
                                out.extend(std::iter::repeat_n(unit as u8, unit as usize % 100));
                                Ok::<_, WorkError>(())
                            });
                            result.unwrap();
                        });
                        if ended == Ended::Completed(()) {
                            return;
                        }
                        dead.write().unwrap().insert(me);
                        deaths.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        let audit = job.audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
        assert_eq!(audit.arena.allocated, audit.arena.reachable);
        let phase = job.phase(0).unwrap();
        for unit in 0..400 {
            let bytes = phase.result(unit).unwrap().unwrap().read_all().unwrap();
            assert_eq!(bytes, vec![unit as u8; unit as usize % 100]);
        }
        assert!(deaths.load(Ordering::Relaxed) > 10);
    }
}
