use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::{Access, Mapping};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Barrier, Mutex, RwLock};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const D: InstanceId = InstanceId::new(9, 1);
const LOCK: u64 = 64;
const LEFT: u64 = 128;
const RIGHT: u64 = 192;
const NODES: u64 = 4096;
/// Many more than threads: where each death follows the other, those behind the dead die before
/// they have gone past them.
const COUNT: u16 = 48;
/// Stores until a waiter stands in the queue: node claimed, lock noted, tail tried in vain, place in
/// front noted, tail swapped.
const LINKED: u64 = 5;

/// A pair that is equal outside of critical sections.
struct Pair(Mapping);

impl Pair {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        Self(Mapping::new(&file, 0, 8192, Access::ReadWrite).unwrap())
    }

    fn nodes(&self) -> McsNodes<'_> {
        McsNodes::new(&self.0, NODES, COUNT).unwrap()
    }

    fn lock(&self) -> McsLock<'_> {
        McsLock::new(self.nodes(), LOCK).unwrap()
    }

    fn join(&self, me: InstanceId) -> McsWaiter<'_> {
        self.nodes().join(me, &|_| true).unwrap()
    }

    fn halves(&self) -> (&AtomicU64, &AtomicU64) {
        (self.0.get(LEFT).unwrap(), self.0.get(RIGHT).unwrap())
    }

    fn is_consistent(&self) -> bool {
        let (left, right) = self.halves();
        left.load(Ordering::Relaxed) == right.load(Ordering::Relaxed)
    }

    fn repair(&self) {
        let (left, right) = self.halves();
        store64(right, left.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn work(&self) {
        let (left, right) = self.halves();
        assert!(self.is_consistent(), "somebody was let in to broken data");
        let next = left.load(Ordering::Relaxed) + 1;
        store64(left, next, Ordering::Relaxed);
        store64(right, next, Ordering::Relaxed);
    }

    /// Joins, locks, repairs if need be, changes both halves, releases, leaves. Returns of whom
    /// the lock was orphaned.
    fn change(&self, me: InstanceId, judge: &impl Liveness) -> Option<InstanceId> {
        let mut seen = None;
        let mut waiter = self.nodes().join(me, judge).expect("there are nodes");
        self.lock()
            .lock(&mut waiter, judge)
            .expect("somebody alive always gets the lock")
            .or_repair(|previous| {
                seen = Some(previous);
                self.repair();
                Ok::<_, LockError>(())
            })
            .map(|guard| {
                self.work();
                guard.unlock().expect("nobody declared the holder dead");
            })
            .expect("nobody declared the repairer dead");
        seen
    }

    /// The lock is free, goes on being one, and no node is lost.
    fn audit(&self, judge: &impl Liveness) {
        assert!(self.is_consistent());
        assert_eq!(self.lock().inspect(judge), Some(LockState::Free));
        assert_eq!(self.change(D, judge), None);
        let all: Vec<_> = (0..COUNT)
            .map(|_| self.nodes().join(D, judge).expect("every node is usable"))
            .collect();
        let none = self.nodes().join(D, judge).unwrap_err();
        assert!(matches!(none, LockError::NoNode { nodes: COUNT, .. }));
        drop(all);
        assert_eq!(self.nodes().in_use(), 0);
        assert_eq!(self.change(D, judge), None);
    }

    /// Enters the queue as `me` and dies there, on another thread.
    fn dies_waiting(&self, me: InstanceId, judge: &(impl Liveness + Sync)) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Its next store announces its sleep, or gives up.
                let ended = dies_after(LINKED, || {
                    let mut waiter = self.nodes().join(me, judge).unwrap();
                    let _ = self
                        .lock()
                        .lock_timeout(&mut waiter, judge, Duration::from_micros(50));
                });
                assert_eq!(ended, Ended::Died);
            });
        });
    }

    fn tail(&self) -> u64 {
        self.lock().words.tail.load(Ordering::Relaxed)
    }
}

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + Sync + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

#[test]
fn after_a_death_at_any_store_the_next_gets_in_and_knows() {
    let (_, stores) = count(|| Pair::new().change(A, &all_but(&[])));
    // Claim, lock noted, tail tried and taken; both halves; release, node given back.
    assert_eq!(stores, 8);
    for at in 0..=stores {
        let pair = Pair::new();
        let ended = dies_after(at, || pair.change(A, &all_but(&[])));
        assert_eq!(ended == Ended::Died, at < stores);
        let seen = pair.change(B, &all_but(&[A]));
        let inside = (4..=6).contains(&at);
        assert_eq!(seen, inside.then_some(A), "death before store {at}");
        pair.audit(&all_but(&[A]));
    }
}

#[test]
fn the_recoverer_may_die_at_any_store_too_and_the_first_name_is_kept() {
    for first in 0..=8 {
        for second in 0.. {
            let pair = Pair::new();
            let _ = dies_after(first, || pair.change(A, &all_but(&[])));
            let broken = !pair.is_consistent();
            let judge = all_but(&[A]);
            let ended = dies_after(second, || pair.change(B, &judge));
            let still_broken = !pair.is_consistent();
            let before = pair.lock().inspect(&all_but(&[A, B]));
            let seen = pair.change(C, &all_but(&[A, B]));
            let context = format!("deaths before {first} and {second}");
            match before {
                Some(LockState::Orphaned { previous, .. }) => {
                    assert_eq!(seen, Some(previous), "{context}");
                }
                _ => assert_eq!(seen, None, "{context}"),
            }
            if still_broken {
                // Half of A's change, or of B's own, and nothing else.
                assert!(
                    seen.is_some_and(|who| broken && who == A || who == B),
                    "{context}"
                );
            }
            pair.audit(&all_but(&[A, B]));
            if ended != Ended::Died {
                break;
            }
        }
    }
}

/// A waiter that gives up, with somebody dead behind it or not, behind a holder that lives or
/// died, and that dies itself before any of its stores.
#[test]
fn a_waiter_may_die_at_any_store_of_waiting_and_of_giving_up() {
    for (holder_dies, follower) in [(false, false), (false, true), (true, false), (true, true)] {
        for at in 0.. {
            let pair = Pair::new();
            let everybody = all_but(&[]);
            let mut holder = pair.join(A);
            let guard = pair.lock().lock(&mut holder, &everybody).unwrap();
            let dead: &[InstanceId] = if holder_dies { &[A, C] } else { &[C] };
            // Before the holder is found dead, it looks alive twice.
            let asked = Cell::new(0);
            let judge = |instance: InstanceId| {
                asked.set(asked.get() + 1);
                if asked.get() == 1 && follower {
                    pair.dies_waiting(C, &all_but(&[]));
                }
                asked.get() <= 2 || !dead.contains(&instance)
            };
            let ended = dies_after(at, || {
                let mut waiter = pair.join(B);
                let timeout = Duration::from_micros(100);
                match pair.lock().lock_timeout(&mut waiter, &judge, timeout) {
                    Err(LockError::Timeout { .. }) => {}
                    // Dropped: given up.
                    Ok(Acquired::Orphaned(orphan)) => assert_eq!(orphan.previous(), A),
                    other => panic!("{other:?}"),
                }
            });
            let context = format!("{holder_dies} {follower} {at}");
            let seen = if holder_dies {
                std::mem::forget(guard);
                std::mem::forget(holder);
                pair.change(D, &all_but(&[A, B, C]))
            } else {
                drop(guard);
                drop(holder);
                pair.change(D, &all_but(&[B, C]))
            };
            assert_eq!(seen, holder_dies.then_some(A), "{context}");
            pair.audit(&all_but(&[A, B, C]));
            if ended == Ended::Completed(()) {
                assert!(at > LINKED, "{context}");
                break;
            }
        }
    }
}

/// A survivor behind two dead waiters and a dead holder dies at any store of its way to the
/// front; the next one finishes.
#[test]
fn going_past_the_dead_may_end_at_any_store() {
    for at in 0.. {
        let pair = Pair::new();
        let judge = all_but(&[]);
        // Claims, notes, enters, and changes one half.
        let _ = dies_after(4, || pair.change(A, &judge));
        let (x, y) = (InstanceId::new(5, 1), InstanceId::new(6, 1));
        pair.dies_waiting(x, &judge);
        pair.dies_waiting(y, &judge);
        let ended = dies_after(at, || pair.change(B, &all_but(&[A, x, y])));
        let dead = [A, B, x, y];
        let seen = pair.change(C, &all_but(&dead));
        match ended {
            Ended::Completed(by_b) => assert_eq!((by_b, seen), (Some(A), None)),
            Ended::Died => assert!([None, Some(A), Some(B)].contains(&seen), "{at}"),
        }
        pair.audit(&all_but(&dead));
        if ended != Ended::Died {
            break;
        }
    }
}

#[test]
fn the_order_is_kept_past_the_dead_and_those_who_give_up() {
    let pair = Pair::new();
    let dead: Vec<_> = [3, 6, 7].map(|id| InstanceId::new(id, 1)).into();
    let judge = all_but(&dead);
    let order = Mutex::new(Vec::new());
    let gave_up = AtomicBool::new(false);
    let mut holder = pair.join(D);
    let guard = pair.lock().lock(&mut holder, &judge).unwrap();
    std::thread::scope(|scope| {
        for id in 1..=10 {
            let before = pair.tail();
            let me = InstanceId::new(id, 1);
            let (pair, judge, order, gave_up) = (&pair, &judge, &order, &gave_up);
            scope.spawn(move || {
                if me == D {
                    return;
                }
                let wait = || {
                    let mut waiter = pair.join(me);
                    let timeout = if id == 5 { 50 } else { 60_000 };
                    let timeout = Duration::from_millis(timeout);
                    match pair.lock().lock_timeout(&mut waiter, judge, timeout) {
                        Ok(guard) => {
                            order.lock().unwrap().push(id);
                            drop(guard);
                        }
                        Err(error) => {
                            assert!(matches!(error, LockError::Timeout { holder: D, .. }));
                            assert_eq!(id, 5);
                            gave_up.store(true, Ordering::Relaxed);
                        }
                    }
                };
                let stores = if judge(me) { u64::MAX } else { LINKED };
                let ended = dies_after(stores, wait);
                assert_eq!(ended == Ended::Died, !judge(me));
            });
            // One that gives up before another comes leaves the tail as it was.
            while me != D && pair.tail() == before && !(id == 5 && gave_up.load(Ordering::Relaxed))
            {
                std::thread::yield_now();
            }
        }
        while !gave_up.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        assert!(order.lock().unwrap().is_empty());
        drop(guard);
    });
    assert_eq!(*order.lock().unwrap(), [1, 2, 4, 8, 10]);
    drop(holder);
    pair.audit(&judge);
}

#[test]
fn while_one_repairs_the_others_wait() {
    let pair = Pair::new();
    let _ = dies_after(4, || pair.change(A, &all_but(&[])));
    let judge = all_but(&[A]);
    for _ in 0..3 {
        let (mut b, mut c) = (pair.join(B), pair.join(C));
        let orphan = pair.lock().try_lock(&mut b, &judge).unwrap();
        assert!(matches!(&orphan, Acquired::Orphaned(o) if o.previous() == A));
        let (previous, recoverer) = (A, Some(B));
        let state = LockState::Orphaned {
            previous,
            recoverer,
        };
        assert_eq!(pair.lock().inspect(&judge), Some(state));
        let error = pair.lock().try_lock(&mut c, &judge).unwrap_err();
        assert!(matches!(error, LockError::Timeout { holder: B, .. }));
        let timeout = Duration::from_millis(10);
        let error = pair.lock().lock_timeout(&mut c, &judge, timeout);
        let error = error.unwrap_err();
        assert!(matches!(error, LockError::Timeout { holder: B, waited } if waited >= timeout));
        // Let go without a repair.
        drop(orphan);
    }
    assert_eq!(pair.change(C, &judge), Some(A));
    pair.audit(&judge);
}

#[test]
fn asking_twice_is_an_error_and_not_a_hang() {
    let pair = Pair::new();
    let everybody = all_but(&[]);
    let (mut first, mut second) = (pair.join(A), pair.join(A));
    let guard = pair.lock().lock(&mut first, &everybody).unwrap();
    let error = pair.lock().lock(&mut second, &everybody).unwrap_err();
    assert_eq!(error, LockError::Deadlock(A));
    // Also with somebody between.
    pair.dies_waiting(B, &everybody);
    let error = pair.lock().lock(&mut second, &everybody).unwrap_err();
    assert_eq!(error, LockError::Deadlock(A));
    drop(guard);
    drop((first, second));
    let none = pair.nodes().join(InstanceId::NONE, &everybody).unwrap_err();
    assert_eq!(none, LockError::NoInstance(InstanceId::NONE));
    assert_eq!(pair.change(C, &all_but(&[B])), None);
    pair.audit(&all_but(&[B]));
}

#[test]
fn one_that_was_declared_dead_learns_it_and_frees_nobody_elses_hold() {
    let pair = Pair::new();
    let (mut a, mut b) = (pair.join(A), pair.join(B));
    let zombie = pair.lock().lock(&mut a, &all_but(&[])).unwrap();
    let zombie = zombie.or_repair(|_| Err(LockError::NoInstance(A))).unwrap();
    let judge = all_but(&[A]);
    let guard = pair.lock().lock(&mut b, &judge).unwrap();
    let guard = guard.or_repair(|_| Ok::<_, LockError>(())).unwrap();
    assert_eq!(zombie.unlock(), Err(LockError::Lost(A)));
    assert_eq!(pair.lock().inspect(&judge), Some(LockState::Held(B)));
    guard.unlock().unwrap();
    drop((a, b));
    pair.audit(&judge);
}

#[test]
fn a_forgotten_guard_holds_its_lock_and_spoils_no_other() {
    let pair = Pair::new();
    let judge = all_but(&[]);
    let other = McsLock::new(pair.nodes(), 256).unwrap();
    let mut a = pair.join(A);
    std::mem::forget(pair.lock().lock(&mut a, &judge).unwrap());
    drop(other.lock(&mut a, &judge).unwrap());
    drop(a);
    assert_eq!(pair.lock().inspect(&judge), Some(LockState::Held(A)));
    assert_eq!(pair.change(B, &all_but(&[A])), Some(A));
    pair.audit(&all_but(&[A]));
}

#[test]
fn garbage_is_named_and_hangs_nobody() {
    let judge = all_but(&[A]);
    for word in [1, u64::MAX, 0xdead_beef_0000_0001] {
        let pair = Pair::new();
        pair.lock().words.tail.store(word, Ordering::Relaxed);
        let mut b = pair.join(B);
        let error = pair.lock().lock(&mut b, &judge).unwrap_err();
        assert!(matches!(error, LockError::Corrupt { word: w, .. } if w == word));
        assert_eq!(pair.lock().inspect(&judge), None);
        // A dead waiter that names garbage in front.
        let pair = Pair::new();
        let _ = dies_after(4, || pair.change(A, &judge));
        let nodes = &pair
            .0
            .get_slice::<McsNodeWords>(NODES, COUNT.into())
            .unwrap();
        let node = nodes.iter().find(|n| n.owner.load(Ordering::Relaxed) != 0);
        node.unwrap().pred.store(word, Ordering::Relaxed);
        let mut b = pair.join(B);
        let error = pair.lock().lock(&mut b, &judge).unwrap_err();
        assert!(matches!(error, LockError::Corrupt { word: w, .. } if w == word));
    }
    // Dead waiters in a ring.
    let pair = Pair::new();
    let _ = dies_after(4, || pair.change(A, &judge));
    let nodes = pair
        .0
        .get_slice::<McsNodeWords>(NODES, COUNT.into())
        .unwrap();
    let node = nodes.iter().find(|n| n.owner.load(Ordering::Relaxed) != 0);
    node.unwrap().pred.store(pair.tail(), Ordering::Relaxed);
    assert_eq!(pair.lock().inspect(&judge), None);
    pair.change(B, &judge);
}

/// Threads that die at random stores or give up, and come back under new generations.
#[test]
fn many_deaths_at_once_lose_no_change_and_no_node() {
    const THREADS: u32 = 4;
    let pair = Pair::new();
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
                    let ended = dies_after(random % 50, || {
                        let mut waiter = pair.nodes().join(me, judge).unwrap();
                        loop {
                            let timeout = Duration::from_micros(random % 400);
                            let guard = pair.lock().lock_timeout(&mut waiter, judge, timeout);
                            if let Err(LockError::Timeout { .. }) = guard {
                                continue;
                            }
                            let guard = guard.unwrap().or_repair(|_| {
                                pair.repair();
                                Ok::<_, LockError>(())
                            });
                            let guard = guard.unwrap();
                            assert!(!inside.swap(true, Ordering::SeqCst), "two inside");
                            assert!(pair.is_consistent());
                            let (left, right) = pair.halves();
                            let next = left.load(Ordering::Relaxed) + 1;
                            inside.store(false, Ordering::SeqCst);
                            store64(left, next, Ordering::Relaxed);
                            changes.fetch_add(1, Ordering::Relaxed);
                            store64(right, next, Ordering::Relaxed);
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
    assert!(deaths.load(Ordering::Relaxed) > 100);
    if !pair.is_consistent() {
        assert!(pair.change(D, &|who| who == D).is_some());
        assert_eq!(pair.halves().0.load(Ordering::Relaxed), total + 1);
    } else {
        assert_eq!(pair.halves().0.load(Ordering::Relaxed), total);
        pair.change(D, &|who| who == D);
    }
    pair.audit(&|who| who == D);
}
