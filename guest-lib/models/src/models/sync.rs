//! Barrier, semaphore, once-cell and condition variable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::lock::{LockError, RecoverableLock};
use lupin::shm::Mapping;
use lupin::sync::barrier::{Barrier, BarrierError, Seat};
use lupin::sync::condvar::Condvar;
use lupin::sync::once::{OnceCell, OnceError};
use lupin::sync::semaphore::Semaphore;

use crate::cells::{get, put};
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "barrier.two",
        scene: || barrier(2, 2),
        loom: Some(LoomRun::new(1, 2).orders(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "barrier.one_round",
        scene: || barrier(2, 1),
        loom: Some(LoomRun::long(3).orders(2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "barrier.turns",
        scene: turns,
        loom: Some(LoomRun::long(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "barrier.three",
        scene: || barrier(3, 3),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "semaphore.one",
        scene: || semaphore(2, 1, 1),
        loom: Some(LoomRun::new(1, 3)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "semaphore.two",
        scene: || semaphore(4, 2, 2),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "once.two",
        scene: || once(2),
        loom: Some(LoomRun::new(2, 4)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "once.four",
        scene: || once(4),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "condvar.notify",
        scene: condvar,
        loom: Some(LoomRun::new(1, 2)),
        ..Model::WITH_DEATHS
    },
];

const AT: u64 = 256;

fn word(memory: &'static Mapping, at: u64) -> &'static AtomicU64 {
    memory.get(at).expect("in the memory")
}

/// Each member stores the round before it waits, and looks at all others' after it.
fn barrier(members: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let barrier = Barrier::at(memory, AT, members).expect("in the memory");
    // By round: whether it ended well, as the first who knew saw it.
    let outcomes: Arc<Mutex<Vec<Option<bool>>>> = Arc::new(Mutex::new(vec![None; rounds as usize]));
    for index in 0..members {
        let me = InstanceId::new(index + 1, 1);
        let everybody = |_: InstanceId| true;
        let mut seat = barrier.join(me, &everybody).expect("a seat");
        let outcomes = outcomes.clone();
        scene.actor(move |actor| {
            for round in 0..rounds {
                put(word(memory, u64::from(index) * 8), round + 1);
                let is_whole = match seat.wait(&actor.judge) {
                    Ok(passed) => {
                        assert_eq!(passed.round, round);
                        for other in 0..members {
                            let seen = get(word(memory, u64::from(other) * 8));
                            assert!(seen > round, "{other} had not arrived at round {round}");
                        }
                        true
                    }
                    Err(BarrierError::Dead { round: broken, .. }) => {
                        assert_eq!(broken, round);
                        false
                    }
                    Err(error) => panic!("{error}"),
                };
                let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                let first = *outcomes[round as usize].get_or_insert(is_whole);
                assert_eq!(first, is_whole, "two outcomes of round {round}");
                if !is_whole {
                    return;
                }
            }
        });
    }
    scene.finally(move |end| {
        let outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = outcomes
            .iter()
            .filter(|whole| **whole == Some(false))
            .count();
        assert!(
            broken <= usize::from(end.dead.is_some()),
            "broken by nobody's death"
        );
    });
    scene
}

/// One waits; another leaves, and a third takes its seat if it comes late enough. Whoever is done
/// leaves, so nobody waits for ever.
fn turns() -> Scene {
    let mut scene = Scene::new(4096);
    let barrier = Barrier::at(scene.memory(), AT, 2).expect("in the memory");
    let everybody = |_: InstanceId| true;
    let seats = [1, 2].map(|id| barrier.join(InstanceId::new(id, 1), &everybody));
    let [waits, leaves] = seats.map(|seat| seat.expect("a seat"));
    let broken: Arc<Mutex<Vec<InstanceId>>> = Arc::default();
    let wait = |mut seat: Seat<'static>, actor: Actor, broken: &Mutex<Vec<InstanceId>>| {
        match seat.wait(&actor.judge) {
            Ok(_) => {}
            Err(BarrierError::Dead { dead, .. }) => {
                let mut broken = broken.lock().unwrap_or_else(PoisonError::into_inner);
                broken.push(dead);
            }
            Err(error) => panic!("{error}"),
        }
        seat.leave().expect("its own");
    };
    let by_first = broken.clone();
    scene.actor(move |actor| wait(waits, actor, &by_first));
    scene.actor(move |_| leaves.leave().expect("its own"));
    let by_third = broken.clone();
    scene.actor(move |actor| match barrier.join(actor.me, &actor.judge) {
        Ok(seat) => wait(seat, actor, &by_third),
        Err(BarrierError::Full { .. }) => {}
        Err(error) => panic!("{error}"),
    });
    scene.finally(move |end| {
        let broken = broken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_dead = |who: &InstanceId| Some(*who) == end.dead;
        assert!(broken.iter().all(is_dead), "broken by {broken:?}");
        let left: Vec<_> = barrier.members().collect();
        assert!(left.iter().all(is_dead), "{left:?} sit for ever");
    });
    scene
}

/// Counts those inside, without the dead.
struct Inside(Arc<AtomicU64>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn semaphore(actors: u32, permits: u32, rounds: u32) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let inside = Arc::new(AtomicU64::new(0));
    let semaphore = Semaphore::at(memory, AT, permits).expect("in the memory");
    let alone = (permits == 1).then(|| scene.exclusive());
    for _ in 0..actors {
        let inside = inside.clone();
        scene.actor(move |actor| {
            for _ in 0..rounds {
                let permit = semaphore.acquire(actor.me, &actor.judge).expect("granted");
                let here = inside.fetch_add(1, Ordering::Relaxed) + 1;
                let counted = Inside(inside.clone());
                assert!(here <= permits.into(), "{here} hold {permits} permits");
                let work = || put(word(memory, 0), get(word(memory, 0)) + 1);
                match alone {
                    Some(alone) => alone.enter(work),
                    None => work(),
                }
                drop(counted);
                permit.release().expect("nobody declared the holder dead");
            }
        });
    }
    scene.finally(move |end| {
        let left: Vec<_> = semaphore.holders().collect();
        assert!(
            left.iter().all(|holder| Some(*holder) == end.dead),
            "{left:?} hold for ever"
        );
        let changes = get(word(memory, 0));
        if permits == 1 && end.dead.is_none() {
            assert_eq!(changes, u64::from(actors * rounds), "a change was lost");
        }
    });
    scene
}

fn once(actors: u32) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let cell = OnceCell::at(memory, AT, 2).expect("in the memory");
    let computed = Arc::new(AtomicU64::new(0));
    let seen = Arc::new(AtomicU64::new(0));
    for index in 0..actors {
        let (computed, seen) = (computed.clone(), seen.clone());
        scene.actor(move |actor| {
            let value = cell.get_or_init(actor.me, &actor.judge, |filler| {
                filler.set(0, u64::from(index) + 1);
                filler.set(1, u64::from(index) + 1);
                computed.fetch_add(1, Ordering::Relaxed);
                Ok::<_, OnceError>(())
            });
            let value = value.expect("a value");
            let (left, right) = (value.get(0), value.get(1));
            assert!(left == right && left != 0, "half a value: {left} {right}");
            let before = seen.swap(left, Ordering::Relaxed);
            assert!(before == 0 || before == left, "two values: {before} {left}");
        });
    }
    scene.finally(move |end| {
        let computed = computed.load(Ordering::Relaxed);
        assert!(
            computed <= 1 + u64::from(end.dead.is_some()),
            "computed {computed} times"
        );
    });
    scene
}

/// One waits under a lock until another says so; a third only uses the lock, and may die in it.
fn condvar() -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let words: &LockWords = memory.get(0).expect("in the memory");
    let lock = RecoverableLock::new(words);
    let condvar = Condvar::new(memory.get(AT).expect("in the memory"));
    let is_said = move || get(word(memory, 64)) == 1;
    scene.actor(move |actor| {
        let nothing = |_| Ok::<_, LockError>(());
        let acquired = lock.lock(actor.me, &actor.judge).expect("granted");
        let guard = acquired.or_repair(nothing).expect("alive");
        let guard = condvar
            .wait_while(guard, &actor.judge, || !is_said(), nothing)
            .expect("granted again");
        guard.unlock().expect("alive");
    });
    scene.immortal(move |actor| {
        let nothing = |_| Ok::<_, LockError>(());
        let acquired = lock.lock(actor.me, &actor.judge).expect("granted");
        let guard = acquired.or_repair(nothing).expect("alive");
        put(word(memory, 64), 1);
        guard.unlock().expect("alive");
        condvar.notify_one();
    });
    scene
}
