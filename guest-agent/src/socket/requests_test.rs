//! Segments and events as clients see them.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::Event;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::RING_SLOTS;
use lupin_abi::layout::GRANULE;
use lupin_abi::socket::Lifetime;

use super::*;
use crate::memory::mapping::Mapping;
use crate::socket::harness::*;
use crate::test_pod::{POOL, TestPod};

#[test]
fn segments_are_zero_shared_between_nodes_and_removed_when_unused() {
    let pod = TestPod::new();
    let garbage = vec![0xa5u8; POOL as usize];
    pod.file()
        .write_all_at(&garbage, pod.header().pool().offset)
        .unwrap();
    let (first, second) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let (a, b) = (first.hello(), second.hello());
    let (window, fd) = a.create("data", 3 << 20).unwrap();
    assert_eq!(window.size, 4 << 20);
    let mine = Mapping::new(&fd, window.offset, window.size, true).unwrap();
    assert!(mine.words().iter().all(|w| w.load(Ordering::Relaxed) == 0));
    assert!(matches!(a.create("data", 1), Err(RefusalCode::Exists)));
    mine.words()[9].store(42, Ordering::Relaxed);

    let (window, fd) = b.open("data", true).unwrap();
    let theirs = Mapping::new(&fd, window.offset, window.size, false).unwrap();
    assert_eq!(theirs.words()[9].load(Ordering::Relaxed), 42);
    assert!(Mapping::new(&fd, window.offset, window.size, true).is_err());
    let Reply::Segments(list) = b.ask(&Request::ListSegments).0 else {
        panic!("no list");
    };
    assert_eq!(
        (list.len(), list[0].name.as_str(), list[0].size),
        (1, "data", 4 << 20)
    );

    assert_eq!(a.remove("data"), Err(RefusalCode::Busy));
    // A node that died uses nothing any more.
    pod.kill(2);
    assert_eq!(a.remove("data"), Ok(()));
    assert!(matches!(a.open("data", false), Err(RefusalCode::NotFound)));
    assert_eq!(a.remove("data"), Err(RefusalCode::NotFound));
    // The space is there again, and zero again.
    let (window, fd) = a.create("all", POOL).unwrap();
    let mine = Mapping::new(&fd, window.offset, window.size, true).unwrap();
    assert!(mine.words().iter().all(|w| w.load(Ordering::Relaxed) == 0));
    assert!(matches!(a.create("more", 1), Err(RefusalCode::NoSpace)));
}

#[test]
fn segment_names_sizes_and_modes_are_checked() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    let long = "x".repeat(65);
    for name in ["", ".hidden", "a/b", "a b", "ä", long.as_str()] {
        assert!(
            matches!(client.create(name, 1), Err(RefusalCode::Invalid)),
            "{name:?}"
        );
    }
    for size in [0, POOL + 1, u64::MAX, u64::MAX - GRANULE] {
        assert!(
            matches!(client.create("a", size), Err(RefusalCode::Invalid)),
            "{size}"
        );
    }
    for (mode, lifetime) in [(0o4777, Lifetime::Kept), (0o600, Lifetime::Members)] {
        let request = Request::CreateSegment {
            segment: named(None, "a"),
            size: 1,
            mode,
            lifetime,
        };
        assert_eq!(client.done(&request), Err(RefusalCode::Invalid));
    }
    assert!(matches!(client.open("a", true), Err(RefusalCode::NotFound)));
}

#[test]
fn a_segment_stays_in_use_until_the_process_that_opened_it_is_dead() {
    let pod = TestPod::new();
    let (first, second) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let a = first.hello();
    a.create("shared", GRANULE).unwrap();
    let path = second.path.clone();
    let (report, ours) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = Forked::new(|| {
        let client = Connection::new(&path);
        client.welcome();
        client.open("shared", false).unwrap();
        // The connection ends here; the lease does not.
        drop(client);
        report.send(b"open").unwrap();
    });
    ours.recv(&mut [0; 8]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(a.remove("shared"), Err(RefusalCode::Busy));
    child.kill();
    until("the lease ends", || a.remove("shared").is_ok());
}

#[test]
fn a_segment_is_not_taken_from_another_process_of_the_node() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    client.create("mine", GRANULE).unwrap();
    let path = served.path.clone();
    let (report, ours) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = Forked::new(|| {
        let client = Connection::new(&path);
        client.welcome();
        client.open("mine", false).unwrap();
        report.send(b"open").unwrap();
        std::mem::forget(client);
    });
    ours.recv(&mut [0; 8]).unwrap();
    assert_eq!(client.remove("mine"), Err(RefusalCode::Busy));
    child.kill();
    until("it is only the caller's", || client.remove("mine").is_ok());
}

fn next_event(client: &Connection) -> Result<Event, u64> {
    match client.receive().unwrap().0 {
        Reply::Event(event) => Ok(event),
        Reply::EventsLost { next } => Err(next),
        other => panic!("{other:?}"),
    }
}

#[test]
fn subscribers_get_the_past_they_ask_for_and_what_happens_next() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    for _ in 0..10 {
        pod.happen(EventKind::Rung, 0);
    }
    let (old, new) = (served.hello(), served.hello());
    assert_eq!(old.ask(&Request::Subscribe { from: 4 }).0, Reply::Done);
    assert_eq!(new.ask(&Request::Subscribe { from: 0 }).0, Reply::Done);
    for seq in 4..=10 {
        assert_eq!(next_event(&old).unwrap().seq, seq);
    }
    pod.happen(EventKind::NodeJoined, 3);
    for client in [&old, &new] {
        let event = next_event(client).unwrap();
        assert_eq!(
            (event.seq, event.kind, event.node),
            (11, EventKind::NodeJoined, 3)
        );
    }
    let (reply, _) = new.ask(&Request::Subscribe { from: 13 });
    assert!(matches!(
        reply,
        Reply::Refused {
            code: RefusalCode::Invalid,
            ..
        }
    ));
}

#[test]
fn a_subscriber_that_falls_behind_learns_that_it_did() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    assert_eq!(client.ask(&Request::Subscribe { from: 0 }).0, Reply::Done);
    // It does not read while the ring turns over many times.
    let total = 10 * RING_SLOTS as u64;
    for _ in 0..total {
        pod.happen(EventKind::Rung, 0);
    }
    let (mut expected, mut losses) = (1, 0);
    while expected <= total {
        match next_event(&client) {
            Ok(event) => {
                assert_eq!(event.seq, expected, "a gap without a word");
                expected += 1;
            }
            Err(next) => {
                assert!(next > expected);
                losses += 1;
                expected = next;
            }
        }
    }
    assert!(losses > 0);
    // And the server still serves.
    assert!(served.hello().register(None).is_ok());
}
