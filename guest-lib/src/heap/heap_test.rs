use super::*;
use crate::shm::Access;
use lupin_abi::InstanceId;

pub(super) const A: InstanceId = InstanceId::new(1, 1);
pub(super) const B: InstanceId = InstanceId::new(2, 1);

pub(super) fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + Clone + '_ {
    move |instance| instance.generation() != 0 && !dead.contains(&instance)
}

pub(super) fn memory(size: u64) -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Mapping::new(&file, 0, size, Access::ReadWrite).unwrap()
}

pub(super) const SIZE: u64 = 1 << 20;
pub(super) const SPEC: HeapSpec = HeapSpec { participants: 4 };

pub(super) fn create(memory: &Mapping) -> Heap<'_> {
    Heap::create(memory, &SPEC, A, &all_but(&[])).unwrap()
}

pub(super) fn word(memory: &Mapping, at: u64) -> u64 {
    load64(memory.get(at).unwrap(), Ordering::Acquire)
}

#[test]
fn blocks_of_all_sizes_come_and_go() {
    let memory = memory(8 << 20);
    let heap = create(&memory);
    let mut p = heap.join(A, all_but(&[])).unwrap();
    let slot = heap.root(0).unwrap();
    for bytes in
        (1..300)
            .chain((300..40_000).step_by(701))
            .chain([65_536, 65_537, 1 << 20, 4 << 20])
    {
        let block = p.alloc_into(slot, bytes).unwrap();
        assert_eq!(word(&memory, slot), block);
        let size = p.size_of_block(block).unwrap();
        assert!(size >= bytes && (size < 2 * bytes + 64), "{bytes} {size}");
        memory.copy_in(block, &vec![0xa5; bytes as usize]).unwrap();
        let audit = heap.audit_with([]).unwrap();
        assert!(
            audit.is_clean() && audit.live_blocks == 1,
            "{bytes} {audit:?}"
        );
        p.free_from(slot).unwrap();
        assert_eq!(word(&memory, slot), 0);
    }
    p.leave().unwrap();
    let audit = heap.audit_with([]).unwrap();
    assert_eq!((audit.live_blocks, audit.slabs), (0, 0), "{audit:?}");
}

#[test]
fn half_a_segment_can_be_one_block() {
    let memory = memory(4 << 20);
    let heap = create(&memory);
    assert_eq!(heap.largest_block(), 2 << 20);
    let mut p = heap.join(A, all_but(&[])).unwrap();
    let slot = heap.root(0).unwrap();
    p.alloc_into(slot, 2 << 20).unwrap();
    p.free_from(slot).unwrap();
    let error = p.alloc_into(slot, (2 << 20) + 1).unwrap_err();
    assert!(matches!(error, HeapError::Size { .. }), "{error}");
}

#[test]
fn blocks_do_not_overlap_and_a_full_heap_says_so() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let mut p = heap.join(A, all_but(&[])).unwrap();
    let slots: Vec<_> = (0..ROOTS).map(|n| heap.root(n).unwrap()).collect();
    let mut live = Vec::new();
    let mut random = 1u64;
    for round in 0..6_000u64 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let slot = slots[(random >> 40) as usize % slots.len()];
        if word(&memory, slot) != 0 {
            live.retain(|(at, _)| *at != word(&memory, slot));
            p.free_from(slot).unwrap();
            continue;
        }
        let bytes = 1 + (random >> 20) % (1 << (3 + round % 15));
        match p.alloc_into(slot, bytes) {
            Ok(at) => {
                let overlap = live
                    .iter()
                    .find(|(other, len)| at < other + len && *other < at + bytes);
                assert_eq!(overlap, None, "{at} {bytes}");
                live.push((at, bytes));
            }
            Err(HeapError::OutOfMemory { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(heap.audit_with([]).unwrap().is_clean());
    for slot in slots {
        if word(&memory, slot) != 0 {
            p.free_from(slot).unwrap();
        }
    }
    p.leave().unwrap();
    assert_eq!(heap.audit_with([]).unwrap().live_blocks, 0);
}

#[test]
fn wrong_frees_are_named_and_change_nothing() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let judge = all_but(&[]);
    let (mut a, mut b) = (heap.join(A, &judge).unwrap(), heap.join(B, &judge).unwrap());
    let (slot, other) = (heap.root(0).unwrap(), heap.root(1).unwrap());
    for bytes in [24, 2000, 100_000] {
        let at = a.alloc_into(slot, bytes).unwrap();
        let error = a.alloc_into(slot, bytes).unwrap_err();
        assert!(matches!(error, HeapError::SlotInUse { .. }), "{error}");
        for p in [&mut a, &mut b] {
            for wild in [
                1,
                8,
                at + 1,
                at + 8,
                SIZE,
                SIZE + 64,
                u64::MAX,
                u64::MAX - 7,
            ] {
                store64(memory.get(other).unwrap(), wild, Ordering::Release);
                let error = p.free_from(other).unwrap_err();
                assert!(
                    matches!(error, HeapError::Foreign { .. }),
                    "{wild:#x} {error}"
                );
            }
            store64(memory.get(other).unwrap(), 0, Ordering::Release);
            let error = p.free_from(other).unwrap_err();
            assert!(matches!(error, HeapError::EmptySlot { .. }), "{error}");
        }
        b.free_from(slot).unwrap();
        store64(memory.get(other).unwrap(), at, Ordering::Release);
        for p in [&mut a, &mut b] {
            let error = p.free_from(other).unwrap_err();
            assert!(matches!(error, HeapError::DoubleFree { .. }), "{error}");
        }
        store64(memory.get(other).unwrap(), 0, Ordering::Release);
    }
    for slot in [3, SIZE, SIZE - 4, u64::MAX] {
        assert!(matches!(a.alloc_into(slot, 8), Err(HeapError::Memory(_))));
        assert!(matches!(a.free_from(slot), Err(HeapError::Memory(_))));
    }
    assert!(heap.audit_with([]).unwrap().is_clean());
}

#[test]
fn what_others_free_is_used_again() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let judge = all_but(&[]);
    let (mut a, mut b) = (heap.join(A, &judge).unwrap(), heap.join(B, &judge).unwrap());
    let slot = heap.root(0).unwrap();
    for bytes in [4096, 32 << 10, 64] {
        for _ in 0..20_000 {
            a.alloc_into(slot, bytes).unwrap();
            b.free_from(slot).unwrap();
        }
    }
    assert!(heap.audit_with([]).unwrap().slabs <= 4);
}

#[test]
fn slabs_of_those_who_left_or_died_are_adopted() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let slots: Vec<_> = (0..ROOTS).map(|n| heap.root(n).unwrap()).collect();
    let mut a = heap.join(A, all_but(&[])).unwrap();
    let mut filled = 0;
    while filled < slots.len() && a.alloc_into(slots[filled], 16 << 10).is_ok() {
        filled += 1;
    }
    assert!(filled > 40, "{filled}");
    // Every second block: no slab is empty, half of the memory is free.
    for slot in slots[..filled].iter().step_by(2) {
        a.free_from(*slot).unwrap();
    }
    let dead = [A];
    core::mem::forget(a);
    let mut b = heap.join(B, all_but(&dead)).unwrap();
    for slot in slots[..filled].iter().step_by(2) {
        b.alloc_into(*slot, 16 << 10).unwrap();
    }
    assert!(heap.audit_with([]).unwrap().is_clean());
    for slot in &slots[..filled] {
        b.free_from(*slot).unwrap();
    }
    b.leave().unwrap();
    assert_eq!(heap.audit_with([]).unwrap().slabs, 0);
}

#[test]
fn places_are_taken_and_given_back() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let judge = all_but(&[]);
    let ids = |n| InstanceId::new(n, 1);
    let mut all: Vec<_> = (1..=4)
        .map(|n| heap.join(ids(n), &judge).unwrap())
        .collect();
    assert!(matches!(
        heap.join(ids(5), &judge),
        Err(HeapError::Full { participants: 4 })
    ));
    assert!(matches!(
        heap.join(ids(2), &judge),
        Err(HeapError::AlreadyJoined(_))
    ));
    assert!(matches!(
        heap.join(InstanceId::NONE, &judge),
        Err(HeapError::NoInstance(_))
    ));
    let third = all.remove(2);
    let place = third.index;
    third.leave().unwrap();
    let first = all.remove(0);
    drop(first);
    let again = heap.join(InstanceId::new(3, 9), &judge).unwrap();
    assert_eq!(again.index, place, "a thread gets its place again");
}

#[test]
fn of_two_who_free_a_block_at_once_one_succeeds() {
    const ROUNDS: usize = 2_000;
    let memory = memory(SIZE);
    let heap = create(&memory);
    let judge = all_but(&[]);
    let [slot, copy] = [0, 1].map(|n| heap.root(n).unwrap());
    let line = std::sync::Barrier::new(2);
    let mut owner = heap.join(A, &judge).unwrap();
    let other = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut other = heap.join(B, all_but(&[])).unwrap();
            let mut freed = Vec::new();
            for _ in 0..ROUNDS {
                line.wait();
                freed.push(other.free_from(copy));
                line.wait();
            }
            freed
        });
        let mut freed = Vec::new();
        for round in 0..ROUNDS {
            let block = owner.alloc_into(slot, 64).unwrap();
            memory.copy_in(copy, &block.to_ne_bytes()).unwrap();
            line.wait();
            if round % 2 == 0 {
                std::thread::yield_now();
            }
            freed.push(owner.free_from(slot));
            line.wait();
            memory.copy_in(slot, &[0; 8]).unwrap();
        }
        other.join().unwrap().into_iter().zip(freed)
    });
    for pair in other {
        assert!(
            matches!(
                pair,
                (Ok(()), Err(HeapError::DoubleFree { .. }))
                    | (Err(HeapError::DoubleFree { .. }), Ok(()))
            ),
            "{pair:?}"
        );
    }
    owner.leave().unwrap();
    assert_eq!(heap.audit().unwrap().live_blocks, 0);
}

#[test]
fn a_life_without_operations_has_an_outcome_and_one_that_left_has_none() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let mut a = heap.join(A, all_but(&[])).unwrap();
    a.tag(7);
    a.alloc_into(a.hold(0), 64).unwrap();
    a.leave().unwrap();
    std::mem::forget(heap.join(B, all_but(&[])).unwrap());
    assert_eq!(heap.outcome_of(B), None, "not settled yet");
    let settled = heap.recover(A, &all_but(&[B])).unwrap();
    assert_eq!(heap.outcome_of(A), None);
    let outcome = heap.outcome_of(B).unwrap();
    assert_eq!((outcome.kind, outcome.happened), (0, false));
    assert_eq!(settled, [outcome]);
    assert!(heap.outcomes().eq([outcome]));
}
