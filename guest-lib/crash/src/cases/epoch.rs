//! Pins and retired blocks: what a reader may look at is kept, and everything else is freed.

use std::time::Duration;

use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::shm::Mapping;

use super::{equal, text};
use crate::case::{BYSTANDER, Case, Operation, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&PIN];

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
    let block = p.alloc_into(slot, 40).map_err(text)?;
    let mut record = p.begin(KIND).map_err(text)?;
    record.set(slot, 0).map_err(text)?;
    p.retire_in(&mut record, block).map_err(text)?;
    record.commit(block).map_err(text)
}

fn collect(p: &mut Participant<'_, World>) -> Result<usize, String> {
    let round = |_| p.collect().map_err(text);
    (0..ROUNDS).map(round).sum()
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
    check: |memory, _, world| {
        let audit = open(memory, world).audit().map_err(text)?;
        match audit.is_clean() {
            true => Ok(()),
            false => Err(format!("{audit:?}")),
        }
    },
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
