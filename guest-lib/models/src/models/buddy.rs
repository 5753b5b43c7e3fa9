//! The pod's allocator: each unit has one owner, and none is lost.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use lupin::InstanceId;
use lupin::buddy::{BuddySpec, PodAllocator, PodAllocatorSpec, PodChunk};

use crate::model::{LoomRun, Model};
use crate::scene::Scene;

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "buddy.two",
        scene: || nodes(2, 2),
        loom: Some(LoomRun::long(1).orders(1)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "buddy.three",
        scene: || nodes(3, 8),
        ..Model::WITH_DEATHS
    },
];

const UNIT: u64 = 4096;
const AT: u64 = 64;

/// Nodes that allocate a chunk of one unit, and then of two, and free the first.
fn nodes(actors: u32, units: u32) -> Scene {
    let mut scene = Scene::new(32 << 10);
    let memory = scene.memory();
    let spec = PodAllocatorSpec {
        nodes: 9,
        chunks: BuddySpec { units, unit: UNIT },
        also: 0,
    };
    let creator = InstanceId::new(8, 1);
    let everybody = |_: InstanceId| true;
    let pod = PodAllocator::create(memory, AT, &spec, creator, &everybody).expect("room");
    let held: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    for _ in 0..actors {
        let held = held.clone();
        scene.actor(move |actor| {
            let take = |bytes: u64| {
                let offset = pod.alloc(actor.me, &actor.judge, bytes).ok()?;
                let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
                for unit in 0..bytes / UNIT {
                    let is_new = held.insert(offset / UNIT + unit);
                    assert!(is_new, "unit {} has two owners", offset / UNIT + unit);
                }
                Some(offset)
            };
            let first = take(UNIT);
            let _ = take(2 * UNIT);
            if let Some(offset) = first {
                held.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&(offset / UNIT));
                pod.free(actor.me, &actor.judge, offset).expect("its own");
            }
        });
    }
    scene.finally(move |end| {
        let me = InstanceId::new(8, 1);
        pod.recover(me, &end.judge).expect("sane");
        let audit = pod.audit(me, &end.judge).expect("sane");
        assert_eq!(audit.free + audit.live, audit.units, "{audit:?}");
        let held = held.lock().unwrap_or_else(PoisonError::into_inner);
        for node in 1..=actors {
            let owner = InstanceId::new(node, 1);
            for PodChunk { offset, bytes, .. } in pod.chunks_of(owner.word()) {
                let is_known = (0..bytes / UNIT).all(|u| held.contains(&(offset / UNIT + u)));
                // The dead may have had one more than they lived to say.
                assert!(
                    is_known || end.dead == Some(owner),
                    "{owner} owns what it never got"
                );
            }
        }
    });
    scene
}
