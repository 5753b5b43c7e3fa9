use lupin_abi::port::ToManager;

use super::*;
use crate::socket::harness::*;
use crate::test_pod::TestPod;

fn request(segment: u32, offset: u64) -> Request {
    Request::Wake {
        segment,
        offset,
        classes: 0b10,
        all: true,
    }
}

/// Creates a segment: its number, and its place in the pod's memory.
fn create(connection: &Connection, name: &str) -> (u32, u64) {
    match connection.ask(&creation(named(None, name), 2 << 20)).0 {
        Reply::Segment {
            entry, mappings, ..
        } => (entry, mappings[0].offset),
        other => panic!("{other:?}"),
    }
}

/// A request with an answer, so that what was sent before it has been handled.
fn settle(connection: &Connection) {
    let (reply, _) = connection.ask(&Request::ListSegments);
    assert!(matches!(reply, Reply::Segments(_)), "{reply:?}");
}

#[test]
fn the_longest_wake_up_fits_its_bound() {
    let longest = Request::Wake {
        segment: u32::MAX,
        offset: u64::MAX,
        classes: u16::MAX,
        all: true,
    };
    assert!(encode(&longest).unwrap().len() <= MAX_WAKE);
}

#[test]
fn a_wake_up_names_a_word_of_a_segment_that_its_sender_may_write() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let connection = served.hello();
    create(&connection, "first");
    let (entry, place) = create(&connection, "second");
    // Beside the one that counts: not aligned, beyond the end, no such segment. None is answered.
    for (segment, offset) in [
        (entry, 3),
        (entry, 2 << 20),
        (entry, u64::MAX - 3),
        (entry + 1, 0),
        (u32::MAX, 0),
        (entry, 64),
    ] {
        connection.send(&request(segment, offset));
    }
    settle(&connection);
    until("the wake-up", || {
        !served.to_manager.lock().unwrap().is_empty()
    });
    let wake = Wake {
        at: place - pod.header().pool().offset + 64,
        classes: 0b10,
        all: true,
    };
    assert_eq!(*served.to_manager.lock().unwrap(), [ToManager::Wake(wake)]);
}

#[test]
fn a_wake_up_before_hello_ends_the_connection() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let connection = served.connect();
    connection.send(&request(0, 0));
    assert_eq!(
        connection.refused(),
        lupin_abi::socket::RefusalCode::Protocol
    );
    assert!(connection.receive().is_none());
}

#[test]
fn deaths_are_told_to_those_who_watch_and_to_the_other_nodes() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let (watcher, other) = (served.hello(), served.hello());
    assert!(matches!(watcher.ask(&Request::WatchDeaths).0, Reply::Done));
    // What happened before may be told of once more.
    let (id, generation) = other.register(None).unwrap();
    let release = Request::ReleaseThread { id, generation };
    assert!(matches!(other.ask(&release).0, Reply::Done));
    assert_eq!(watcher.receive().unwrap().0, Reply::Deaths);
    until("the others are told", || {
        served
            .to_manager
            .lock()
            .unwrap()
            .contains(&ToManager::Deaths)
    });
    // One who does not read holds nobody up.
    for _ in 0..1000 {
        let (id, generation) = other.register(None).unwrap();
        let release = Request::ReleaseThread { id, generation };
        assert!(matches!(other.ask(&release).0, Reply::Done));
    }
    settle(&other);
}

#[test]
fn a_killed_process_is_a_death() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let watcher = served.hello();
    assert!(matches!(watcher.ask(&Request::WatchDeaths).0, Reply::Done));
    let ready = nix::sys::eventfd::EventFd::new().unwrap();
    let child = Forked::new(|| {
        let connection = served.hello();
        connection.register(None).unwrap();
        ready.write(1).unwrap();
        std::mem::forget(connection);
    });
    ready.read().unwrap();
    child.kill();
    assert_eq!(watcher.receive().unwrap().0, Reply::Deaths);
}
