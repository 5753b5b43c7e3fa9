//! Things that are broken on purpose, one for each oracle: a suite that does not catch them
//! proves nothing of the others.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lupin::liveness::Liveness;
use lupin::probe::Kind;
use lupin::shm::Mapping;

use super::pair::{self, Before, LOCK_AT, Lock};
use crate::cells::{cas, get, put};
use crate::history::{History, Spec};
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, End, Scene};

/// Something broken, and which oracle must say so.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// The oracle.
    pub oracle: &'static str,
    /// The model that must fail.
    pub model: Model,
    /// A part of what it must fail with.
    pub because: &'static str,
}

/// All of them.
pub(super) const CONTROLS: &[Control] = &[
    Control {
        oracle: "order (weak memory)",
        model: Model {
            name: "control.relaxed_release",
            scene: || pair::scene::<Relaxed>(2, 1, Before::Free),
            loom: Some(LoomRun::new(2, 2)),
            shuttle: false,
            deaths: false,
            ..Model::WITH_DEATHS
        },
        because: "Causality violation",
    },
    Control {
        oracle: "mutual exclusion",
        model: Model {
            name: "control.look_then_take",
            scene: || pair::scene::<LookThenTake>(2, 2, Before::Free),
            deaths: false,
            ..Model::WITH_DEATHS
        },
        because: "two actors are inside",
    },
    Control {
        oracle: "holds of the dead",
        model: Model {
            name: "control.no_orphan",
            scene: || pair::scene::<NoOrphan>(2, 2, Before::Free),
            ..Model::WITH_DEATHS
        },
        because: "let in to broken data",
    },
    Control {
        oracle: "deadlock after a death",
        model: Model {
            name: "control.no_recovery",
            scene: || pair::scene::<NoRecovery>(2, 2, Before::Free),
            ..Model::WITH_DEATHS
        },
        because: "exceeded",
    },
    Control {
        oracle: "linearizability",
        model: Model {
            name: "control.load_then_store",
            scene: load_then_store,
            deaths: false,
            ..Model::WITH_DEATHS
        },
        because: "no order explains",
    },
    Control {
        oracle: "unique values",
        model: Model {
            name: "control.ticket",
            scene: tickets,
            deaths: false,
            ..Model::WITH_DEATHS
        },
        because: "has two owners",
    },
];

/// A spin lock of one word, with what its variants do wrong.
trait Wrong: 'static {
    /// Takes a free lock.
    fn take(word: &AtomicU64, me: u64) -> bool {
        cas(word, 0, me, Ordering::Acquire)
    }

    /// Gives it back.
    const RELEASE: Ordering = Ordering::Release;
    /// Whether a dead holder's lock is taken as if it were free.
    const TAKES_FROM_DEAD: bool = true;
}

struct Spin<W>(&'static AtomicU64, std::marker::PhantomData<W>);

type Relaxed = Spin<RelaxedRelease>;
type LookThenTake = Spin<Looks>;
type NoOrphan = Spin<Forgets>;
type NoRecovery = Spin<Waits>;

struct RelaxedRelease;
impl Wrong for RelaxedRelease {
    const RELEASE: Ordering = Ordering::Relaxed;
}

struct Looks;
impl Wrong for Looks {
    fn take(word: &AtomicU64, me: u64) -> bool {
        let is_free = get(word) == 0;
        if is_free {
            put(word, me);
        }
        is_free
    }
}

struct Forgets;
impl Wrong for Forgets {}

struct Waits;
impl Wrong for Waits {
    const TAKES_FROM_DEAD: bool = false;
}

impl<W: Wrong> Lock for Spin<W> {
    fn join(memory: &'static Mapping, _actor: Actor) -> Self {
        let word = memory.get(LOCK_AT).expect("in the memory");
        Self(word, std::marker::PhantomData)
    }

    fn locked(&mut self, actor: Actor, _repair: impl FnOnce(), body: impl FnOnce()) {
        let me = actor.me.word();
        while !W::take(self.0, me) {
            let owner = get(self.0);
            if W::TAKES_FROM_DEAD
                && owner != 0
                && !actor.judge.is_alive(lupin::InstanceId::from_word(owner))
                && cas(self.0, owner, me, Ordering::Acquire)
            {
                break;
            }
            crate::cells::pause();
        }
        body();
        crate::cells::access(self.0, Kind::Store(0), W::RELEASE);
    }

    fn keep(self, _actor: Actor) {}

    fn audit(_memory: &'static Mapping, _end: &End) {}
}

/// A counter whose increments are a load and a store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Count(u64);

impl Spec for Count {
    type Op = ();
    type Answer = u64;

    fn apply(&mut self, (): &()) -> u64 {
        self.0 += 1;
        self.0
    }
}

fn load_then_store() -> Scene {
    let mut scene = Scene::new(4096);
    let word: &AtomicU64 = scene.memory().get(64).expect("in the memory");
    let history = History::<Count>::default();
    for _ in 0..2 {
        let history = history.clone();
        scene.actor(move |actor| {
            history.run(actor, (), || {
                let next = get(word) + 1;
                put(word, next);
                next
            });
        });
    }
    scene.finally(move |end| history.check(Count(0), end.time));
    scene
}

fn tickets() -> Scene {
    let mut scene = Scene::new(4096);
    let word: &AtomicU64 = scene.memory().get(64).expect("in the memory");
    let taken: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    for _ in 0..2 {
        let taken = taken.clone();
        scene.actor(move |_| {
            let ticket = get(word);
            put(word, ticket + 1);
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            assert!(taken.insert(ticket), "ticket {ticket} has two owners");
        });
    }
    scene
}
