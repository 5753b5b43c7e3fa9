//! The readers-writer lock.

use std::sync::atomic::AtomicU64;

use lupin::lock::rwlock::{ReadAcquired, RwLock};
use lupin::lock::{Acquired, LockError, LockState};
use lupin::shm::Mapping;

use super::pair::{self, Before, LOCK_AT, Lock};
use crate::cells::{get, put};
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, End, Here, Judge, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "rwlock.two_writers",
        scene: || pair::scene::<Writer>(2, 1, Before::Free),
        loom: Some(LoomRun::long(2).orders(1)),
        is_dekker: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "rwlock.reader",
        scene: || readers(1, 1),
        loom: Some(LoomRun::long(2).orders(1)),
        is_dekker: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "rwlock.leaving",
        scene: leaving,
        loom: Some(LoomRun::new(1, 3)),
        is_dekker: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "rwlock.orphan",
        scene: || pair::scene::<Writer>(3, 2, Before::Orphaned),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "rwlock.readers",
        scene: || readers(2, 2),
        ..Model::WITH_DEATHS
    },
];

struct Writer(RwLock<'static>);

fn lock(memory: &'static Mapping) -> RwLock<'static> {
    RwLock::new(memory.get(LOCK_AT).expect("in the memory"))
}

impl Lock for Writer {
    fn join(memory: &'static Mapping, _actor: Actor) -> Self {
        Self(lock(memory))
    }

    fn locked(&mut self, actor: Actor, repair: impl FnOnce(), body: impl FnOnce()) {
        let acquired = self.0.write(actor.me, &actor.judge).expect("granted");
        let guard = acquired
            .or_repair(|_| {
                repair();
                Ok::<_, LockError>(())
            })
            .expect("nobody declared the repairer dead");
        body();
        guard.unlock().expect("nobody declared the holder dead");
    }

    fn keep(self, actor: Actor) {
        std::mem::forget(self.0.write(actor.me, &actor.judge).expect("granted"));
    }

    fn audit(memory: &'static Mapping, end: &End) {
        match lock(memory).inspect(&end.judge) {
            LockState::Free => {}
            LockState::Orphaned { recoverer, .. } => {
                assert!(
                    end.dead.is_some() && recoverer.is_none(),
                    "an orphan for ever"
                );
            }
            LockState::Held(owner) => panic!("{owner} holds the lock for ever"),
        }
    }
}

/// One writes two equal words, others read them.
fn readers(readers: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let word = |at| memory.get::<AtomicU64>(at).expect("in the memory");
    let (left, right) = (word(64), word(128));
    // One reader and the writer are never in at once, also in the order of the memory model.
    let alone = (readers == 1).then(|| scene.exclusive());
    let enter = move |body: &dyn Fn()| match alone {
        Some(alone) => alone.enter(body),
        None => body(),
    };
    let repair = move |_| {
        enter(&|| put(right, get(left)));
        Ok::<_, LockError>(())
    };
    let write = move |actor: Actor| {
        let acquired = lock(memory).write(actor.me, &actor.judge).expect("granted");
        let guard = acquired.or_repair(repair).expect("alive");
        enter(&|| {
            let next = get(left) + 1;
            put(left, next);
            put(right, next);
        });
        guard.unlock().expect("alive");
    };
    scene.actor(move |actor| (0..rounds).for_each(|_| write(actor)));
    for _ in 0..readers {
        scene.actor(move |actor| {
            for _ in 0..rounds {
                let acquired = lock(memory).read(actor.me, &actor.judge).expect("granted");
                let guard = acquired.or_repair(&actor.judge, repair).expect("alive");
                enter(&|| assert_eq!(get(left), get(right), "a reader beside a writer"));
                guard.unlock().expect("alive");
            }
        });
    }
    scene.finally(move |end| {
        let me = lupin::InstanceId::new(8, 1);
        let judge = end.judge;
        write(Actor { me, judge });
        assert_eq!(get(left), get(right));
        assert!(
            end.dead.is_some() || get(left) == rounds + 1,
            "a change was lost"
        );
    });
    scene
}

/// A reader that has been in from the start goes out, and a writer waits for that: what one has
/// read comes before what the other writes.
fn leaving() -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let alone = scene.exclusive();
    let first = lupin::InstanceId::new(1, 1);
    let read = lock(memory).read(first, &Judge).expect("granted");
    let ReadAcquired::Shared(guard) = read else {
        panic!("nobody has died yet")
    };
    let guard = Here(guard);
    let reader = scene.actor(move |_| {
        let guard = guard.into_inner();
        alone.enter(|| ());
        guard.unlock().expect("alive");
    });
    assert_eq!(reader, first, "the one that is in");
    scene.actor(move |actor| {
        let acquired = lock(memory).write(actor.me, &actor.judge).expect("granted");
        let Acquired::Clean(guard) = acquired else {
            panic!("no writer has died")
        };
        alone.enter(|| ());
        guard.unlock().expect("alive");
    });
    scene
}
