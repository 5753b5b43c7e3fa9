//! Epochs: nothing is freed under a living reader, and a dead one holds nothing up.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::epoch::{Epochs, Reader};
use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::probe::Kind;
use lupin::shm::Mapping;

use crate::cells::{access, get, get_acquire, pause, put};
use crate::model::{LoomRun, Model};
use crate::scene::{Exclusive, Here, Judge, Scene};
use crate::stage;

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "epoch.reader",
        scene: || rule(1, 1),
        loom: Some(LoomRun::new(1, 3)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "epoch.helped",
        scene: helped,
        loom: Some(LoomRun::new(1, 2)),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "epoch.readers",
        scene: || rule(3, 2),
        ..Model::WITH_DEATHS
    },
    Model {
        name: "epoch.heap",
        scene: || heap(2, 2),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
];

const GLOBAL: u64 = 0;
const ROOT: u64 = 64;
const BLOCK: u64 = 128;
const PLACES: u64 = 256;
/// What a block holds until it is freed.
const VALUE: u64 = 7;
const FREED: u64 = 0xdead;

fn word(memory: &'static Mapping, at: u64) -> &'static AtomicU64 {
    memory.get(at).expect("in the memory")
}

fn place(memory: &'static Mapping, index: u32) -> Reader<'static> {
    let at = PLACES + u64::from(index) * 64;
    Reader {
        owner: word(memory, at),
        line: word(memory, at + 8),
    }
}

/// Adds an actor that pins and looks at what the root names, `rounds` times.
fn reader(scene: &mut Scene, index: u32, rounds: u64, look: Exclusive) {
    let memory = scene.memory();
    let epochs = Epochs::new(word(memory, GLOBAL));
    let place = place(memory, index);
    let me = scene.actor(move |_| {
        for _ in 0..rounds {
            epochs.pin(place.line);
            let block = get_acquire(word(memory, ROOT));
            if block != 0 {
                look.enter(|| assert_eq!(get(word(memory, block)), VALUE, "read after free"));
            }
            epochs.unpin(place.line);
        }
    });
    put(place.owner, me.word());
}

/// The rule itself: `readers` pin `rounds` times, and look at what the root names; the last actor
/// unlinks the block and frees it as soon as the epochs say so, which is waited for without limit:
/// if a dead reader held it up, that would be the end of the execution.
fn rule(readers: u32, rounds: u64) -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let epochs = Epochs::new(word(memory, GLOBAL));
    put(word(memory, BLOCK), VALUE);
    put(word(memory, ROOT), BLOCK);
    // A free must come after each look, in the order of the memory model.
    let looks: Vec<Exclusive> = (0..readers).map(|_| scene.exclusive()).collect();
    for (index, look) in (0..readers).zip(looks.clone()) {
        reader(&mut scene, index, rounds, look);
    }
    let remover = scene.actor(move |actor| {
        access(word(memory, ROOT), Kind::Store(0), Ordering::Release);
        let stamp = epochs.stamp();
        while !epochs.is_over(stamp) {
            let places = (0..readers).map(|index| self::place(memory, index));
            if epochs.advance(places, &actor.judge).is_err() {
                pause();
            }
        }
        let free = || put(word(memory, BLOCK), FREED);
        match looks[..] {
            [only] => only.enter(free),
            _ => {
                looks.iter().for_each(|look| look.enter(|| ()));
                free();
            }
        }
    });
    scene.finally(move |end| {
        let freed = get(word(memory, BLOCK)) == FREED;
        assert!(freed || end.dead == Some(remover), "never freed");
        for _ in 0..3 {
            let places = (0..readers).map(|index| place(memory, index));
            let advanced = epochs.advance(places, &end.judge);
            assert!(advanced.is_ok(), "{advanced:?}, who is not pinned");
        }
    });
    scene
}

/// One reads, one frees, and only a third one, who knows nothing of either, moves the epoch on.
fn helped() -> Scene {
    let mut scene = Scene::new(4096);
    let memory = scene.memory();
    let epochs = Epochs::new(word(memory, GLOBAL));
    put(word(memory, BLOCK), VALUE);
    put(word(memory, ROOT), BLOCK);
    let look = scene.exclusive();
    reader(&mut scene, 0, 1, look);
    scene.actor(move |_| {
        access(word(memory, ROOT), Kind::Store(0), Ordering::Release);
        let stamp = epochs.stamp();
        // It may never be over: whoever moves the epoch on has perhaps done so before.
        for _ in 0..2 {
            if epochs.is_over(stamp) {
                return look.enter(|| put(word(memory, BLOCK), FREED));
            }
            pause();
        }
    });
    scene.actor(move |actor| {
        for _ in 0..2 {
            let _ = epochs.advance([place(memory, 0)], &actor.judge);
        }
    });
    scene
}

const HEIR: InstanceId = InstanceId::new(8, 1);
const SIZE: u64 = 3 << 19;
/// The kind of the records here.
const KIND: u32 = 9;
/// Calls after which a retired block that nobody looks at is free.
const CALLS: usize = 3;

type Member = Participant<'static, Judge>;

/// Puts a block of two equal words into a root.
fn publish(memory: &'static Mapping, member: &mut Member, root: u64, value: u64) {
    let hold = member.hold(0);
    let block = member.alloc_into(hold, 16).expect("room");
    put(word(memory, block), value);
    put(word(memory, block + 8), value);
    let mut record = member.begin(KIND).expect("alive");
    record.set(root, block).expect("room");
    record.set(hold, 0).expect("room");
    record.commit(0).expect("sane");
}

/// Takes the block out of a root, and retires it.
fn retire(member: &mut Member, root: u64) {
    let mut record = member.begin(KIND).expect("alive");
    let block = record.get(root).expect("sane");
    if block == 0 {
        return;
    }
    record.set(root, 0).expect("room");
    member.retire_in(&mut record, block).expect("room");
    record.commit(0).expect("sane");
}

/// The heap's use of it: one replaces the block of a root again and again, in memory that it frees
/// as early as it may; readers must find both words of a block equal.
fn heap(readers: u32, rounds: u64) -> Scene {
    let (mut scene, built) = stage::scene(("epoch", readers as usize), SIZE, |scene| {
        let spec = HeapSpec { participants: 5 };
        let heap = Heap::create(scene.memory(), &spec, HEIR, &Judge).expect("room");
        let join = |me| heap.join(me, Judge).expect("a place");
        let heir = join(HEIR);
        let ids = 1..=1 + readers;
        let mut members: Vec<Member> = ids.map(|id| join(InstanceId::new(id, 1))).collect();
        let root = heap.root(0).expect("a root");
        publish(scene.memory(), &mut members[0], root, 1);
        (heap, heir, members)
    });
    let memory = scene.memory();
    let (heap, heir, members) = &*built;
    let root = heap.root(0).expect("a root");
    let mut members = members.iter().map(|member| Here(member.twin()));
    let remover = members.next().expect("at least one");
    scene.actor(move |_| {
        let mut member = remover.into_inner();
        for round in 0..rounds {
            retire(&mut member, root);
            for _ in 0..CALLS {
                member.collect().expect("sane");
            }
            publish(memory, &mut member, root, round + 2);
        }
    });
    for member in members {
        scene.actor(move |_| {
            let mut member = member.into_inner();
            for _ in 0..rounds {
                let pin = member.pin();
                let block = get_acquire(word(memory, root));
                if block != 0 {
                    let left = get(word(memory, block));
                    let right = get(word(memory, block + 8));
                    assert!(
                        left == right && left != 0,
                        "read after free: {left} {right}"
                    );
                }
                drop(pin);
            }
        });
    }
    let (heap, mut heir) = (*heap, heir.twin());
    scene.finally(move |end| {
        heap.recover(HEIR, &end.judge).expect("sane");
        // Whoever was pinned is gone or dead: what is retired now is free after the usual calls.
        retire(&mut heir, root);
        let freed: usize = (0..CALLS).map(|_| heir.collect().expect("sane")).sum();
        assert!(freed == 1 || end.dead.is_some(), "{freed} blocks freed");
        assert_eq!(get(word(memory, root)), 0);
        assert!(heap.audit_with([]).expect("sane").is_clean());
    });
    scene
}
