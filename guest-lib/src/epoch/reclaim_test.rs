use super::*;
use crate::heap::HeapSpec;
use crate::mem::crash::dies_after;
use crate::shm::{Access, Mapping};
use core::mem::forget;
use std::cell::RefCell;
use std::rc::Rc;

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);
const C: InstanceId = InstanceId::new(3, 1);
const KIND: u32 = 9;

#[derive(Clone, Default)]
struct World(Rc<RefCell<Vec<InstanceId>>>);

impl Liveness for World {
    fn is_alive(&self, instance: InstanceId) -> bool {
        !instance.is_none() && !self.0.borrow().contains(&instance)
    }
}

fn memory() -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    Mapping::new(&file, 0, 1 << 20, Access::ReadWrite).unwrap()
}

fn create(memory: &Mapping) -> Heap<'_> {
    let spec = HeapSpec { participants: 4 };
    Heap::create(memory, &spec, A, &World::default()).unwrap()
}

/// Moves the block of a root into the limbo.
fn retire(member: &mut Participant<'_, World>, root: u64) {
    let mut record = member.begin(KIND).unwrap();
    let block = record.get(root).unwrap();
    record.set(root, 0).unwrap();
    member.retire_in(&mut record, block).unwrap();
    record.commit(block).unwrap();
}

fn freed_in(member: &mut Participant<'_, World>, calls: usize) -> usize {
    (0..calls).map(|_| member.collect().unwrap()).sum()
}

#[test]
fn a_retired_block_is_free_after_three_calls() {
    let memory = memory();
    let heap = create(&memory);
    let mut a = heap.join(A, World::default()).unwrap();
    let root = heap.root(0).unwrap();
    a.alloc_into(root, 100).unwrap();
    retire(&mut a, root);
    assert_eq!(freed_in(&mut a, 2), 0);
    assert_eq!(freed_in(&mut a, 1), 1);
    assert_eq!(heap.audit_with([]).unwrap().live_blocks, 0);
}

#[test]
fn a_pinned_reader_holds_reclamation_back_until_it_unpins_or_dies() {
    let memory = memory();
    let heap = create(&memory);
    let world = World::default();
    let mut a = heap.join(A, world.clone()).unwrap();
    let mut b = heap.join(B, world.clone()).unwrap();
    let root = heap.root(0).unwrap();
    let retire_one = |a: &mut Participant<'_, World>| {
        a.alloc_into(root, 100).unwrap();
        retire(a, root);
    };
    let pin = b.pin();
    retire_one(&mut a);
    assert_eq!(freed_in(&mut a, 10), 0);
    drop(pin);
    assert_eq!(freed_in(&mut a, 2), 1);
    // It dies with the pin.
    forget(b.pin());
    forget(b);
    retire_one(&mut a);
    assert_eq!(freed_in(&mut a, 10), 0);
    world.0.borrow_mut().push(B);
    assert_eq!(freed_in(&mut a, 2), 1);
    // Nobody has settled the dead one, and whoever comes into its place is not pinned.
    let b2 = heap.join(InstanceId::new(2, 2), world.clone()).unwrap();
    retire_one(&mut a);
    assert_eq!(freed_in(&mut a, 3), 1);
    drop(b2);
}

#[test]
fn a_full_limbo_names_the_reader_and_has_room_again_after_it() {
    let memory = memory();
    let heap = create(&memory);
    let world = World::default();
    let mut a = heap.join(A, world.clone()).unwrap();
    let mut b = heap.join(B, world.clone()).unwrap();
    let root = heap.root(0).unwrap();
    let pin = b.pin();
    let error = loop {
        match a.make_room() {
            Ok(()) => {
                a.alloc_into(root, 8).unwrap();
                retire(&mut a, root);
            }
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, HeapError::LimboFull { reader: B }),
        "{error}"
    );
    let audit = heap.audit_with([]).unwrap();
    assert!(audit.is_clean() && audit.held_blocks > LIMBO as u64 / 2);
    drop(pin);
    a.make_room().unwrap();
    while freed_in(&mut a, 3) > 0 {}
    assert_eq!(heap.audit_with([]).unwrap().live_blocks, 0);
}

#[test]
fn retiring_and_collecting_may_end_at_any_store_and_so_may_recovery() {
    let mut pairs = 0;
    for first in 0.. {
        let mut first_completed = false;
        for second in 0.. {
            let memory = memory();
            let heap = create(&memory);
            let world = World::default();
            let mut a = heap.join(A, world.clone()).unwrap();
            let roots = [0, 1].map(|n| heap.root(n).unwrap());
            for root in roots {
                a.alloc_into(root, 100).unwrap();
            }
            let ended = dies_after(first, || {
                retire(&mut a, roots[0]);
                freed_in(&mut a, 2);
                retire(&mut a, roots[1]);
                freed_in(&mut a, 3);
            });
            first_completed = ended == crate::mem::crash::Ended::Completed(());
            forget(a);
            world.0.borrow_mut().push(A);
            let ended = dies_after(second, || drop(heap.recover(B, &world).unwrap()));
            world.0.borrow_mut().push(B);
            heap.recover(C, &world).unwrap();
            let audit = heap.audit_with([]).unwrap();
            assert!(audit.is_clean(), "{first} {second}: {audit:?}");
            // The next life in the place frees what the dead one had retired.
            let mut a = heap.join(InstanceId::new(1, 2), world.clone()).unwrap();
            freed_in(&mut a, 3);
            for root in roots {
                if load64(memory.get(root).unwrap(), Ordering::Relaxed) != 0 {
                    a.free_from(root).unwrap();
                }
            }
            let audit = heap.audit_with([]).unwrap();
            assert_eq!(audit.live_blocks, 0, "{first} {second}: {audit:?}");
            pairs += 1;
            if ended == crate::mem::crash::Ended::Completed(()) {
                break;
            }
        }
        if first_completed {
            break;
        }
    }
    assert!(pairs > 200, "{pairs}");
}
