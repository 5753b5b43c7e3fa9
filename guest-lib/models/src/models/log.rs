//! The redo log, as it is used: a lock, a record over two words, and heirs who settle it.

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::lock::{LockError, RecoverableLock};
use lupin::log::{Log, log_size};
use lupin::shm::Mapping;

use crate::cells::get;
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "log.two",
        scene: || writers(2, 1),
        loom: Some(LoomRun::new(0, 2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "log.three",
        scene: || writers(3, 3),
        ..Model::WITH_DEATHS
    },
];

const LOGS: u64 = 512;
const ENTRIES: u32 = 4;

fn log_of(memory: &'static Mapping, owner: InstanceId) -> Log<'static> {
    let at = LOGS + u64::from(owner.id()) * log_size(ENTRIES);
    Log::new(memory, at, ENTRIES).expect("in the memory")
}

fn half(memory: &'static Mapping, at: u64) -> u64 {
    get(memory.get(at).expect("in the memory"))
}

/// Adds one to both words in one record.
fn change(memory: &'static Mapping, actor: Actor) {
    let words: &LockWords = memory.get(0).expect("in the memory");
    let settle = |dead| {
        log_of(memory, dead).settle(dead).expect("a sane log");
        Ok::<_, LockError>(())
    };
    let acquired = RecoverableLock::new(words).lock(actor.me, &actor.judge);
    let guard = acquired.expect("granted").or_repair(settle).expect("alive");
    let mut record = log_of(memory, actor.me)
        .begin(actor.me, 1, 0)
        .expect("settled");
    let left = record.get(64).expect("in the memory");
    assert_eq!(
        left,
        record.get(128).expect("in the memory"),
        "half a record"
    );
    record.set(64, left + 1).expect("room");
    record.set(128, left + 1).expect("room");
    record.commit(left + 1).expect("in the memory");
    guard.unlock().expect("alive");
}

fn writers(actors: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    for _ in 0..actors {
        scene.actor(move |actor| {
            for _ in 0..rounds {
                change(memory, actor);
            }
        });
    }
    scene.finally(move |end| {
        let me = InstanceId::new(8, 1);
        let judge = end.judge;
        change(memory, Actor { me, judge });
        let sum = half(memory, 64) - 1;
        assert_eq!(sum + 1, half(memory, 128), "half a record");
        let all = u64::from(actors) * rounds;
        let Some(dead) = end.dead else {
            assert_eq!(sum, all, "a change was lost");
            return;
        };
        // What the outcome says happened is what is in memory.
        let last = log_of(memory, dead).last().expect("a sane log");
        if last.happened {
            assert!(last.result <= sum, "{last:?} and a sum of {sum}");
        }
        assert!(
            (all - rounds..=all).contains(&sum),
            "{sum} of {all} changes"
        );
    });
    scene
}
