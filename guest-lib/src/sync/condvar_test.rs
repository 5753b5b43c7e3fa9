use super::super::test_world::{A, B, C, Dead, Random, all_but};
use super::*;
use crate::lock::{LockState, RecoverableLock};
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::{load64, store64};
use lupin_abi::system::LockWords;

/// Items that producers add and consumers take.
#[derive(Default)]
struct Store {
    lock: LockWords,
    changed: CondvarWords,
    /// Written twice, so that a death in between shows.
    items: [AtomicU64; 2],
}

impl Store {
    fn lock(&self) -> RecoverableLock<'_> {
        RecoverableLock::new(&self.lock)
    }

    fn changed(&self) -> Condvar<'_> {
        Condvar::new(&self.changed)
    }

    fn items(&self) -> u64 {
        load64(&self.items[0], Ordering::Relaxed)
    }

    fn set(&self, items: u64) {
        store64(&self.items[0], items, Ordering::Relaxed);
        store64(&self.items[1], items, Ordering::Relaxed);
    }

    /// The first word decides.
    fn repair(&self) -> Result<(), LockError> {
        store64(&self.items[1], self.items(), Ordering::Relaxed);
        Ok(())
    }

    fn produce(&self, me: InstanceId, judge: &impl Liveness) {
        let guard = self.lock().lock(me, judge).unwrap();
        let guard = guard.or_repair(|_| self.repair()).unwrap();
        self.set(self.items() + 1);
        guard.unlock().unwrap();
        self.changed().notify_one();
    }

    fn consume(&self, me: InstanceId, judge: &impl Liveness) {
        let guard = self.lock().lock(me, judge).unwrap();
        let guard = guard.or_repair(|_| self.repair()).unwrap();
        let guard = self
            .changed()
            .wait_while(guard, judge, || self.items() == 0, |_| self.repair())
            .unwrap();
        assert_eq!(self.items(), load64(&self.items[1], Ordering::Relaxed));
        self.set(self.items() - 1);
        guard.unlock().unwrap();
    }
}

#[test]
fn a_notifier_that_dies_at_any_store_leaves_no_waiter_behind() {
    let everybody = all_but(&[]);
    let (_, stores) = count(|| Store::default().produce(A, &everybody));
    assert!(stores >= 5, "{stores}");
    for at in 0..=stores {
        let store = Store::default();
        let dead = Dead::default();
        let judge = |instance| dead.is_alive(instance);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| store.consume(B, &judge));
            while store.lock().inspect(&judge) != LockState::Free {
                std::thread::yield_now();
            }
            let ended = dies_after(at, || store.produce(A, &judge));
            dead.add(A);
            let begin = Instant::now();
            if store.items() == 0 && ended == Ended::Died {
                // It died before it had produced anything: the waiter waits for the next.
                store.produce(C, &judge);
            }
            waiter.join().unwrap();
            assert!(begin.elapsed() < 10 * RECHECK, "death before store {at}");
        });
        assert_eq!(store.items(), 0);
        assert_eq!(store.lock().inspect(&judge), LockState::Free);
    }
}

#[test]
fn a_waiter_that_dies_at_any_store_takes_nothing_with_it() {
    let everybody = all_but(&[]);
    for at in 0.. {
        for again in 0.. {
            let store = Store::default();
            // One wait without a notification, then the item is there.
            let waits = |me, judge: &dyn Fn(InstanceId) -> bool| {
                let guard = store.lock().lock(me, &judge).unwrap();
                let guard = guard.or_repair(|_| store.repair()).unwrap();
                let woken = store.changed().wait_timeout(guard, &judge, Duration::ZERO);
                let guard = woken
                    .unwrap()
                    .acquired
                    .or_repair(|_| store.repair())
                    .unwrap();
                store.set(store.items() + 1);
                guard.unlock().unwrap();
            };
            let first = dies_after(at, || waits(A, &everybody));
            let second = dies_after(again, || waits(B, &all_but(&[A])));
            let judge = all_but(&[A, B]);
            let before = store.items();
            store.produce(C, &judge);
            for _ in 0..=before {
                store.consume(C, &judge);
            }
            assert_eq!(store.items(), 0, "deaths before {at} and {again}");
            assert_eq!(store.lock().inspect(&judge), LockState::Free);
            if second != Ended::Died {
                if first != Ended::Died {
                    return;
                }
                break;
            }
        }
    }
}

#[test]
fn a_timeout_is_told_and_the_lock_is_held_again() {
    let store = Store::default();
    let everybody = all_but(&[]);
    let guard = store.lock().lock(A, &everybody).unwrap();
    let Acquired::Clean(guard) = guard else {
        panic!("the lock was new")
    };
    let begin = Instant::now();
    let timeout = Duration::from_millis(20);
    let woken = store
        .changed()
        .wait_timeout(guard, &everybody, timeout)
        .unwrap();
    assert!(woken.timed_out && begin.elapsed() >= timeout);
    assert_eq!(store.lock().inspect(&everybody), LockState::Held(A));
    drop(woken);
    assert_eq!(store.lock().inspect(&everybody), LockState::Free);
}

#[test]
fn one_that_was_declared_dead_does_not_wait() {
    let store = Store::default();
    let Acquired::Clean(zombie) = store.lock().lock(A, &all_but(&[])).unwrap() else {
        panic!("the lock was new")
    };
    let Acquired::Orphaned(orphan) = store.lock().lock(B, &all_but(&[A])).unwrap() else {
        panic!("A is dead")
    };
    let guard = orphan.repaired().unwrap();
    let lost = store.changed().wait(zombie, &all_but(&[A]));
    assert_eq!(lost.map(|_| ()), Err(LockError::Lost(A)));
    guard.unlock().unwrap();
}

/// Two that take turns: each turn is one notification, and each lost one would cost `RECHECK`.
#[test]
fn no_notification_is_lost() {
    const TURNS: u64 = 4_000;
    let store = Store::default();
    let everybody = all_but(&[]);
    let begin = Instant::now();
    let mut rechecks = 0;
    std::thread::scope(|scope| {
        let turns = |me: InstanceId, parity: u64| {
            let (store, everybody) = (&store, &everybody);
            move || {
                let mut slow = 0;
                for _ in 0..TURNS {
                    let guard = store.lock().lock(me, everybody).unwrap();
                    let mut guard = guard.or_repair(|_| store.repair()).unwrap();
                    while store.items() % 2 != parity {
                        let asleep = Instant::now();
                        let woken = store.changed().wait(guard, everybody).unwrap();
                        slow += u32::from(asleep.elapsed() >= RECHECK);
                        guard = woken.or_repair(|_| store.repair()).unwrap();
                    }
                    store.set(store.items() + 1);
                    guard.unlock().unwrap();
                    store.changed().notify_all();
                }
                slow
            }
        };
        let other = scope.spawn(turns(A, 0));
        rechecks += turns(B, 1)();
        rechecks += other.join().unwrap();
    });
    assert_eq!(store.items(), 2 * TURNS);
    // A machine that does nothing else may still stop a thread that long, but not often.
    assert!(
        rechecks < 20,
        "{rechecks} of {TURNS} turns in {:?}",
        begin.elapsed()
    );
}

/// Producers and consumers that die at random stores: what was produced is consumed, no more and
/// no less.
#[test]
fn many_deaths_at_once_lose_no_item() {
    const ITEMS: u64 = 300;
    let store = Store::default();
    let dead = Dead::default();
    let judge = |instance: InstanceId| dead.is_alive(instance);
    let (produced, consumed) = (AtomicU64::new(0), AtomicU64::new(0));
    // The change counts from the moment that it is made; a death after that does not undo it.
    let until_done = |id: u32, counter: &AtomicU64, step: &dyn Fn(InstanceId)| {
        let mut random = Random::new(id);
        let mut generation = 1;
        while counter.load(Ordering::SeqCst) < ITEMS {
            let me = InstanceId::new(id, generation);
            if dies_after(random.next() % 12, || step(me)) == Ended::Died {
                dead.add(me);
                generation += 1;
            }
        }
    };
    let change = |me: InstanceId, counter: &AtomicU64, up: bool| {
        let guard = store.lock().lock(me, &judge).unwrap();
        let mut guard = guard.or_repair(|_| store.repair()).unwrap();
        while !up && store.items() == 0 && counter.load(Ordering::SeqCst) < ITEMS {
            guard = store
                .changed()
                .wait(guard, &judge)
                .unwrap()
                .or_repair(|_| store.repair())
                .unwrap();
        }
        if counter.load(Ordering::SeqCst) < ITEMS {
            let items = if up {
                store.items() + 1
            } else {
                store.items() - 1
            };
            store64(&store.items[0], items, Ordering::Relaxed);
            counter.fetch_add(1, Ordering::SeqCst);
            store64(&store.items[1], items, Ordering::Relaxed);
        }
        guard.unlock().unwrap();
        store.changed().notify_all();
    };
    std::thread::scope(|scope| {
        for id in 1..=4 {
            let up = id % 2 == 0;
            let counter = if up { &produced } else { &consumed };
            let (until_done, change) = (&until_done, &change);
            scope.spawn(move || until_done(id, counter, &|me| change(me, counter, up)));
        }
    });
    assert_eq!(
        (produced.into_inner(), consumed.into_inner()),
        (ITEMS, ITEMS)
    );
    assert_eq!(store.items(), 0);
}
