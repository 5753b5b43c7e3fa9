use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::{Access, Mapping};
use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Barrier, RwLock as StdRwLock};

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const D: InstanceId = InstanceId::new(9, 1);

/// A pair that is equal while nobody writes.
struct Pair(Mapping);

impl Pair {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Self(Mapping::new(&file, 0, 4096, Access::ReadWrite).unwrap())
    }

    fn lock(&self) -> RwLock<'_> {
        RwLock::new(self.0.get(0).unwrap())
    }

    fn halves(&self) -> (&AtomicU64, &AtomicU64) {
        (self.0.get(1024).unwrap(), self.0.get(1088).unwrap())
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
        assert!(self.is_consistent(), "a writer was let in to broken data");
        let next = left.load(Ordering::Relaxed) + 1;
        store64(left, next, Ordering::Relaxed);
        store64(right, next, Ordering::Relaxed);
    }

    /// Locks, repairs if need be, changes both halves, releases. Returns of whom it was orphaned.
    fn change(&self, me: InstanceId, judge: &impl Liveness) -> Option<InstanceId> {
        let mut seen = None;
        let guard = self
            .lock()
            .write(me, judge)
            .expect("somebody alive always gets the lock")
            .or_repair(|previous| {
                seen = Some(previous);
                self.repair();
                Ok::<_, LockError>(())
            })
            .expect("nobody declared the repairer dead");
        self.work();
        guard.unlock().expect("nobody declared the holder dead");
        seen
    }

    fn look(&self, me: InstanceId, judge: &impl Liveness) -> Option<InstanceId> {
        let mut seen = None;
        let guard = self
            .lock()
            .read(me, judge)
            .expect("somebody alive always gets the lock")
            .or_repair(judge, |previous| {
                seen = Some(previous);
                self.repair();
                Ok::<_, LockError>(())
            })
            .expect("nobody declared the repairer dead");
        assert!(self.is_consistent(), "a reader was let in to broken data");
        guard.unlock().expect("nobody declared the reader dead");
        seen
    }

    fn audit(&self, judge: &impl Liveness) {
        assert!(self.is_consistent());
        assert_eq!(self.lock().inspect(judge), LockState::Free);
        assert_eq!(self.lock().readers(judge), []);
        assert_eq!(self.look(D, judge), None);
        assert_eq!(self.change(D, judge), None);
        let taken = |slot: &&AtomicU64| slot.load(Ordering::Relaxed) != 0;
        assert_eq!(self.lock().words.readers.iter().filter(taken).count(), 0);
    }
}

fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + Sync + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

#[test]
fn after_a_writers_death_at_any_store_the_next_gets_in_and_knows() {
    let (_, stores) = count(|| Pair::new().change(A, &all_but(&[])));
    assert_eq!(stores, 4); // Owner, both halves, owner.
    for next_reads in [false, true] {
        for at in 0..=stores {
            let pair = Pair::new();
            let _ = dies_after(at, || pair.change(A, &all_but(&[])));
            let judge = all_but(&[A]);
            let seen = match next_reads {
                true => pair.look(B, &judge),
                false => pair.change(B, &judge),
            };
            let inside = at >= 1 && at < stores;
            assert_eq!(seen, inside.then_some(A), "death before store {at}");
            pair.audit(&judge);
        }
    }
}

#[test]
fn a_reader_may_die_at_any_store_and_holds_up_nobody() {
    for at in 0.. {
        let pair = Pair::new();
        let ended = dies_after(at, || pair.look(A, &all_but(&[])));
        let judge = all_but(&[A]);
        assert_eq!(pair.look(B, &judge), None);
        assert_eq!(pair.change(C, &judge), None);
        pair.audit(&judge);
        if ended != Ended::Died {
            assert_eq!(at, 2); // The slot, twice.
            break;
        }
    }
}

#[test]
fn the_recoverer_may_die_at_any_store_too_and_the_first_name_is_kept() {
    for reads in [false, true] {
        for first in 0..=4 {
            for second in 0.. {
                let pair = Pair::new();
                let _ = dies_after(first, || pair.change(A, &all_but(&[])));
                let judge = all_but(&[A]);
                let ended = dies_after(second, || match reads {
                    true => pair.look(B, &judge),
                    false => pair.change(B, &judge),
                });
                let judge = all_but(&[A, B]);
                let before = pair.lock().inspect(&judge);
                let seen = pair.change(C, &judge);
                let context = format!("deaths before {first} and {second}");
                match before {
                    LockState::Orphaned { previous, .. } => {
                        assert_eq!(seen, Some(previous), "{context}");
                    }
                    _ => assert_eq!(seen, None, "{context}"),
                }
                pair.audit(&judge);
                if ended != Ended::Died {
                    break;
                }
            }
        }
    }
}

#[test]
fn readers_share_and_writers_do_not() {
    let pair = Pair::new();
    let judge = all_but(&[]);
    let first = pair.lock().try_read(A, &judge).unwrap();
    let second = pair.lock().try_read(B, &judge).unwrap();
    assert_eq!(pair.lock().readers(&judge).len(), 2);
    let error = pair.lock().try_write(C, &judge).unwrap_err();
    assert!(matches!(error, LockError::Timeout { holder, .. } if holder == A || holder == B));
    // Giving up lets readers in again.
    drop(pair.lock().try_read(C, &judge).unwrap());
    drop(first);
    let timeout = Duration::from_millis(5);
    let error = pair.lock().write_timeout(C, &judge, timeout).unwrap_err();
    assert!(matches!(error, LockError::Timeout { holder: B, waited } if waited >= timeout));
    drop(second);
    let writer = pair.lock().try_write(C, &judge).unwrap();
    let error = pair.lock().try_read(A, &judge).unwrap_err();
    assert!(matches!(error, LockError::Timeout { holder: C, .. }));
    let error = pair.lock().read_timeout(A, &judge, timeout).unwrap_err();
    assert!(matches!(error, LockError::Timeout { holder: C, waited } if waited >= timeout));
    assert_eq!(pair.lock().readers(&judge), []);
    let Acquired::Clean(writer) = writer else {
        panic!("nobody died")
    };
    let reader = RwLock::downgrade(writer, &judge).unwrap();
    drop(pair.lock().try_read(A, &judge).unwrap());
    assert!(pair.lock().try_write(A, &judge).is_err());
    drop(reader);
    pair.audit(&judge);
}

#[test]
fn dead_readers_make_room_and_the_living_are_waited_for() {
    let pair = Pair::new();
    let judge = all_but(&[]);
    let dead: Vec<_> = (1..=MAX_READERS as u32)
        .map(|id| InstanceId::new(id, 7))
        .collect();
    for reader in &dead {
        std::mem::forget(pair.lock().try_read(*reader, &judge).unwrap());
    }
    let full = pair.lock().try_read(A, &judge).unwrap_err();
    assert!(matches!(full, LockError::Timeout { .. }));
    let judge = all_but(&dead);
    let reader = pair.lock().try_read(A, &judge).unwrap();
    assert!(pair.lock().try_write(B, &judge).is_err());
    drop(reader);
    pair.audit(&judge);
}

/// The writer dies while it waits for a reader: whoever comes next still waits for that reader.
#[test]
fn a_recoverer_waits_for_the_readers_that_its_predecessor_waited_for() {
    for reads in [false, true] {
        let pair = Pair::new();
        let everybody = all_but(&[]);
        let reader = pair.lock().try_read(C, &everybody).unwrap();
        let ended = dies_after(1, || pair.lock().write(A, &everybody).map(drop));
        assert_eq!(ended, Ended::Died);
        let judge = all_but(&[A]);
        let error = match reads {
            true => pair.lock().try_read(B, &judge).map(drop),
            false => pair.lock().try_write(B, &judge).map(drop),
        };
        assert!(matches!(error, Err(LockError::Timeout { holder: C, .. })));
        let (previous, recoverer) = (A, None);
        let state = LockState::Orphaned {
            previous,
            recoverer,
        };
        assert_eq!(pair.lock().inspect(&judge), state);
        drop(reader);
        assert_eq!(pair.look(B, &judge), Some(A));
        pair.audit(&judge);
    }
}

#[test]
fn asking_twice_is_an_error_and_not_a_hang() {
    let pair = Pair::new();
    let judge = all_but(&[]);
    let writer = pair.lock().write(A, &judge).unwrap();
    assert_eq!(
        pair.lock().write(A, &judge).unwrap_err(),
        LockError::Deadlock(A)
    );
    assert_eq!(
        pair.lock().read(A, &judge).unwrap_err(),
        LockError::Deadlock(A)
    );
    drop(writer);
    let reader = pair.lock().read(A, &judge).unwrap();
    assert_eq!(
        pair.lock().write(A, &judge).unwrap_err(),
        LockError::Deadlock(A)
    );
    // A second time beside itself, but not behind a writer that waits for the first.
    drop(pair.lock().read(A, &judge).unwrap());
    std::mem::forget(pair.lock().side().lock(B, &judge).unwrap());
    assert_eq!(
        pair.lock().read(A, &judge).unwrap_err(),
        LockError::Deadlock(A)
    );
    drop(reader);
    let judge = all_but(&[B]);
    let orphan = pair.lock().read(A, &judge).unwrap();
    assert_eq!(
        pair.lock().read(A, &judge).unwrap_err(),
        LockError::Deadlock(A)
    );
    drop(orphan);
    let none = pair.lock().read(InstanceId::NONE, &judge).unwrap_err();
    assert_eq!(none, LockError::NoInstance(InstanceId::NONE));
    assert_eq!(pair.change(A, &judge), Some(B));
    pair.audit(&judge);
}

#[test]
fn those_that_were_declared_dead_learn_it() {
    let pair = Pair::new();
    let everybody = all_but(&[]);
    let ReadAcquired::Shared(reader) = pair.lock().read(A, &everybody).unwrap() else {
        panic!("nobody died")
    };
    let judge = all_but(&[A]);
    let guard = pair.lock().write(B, &judge).unwrap();
    assert_eq!(reader.unlock(), Err(LockError::Lost(A)));
    let Acquired::Clean(zombie) = guard else {
        panic!("readers leave no orphan")
    };
    let judge = all_but(&[A, B]);
    let ReadAcquired::Orphaned(orphan) = pair.lock().read(C, &judge).unwrap() else {
        panic!("B is dead")
    };
    let guard = orphan.repaired().unwrap();
    assert_eq!(zombie.unlock(), Err(LockError::Lost(B)));
    guard.unlock().unwrap();
    pair.audit(&judge);
}

#[test]
fn garbage_in_the_words_never_holds_the_lock_for_ever() {
    for word in [1, u64::MAX, 0xdead_beef_0000_0001] {
        let pair = Pair::new();
        let judge = |instance| [A, D].contains(&instance);
        let words = pair.lock().words;
        words.writer.owner.store(word, Ordering::Relaxed);
        words.writer.recoverer.store(!word, Ordering::Relaxed);
        for slot in &words.readers {
            slot.store(word, Ordering::Relaxed);
        }
        assert_eq!(pair.look(A, &judge), Some(InstanceId::from_word(word)));
        pair.audit(&judge);
    }
}

/// Readers and writers that die at random stores, and come back under new generations.
#[test]
fn many_deaths_at_once_lose_no_change() {
    const THREADS: u32 = 4;
    let pair = Pair::new();
    let dead = StdRwLock::new(HashSet::new());
    let judge =
        |instance: InstanceId| !instance.is_none() && !dead.read().unwrap().contains(&instance);
    let writing = AtomicBool::new(false);
    let (changes, deaths, looks) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let barrier = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for id in 1..=THREADS {
            let (pair, judge, dead, writing) = (&pair, &judge, &dead, &writing);
            let (changes, deaths, looks, barrier) = (&changes, &deaths, &looks, &barrier);
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
                    let mut coin = random;
                    let ended = dies_after(random % 40, || {
                        loop {
                            coin = coin.rotate_left(1);
                            if coin & 1 == 0 {
                                let guard = pair.lock().read(me, judge).unwrap();
                                let guard = guard.or_repair(judge, |_| {
                                    pair.repair();
                                    Ok::<_, LockError>(())
                                });
                                let guard = guard.unwrap();
                                assert!(!writing.load(Ordering::SeqCst), "beside a writer");
                                assert!(pair.is_consistent());
                                looks.fetch_add(1, Ordering::Relaxed);
                                guard.unlock().unwrap();
                                continue;
                            }
                            let guard = pair.lock().write(me, judge).unwrap().or_repair(|_| {
                                pair.repair();
                                Ok::<_, LockError>(())
                            });
                            let guard = guard.unwrap();
                            assert!(!writing.swap(true, Ordering::SeqCst), "two writers");
                            assert!(pair.is_consistent());
                            assert_eq!(
                                pair.lock().words.writer.owner.load(Ordering::Relaxed),
                                me.word()
                            );
                            writing.store(false, Ordering::SeqCst);
                            let (left, right) = pair.halves();
                            let next = left.load(Ordering::Relaxed) + 1;
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
    assert_eq!(pair.halves().0.load(Ordering::Relaxed), total);
    assert!(deaths.load(Ordering::Relaxed) > 100 && looks.load(Ordering::Relaxed) > 100);
    pair.look(D, &|who| who == D);
    pair.audit(&|who| who == D);
}
