//! The recoverable TATAS lock.

use lupin::abi::system::LockWords;
use lupin::lock::{LockError, LockState, RecoverableLock};
use lupin::shm::Mapping;

use super::pair::{self, Before, LOCK_AT, Lock};
use crate::model::{LoomRun, Model};
use crate::on_loom::Sleep;
use crate::scene::{Actor, End};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "tatas.two",
        scene: || pair::scene::<Tatas>(2, 1, Before::Free),
        loom: Some(LoomRun::new(2, 4)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "tatas.again",
        scene: || pair::scene::<Tatas>(2, 2, Before::Free),
        loom: Some(LoomRun::new(1, 3)),
        deaths: false,
        sleep: Sleep::Bounded,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "tatas.orphan",
        scene: || pair::scene::<Tatas>(2, 1, Before::Orphaned),
        loom: Some(LoomRun::new(0, 3)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "tatas.four",
        scene: || pair::scene::<Tatas>(4, 3, Before::Orphaned),
        ..Model::WITH_DEATHS
    },
];

struct Tatas(RecoverableLock<'static>);

impl Lock for Tatas {
    fn join(memory: &'static Mapping, _actor: Actor) -> Self {
        let words: &LockWords = memory.get(LOCK_AT).expect("in the memory");
        Self(RecoverableLock::new(words))
    }

    fn locked(&mut self, actor: Actor, repair: impl FnOnce(), body: impl FnOnce()) {
        let acquired = self.0.lock(actor.me, &actor.judge).expect("granted");
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
        std::mem::forget(self.0.lock(actor.me, &actor.judge).expect("granted"));
    }

    fn audit(memory: &'static Mapping, end: &End) {
        match Self::join(memory, Actor::nobody()).0.inspect(&end.judge) {
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
