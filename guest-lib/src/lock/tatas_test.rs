use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Barrier, RwLock};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);

/// A pair that is equal outside of critical sections.
#[derive(Default)]
struct Pair {
    lock: LockWords,
    left: AtomicU64,
    right: AtomicU64,
}

impl Pair {
    fn lock(&self) -> RecoverableLock<'_> {
        RecoverableLock::new(&self.lock)
    }

    fn is_consistent(&self) -> bool {
        self.left.load(Ordering::Relaxed) == self.right.load(Ordering::Relaxed)
    }

    fn repair(&self) {
        let left = self.left.load(Ordering::Relaxed);
        store64(&self.right, left, Ordering::Relaxed);
    }

    /// Locks, repairs if need be, changes both halves, releases. Tells `seen` of an orphan.
    fn change(&self, me: InstanceId, judge: &impl Liveness, seen: &mut Option<InstanceId>) {
        let guard = self
            .lock()
            .lock_timeout(me, judge, Duration::MAX)
            .expect("somebody alive always gets the lock")
            .or_repair(|previous| {
                *seen = Some(previous);
                self.repair();
                Ok::<_, LockError>(())
            })
            .expect("nobody declared the repairer dead");
        assert!(self.is_consistent(), "{me} was let in to broken data");
        let next = self.left.load(Ordering::Relaxed) + 1;
        store64(&self.left, next, Ordering::Relaxed);
        store64(&self.right, next, Ordering::Relaxed);
        guard.unlock().expect("nobody declared the holder dead");
    }
}

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

#[test]
fn after_a_death_at_any_store_the_next_gets_in_and_knows() {
    let (_, stores) = count(|| Pair::default().change(A, &all_but(&[]), &mut None));
    assert!(stores >= 4, "{stores}");
    for at in 0..=stores {
        let pair = Pair::default();
        let ended = dies_after(at, || pair.change(A, &all_but(&[]), &mut None));
        assert_eq!(ended == Ended::Completed(()), at == stores);
        let mut seen = None;
        pair.change(B, &all_but(&[A]), &mut seen);
        // Orphaned exactly if A died after it got the lock and before it released it.
        let inside = at >= 1 && at < stores;
        assert_eq!(seen, inside.then_some(A), "death before store {at}");
        assert_eq!(pair.lock().inspect(&all_but(&[A])), LockState::Free);
    }
}

#[test]
fn the_recoverer_may_die_at_any_store_too_and_the_first_name_is_kept() {
    for first in 0..=4 {
        for second in 0.. {
            let pair = Pair::default();
            let _ = dies_after(first, || pair.change(A, &all_but(&[]), &mut None));
            let mut seen_by_b = None;
            let ended = dies_after(second, || {
                pair.change(B, &all_but(&[A]), &mut seen_by_b);
            });
            let owner = pair.lock.owner.load(Ordering::Relaxed);
            let mut seen_by_c = None;
            pair.change(C, &all_but(&[A, B]), &mut seen_by_c);
            let expected = match owner {
                0 => None,
                word => Some(InstanceId::from_word(word)),
            };
            assert_eq!(seen_by_c, expected, "deaths before {first} and {second}");
            if seen_by_b.is_some() && owner == A.word() {
                // Not declared repaired: C heard of A, not of B, which never changed anything
                // under its own name.
                assert_eq!(seen_by_c, Some(A));
            }
            assert_eq!(pair.lock().inspect(&all_but(&[A, B])), LockState::Free);
            assert_eq!(pair.lock.recoverer.load(Ordering::Relaxed), 0);
            if ended == Ended::Completed(()) {
                assert!(second >= 4);
                break;
            }
        }
    }
}

#[test]
fn a_repair_that_is_given_up_leaves_the_lock_orphaned() {
    let pair = Pair::default();
    let _ = dies_after(2, || pair.change(A, &all_but(&[]), &mut None));
    for _ in 0..3 {
        let Ok(Acquired::Orphaned(orphan)) = pair.lock().try_lock(B, &all_but(&[A])) else {
            panic!("expected an orphan")
        };
        assert_eq!(orphan.previous(), A);
        let state = pair.lock().inspect(&all_but(&[A]));
        let (previous, recoverer) = (A, Some(B));
        assert_eq!(
            state,
            LockState::Orphaned {
                previous,
                recoverer
            }
        );
    }
    assert!(!pair.is_consistent());
}

#[test]
fn while_one_repairs_the_others_wait() {
    let pair = Pair::default();
    let _ = dies_after(2, || pair.change(A, &all_but(&[]), &mut None));
    let judge = all_but(&[A]);
    let orphan = pair.lock().try_lock(B, &judge).unwrap();
    let error = pair.lock().try_lock(C, &judge).unwrap_err();
    assert!(matches!(error, LockError::Timeout { holder, .. } if holder == B));
    let error = pair
        .lock()
        .lock_timeout(C, &judge, Duration::from_millis(20))
        .unwrap_err();
    assert!(matches!(error, LockError::Timeout { waited, .. } if waited.as_millis() >= 20));
    drop(orphan);
    let _ = pair.lock().try_lock(C, &judge).unwrap();
}

#[test]
fn a_restarted_singleton_resolves_its_own_hold_at_any_death() {
    let everybody = all_but(&[]);
    for at in 0..=4 {
        let pair = Pair::default();
        let ended = dies_after(at, || pair.change(A, &everybody, &mut None));
        // The same instance again: for everybody else it never died.
        let own = pair.lock().resolve_own(A, &everybody).unwrap();
        assert_eq!(own.is_some(), at >= 1 && ended == Ended::Died, "{at}");
        if let Some(orphan) = own {
            assert_eq!(orphan.previous(), A);
            pair.repair();
            drop(orphan.repaired().unwrap());
        }
        pair.change(A, &everybody, &mut None);
        pair.change(B, &everybody, &mut None);
    }
    // It dies while it repairs another's hold, and is started again.
    for at in 0.. {
        let pair = Pair::default();
        let _ = dies_after(2, || pair.change(C, &everybody, &mut None));
        let judge = all_but(&[C]);
        let ended = dies_after(at, || pair.change(A, &judge, &mut None));
        if let Some(orphan) = pair.lock().resolve_own(A, &judge).unwrap() {
            pair.repair();
            drop(orphan.repaired().unwrap());
        }
        pair.change(A, &judge, &mut None);
        pair.change(B, &judge, &mut None);
        if ended == Ended::Completed(()) {
            break;
        }
    }
}

#[test]
fn asking_twice_is_an_error_and_not_a_hang() {
    let pair = Pair::default();
    let everybody = all_but(&[]);
    let guard = pair.lock().lock(A, &everybody).unwrap();
    let error = pair.lock().lock(A, &everybody).unwrap_err();
    assert_eq!(error, LockError::Deadlock(A));
    drop(guard);
    let _ = dies_after(2, || pair.change(B, &everybody, &mut None));
    let orphan = pair.lock().lock(A, &all_but(&[B])).unwrap();
    let error = pair.lock().lock(A, &all_but(&[B])).unwrap_err();
    assert_eq!(error, LockError::Deadlock(A));
    drop(orphan);
    let none = pair.lock().lock(InstanceId::NONE, &everybody).unwrap_err();
    assert_eq!(none, LockError::NoInstance(InstanceId::NONE));
}

#[test]
fn one_that_was_declared_dead_learns_it_and_frees_nobody_elses_hold() {
    let pair = Pair::default();
    let Acquired::Clean(zombie) = pair.lock().lock(A, &all_but(&[])).unwrap() else {
        panic!("the lock was new")
    };
    let Acquired::Orphaned(orphan) = pair.lock().lock(B, &all_but(&[A])).unwrap() else {
        panic!("A is dead")
    };
    let guard = orphan.repaired().unwrap();
    assert_eq!(zombie.unlock(), Err(LockError::Lost(A)));
    assert_eq!(pair.lock().inspect(&all_but(&[A])), LockState::Held(B));
    guard.unlock().unwrap();
}

#[test]
fn garbage_in_the_words_never_holds_the_lock_for_ever() {
    for word in [1, u64::MAX, 0xdead_beef_0000_0001] {
        let pair = Pair::default();
        pair.lock.owner.store(word, Ordering::Relaxed);
        pair.lock.recoverer.store(!word, Ordering::Relaxed);
        let judge = |instance| [A, B].contains(&instance);
        let acquired = pair.lock().lock(A, &judge).unwrap();
        assert!(matches!(acquired, Acquired::Orphaned(_)));
    }
}

/// Threads that die at random stores and come back under new generations, all at once.
#[test]
fn many_deaths_at_once_lose_no_change() {
    const THREADS: u32 = 4;
    let pair = Pair::default();
    let dead = RwLock::new(HashSet::new());
    let judge =
        |instance: InstanceId| !instance.is_none() && !dead.read().unwrap().contains(&instance);
    let inside = AtomicBool::new(false);
    let (changes, deaths) = (AtomicU64::new(0), AtomicU32::new(0));
    let barrier = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for id in 1..=THREADS {
            let (pair, judge, dead, inside) = (&pair, &judge, &dead, &inside);
            let (changes, deaths, barrier) = (&changes, &deaths, &barrier);
            scope.spawn(move || {
                let mut random = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut generation = 1;
                barrier.wait();
                let end = Instant::now() + Duration::from_millis(700);
                while Instant::now() < end {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let me = InstanceId::new(id, generation);
                    let ended = dies_after(random % 40, || {
                        loop {
                            let guard = pair.lock().lock(me, judge).unwrap().or_repair(|_| {
                                pair.repair();
                                Ok::<_, LockError>(())
                            });
                            let guard = guard.unwrap();
                            assert!(!inside.swap(true, Ordering::SeqCst), "two inside");
                            assert!(pair.is_consistent());
                            let next = pair.left.load(Ordering::Relaxed) + 1;
                            inside.store(false, Ordering::SeqCst);
                            store64(&pair.left, next, Ordering::Relaxed);
                            changes.fetch_add(1, Ordering::Relaxed);
                            store64(&pair.right, next, Ordering::Relaxed);
                            guard.unlock().unwrap();
                        }
                    });
                    let ended: Ended<()> = ended;
                    assert_eq!(ended, Ended::Died);
                    dead.write().unwrap().insert(me);
                    deaths.fetch_add(1, Ordering::Relaxed);
                    generation += 1;
                }
            });
        }
    });
    let total = changes.load(Ordering::Relaxed);
    assert_eq!(pair.left.load(Ordering::Relaxed), total);
    assert!(deaths.load(Ordering::Relaxed) > 100);
}
