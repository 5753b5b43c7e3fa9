//! Actors that change two words under a lock: the scene of all lock models.
//!
//! The words are equal outside of critical sections. So whoever is let in after a death and not
//! told of it, or let in while another is inside, or does not see what the one before stored,
//! finds them different or loses a change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::shm::Mapping;

use crate::cells::{get, put};
use crate::scene::{Actor, End, Exclusive, Judge, Scene};

/// A lock, as one thread uses it.
pub(super) trait Lock: Sized + 'static {
    /// The thread's part of the lock in `memory`, from [`LOCK_AT`] on.
    fn join(memory: &'static Mapping, actor: Actor) -> Self;
    /// Runs `body` under the lock, after `repair` if a holder died inside.
    fn locked(&mut self, actor: Actor, repair: impl FnOnce(), body: impl FnOnce());
    /// Takes the lock and never gives it back.
    fn keep(self, actor: Actor);
    /// Checks the lock's own words when nobody uses it.
    fn audit(memory: &'static Mapping, end: &End);
}

/// Where locks lie.
pub(super) const LOCK_AT: u64 = 256;

/// The state that the actors find.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Before {
    Free,
    /// An owner died between its two stores.
    Orphaned,
}

#[derive(Clone, Copy)]
struct Pair {
    memory: &'static Mapping,
    inside: Exclusive,
}

impl Pair {
    fn halves(self) -> [&'static AtomicU64; 2] {
        [64, 128].map(|at| self.memory.get(at).expect("in the memory"))
    }

    fn repair(self) {
        let [left, right] = self.halves();
        self.inside.enter(|| put(right, get(left)));
    }

    /// Adds one to both.
    fn change(self) {
        let [left, right] = self.halves();
        self.inside.enter(|| {
            let next = get(left) + 1;
            assert_eq!(next, get(right) + 1, "let in to broken data");
            put(left, next);
            put(right, next);
        });
    }
}

/// `actors` that each change the pair `rounds` times.
pub(super) fn scene<L: Lock>(actors: u32, rounds: u64, before: Before) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let pair = Pair {
        memory,
        inside: scene.exclusive(),
    };
    let mut first = 0;
    if before == Before::Orphaned {
        let dead = Actor {
            me: InstanceId::new(9, 1),
            judge: Judge,
        };
        L::join(memory, dead).keep(dead);
        put(pair.halves()[0], 1);
        first = 1;
    }
    let done = Arc::new(AtomicU64::new(first));
    for _ in 0..actors {
        let done = done.clone();
        scene.actor(move |actor| {
            let mut lock = L::join(memory, actor);
            for _ in 0..rounds {
                lock.locked(actor, || pair.repair(), || pair.change());
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let all = first + u64::from(actors) * rounds;
    scene.finally(move |end| {
        let survivor = Actor {
            me: InstanceId::new(8, 1),
            judge: end.judge,
        };
        L::audit(memory, end);
        // Whatever is left, the next one gets in, and repairs if need be.
        L::join(memory, survivor).locked(survivor, || pair.repair(), || pair.change());
        let done = done.load(Ordering::Relaxed) + 1;
        let [left, right] = pair.halves().map(get);
        assert_eq!(left, right, "the last one left broken data");
        match end.dead {
            None => assert_eq!((left, done), (all + 1, all + 1), "a change was lost"),
            // The victim's last change may have happened; nobody else's is lost.
            Some(_) => assert!(
                (done..=done + 1).contains(&left),
                "{left} of {done} changes"
            ),
        }
    });
    scene
}
