//! The recoverable queue lock.

use lupin::lock::mcs::{McsLock, McsNodes, McsWaiter};
use lupin::lock::{LockError, LockState};
use lupin::shm::Mapping;

use super::pair::{self, Before, LOCK_AT, Lock};
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, End};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "mcs.two",
        scene: || pair::scene::<Mcs>(2, 1, Before::Free),
        loom: Some(LoomRun::new(1, 3)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "mcs.orphan",
        scene: || pair::scene::<Mcs>(2, 1, Before::Orphaned),
        loom: Some(LoomRun::long(2).orders(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "mcs.four",
        scene: || pair::scene::<Mcs>(4, 2, Before::Orphaned),
        ..Model::WITH_DEATHS
    },
];

const NODES: u16 = 6;
const NODES_AT: u64 = LOCK_AT + 64;

struct Mcs {
    lock: McsLock<'static>,
    waiter: McsWaiter<'static>,
}

fn nodes(memory: &'static Mapping) -> McsNodes<'static> {
    McsNodes::new(memory, NODES_AT, NODES).expect("in the memory")
}

impl Lock for Mcs {
    fn join(memory: &'static Mapping, actor: Actor) -> Self {
        let nodes = nodes(memory);
        Self {
            lock: McsLock::new(nodes, LOCK_AT).expect("in the memory"),
            waiter: nodes.join(actor.me, &actor.judge).expect("a node"),
        }
    }

    fn locked(&mut self, actor: Actor, repair: impl FnOnce(), body: impl FnOnce()) {
        let acquired = self
            .lock
            .lock(&mut self.waiter, &actor.judge)
            .expect("granted");
        let guard = acquired
            .or_repair(|_| {
                repair();
                Ok::<_, LockError>(())
            })
            .expect("nobody declared the repairer dead");
        body();
        guard.unlock().expect("nobody declared the holder dead");
    }

    fn keep(mut self, actor: Actor) {
        let acquired = self.lock.lock(&mut self.waiter, &actor.judge);
        std::mem::forget(acquired.expect("granted"));
        std::mem::forget(self.waiter);
    }

    fn audit(memory: &'static Mapping, end: &End) {
        let lock = McsLock::new(nodes(memory), LOCK_AT).expect("in the memory");
        match lock.inspect(&end.judge).expect("a sane queue") {
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
