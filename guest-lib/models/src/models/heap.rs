//! The heap: a block has one owner, one of two frees wins, and a death leaks nothing.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lupin::InstanceId;
use lupin::heap::{Heap, HeapError, HeapSpec, Participant};

use crate::cells::{get, get_acquire, put};
use crate::model::{LoomRun, Model};
use crate::scene::{Here, Judge, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "heap.free_twice",
        scene: free_twice,
        loom: Some(LoomRun::long(1).orders(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "heap.hand_over",
        scene: hand_over,
        loom: Some(LoomRun::long(1).orders(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "heap.churn",
        scene: churn,
        ..Model::WITH_DEATHS
    },
];

const SIZE: u64 = 512 << 10;
/// A size of which a slab has few.
const BLOCK: u64 = 30_000;

fn heap(scene: &Scene) -> Heap<'static> {
    let spec = HeapSpec { participants: 4 };
    Heap::create(scene.memory(), &spec, InstanceId::new(8, 1), &Judge).expect("room")
}

fn join(heap: Heap<'static>, id: u32) -> Here<Participant<'static, Judge>> {
    Here(heap.join(InstanceId::new(id, 1), Judge).expect("a place"))
}

/// A survivor settles what the dead left; then nothing is leaked, shared or dangling.
fn audit(scene: &mut Scene, heap: Heap<'static>) {
    scene.finally(move |end| {
        let me = InstanceId::new(8, 1);
        heap.recover(me, &end.judge).expect("sane");
        let audit = heap.audit().expect("sane");
        assert!(audit.is_clean(), "{audit:?}");
        // It goes on: the places of the dead are taken.
        let mut heir = heap.join(me, end.judge).expect("a place");
        let slot = heir.hold(0);
        heir.alloc_into(slot, BLOCK).expect("room");
        heir.free_from(slot).expect("its own");
        heir.leave().expect("sane");
        let audit = heap.audit().expect("sane");
        assert!(audit.is_clean(), "{audit:?}");
    });
}

/// Two free the same block from two slots: a mistake that must not harm the heap. One of them
/// is told, unless they did it at the same time.
fn free_twice() -> Scene {
    let mut scene = Scene::new(SIZE);
    let heap = heap(&scene);
    let roots = [0, 1].map(|n| heap.root(n).expect("a root"));
    let memory = scene.memory();
    let slots = roots.map(|root| memory.get::<AtomicU64>(root).expect("in the memory"));
    let mut owner = join(heap, 1);
    let other = join(heap, 2);
    let block = owner.0.alloc_into(roots[0], BLOCK).expect("room");
    put(slots[1], block);
    let freed = Arc::new(AtomicU64::new(0));
    for (participant, slot) in [owner, other].into_iter().zip(slots) {
        let freed = freed.clone();
        scene.actor(move |_| {
            let mut participant = participant.into_inner();
            let at = memory.offset_of(slot).expect("in the memory");
            match participant.free_from(at) {
                Ok(()) => {
                    freed.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    // Not a double free any more if the slab is gone as well.
                    let is_known = matches!(
                        error,
                        HeapError::DoubleFree { .. } | HeapError::Foreign { .. }
                    );
                    assert!(is_known, "{error}");
                    put(slot, 0);
                }
            }
        });
    }
    scene.finally(move |end| {
        let me = InstanceId::new(8, 1);
        heap.recover(me, &end.judge).expect("sane");
        assert!(
            freed.load(Ordering::Relaxed) > 0 || end.dead.is_some(),
            "nobody could free it"
        );
        for slot in slots {
            put(slot, 0);
        }
        let audit = heap.audit().expect("sane");
        assert!(
            audit.dangling.is_empty() && audit.shared.is_empty(),
            "{audit:?}"
        );
    });
    scene
}

/// One fills a root with blocks, the other frees them.
fn hand_over() -> Scene {
    let mut scene = Scene::new(SIZE);
    let heap = heap(&scene);
    let root = heap.root(0).expect("a root");
    let (maker, taker) = (join(heap, 1), join(heap, 2));
    scene.actor(move |_| {
        maker.into_inner().alloc_into(root, BLOCK).expect("room");
    });
    scene.actor(move |_| {
        let mut taker = taker.into_inner();
        let slot: &AtomicU64 = taker.memory().get(root).expect("in the memory");
        // Not before it is there: a slot is its owner's alone until then.
        if get_acquire(slot) != 0 {
            taker.free_from(root).expect("a block");
        }
        let hold = taker.hold(0);
        taker.alloc_into(hold, BLOCK).expect("room");
    });
    audit(&mut scene, heap);
    scene
}

/// Blocks that somebody has, by all.
type Live = Arc<Mutex<BTreeSet<u64>>>;

/// One actor's blocks. They are nobody's any more when it ends or dies.
struct Mine(Live, Vec<u64>);

impl Mine {
    fn live(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&mut self, block: u64) {
        assert!(self.live().insert(block), "block {block:#x} has two owners");
        self.1.push(block);
    }

    fn give(&mut self, block: u64) {
        self.live().remove(&block);
        self.1.retain(|mine| *mine != block);
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        for block in std::mem::take(&mut self.1) {
            self.live().remove(&block);
        }
    }
}

/// Three allocate and free, from slabs that they take from a common stock and give back.
fn churn() -> Scene {
    let mut scene = Scene::new(SIZE);
    let heap = heap(&scene);
    let live = Live::default();
    for id in 1..=3u32 {
        let participant = join(heap, id);
        let live = live.clone();
        scene.actor(move |_| {
            let mut participant = participant.into_inner();
            let mut mine = Mine(live, Vec::new());
            for round in 0..3 {
                let slot = participant.hold(round);
                let block = participant.alloc_into(slot, BLOCK).expect("room");
                mine.take(block);
                if round != 1 {
                    mine.give(block);
                    participant.free_from(slot).expect("its own");
                }
            }
            let slot = participant.memory().get(participant.hold(1));
            assert!(mine.1.contains(&get(slot.expect("in the memory"))));
        });
    }
    audit(&mut scene, heap);
    scene
}
