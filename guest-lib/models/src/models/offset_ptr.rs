//! Offset pointers: what a pointer that was swapped in leads to is seen as its publisher left it.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::offset_ptr::AtomicOffsetPtr;
use lupin::shm::Mapping;

use crate::cells::{get, put};
use crate::model::{LoomRun, Model};
use crate::scene::Scene;

pub(super) const MODELS: &[Model] = &[Model {
    name: "offset_ptr.push",
    scene: push,
    loom: Some(LoomRun::new(2, 4)),
    ..Model::WITH_DEATHS
}];

type Pointer = AtomicOffsetPtr<AtomicU64>;

fn pointer(memory: &'static Mapping, at: u64) -> &'static Pointer {
    memory.get(at).expect("in the memory")
}

fn word(memory: &'static Mapping, at: u64) -> &'static AtomicU64 {
    memory.get(at).expect("in the memory")
}

/// Two actors push a block each onto a stack: its value first, then the link to the block below.
/// A third reads all that it finds.
fn push() -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    for n in 1..=2 {
        scene.actor(move |_| {
            let (value, link) = (word(memory, n * 64), pointer(memory, n * 64 + 8));
            put(value, n);
            let mut below = pointer(memory, 0)
                .load(memory, Ordering::Acquire)
                .expect("inside");
            loop {
                link.store(memory, below, Ordering::Relaxed)
                    .expect("inside");
                let swapped = pointer(memory, 0)
                    .compare_exchange(memory, below, Some(value), Ordering::AcqRel)
                    .expect("inside");
                match swapped {
                    Ok(()) => return,
                    Err(found) => below = found,
                }
            }
        });
    }
    scene.immortal(move |_| {
        walk(memory);
    });
    scene.finally(move |end| {
        let seen = walk(memory);
        assert!(
            end.dead.is_some() || seen.len() == 2,
            "a block was lost: {seen:?}"
        );
    });
    scene
}

fn walk(memory: &'static Mapping) -> Vec<u64> {
    let mut seen = Vec::new();
    let mut here = pointer(memory, 0)
        .load(memory, Ordering::Acquire)
        .expect("inside");
    while let Some(value) = here {
        let at = memory.offset_of(value).expect("inside");
        assert_eq!(get(value) * 64, at, "a block without its contents");
        seen.push(get(value));
        let next = pointer(memory, at + 8).load(memory, Ordering::Relaxed);
        here = next.expect("inside");
    }
    seen.sort_unstable();
    seen.dedup();
    seen
}
