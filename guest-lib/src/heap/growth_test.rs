//! Where the memory of slabs is after deaths, and whose it is.

use super::heap_test::{A, B, SIZE, all_but, create, memory};
use super::*;
use crate::mem::crash::{Ended, dies_after};
use core::cell::Cell;
use lupin_abi::InstanceId;

const SMALL_HEAP: u64 = 4 << 20;
const SIZES: [u64; 12] = [
    8, 24, 64, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 16_000, 32_000,
];

#[test]
fn slabs_of_lives_that_died_in_growth_are_found_again() {
    // One who comes back, many who come back by turns, and more than there are places.
    for (participants, ids) in [(64, 1), (64, 64), (8, 100)] {
        let memory = memory(SMALL_HEAP);
        let living = Cell::new(A);
        let judge = |instance| instance == living.get();
        let spec = HeapSpec { participants };
        let heap = Heap::create(&memory, &spec, A, &judge).unwrap();
        let mut random = 1u64;
        let mut below = |bound: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % bound
        };
        let mut deaths = 0;
        for life in 0..1_500 {
            living.set(InstanceId::new(10 + life % ids, 1 + life / ids));
            let (stores, bytes) = (below(300), SIZES[below(12) as usize]);
            let ended = dies_after(stores, || {
                let mut p = heap.join(living.get(), judge).unwrap();
                for n in 0..4 {
                    p.alloc_into(p.hold(n), bytes).unwrap();
                }
                std::mem::forget(p);
            });
            deaths += u32::from(ended == Ended::Died);
        }
        assert!(deaths > 500, "{deaths}");
        living.set(A);
        heap.recover(A, &judge).unwrap();
        assert_eq!(heap.audit_with([]).unwrap().live_blocks, 0);
        // All spans can be used for something else.
        let mut p = heap.join(A, judge).unwrap();
        let taken = (0..ROOTS)
            .map_while(|n| p.alloc_into(heap.root(n).unwrap(), SPAN).ok())
            .count();
        let audit = heap.audit_with([]).unwrap();
        assert!(audit.is_clean(), "{audit:?}");
        assert_eq!(
            (taken, audit.run_spans),
            (audit.spans as usize, audit.spans)
        );
    }
}

#[test]
fn who_adopts_slabs_of_the_dead_does_not_hoard_them() {
    let memory = memory(SMALL_HEAP);
    let living = Cell::new(A);
    let judge = |instance| instance == A || instance == living.get();
    let spec = HeapSpec { participants: 64 };
    let heap = Heap::create(&memory, &spec, A, &judge).unwrap();
    let mut p = heap.join(A, judge).unwrap();
    let slot = heap.root(0).unwrap();
    let sizes = [1_024, 2_048, 4_096, 8_192, 16_384];
    for (round, bytes) in sizes.into_iter().enumerate() {
        for id in 10..26 {
            living.set(InstanceId::new(id, 1 + round as u32));
            let mut victim = heap.join(living.get(), judge).unwrap();
            victim.alloc_into(victim.hold(0), bytes).unwrap();
            std::mem::forget(victim);
        }
        living.set(A);
        heap.recover(A, &judge).unwrap();
        p.alloc_into(slot, bytes).unwrap();
        p.free_from(slot).unwrap();
        let audit = heap.audit().unwrap();
        assert!(audit.slabs as usize <= 2 * (round + 1), "{audit:?}");
    }
}

#[test]
fn a_living_participant_gives_back_what_others_emptied_when_it_is_asked_to() {
    let memory = memory(SIZE);
    let heap = create(&memory);
    let judge = all_but(&[]);
    let (mut a, mut b) = (heap.join(A, &judge).unwrap(), heap.join(B, &judge).unwrap());
    let slots: Vec<_> = (1..=24).map(|n| heap.root(n).unwrap()).collect();
    for slot in &slots {
        a.alloc_into(*slot, 32 << 10).unwrap();
    }
    for slot in slots {
        b.free_from(slot).unwrap();
    }
    let (slot, largest) = (heap.root(0).unwrap(), heap.largest_block());
    let error = b.alloc_into(slot, largest).unwrap_err();
    assert!(matches!(error, HeapError::OutOfMemory { .. }), "{error}");
    a.trim().unwrap();
    assert_eq!(heap.audit().unwrap().slabs, 0);
    b.alloc_into(slot, largest).unwrap();
}
