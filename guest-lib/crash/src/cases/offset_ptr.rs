//! Pointers inside a segment.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::offset_ptr::AtomicOffsetPtr;
use lupin::shm::Mapping;

use super::{equal, load, store};
use crate::case::{Case, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Store, &CompareExchange];

const POINTER: u64 = 64;
const OLD: u64 = 128;
const NEW: u64 = 192;
/// What lies at both targets.
const VALUE: u64 = 0x1234_5678;

fn parts(memory: &Mapping) -> (&AtomicOffsetPtr<AtomicU64>, &AtomicU64, &AtomicU64) {
    let get = |at| memory.get::<AtomicU64>(at).expect("in bounds");
    (memory.get(POINTER).expect("in bounds"), get(OLD), get(NEW))
}

fn prepare(memory: &Mapping, state: &str) {
    let (pointer, old, _) = parts(memory);
    store(memory, OLD, VALUE);
    if state != "null" {
        let stored = pointer.store(memory, Some(old), Ordering::Release);
        stored.expect("both lie in the memory");
    }
}

/// It leads to the old target, or to the new one whose contents are complete.
fn check(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    let (pointer, old, new) = parts(memory);
    let target = pointer
        .load(memory, Ordering::Acquire)
        .map_err(|error| error.to_string())?;
    match target {
        None if state == "null" && !world.returned => Ok(()),
        Some(target) if core::ptr::eq(target, new) => equal("the target", load(memory, NEW), VALUE),
        Some(target) if core::ptr::eq(target, old) && state != "null" && !world.returned => Ok(()),
        other => Err(format!("it leads to {other:?}")),
    }
}

/// Points it back to the old target and once more to the new one.
fn go_on(memory: &Mapping) -> Result<(), String> {
    let (pointer, old, new) = parts(memory);
    for target in [old, new] {
        let stored = pointer.store(memory, Some(target), Ordering::Release);
        stored.map_err(|error| error.to_string())?;
        let found = pointer.load(memory, Ordering::Acquire);
        let found = found.map_err(|error| error.to_string())?;
        if !found.is_some_and(|found| core::ptr::eq(found, target)) {
            return Err(format!("it leads to {found:?}"));
        }
    }
    Ok(())
}

/// Fills a target and points to it.
#[derive(Debug)]
struct Store;

impl Case for Store {
    fn name(&self) -> &'static str {
        "offset_ptr.store"
    }

    fn states(&self) -> &'static [&'static str] {
        &["null", "set"]
    }

    fn bytes(&self) -> u64 {
        4096
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let (pointer, _, new) = parts(memory);
        store(memory, NEW, VALUE);
        let stored = pointer.store(memory, Some(new), Ordering::Release);
        stored.expect("both lie in the memory");
    }

    fn recover(&self, _: &Mapping, _: &str, _: InstanceId, _: &World) {}

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, _: &str, _: &World) -> Result<(), String> {
        go_on(memory)
    }
}

/// Fills a target and points to it, if it still leads to where it did.
#[derive(Debug)]
struct CompareExchange;

impl Case for CompareExchange {
    fn name(&self) -> &'static str {
        "offset_ptr.compare_exchange"
    }

    fn states(&self) -> &'static [&'static str] {
        &["null", "set"]
    }

    fn bytes(&self) -> u64 {
        4096
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, state: &str) {
        let (pointer, old, new) = parts(memory);
        store(memory, NEW, VALUE);
        let current = (state != "null").then_some(old);
        let swapped = pointer.compare_exchange(memory, current, Some(new), Ordering::AcqRel);
        swapped
            .expect("all lie in the memory")
            .expect("nobody else changes it");
    }

    fn recover(&self, _: &Mapping, _: &str, _: InstanceId, _: &World) {}

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, _: &str, _: &World) -> Result<(), String> {
        go_on(memory)
    }
}
