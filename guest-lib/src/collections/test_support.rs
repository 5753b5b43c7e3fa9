//! What the tests of this module share.

use core::mem::forget;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use lupin_abi::InstanceId;

use crate::heap::{Heap, HeapSpec, Participant};
use crate::liveness::Liveness;
use crate::log::Outcome;
use crate::mem::crash::{Ended, count, dies_after};
use crate::shm::{Access, Mapping};

pub(super) const A: InstanceId = InstanceId::new(1, 1);
pub(super) const B: InstanceId = InstanceId::new(2, 1);
pub(super) const C: InstanceId = InstanceId::new(3, 1);

/// A judge for whom only these are dead.
pub(super) fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| instance.generation() != 0 && !dead.contains(&instance)
}

/// Fresh shared memory.
pub(super) fn memory(size: u64) -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Mapping::new(&file, 0, size, Access::ReadWrite).unwrap()
}

/// Xorshift (G. Marsaglia, *Xorshift RNGs*, 2003).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Who is dead, for all who share it.
#[derive(Clone, Default)]
pub(super) struct World(Arc<RwLock<Vec<InstanceId>>>);

impl World {
    pub(super) fn kill(&self, instance: InstanceId) {
        self.0.write().unwrap().push(instance);
    }
}

impl Liveness for World {
    fn is_alive(&self, instance: InstanceId) -> bool {
        instance.generation() != 0 && !self.0.read().unwrap().contains(&instance)
    }
}

/// A participant of the tests.
pub(super) type Member<'m> = Participant<'m, World>;

/// Bytes of a test's heap.
const HEAP: u64 = 3 << 19;
/// The next life of an instance.
const fn next(life: InstanceId) -> InstanceId {
    InstanceId::new(life.id(), life.generation() + 1)
}
/// Sizes of the blocks that the tests need.
const SIZES: [u64; 5] = [24, 32, 48, 80, 160];

/// What a collection holds: numbers and values.
pub(super) type Contents = Vec<(u64, Vec<u8>)>;

/// A heap for `participants` in fresh memory.
pub(super) fn heap_in(memory: &Mapping, participants: u32) -> Heap<'_> {
    Heap::create(memory, &HeapSpec { participants }, A, &World::default()).unwrap()
}

/// One operation on one collection in root 0, and what it should do.
pub(super) trait Operation {
    /// Creates the collection and brings it into the state.
    fn prepare(&self, member: &mut Member<'_>);
    /// The operation.
    fn run(&self, member: &mut Member<'_>);
    /// Kinds of its record.
    fn kinds(&self) -> &[u32];
    /// Something else, that uses what the operation changes, and changes nothing in the end. It
    /// may use keys from 1000 on.
    fn visit(&self, member: &mut Member<'_>);
    /// What the collection holds.
    fn contents(&self, member: &mut Member<'_>) -> Contents;
    /// Its blocks, all but the root's.
    fn blocks(&self, heap: Heap<'_>) -> Vec<u64>;
}

/// Ends the operation before every store, and then the work of a second one: its recovery before
/// every store of that, or a visit before every `step`-th. Each time a third one finds all of the
/// operation or nothing, as the outcome says, a sound heap, and a collection that works.
///
/// Returns how many pairs it tried.
pub(super) fn square(operation: &impl Operation, step: u64) -> u64 {
    let memory = memory(HEAP);
    let heap = heap_in(&memory, 3);
    // All three have slabs from their first lives: the heap's own tests are about getting one.
    let mut members = [A, B, C].map(|who| heap.join(who, World::default()).unwrap());
    for (number, member) in (0..).zip(&mut members) {
        for (size, bytes) in (0..).zip(SIZES) {
            let root = heap.root(1 + number * SIZES.len() as u32 + size).unwrap();
            member.alloc_into(root, bytes).unwrap();
        }
    }
    operation.prepare(&mut members[0]);
    for member in members {
        member.leave().unwrap();
    }
    let image: Vec<u64> = words(&memory)
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .collect();
    let (before, after, stores) = {
        let mut member = heap.join(next(A), World::default()).unwrap();
        let before = operation.contents(&mut member);
        let ((), stores) = count(|| operation.run(&mut member));
        (before, operation.contents(&mut member), stores)
    };
    assert!(stores < 100, "{stores}: a slab was missing");
    let mut pairs = 0;
    for by_visit in [false, true] {
        for first in 0..=stores {
            let step = if by_visit { step } else { 1 };
            for second in (first % step..).step_by(step as usize) {
                restore(&memory, &image);
                pairs += 1;
                let what = format!("deaths before stores {first} and {second}, {by_visit}");
                if crash_twice(
                    operation,
                    &memory,
                    (first, second),
                    by_visit,
                    |found, outcome| {
                        let happened = outcome.happened
                            && outcome.tag == 7
                            && operation.kinds().contains(&outcome.kind);
                        let expected = if happened { &after } else { &before };
                        assert_eq!(found, expected, "{what}: {outcome:?}");
                        assert!(happened || first < stores, "{what}: {outcome:?}");
                    },
                ) {
                    break;
                }
            }
        }
    }
    pairs
}

/// One run of the square; true if the second one completed.
fn crash_twice(
    operation: &impl Operation,
    memory: &Mapping,
    (first, second): (u64, u64),
    by_visit: bool,
    check: impl Fn(&Contents, Outcome),
) -> bool {
    let (heap, world) = (open(memory), World::default());
    let [first_one, second_one, third_one] = [A, B, C].map(next);
    // All before anything happens, so that each keeps its own slabs.
    let [mut a, mut b, mut c] =
        [first_one, second_one, third_one].map(|who| heap.join(who, world.clone()).unwrap());
    a.tag(7);
    let _ = dies_after(first, || operation.run(&mut a));
    forget(a);
    world.kill(first_one);
    let completed = if by_visit {
        let ended = dies_after(second, || operation.visit(&mut b));
        ended == Ended::Completed(())
    } else {
        let ended = dies_after(second, || drop(heap.recover(second_one, &world).unwrap()));
        ended == Ended::Completed(())
    };
    forget(b);
    world.kill(second_one);
    heap.recover(third_one, &world).unwrap();
    let mut found = operation.contents(&mut c);
    // What the dead visitor left; gone after another visit.
    found.retain(|(number, _)| *number < 1000);
    check(&found, heap.outcome_of(first_one).expect("A took part"));
    operation.visit(&mut c);
    audit(operation, heap);
    for _ in 0..4 {
        c.collect().unwrap();
    }
    c.leave().unwrap();
    audit(operation, heap);
    completed
}

fn audit(operation: &impl Operation, heap: Heap<'_>) {
    let audit = heap.audit_with(operation.blocks(heap)).unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

fn open(memory: &Mapping) -> Heap<'_> {
    Heap::open(memory, &World::default(), core::time::Duration::ZERO).unwrap()
}

/// All words of a memory, to put it back into a state again and again.
fn words(memory: &Mapping) -> &[AtomicU64] {
    memory.get_slice(0, memory.len() / 8).unwrap()
}

fn restore(memory: &Mapping, image: &[u64]) {
    for (cell, word) in words(memory).iter().zip(image) {
        if cell.load(Ordering::Relaxed) != *word {
            cell.store(*word, Ordering::Relaxed);
        }
    }
}
