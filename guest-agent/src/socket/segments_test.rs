//! Segments of groups, and what attackers try with them.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::groups::{Admission, GroupId, GroupReply, GroupRequest, Secret};
use lupin_abi::layout::GRANULE;
use lupin_abi::socket::{Lifetime, Request};

use super::harness::*;
use super::*;
use crate::memory::mapping::Mapping;
use crate::test_pod::{POOL, TestPod};

const TOKEN: &[u8] = b"0123456789abcdef";

/// A group, with this process as a member; and the thread that is.
fn group(client: &Connection, name: &str, quota: Option<u64>) -> (GroupId, (u32, u32)) {
    let create = GroupRequest::Create {
        name: name.into(),
        admission: Admission {
            secret: Some(Secret::new(TOKEN)),
            ..Admission::default()
        },
        quota,
    };
    let Reply::Group(GroupReply::Created { group }) = client.ask(&Request::Group(create)).0 else {
        panic!("no group");
    };
    let thread = client.register(None).unwrap();
    client.join_group(name, Some(TOKEN), &[thread]).unwrap();
    (group, thread)
}

fn leave(client: &Connection, group: GroupId, thread: (u32, u32)) {
    let threads = vec![thread];
    let leave = GroupRequest::Leave { group, threads };
    client.done(&Request::Group(leave)).unwrap();
}

/// All that can be asked about a segment.
fn requests(group: Option<GroupId>, name: &str) -> Vec<Request> {
    let segment = || named(group, name);
    let mut requests = vec![
        creation(segment(), GRANULE),
        Request::GrowSegment {
            segment: segment(),
            size: 2 * GRANULE,
        },
        Request::RenameSegment {
            segment: segment(),
            to: "mine".into(),
        },
    ];
    for yes in [false, true] {
        requests.push(Request::OpenSegment {
            segment: segment(),
            read_only: yes,
        });
        requests.push(Request::RemoveSegment {
            segment: segment(),
            revoke: yes,
        });
    }
    requests
}

/// Runs `act` in another process, with a connection of its own; it must not panic.
fn elsewhere(served: &Served, act: impl FnOnce(&Connection)) {
    let path = served.path.clone();
    let (report, ours) = UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = Forked::new(|| {
        let client = Connection::new(&path);
        client.welcome();
        act(&client);
        report.send(b"done").unwrap();
    });
    let done = ours.recv(&mut [0; 8]);
    child.kill();
    done.expect("what the other process found is in its output");
}

fn listed(client: &Connection) -> Vec<String> {
    let Reply::Segments(list) = client.ask(&Request::ListSegments).0 else {
        panic!("no list");
    };
    list.into_iter().map(|segment| segment.name).collect()
}

#[test]
fn members_create_map_grow_rename_and_remove() {
    let pod = TestPod::new();
    let (first, second) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let (a, b) = (first.hello(), second.hello());
    let (group_id, _) = group(&a, "g", Some(16 << 20));
    let thread = b.register(None).unwrap();
    let join = GroupRequest::Join {
        name: "g".into(),
        secret: Some(Secret::new(TOKEN)),
        threads: vec![thread],
    };
    b.ask(&Request::Group(join));
    let x = || named(Some(group_id), "x");
    let made = parts(a.ask(&creation(x(), 6 << 20)), true).unwrap();
    let sizes: Vec<u64> = made.iter().map(|(window, _)| window.size).collect();
    assert_eq!(sizes, [4 << 20, 2 << 20]);
    let open = || Request::OpenSegment {
        segment: x(),
        read_only: false,
    };
    let words = |(window, fd): &(_, _)| {
        let window: &lupin_abi::socket::Mapping = window;
        Mapping::new(fd, window.offset, window.size, true).unwrap()
    };
    words(&made[1]).words()[3].store(7, Ordering::Relaxed);
    let found = parts(b.ask(&open()), false).unwrap();
    assert_eq!(words(&found[1]).words()[3].load(Ordering::Relaxed), 7);
    let grow = |size| Request::GrowSegment { segment: x(), size };
    let grown = parts(b.ask(&grow(10 << 20)), false).unwrap();
    assert_eq!(grown.len(), 3);
    let zeros = words(&grown[2]);
    assert!(zeros.words().iter().all(|w| w.load(Ordering::Relaxed) == 0));
    // Asked again, as by a client that lost the answer: nothing more.
    assert_eq!(parts(b.ask(&grow(10 << 20)), false).unwrap().len(), 3);
    assert_eq!(b.done(&grow(18 << 20)), Err(RefusalCode::Quota));
    assert_eq!(parts(a.ask(&open()), false).unwrap().len(), 3);
    let rename = Request::RenameSegment {
        segment: x(),
        to: "y".into(),
    };
    b.done(&rename).unwrap();
    assert_eq!(a.done(&open()), Err(RefusalCode::NotFound));
    assert_eq!(listed(&a), ["y"]);
    let remove = |revoke| Request::RemoveSegment {
        segment: named(Some(group_id), "y"),
        revoke,
    };
    assert_eq!(a.done(&remove(false)), Err(RefusalCode::Busy));
    a.done(&remove(true)).unwrap();
    assert!(listed(&b).is_empty());
    // Nothing can be taken from processes here: the memory is nobody else's while they live.
    let quota = a.done(&creation(x(), 8 << 20));
    assert_eq!(quota, Err(RefusalCode::Quota));
}

#[test]
fn who_is_no_member_can_do_nothing_and_learns_nothing() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let a = served.hello();
    let (group_id, thread) = group(&a, "g", None);
    a.ask(&creation(named(Some(group_id), "secret"), GRANULE));
    a.create("open", GRANULE).unwrap();
    elsewhere(&served, |other| {
        let (own, _) = group(other, "h", None);
        // Groups that there are, that were, that will be, and that cannot be.
        let (index, uses) = (group_id.index().unwrap(), group_id.word() >> 32);
        let ids = [
            group_id.word(),
            GroupId::new(index, uses as u32 + 1).word(),
            GroupId::new(index, uses as u32 - 1).word(),
            GroupId::new(300, 1).word(),
            0,
            u64::MAX,
            u64::from(u32::MAX),
        ];
        for id in ids.map(GroupId::from_word) {
            for name in ["secret", "absent", "../secret", "", "g/secret", "\0"] {
                for request in requests(Some(id), name) {
                    let (reply, fds) = other.ask(&request);
                    let Reply::Refused { code, message } = reply else {
                        panic!("{request:?}: {reply:?}");
                    };
                    assert_eq!(code, RefusalCode::Permission, "{request:?}");
                    assert!(!message.contains("secret") && fds.is_empty());
                }
            }
        }
        // The name is not the other group's here, nor nobody's.
        for place in [Some(own), None] {
            let code = other.done(&requests(place, "secret")[3]).unwrap_err();
            assert_eq!(code, RefusalCode::NotFound);
        }
        assert!(!listed(other).contains(&"secret".to_owned()));
        // With another's credentials, or none.
        for (secret, threads) in [
            (Some(Secret::new(TOKEN)), vec![thread]),
            (Some(Secret::new([9; 16])), vec![]),
            (None, vec![]),
        ] {
            let mine = other.register(None).unwrap();
            let threads = if threads.is_empty() {
                vec![mine]
            } else {
                threads
            };
            let name = "g".into();
            let join = GroupRequest::Join {
                name,
                secret,
                threads,
            };
            let refused = other.done(&Request::Group(join)).unwrap_err();
            assert_eq!(refused, RefusalCode::Permission);
        }
    });
    // Who leaves has no more rights than who never came.
    leave(&a, group_id, thread);
    for request in requests(Some(group_id), "secret") {
        assert_eq!(a.done(&request), Err(RefusalCode::Permission));
    }
    assert_eq!(listed(&a), ["open"]);
}

#[test]
fn numbers_and_names_that_make_no_sense_are_refused() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    let (group_id, _) = group(&client, "g", None);
    for place in [None, Some(group_id)] {
        parts(client.ask(&creation(named(place, "a"), GRANULE)), true).unwrap();
        for size in [0, POOL + 1, u64::MAX, u64::MAX - GRANULE + 1, 1 << 63] {
            let create = creation(named(place, "b"), size);
            assert_eq!(client.done(&create), Err(RefusalCode::Invalid));
            let grow = Request::GrowSegment {
                segment: named(place, "a"),
                size,
            };
            assert_eq!(client.done(&grow), Err(RefusalCode::Invalid), "{size}");
        }
        let long = "x".repeat(65);
        for name in ["", ".", "..", "/dev/mem", "a\0b", "dax0.0/../x", &long] {
            let create = creation(named(place, name), GRANULE);
            assert_eq!(client.done(&create), Err(RefusalCode::Invalid), "{name:?}");
            let rename = Request::RenameSegment {
                segment: named(place, "a"),
                to: name.into(),
            };
            assert_eq!(client.done(&rename), Err(RefusalCode::Invalid), "{name:?}");
        }
    }
    let huge = "x".repeat(60_000);
    let (reply, _) = client.ask(&requests(None, &huge)[3]);
    let Reply::Refused { message, .. } = reply else {
        panic!("{reply:?}");
    };
    assert!(message.len() < 200, "an answer is no echo");
    let members = Request::CreateSegment {
        segment: named(None, "m"),
        size: GRANULE,
        mode: 0,
        lifetime: Lifetime::Members,
    };
    assert_eq!(client.done(&members), Err(RefusalCode::Invalid));
}

#[test]
fn segments_that_live_with_their_members_go_with_the_last_one() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let a = served.hello();
    let (group_id, thread) = group(&a, "g", None);
    elsewhere(&served, |_| {});
    let create = Request::CreateSegment {
        segment: named(Some(group_id), "m"),
        size: POOL,
        mode: 0,
        lifetime: Lifetime::Members,
    };
    drop(a.ask(&create));
    let path = served.path.clone();
    // Another process has it, too, and dies with its membership.
    let (report, ours) = UnixDatagram::pair().unwrap();
    let child = Forked::new(|| {
        let client = Connection::new(&path);
        client.welcome();
        let thread = client.register(None).unwrap();
        let join = GroupRequest::Join {
            name: "g".into(),
            secret: Some(Secret::new(TOKEN)),
            threads: vec![thread],
        };
        client.ask(&Request::Group(join));
        client.ask(&requests(Some(group_id), "m")[3]);
        report.send(b"open").unwrap();
        std::mem::forget(client);
    });
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    ours.recv(&mut [0; 8]).unwrap();
    leave(&a, group_id, thread);
    let other = pod.attach(2, 1);
    let live = || {
        let entries = other.system().segments().iter();
        entries.filter_map(|entry| entry.snapshot()).count()
    };
    // Its other member lives.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(live(), 1);
    child.kill();
    until("it is gone", || live() == 0);
}

#[test]
fn ten_thousand_connections_harm_nobody() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let honest = served.hello();
    let mut kept = Vec::new();
    for _ in 0..10_000 {
        let client = served.connect();
        if kept.len() < limits::CONNECTIONS_PER_USER - 1 {
            // Says nothing, and stays.
            kept.push(client);
        }
    }
    until("the honest one is served", || honest.register(None).is_ok());
    drop(kept);
    until("there is room again", || {
        let client = served.connect();
        let version = lupin_abi::ABI_VERSION;
        let _ = client.send_bytes(&encode(&Request::Hello { version }).unwrap());
        matches!(client.receive(), Some((Reply::Welcome { .. }, _)))
    });
}

#[test]
fn who_asks_and_does_not_read_costs_one_answer() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let honest = served.hello();
    for n in 0..64 {
        honest.create(&format!("s{n:060}"), GRANULE).ok();
    }
    let greedy = served.hello();
    let timeout = nix::sys::time::TimeVal::new(0, 200_000);
    setsockopt(&greedy.0, sockopt::SendTimeout, &timeout).unwrap();
    let list = encode(&Request::ListSegments).unwrap();
    let sent = (0..4000).take_while(|_| greedy.send_bytes(&list).is_ok());
    let sent = sent.count();
    assert!(
        sent < 4000,
        "the socket is full, and the agent does not read on"
    );
    until("others are served", || honest.register(None).is_ok());
    // All that was asked is answered in the end, or refused as too much.
    for _ in 0..sent {
        let (reply, _) = greedy.receive().unwrap();
        assert!(matches!(
            reply,
            Reply::Segments(_)
                | Reply::Refused {
                    code: RefusalCode::Limit,
                    ..
                }
        ));
    }
}
