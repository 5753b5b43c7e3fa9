//! Pins and retired blocks: what a reader may look at is kept, and everything else is freed.

use std::time::Duration;

use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::shm::Mapping;

use super::{equal, load, text};
use crate::case::{BYSTANDER, Case, Operation, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&PIN, &FULL];

/// The kind of the records here.
const KIND: u32 = 9;
/// More than enough rounds of collection for whatever nobody looks at.
const ROUNDS: usize = 6;

fn open<'m>(memory: &'m Mapping, world: &World) -> Heap<'m> {
    Heap::open(memory, world, Duration::ZERO).expect("the heap is complete")
}

/// Retires a block, as a removal from a collection does.
fn retire(p: &mut Participant<'_, World>) -> Result<(), String> {
    let slot = p.hold(0);
    p.alloc_into(slot, 40).map_err(text)?;
    retire_from(p, slot)
}

/// Empties a slot and retires the block that it held.
fn retire_from(p: &mut Participant<'_, World>, slot: u64) -> Result<(), String> {
    let mut record = p.begin(KIND).map_err(text)?;
    let block = record.get(slot).map_err(text)?;
    record.set(slot, 0).map_err(text)?;
    p.retire_in(&mut record, block).map_err(text)?;
    record.commit(block).map_err(text)
}

fn collect(p: &mut Participant<'_, World>) -> Result<usize, String> {
    let round = |_| p.collect().map_err(text);
    (0..ROUNDS).map(round).sum()
}

fn audit(memory: &Mapping, world: &World) -> Result<(), String> {
    let audit = open(memory, world).audit().map_err(text)?;
    match audit.is_clean() {
        true => Ok(()),
        false => Err(format!("{audit:?}")),
    }
}

const PIN: Operation = Operation {
    name: "heap.pin",
    states: &["nobody else"],
    bytes: 288 << 10,
    prepare: |memory, _| {
        let world = World::without_deaths();
        let spec = HeapSpec { participants: 4 };
        let heap = Heap::create(memory, &spec, BYSTANDER, &world).expect("new memory");
        // The victim has slabs from before: getting one is the heap's own case.
        let mut p = heap.join(VICTIM, world).expect("there is a place");
        p.alloc_into(p.hold(0), 40).expect("there is room");
        p.leave().expect("it lives");
    },
    run: |memory, _| {
        let world = World::without_deaths();
        let heap = open(memory, &world);
        let mut p = heap.join(VICTIM, world).expect("there is a place");
        drop(p.pin());
        retire(&mut p).expect("there is room");
        assert_eq!(collect(&mut p), Ok(1), "nobody reads");
        // A death runs no destructors.
        std::mem::forget(p);
    },
    recover: |memory, _, me, world| {
        let outcomes = open(memory, world).recover(me, world);
        outcomes.expect("nothing is damaged");
    },
    check: |memory, _, world| audit(memory, world),
    go_on: |memory, _, world| {
        let heap = open(memory, world);
        let join = |me| heap.join(me, world.clone()).map_err(text);
        let (mut reader, mut writer) = (join(BYSTANDER)?, join(world.survivor())?);
        // What a dead one had retired in the same place is gone first.
        collect(&mut writer)?;
        // Twice: the second block is retired where the first one was.
        for _ in 0..2 {
            let pin = reader.pin();
            retire(&mut writer)?;
            equal("freed under a reader", collect(&mut writer)?, 0)?;
            drop(pin);
            equal("freed without one", collect(&mut writer)?, 1)?;
        }
        writer.leave().map_err(text)?;
        reader.leave().map_err(text)
    },
    lives_on: true,
};

/// Two of these fill a span.
const BIG: u64 = 32 << 10;
/// The root that the operation fills, and the first of those of the one who leaves.
const TARGET: u32 = 40;
const LEFT: u32 = 50;

fn root(heap: Heap<'_>, index: u32) -> u64 {
    heap.root(index).expect("there are 64")
}

/// An allocation that finds memory only in what somebody retired before leaving.
const FULL: Operation = Operation {
    name: "heap.alloc_into_full",
    states: &["blocks retired by one who left"],
    bytes: 288 << 10,
    prepare: |memory, _| {
        let world = World::without_deaths();
        let spec = HeapSpec { participants: 4 };
        let heap = Heap::create(memory, &spec, BYSTANDER, &world).expect("new memory");
        let join = |me| heap.join(me, world.clone()).expect("there is a place");
        let (mut leaver, mut filler) = (join(BYSTANDER), join(VICTIM));
        for index in [LEFT, LEFT + 1] {
            let slot = root(heap, index);
            leaver.alloc_into(slot, BIG).expect("there is room");
        }
        for index in 0..TARGET {
            if filler.alloc_into(root(heap, index), BIG).is_err() {
                break;
            }
        }
        assert!(load(memory, root(heap, TARGET - 1)) == 0, "it is full");
        for index in [LEFT, LEFT + 1] {
            retire_from(&mut leaver, root(heap, index)).expect("there is room");
        }
        leaver.leave().expect("it lives");
        filler.leave().expect("it lives");
    },
    run: |memory, _| {
        let world = World::without_deaths();
        let heap = open(memory, &world);
        let mut p = heap.join(VICTIM, world).expect("there is a place");
        let block = p.alloc_into(root(heap, TARGET), BIG);
        block.expect("what was retired is free");
        std::mem::forget(p);
    },
    recover: |memory, _, me, world| {
        let outcomes = open(memory, world).recover(me, world);
        outcomes.expect("nothing is damaged");
    },
    check: |memory, _, world| {
        audit(memory, world)?;
        let is_there = load(memory, root(open(memory, world), TARGET)) != 0;
        equal(
            "it returned with nothing",
            world.returned && !is_there,
            false,
        )
    },
    go_on: |memory, _, world| {
        let heap = open(memory, world);
        let mut p = heap.join(world.survivor(), world.clone()).map_err(text)?;
        let slot = root(heap, TARGET);
        if load(memory, slot) != 0 {
            p.free_from(slot).map_err(text)?;
        }
        // Both blocks that were retired, and no more.
        p.alloc_into(slot, BIG).map_err(text)?;
        p.alloc_into(root(heap, LEFT), BIG).map_err(text)?;
        let more = p.alloc_into(root(heap, LEFT + 1), BIG).is_ok();
        equal("more than there is", more, false)?;
        for slot in [slot, root(heap, LEFT)] {
            p.free_from(slot).map_err(text)?;
        }
        p.trim().map_err(text)?;
        // The place of the one who left is like new: what is retired there now waits for readers.
        let mut again = heap.join(BYSTANDER, world.clone()).map_err(text)?;
        let pin = p.pin();
        again.alloc_into(root(heap, LEFT), BIG).map_err(text)?;
        retire_from(&mut again, root(heap, LEFT))?;
        equal("freed under a reader", collect(&mut again)?, 0)?;
        drop(pin);
        equal("freed without one", collect(&mut again)?, 1)?;
        again.leave().map_err(text)?;
        p.leave().map_err(text)?;
        audit(memory, world)
    },
    // A living one keeps the slab that it took the block from.
    lives_on: false,
};
