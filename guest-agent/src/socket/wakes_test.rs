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

/// The first wake-ups that the agent tells the manager of.
fn relayed(served: &Served) -> Vec<Wake> {
    let wakes = || {
        let told = served.to_manager.lock().unwrap();
        let wakes = told.iter().filter_map(|told| match told {
            ToManager::Wake(wake) => Some(*wake),
            _ => None,
        });
        wakes.collect::<Vec<_>>()
    };
    until("the wake-up", || !wakes().is_empty());
    wakes()
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
    let wake = Wake {
        at: place - pod.header().pool().offset + 64,
        classes: 0b10,
        all: true,
    };
    assert_eq!(relayed(&served), [wake]);
}

#[test]
fn what_a_process_may_wake_goes_straight_to_the_nodes_that_take_it() {
    let pod = TestPod::new();
    let folder = folder();
    let peers = folder.path().join("run").join(lupin_abi::socket::PEERS);
    std::fs::create_dir_all(&peers).unwrap();
    let two = std::os::unix::net::UnixDatagram::bind(peers.join("2")).unwrap();
    two.set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    let served = Served::start_in(folder, &pod, 1);
    let connection = served.hello();
    let (entry, _) = create(&connection, "words");
    let to = |classes| Request::Wake {
        segment: entry,
        offset: 64,
        classes,
        all: true,
    };
    // Refused, and so in no queue before the one that counts.
    connection.send(&request(entry + 1, 64));
    connection.send(&to(0b10));
    let mut packet = [0; MAX_WAKE];
    let len = two.recv(&mut packet).unwrap();
    assert_eq!(&packet[..len], encode(&to(0b10)).unwrap());
    // Node 3 has no such socket: it is a guest, or its agent is being restarted.
    connection.send(&to(0b110));
    let left: Vec<u16> = relayed(&served).iter().map(|wake| wake.classes).collect();
    assert_eq!(left, [0b100]);
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
