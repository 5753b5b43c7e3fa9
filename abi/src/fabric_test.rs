use super::*;
use alloc::alloc::{Layout, alloc_zeroed};

fn section() -> &'static FabricSection {
    let layout = Layout::from_size_align(FABRIC_SIZE as usize, 4096).unwrap();
    // SAFETY: the layout has a non-zero size; the memory is leaked, so it lives for 'static.
    unsafe { FabricSection::from_ptr(alloc_zeroed(layout)) }
}

fn event(n: u64) -> Event {
    Event {
        seq: 0,
        time_ns: n,
        epoch: 1,
        kind: EventKind::Fenced,
        node: 3,
        old_generation: 1,
        generation: 2,
        cause: Cause::Hang,
        evidence: [n; EVIDENCE_WORDS],
    }
}

#[test]
fn events_read_back_in_order() {
    let s = section();
    assert_eq!(s.read(1), RingRead::NotYet);
    for n in 1..=10 {
        assert_eq!(s.append(&event(n)), n);
    }
    for n in 1..=10 {
        assert_eq!(s.read(n), RingRead::Event(Event { seq: n, ..event(n) }));
    }
    assert_eq!(s.read(11), RingRead::NotYet);
}

#[test]
fn a_reader_that_falls_behind_learns_it_and_can_go_on() {
    let s = section();
    let total = RING_SLOTS as u64 + 100;
    for n in 1..=total {
        s.append(&event(n));
    }
    let RingRead::Lost { oldest } = s.read(1) else {
        panic!("expected a loss")
    };
    for n in oldest..=total {
        assert_eq!(
            s.read(n),
            RingRead::Event(Event { seq: n, ..event(n) }),
            "{n}"
        );
    }
}

#[test]
fn a_half_written_slot_is_never_an_event() {
    let s = section();
    s.append(&event(1));
    // What a manager leaves that dies inside `append`.
    let slot = &s.ring[2];
    slot.seq.store(0, Ordering::Relaxed);
    slot.words[0].store(77, Ordering::Relaxed);
    assert_eq!(s.read(2), RingRead::NotYet);
    assert_eq!(s.append(&event(2)), 2);
    assert_eq!(s.read(2), RingRead::Event(Event { seq: 2, ..event(2) }));
}

#[test]
fn liveness_compares_the_whole_instance() {
    let s = section();
    let node = NodeId::new(3).unwrap();
    s.entry(node).set_generation(2);
    assert!(s.is_current(InstanceId::of_node(node, 2)));
    assert!(!s.is_current(InstanceId::of_node(node, 1)));
    assert!(!s.is_current(InstanceId::NONE));
    assert!(!s.is_current(InstanceId::new(u32::MAX, 2)));
}

#[test]
fn a_concurrent_reader_never_sees_a_torn_event() {
    extern crate std;
    let s = section();
    let writer = std::thread::spawn(move || {
        for n in 1..=200_000 {
            s.append(&event(n));
        }
    });
    let mut seen = 0;
    while !writer.is_finished() {
        let head = s.state().ring_head();
        if let RingRead::Event(e) = s.read(head.saturating_sub(RING_SLOTS as u64 - 3).max(1)) {
            assert!(e.evidence.iter().all(|w| *w == e.seq), "torn: {e:?}");
            seen += 1;
        }
    }
    writer.join().unwrap();
    assert!(seen > 0);
}
