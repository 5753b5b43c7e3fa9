//! The way of an event from the manager to an application: a ring is a hint and may get lost, the
//! ring of events and the generation table are the truth.

mod support;

use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use lupin::{Events, Happening, Patience};
use lupin_abi::NodeId;
use lupin_abi::fabric::RING_SLOTS;
use support::Pod;

/// How late an event may be whose ring got lost: the agent looks around four times a second, and
/// machines that run tests may be busy.
const LATE: Duration = Duration::from_secs(10);

fn subscribe(pod: &Pod) -> (lupin::Pod, Events) {
    pod.joined();
    let attached = lupin::Pod::attach_at(pod.socket(), Patience::default()).unwrap();
    let events = attached.subscribe(0).unwrap();
    (attached, events)
}

fn ring(doorbell: &OwnedFd) {
    nix::unistd::write(doorbell, &1u64.to_ne_bytes()).unwrap();
}

/// Events happen one by one while the application sleeps, and the doorbell is rung for those that
/// `hears` says; every one reaches the application, once, in order, and in bounded time.
fn each_arrives(hears: impl Fn(u64) -> bool) {
    let pod = Pod::new();
    let _agent = pod.start(&[], &[]);
    let (_attached, mut events) = subscribe(&pod);
    let doorbell = pod.manager().hello();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while let Ok(Some(happening)) = events.next_within(2 * LATE) {
            if tell.send(happening).is_err() {
                return;
            }
        }
    });
    for n in 0..12 {
        // The application has seen all there was, and waits for its agent.
        std::thread::sleep(Duration::from_millis(20));
        let seq = pod.happen();
        if hears(n) {
            ring(&doorbell);
        }
        match told.recv_timeout(LATE) {
            Ok(Happening::Event(event)) => assert_eq!(event.seq, seq, "event {n}"),
            other => panic!("event {n}: {other:?}"),
        }
    }
    assert!(told.try_recv().is_err(), "told twice");
}

#[test]
fn every_second_ring_may_get_lost() {
    each_arrives(|n| n % 2 == 0);
}

#[test]
fn all_rings_may_be_masked() {
    each_arrives(|_| false);
}

#[test]
fn rings_without_an_event_are_nothing() {
    let pod = Pod::new();
    let _agent = pod.start(&[], &[]);
    let (_attached, mut events) = subscribe(&pod);
    let doorbell = pod.manager().hello();
    for _ in 0..100 {
        ring(&doorbell);
    }
    let seq = pod.happen();
    ring(&doorbell);
    match events.next_within(LATE).unwrap() {
        Some(Happening::Event(event)) => assert_eq!(event.seq, seq),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reader_that_falls_behind_learns_it_and_finds_the_truth_in_the_table() {
    let pod = Pod::new();
    let _agent = pod.start(&[], &[]);
    let (attached, mut events) = subscribe(&pod);
    let doorbell = pod.manager().hello();
    let other = NodeId::new(2).unwrap();
    let mut last = 0;
    for generation in 1..=RING_SLOTS as u32 + 1000 {
        pod.fabric().entry(other).set_generation(generation);
        last = pod.happen();
        ring(&doorbell);
    }
    let Some(Happening::Lost { next }) = events.next_within(LATE).unwrap() else {
        panic!("nothing was said to be lost");
    };
    assert!(next > 1000 && next <= last, "goes on at {next} of {last}");
    // The news is in the table, whatever was lost.
    let generation = attached.fabric().entry(other).generation();
    assert_eq!(generation, RING_SLOTS as u32 + 1000);
    for seq in next..=last {
        match events.next_within(LATE).unwrap() {
            Some(Happening::Event(event)) => assert_eq!(event.seq, seq),
            other => panic!("event {seq}: {other:?}"),
        }
    }
    assert_eq!(events.next_within(Duration::ZERO).unwrap(), None);
}
