//! The client against an agent that answers, refuses, goes away, and comes back.

mod common;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{FakePod, eventually};
use lupin::client::RefusalCode;
use lupin::liveness::Liveness;
use lupin::shm::Access;
use lupin::{ClientError, Happening, Patience, Pod};

const MIB: u64 = 1 << 20;

fn attach(path: impl Into<std::path::PathBuf>) -> Pod {
    Pod::attach_at(path, Patience::default()).unwrap()
}

#[test]
fn two_nodes_share_a_segment() {
    let pod = FakePod::new(16 * MIB);
    let (one, two) = (attach(pod.start_node(1)), attach(pod.start_node(2)));
    assert_eq!((one.node().get(), two.node().get()), (1, 2));
    assert_eq!(one.header().name(), "fake");
    let mine = one.create_segment("shared", 5 * MIB, 0o660).unwrap();
    assert!(mine.is_created());
    assert_eq!(mine.len(), 6 * MIB, "rounded up to granules");
    let yours = two.open_segment("shared", Access::ReadOnly).unwrap();
    mine.get::<AtomicU64>(8)
        .unwrap()
        .store(7, Ordering::Release);
    let read = yours.get::<AtomicU64>(8).unwrap().load(Ordering::Acquire);
    assert_eq!(read, 7);
    assert_eq!(two.list_segments().unwrap().len(), 1);

    let again = one.create_segment("shared", 1, 0o660).unwrap_err();
    assert_eq!(again.refusal(), Some(RefusalCode::Exists));
    let large = one.create_segment("large", 100 * MIB, 0o660).unwrap_err();
    assert_eq!(large.refusal(), Some(RefusalCode::NoSpace));
    let none = two.open_segment("none", Access::ReadWrite).unwrap_err();
    assert_eq!(none.refusal(), Some(RefusalCode::NotFound));
    two.remove_segment("shared").unwrap();
    assert!(two.list_segments().unwrap().is_empty());
}

#[test]
fn whoever_comes_first_creates_a_segment_and_the_others_wait_for_it() {
    let pod = FakePod::new(16 * MIB);
    let sockets = [1, 2, 3].map(|id| pod.start_node(id));
    let open = |socket: &PathBuf| {
        let segment = attach(socket).open_or_create_segment("shared", MIB, 0o660);
        segment.unwrap().is_created()
    };
    // Another one prepares it, and dies in that.
    pod.prepare("shared", true);
    std::thread::scope(|scope| {
        let nodes: Vec<_> = sockets.iter().map(|s| scope.spawn(|| open(s))).collect();
        std::thread::sleep(Duration::from_millis(30));
        assert!(nodes.iter().all(|node| !node.is_finished()));
        pod.prepare("shared", false);
        let created = nodes.into_iter().map(|node| node.join().unwrap());
        assert_eq!(created.filter(|created| *created).count(), 1);
    });
    let error = attach(&sockets[0]).open_or_create_segment("shared", 3 * MIB, 0o660);
    let error = error.unwrap_err();
    assert!(matches!(error, ClientError::Smaller { .. }), "{error}");

    pod.prepare("other", true);
    let patience = Patience {
        request: Duration::from_millis(100),
        ..Patience::default()
    };
    let hasty = Pod::attach_at(&sockets[0], patience).unwrap();
    let refused = [
        hasty.open_segment("other", Access::ReadOnly),
        hasty.open_or_create_segment("other", MIB, 0o660),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().refusal(), Some(RefusalCode::Busy));
    }
}

#[test]
fn threads_live_until_dropped_and_die_with_their_node() {
    let pod = FakePod::new(4 * MIB);
    let (one, two) = (attach(pod.start_node(1)), attach(pod.start_node(2)));
    let mine = one.register_thread(None).unwrap();
    let yours = two.register_thread(Some(77)).unwrap();
    assert_eq!(yours.instance().id(), 77);
    assert!(two.threads_alive().is_alive(mine.instance()));
    let taken = one.register_thread(Some(77)).unwrap_err();
    assert_eq!(taken.refusal(), Some(RefusalCode::IdTaken));

    let name = mine.instance();
    drop(mine);
    assert!(!two.threads_alive().is_alive(name));

    assert!(one.threads_alive().is_alive(yours.instance()));
    pod.kill_node(2);
    assert!(!one.threads_alive().is_alive(yours.instance()));
    let successor = one.register_thread(Some(77)).unwrap();
    assert!(successor.instance().generation() > yours.instance().generation());
}

#[test]
fn an_agent_that_is_started_again_is_found_again() {
    let pod = FakePod::new(4 * MIB);
    let path = pod.start_node(1);
    let client = attach(&path);
    let mut events = client.subscribe(0).unwrap();
    let thread = client.register_thread(None).unwrap();
    pod.stop_agent(1);
    assert!(
        client.threads_alive().is_alive(thread.instance()),
        "an agent's death is not its processes' death"
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            pod.start_node(1);
        });
        assert!(client.list_segments().unwrap().is_empty());
    });
    let joined = events.next_within(Duration::from_secs(5)).unwrap();
    assert!(matches!(joined, Some(Happening::Event(_))), "{joined:?}");
    assert_eq!(events.next_within(Duration::from_millis(30)).unwrap(), None);
}

#[test]
fn another_life_of_the_node_is_not_mistaken_for_this_one() {
    let pod = FakePod::new(4 * MIB);
    let client = attach(pod.start_node(1));
    pod.kill_node(1);
    pod.start_node(1);
    let error = client.list_segments().unwrap_err();
    assert!(matches!(error, ClientError::OtherLife { .. }), "{error}");
}

#[test]
fn no_agent_is_said_in_time_and_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let patience = Patience {
        connect: Duration::from_millis(100),
        ..Patience::default()
    };
    let path = dir.path().join("none.sock");
    let error = Pod::attach_at(&path, patience.clone()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(error.to_string().contains("none.sock"), "{error}");
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(
        Pod::attach_at(long, patience).unwrap_err(),
        ClientError::NoAgent { .. }
    ));
}

#[test]
fn events_come_in_order_and_only_once() {
    let pod = FakePod::new(4 * MIB);
    let client = attach(pod.start_node(1));
    let mut from_start = client.subscribe(1).unwrap();
    let mut from_now = client.subscribe(0).unwrap();
    pod.start_node(2);
    pod.kill_node(2);
    let mut seen = Vec::new();
    while let Some(Happening::Event(event)) =
        from_start.next_within(Duration::from_millis(50)).unwrap()
    {
        seen.push(event.seq);
    }
    assert_eq!(seen, [1, 2, 3]);
    let Some(Happening::Event(first)) = from_now.next_within(Duration::from_secs(5)).unwrap()
    else {
        panic!("expected an event")
    };
    assert_eq!(first.seq, 2);
    let Some(Ok(Happening::Event(second))) = from_now.next() else {
        panic!("expected an event")
    };
    assert_eq!(second.seq, 3);
    let _ = from_now.as_fd();
    eventually("nothing is left", || pod.fabric().state().ring_head() == 3);
}
