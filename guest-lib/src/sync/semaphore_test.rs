use super::super::test_world::{A, B, C, D, Dead, Random, all_but};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;
use std::sync::atomic::AtomicBool;

type Words = SemaphoreWords<3>;

fn acquire_and_release(words: &Words, me: InstanceId, judge: &impl Liveness) {
    let permit = Semaphore::new(words).try_acquire(me, judge).unwrap();
    permit.release().unwrap();
}

/// All permits at once, and from whom they were reclaimed; nobody else can have one then.
fn acquire_all(words: &Words, me: InstanceId, judge: &impl Liveness) -> Vec<InstanceId> {
    let semaphore = Semaphore::new(words);
    let permits: Vec<_> = (0..semaphore.permits())
        .map(|_| semaphore.try_acquire(me, judge).expect("no permit leaked"))
        .collect();
    let error = semaphore.try_acquire(D, judge).unwrap_err();
    assert!(matches!(error, SemaphoreError::Timeout { permits: 3, holder, .. } if holder == me));
    let reclaimed = permits.iter().filter_map(Permit::reclaimed_from).collect();
    for permit in permits {
        permit.release().unwrap();
    }
    assert_eq!(semaphore.holders().count(), 0);
    reclaimed
}

#[test]
fn the_permit_of_the_dead_comes_back_whenever_it_died() {
    let everybody = all_but(&[]);
    let (_, stores) = count(|| acquire_and_release(&Words::default(), A, &everybody));
    assert!(stores >= 2);
    for at in 0..=stores {
        let words = Words::default();
        let ended = dies_after(at, || acquire_and_release(&words, A, &everybody));
        assert_eq!(ended == Ended::Completed(()), at == stores);
        let held: Vec<_> = Semaphore::new(&words).holders().collect();
        assert_eq!(
            acquire_all(&words, B, &all_but(&[A])),
            held,
            "death before store {at}"
        );
        assert!(held.is_empty() || held == [A]);
    }
}

#[test]
fn whoever_reclaims_may_die_at_any_store_too() {
    let everybody = all_but(&[]);
    for first in 0..=2 {
        for second in 0.. {
            let words = Words::default();
            let _ = dies_after(first, || acquire_and_release(&words, A, &everybody));
            let ended = dies_after(second, || acquire_all(&words, B, &all_but(&[A])));
            let judge = all_but(&[A, B]);
            let held: Vec<_> = Semaphore::new(&words).holders().collect();
            let mut reclaimed = acquire_all(&words, C, &judge);
            // Each permit comes from whoever held it last, and is reclaimed once.
            reclaimed.sort_by_key(|instance| instance.word());
            let mut expected = held.clone();
            expected.sort_by_key(|instance| instance.word());
            assert_eq!(reclaimed, expected, "deaths before {first} and {second}");
            assert_eq!(acquire_all(&words, C, &judge), []);
            if ended != Ended::Died {
                assert!(second >= 6);
                break;
            }
        }
    }
}

#[test]
fn permits_of_the_living_are_waited_for() {
    let words = Words::default();
    let semaphore = Semaphore::new(&words);
    let everybody = all_but(&[]);
    let held: Vec<_> = [A, B, C]
        .map(|me| semaphore.try_acquire(me, &everybody).unwrap())
        .into();
    let timeout = Duration::from_millis(20);
    let error = semaphore
        .acquire_timeout(D, &everybody, timeout)
        .unwrap_err();
    assert!(matches!(error, SemaphoreError::Timeout { waited, .. } if waited >= timeout));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| semaphore.acquire(D, &everybody).unwrap());
        std::thread::sleep(timeout);
        drop(held);
        assert_eq!(waiter.join().unwrap().reclaimed_from(), None);
    });
    assert_eq!(semaphore.holders().count(), 0);
}

#[test]
fn a_death_ends_the_wait_of_the_next() {
    let words = SemaphoreWords::<1>::default();
    let semaphore = Semaphore::new(&words);
    let dead = Dead::default();
    let judge = |instance| dead.is_alive(instance);
    core::mem::forget(semaphore.try_acquire(A, &judge).unwrap());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| semaphore.acquire(B, &judge).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        dead.add(A);
        assert_eq!(waiter.join().unwrap().reclaimed_from(), Some(A));
    });
}

#[test]
fn one_that_was_declared_dead_frees_nobody_elses_permit() {
    let words = SemaphoreWords::<1>::default();
    let semaphore = Semaphore::new(&words);
    let zombie = semaphore.try_acquire(A, &all_but(&[])).unwrap();
    let permit = semaphore.try_acquire(B, &all_but(&[A])).unwrap();
    assert_eq!(zombie.release(), Err(SemaphoreError::Lost(A)));
    assert_eq!(semaphore.holders().collect::<Vec<_>>(), [B]);
    permit.release().unwrap();
}

#[test]
fn a_restarted_singleton_gives_back_what_it_held() {
    let words = Words::default();
    let semaphore = Semaphore::new(&words);
    let everybody = all_but(&[]);
    for _ in 0..2 {
        core::mem::forget(semaphore.try_acquire(A, &everybody).unwrap());
    }
    let _other = semaphore.try_acquire(B, &everybody).unwrap();
    assert_eq!(semaphore.resolve_own(A), 2);
    assert_eq!(semaphore.resolve_own(A), 0);
    assert_eq!(semaphore.resolve_own(InstanceId::NONE), 0);
    assert_eq!(semaphore.holders().collect::<Vec<_>>(), [B]);
}

#[test]
fn garbage_and_nobody_hold_nothing() {
    let words = Words::default();
    for (cell, word) in words
        .holders
        .iter()
        .zip([1, u64::MAX, 0xdead_beef_0000_0001])
    {
        store64(cell, word, Ordering::Relaxed);
    }
    let judge = |instance| [A, D].contains(&instance);
    assert_eq!(acquire_all(&words, A, &judge).len(), 3);
    let none = Semaphore::new(&words)
        .try_acquire(InstanceId::NONE, &judge)
        .unwrap_err();
    assert_eq!(none, SemaphoreError::NoInstance(InstanceId::NONE));
    let empty = SemaphoreWords::<0>::default();
    let error = Semaphore::new(&empty).try_acquire(A, &judge).unwrap_err();
    assert!(matches!(error, SemaphoreError::Timeout { permits: 0, .. }));
}

/// Threads that die at random stores, with permits and without, and come back under new
/// generations, all at once.
#[test]
fn many_deaths_at_once_never_let_in_too_many_and_lose_no_permit() {
    const THREADS: u32 = 5;
    let words = Words::default();
    let dead = Dead::default();
    let judge = |instance: InstanceId| dead.is_alive(instance);
    let inside = AtomicU32::new(0);
    let deaths = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for id in 1..=THREADS {
            let (words, dead, judge, inside, deaths) = (&words, &dead, &judge, &inside, &deaths);
            scope.spawn(move || {
                let semaphore = Semaphore::new(words);
                let work = AtomicU64::new(0);
                let mut random = Random::new(id);
                let mut generation = 1;
                let end = Instant::now() + Duration::from_millis(500);
                while Instant::now() < end {
                    let me = InstanceId::new(id, generation);
                    let i_am_inside = AtomicBool::new(false);
                    let ended: Ended<()> = dies_after(random.next() % 30, || {
                        loop {
                            let permit = semaphore.acquire(me, judge).unwrap();
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 3, "too many inside");
                            i_am_inside.store(true, Ordering::SeqCst);
                            store64(&work, 1, Ordering::Relaxed);
                            i_am_inside.store(false, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            permit.release().unwrap();
                        }
                    });
                    assert_eq!(ended, Ended::Died);
                    if i_am_inside.load(Ordering::SeqCst) {
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                    dead.add(me);
                    deaths.fetch_add(1, Ordering::Relaxed);
                    generation += 1;
                }
            });
        }
    });
    assert!(deaths.load(Ordering::Relaxed) > 100);
    // Nobody of them is left.
    acquire_all(&words, C, &|instance| instance == C);
}

#[test]
fn it_can_lie_anywhere_in_a_mapping() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let memory = Mapping::new(&file, 0, 4096, crate::shm::Access::ReadWrite).unwrap();
    let last = 4096 - size_of::<Words>() as u64;
    let semaphore = Semaphore::at(&memory, last, 3).unwrap();
    let words: &Words = memory.get(last).unwrap();
    let permit = semaphore.acquire(A, &all_but(&[])).unwrap();
    assert_eq!(Semaphore::new(words).holders().collect::<Vec<_>>(), [A]);
    drop(permit);
    assert!(Semaphore::at(&memory, last, 4).is_err());
    assert!(Semaphore::at(&memory, last + 4, 1).is_err());
    assert!(Semaphore::at(&memory, u64::MAX - 7, u32::MAX).is_err());
}
