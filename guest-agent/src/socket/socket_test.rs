//! The protocol, thread ids, limits: against a real socket.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::instances::Holder;
use lupin_abi::socket::Request;
use lupin_abi::{ABI_VERSION, InstanceId, ThreadId};
use nix::sys::socket::{MsgFlags, sendmsg};

use super::harness::*;
use super::*;
use crate::memory::mapping::Mapping;
use crate::test_pod::TestPod;

#[test]
fn a_client_learns_who_its_node_is_and_cannot_write_what_it_is_given() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 2, 1);
    let (reply, fds) = served.connect().welcome();
    let Reply::Welcome {
        version,
        node,
        generation,
        fabric,
        instances,
    } = reply
    else {
        panic!("{reply:?}");
    };
    assert_eq!((version, node, generation), (ABI_VERSION, 2, 1));
    assert_eq!(fds.len(), 2);
    for (fd, window) in fds.iter().zip([fabric, instances]) {
        assert!(Mapping::new(fd, window.offset, window.size, false).is_ok());
        assert!(Mapping::new(fd, window.offset, window.size, true).is_err());
    }
}

#[test]
fn nonsense_is_answered_and_cut_off_and_harms_nobody() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let honest = served.hello();
    let hello = encode(&Request::Hello {
        version: ABI_VERSION,
    })
    .unwrap();
    for packet in [
        vec![0xff; 64],
        vec![0; MAX_PACKET],
        [&hello[..], b"x"].concat(),
        encode(&Request::ListSegments).unwrap(),
    ] {
        let client = served.connect();
        client.send_bytes(&packet).unwrap();
        assert_eq!(client.refused(), RefusalCode::Protocol);
        assert!(client.receive().is_none());
    }
    let client = served.hello();
    client.send_bytes(&hello).unwrap();
    assert_eq!(client.refused(), RefusalCode::Protocol);
    assert!(client.receive().is_none());

    let client = served.connect();
    client.send(&Request::Hello { version: 99 });
    assert_eq!(client.refused(), RefusalCode::Version);
    assert!(client.receive().is_none());

    let client = served.connect();
    client.send_bytes(&[]).unwrap();
    assert!(client.receive().is_none());

    let client = served.hello();
    client.send_bytes(&vec![0; MAX_PACKET + 1]).unwrap();
    assert_eq!(client.refused(), RefusalCode::Protocol);
    assert!(client.receive().is_none());

    // Gone with a request on its way, and with an answer on its way.
    for _ in 0..50 {
        let client = served.connect();
        client.send_bytes(&hello).unwrap();
        client.send(&Request::RegisterThread {
            id: None,
            tid: None,
        });
    }
    assert!(honest.register(None).is_ok());
}

#[test]
fn descriptors_that_a_client_sends_are_not_kept() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let packet = encode(&Request::ListSegments).unwrap();
    let fds = [theirs.as_raw_fd()];
    sendmsg::<()>(
        client.0.as_raw_fd(),
        &[IoSlice::new(&packet)],
        &[nix::sys::socket::ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    drop(theirs);
    assert!(matches!(client.receive().unwrap().0, Reply::Segments(_)));
    // Once the last copy is closed, reading ends.
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
}

#[test]
fn thread_ids_are_unique_released_and_reborn() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let (one, two) = (served.hello(), served.hello());
    let (id, generation) = one.register(None).unwrap();
    let (other, _) = two.register(None).unwrap();
    assert_ne!(id, other);
    assert_eq!(one.register(Some(id)), Err(RefusalCode::IdTaken));
    assert_eq!(one.register(Some(0)), Err(RefusalCode::Invalid));
    assert_eq!(one.register(Some(u32::MAX)), Err(RefusalCode::Invalid));
    let release = |generation| one.ask(&Request::ReleaseThread { id, generation }).0;
    assert!(matches!(
        release(generation + 1),
        Reply::Refused {
            code: RefusalCode::NotFound,
            ..
        }
    ));
    assert_eq!(release(generation), Reply::Done);
    assert!(matches!(
        release(generation),
        Reply::Refused {
            code: RefusalCode::NotFound,
            ..
        }
    ));
    let (_, reborn) = one.register(Some(id)).unwrap();
    assert!(reborn > generation);
    let entry = pod.attach(2, 1);
    let entry = entry.instances().thread(ThreadId::new(id).unwrap());
    assert_eq!(entry.node(), InstanceId::new(1, 1));
    assert_eq!(
        (entry.generation(), entry.holder().pid),
        (reborn, std::process::id())
    );
}

#[test]
fn another_nodes_dead_threads_are_free_and_its_living_ones_are_not() {
    let pod = TestPod::new();
    let (served, peer) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let (id, generation) = peer.hello().register(Some(77)).unwrap();
    let client = served.hello();
    assert_eq!(client.register(Some(id)), Err(RefusalCode::IdTaken));
    pod.kill(2);
    let (again, next) = client.register(Some(id)).unwrap();
    assert_eq!(again, id);
    assert!(next > generation);
    // The dead node is told so, and changes nothing.
    assert_eq!(peer.hello().register(None), Err(RefusalCode::Failed));
}

#[test]
fn the_death_of_a_process_ends_its_threads_at_once() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let memory = pod.attach(2, 1);
    let thread = |id| memory.instances().thread(ThreadId::new(id).unwrap());
    let path = served.path.clone();
    let child = Forked::new(|| {
        let client = Connection::new(&path);
        client.welcome();
        client.register(Some(500)).unwrap();
        client.register(Some(501)).unwrap();
        std::mem::forget(client);
    });
    until("both are alive", || {
        [500, 501]
            .iter()
            .all(|id| thread(*id).node() == InstanceId::new(1, 1))
    });
    let before = thread(500).generation();
    child.kill();
    until("both are dead", || {
        [500, 501].iter().all(|id| thread(*id).node().is_none())
    });
    assert_eq!(thread(500).generation(), before + 1);
}

#[test]
fn threads_outlive_the_connection_but_not_the_process() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let (id, generation) = served.hello().register(None).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let client = served.hello();
    assert_eq!(client.register(Some(id)), Err(RefusalCode::IdTaken));
    let reply = client.ask(&Request::ReleaseThread { id, generation }).0;
    assert_eq!(reply, Reply::Done);
}

#[test]
fn a_process_cannot_act_for_another() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    let (id, generation) = client.register(None).unwrap();
    let path = served.path.clone();
    let (report, ours) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = Forked::new(|| {
        // Over the connection that it inherited, and over one of its own.
        client.send(&Request::ReleaseThread { id, generation });
        let inherited = client.refused();
        let own = Connection::new(&path);
        own.welcome();
        own.send(&Request::ReleaseThread { id, generation });
        let codes = format!("{inherited:?} {:?}", own.refused());
        report.send(codes.as_bytes()).unwrap();
    });
    let mut buffer = [0; 64];
    let len = ours.recv(&mut buffer).unwrap();
    child.kill();
    assert_eq!(&buffer[..len], b"Protocol IdTaken");
    assert_eq!(client.register(Some(id)), Err(RefusalCode::IdTaken));
}

#[test]
fn one_user_cannot_have_all_connections() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let clients: Vec<Connection> = (0..limits::CONNECTIONS_PER_USER)
        .map(|_| served.hello())
        .collect();
    let one_too_many = served.connect();
    assert_eq!(one_too_many.refused(), RefusalCode::Limit);
    assert!(one_too_many.receive().is_none());
    drop(clients);
    until("there is room again", || {
        let client = served.connect();
        let version = ABI_VERSION;
        let _ = client.send_bytes(&encode(&Request::Hello { version }).unwrap());
        matches!(client.receive(), Some((Reply::Welcome { .. }, _)))
    });
}

#[test]
fn a_flood_of_requests_is_refused_and_others_are_served() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let client = served.hello();
    let mut limited = false;
    for _ in 0..20 * limits::BURST {
        let (reply, _) = client.ask(&Request::ReleaseThread {
            id: 1,
            generation: 9,
        });
        match reply {
            Reply::Refused {
                code: RefusalCode::Limit,
                ..
            } => {
                limited = true;
                break;
            }
            Reply::Refused {
                code: RefusalCode::NotFound,
                ..
            } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(limited);
    std::thread::sleep(Duration::from_millis(20));
    assert!(client.register(None).is_ok());
}

#[test]
fn a_second_agent_does_not_take_the_socket_but_a_successor_does() {
    let pod = TestPod::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let first = listen_on(&path).unwrap();
    assert_eq!(
        listen_on(&path).unwrap_err().kind(),
        io::ErrorKind::AddrInUse
    );
    drop(first);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    listen_on(&path).unwrap();
    // A stream socket in the way is somebody else's.
    fs::remove_file(&path).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert_eq!(
        listen_on(&path).unwrap_err().kind(),
        io::ErrorKind::AddrInUse
    );
    drop(pod);
}

#[test]
fn a_restarted_agent_keeps_living_threads_and_buries_dead_ones() {
    let pod = TestPod::new();
    let memory = pod.attach(1, 1);
    let me = InstanceId::new(1, 1);
    let thread = |id| memory.instances().thread(ThreadId::new(id).unwrap());
    let mut gone = std::process::Command::new("/bin/true").spawn().unwrap();
    let dead = gone.id();
    gone.wait().unwrap();
    for (id, pid) in [(10, std::process::id()), (11, dead)] {
        thread(id).raise();
        let started = 0;
        let tid = 0;
        thread(id).bind(me, Holder { pid, tid, started });
    }
    // The agent before died with the directory lock.
    let words = memory.system().directory_lock();
    words.owner.store(me.word(), Ordering::Relaxed);
    let served = Served::start(&pod, 1, 1, true);
    assert_eq!((thread(10).generation(), thread(10).node()), (1, me));
    assert_eq!(
        (thread(11).generation(), thread(11).node()),
        (2, InstanceId::NONE)
    );
    // The living one is this process's again.
    let reply = served.hello().ask(&Request::ReleaseThread {
        id: 10,
        generation: 1,
    });
    assert_eq!(reply.0, Reply::Done);
}

#[test]
fn dead_threads_that_cannot_be_buried_yet_are_when_they_can() {
    let pod = TestPod::new();
    let memory = pod.attach(1, 1);
    let me = InstanceId::new(1, 1);
    let entry = memory.instances().thread(ThreadId::new(11).unwrap());
    let mut gone = std::process::Command::new("/bin/true").spawn().unwrap();
    let (pid, tid, started) = (gone.id(), 0, 0);
    gone.wait().unwrap();
    entry.raise();
    entry.bind(me, Holder { pid, tid, started });
    let mut backend = pod.backend(1, 1);
    crate::memory::Backend::attached(&mut backend, pod.header()).unwrap();
    let directory = crate::directory::Directory::new(memory.clone());
    let held = directory.begin(true).unwrap();
    // A peer that lives hangs with the lock.
    let words = memory.system().directory_lock();
    words
        .owner
        .store(InstanceId::new(2, 1).word(), Ordering::Relaxed);
    let folder = tempfile::tempdir().unwrap();
    let poller = Poller::new().unwrap();
    let threads = Threads::new(directory.clone());
    let segments = Segments::new(directory, Box::new(backend), held);
    let path = folder.path().join("agent.sock");
    let mut server = Server::new(&path, &poller, threads, segments, true).unwrap();
    assert_eq!((entry.generation(), entry.node()), (1, me));
    server.tick(&poller);
    assert_eq!((entry.generation(), entry.node()), (1, me));
    words.owner.store(0, Ordering::Relaxed);
    server.tick(&poller);
    assert_eq!((entry.generation(), entry.node()), (2, InstanceId::NONE));
    assert!(server.unburied.is_empty());
}

#[test]
fn a_number_that_was_given_to_another_process_keeps_no_thread_alive() {
    let pod = TestPod::new();
    let memory = pod.attach(1, 1);
    let me = InstanceId::new(1, 1);
    let thread = |id| memory.instances().thread(ThreadId::new(id).unwrap());
    let this = crate::task::process(std::process::id());
    // This very process; a process before it that had its number; a thread that it had.
    let tid = std::process::id() + 1_000_000;
    let earlier = this.started - 1;
    let holders = [
        this,
        Holder {
            started: earlier,
            ..this
        },
        Holder { tid, ..this },
    ];
    for (id, holder) in (10..).zip(holders) {
        thread(id).raise();
        thread(id).bind(me, holder);
    }
    let _served = Served::start(&pod, 1, 1, true);
    assert_eq!((thread(10).generation(), thread(10).node()), (1, me));
    for id in [11, 12] {
        assert_eq!(
            (thread(id).generation(), thread(id).node()),
            (2, InstanceId::NONE)
        );
    }
}
