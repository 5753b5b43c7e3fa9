//! The server against real sockets: a thread serves, the test is the client.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lupin_abi::event::EventKind;
use lupin_abi::fabric::RING_SLOTS;
use lupin_abi::layout::GRANULE;
use lupin_abi::socket::{Mapping as Window, Request, decode};
use lupin_abi::{ABI_VERSION, Event, InstanceId, ThreadId};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::time::TimeVal;
use std::io::{IoSlice, IoSliceMut};

use super::*;
use crate::directory::Directory;
use crate::memory::mapping::Mapping;
use crate::test_pod::{POOL, TestPod};

/// An agent's socket in a thread of its own.
struct Served {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    fn new(pod: &TestPod, node: u32, generation: u32) -> Self {
        Self::start(pod, node, generation, false)
    }

    fn start(pod: &TestPod, node: u32, generation: u32, restarted: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/agent.sock");
        let memory = pod.attach(node, generation);
        let mut backend = pod.backend(node, generation);
        crate::memory::Backend::attached(&mut backend, pod.header()).unwrap();
        let directory = Directory::new(memory);
        let held = directory.begin(restarted).unwrap();
        let poller = Poller::new().unwrap();
        let threads = Threads::new(directory.clone());
        let segments = Segments::new(directory, Box::new(backend), held);
        let mut server = Server::new(&path, &poller, threads, segments, restarted).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let wait = if server.has_work() { 0 } else { 20 };
                for (source, flags) in poller.wait(Some(Duration::from_millis(wait))).unwrap() {
                    match source {
                        Source::ClientListener => server.on_listener(&poller),
                        Source::Client(id) => server.on_client(&poller, id, flags),
                        Source::Process(pid) => server.on_process(pid),
                        other => panic!("{other:?}"),
                    }
                }
                server.work(&poller);
                server.tick(&poller);
            }
        });
        Self {
            path,
            stop,
            thread: Some(thread),
            _folder: folder,
        }
    }

    fn connect(&self) -> Connection {
        Connection::new(&self.path)
    }

    fn hello(&self) -> Connection {
        let connection = self.connect();
        connection.welcome();
        connection
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the server must survive whatever clients do");
        }
    }
}

struct Connection(OwnedFd);

impl Connection {
    fn new(path: &Path) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(20, 0)).unwrap();
        Self(fd)
    }

    fn send_bytes(&self, bytes: &[u8]) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None)
    }

    fn send(&self, request: &Request) {
        self.send_bytes(&encode(request).unwrap()).unwrap();
    }

    /// The next packet; `None` at the end of the connection.
    fn receive(&self) -> Option<(Reply, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::empty();
        let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            Err(Errno::ECONNRESET) => return None,
            Err(error) => panic!("no answer: {error}"),
        };
        let fds = message
            .cmsgs()
            .unwrap()
            .filter_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            // SAFETY: just received, known to nobody else.
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect();
        let len = message.bytes;
        (len > 0).then(|| (decode(&buffer[..len]).unwrap(), fds))
    }

    fn ask(&self, request: &Request) -> (Reply, Vec<OwnedFd>) {
        self.send(request);
        self.receive().expect("the agent hung up")
    }

    fn welcome(&self) -> (Reply, Vec<OwnedFd>) {
        let version = ABI_VERSION;
        self.ask(&Request::Hello { version })
    }

    fn register(&self, id: Option<u32>) -> Result<(u32, u32), RefusalCode> {
        match self.ask(&Request::RegisterThread { id }).0 {
            Reply::Thread { id, generation } => Ok((id, generation)),
            Reply::Refused { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    fn create(&self, name: &str, size: u64) -> Result<(Window, OwnedFd), RefusalCode> {
        let (name, mode) = (name.into(), 0o600);
        segment(self.ask(&Request::CreateSegment { name, size, mode }), true)
    }

    fn open(&self, name: &str, read_only: bool) -> Result<(Window, OwnedFd), RefusalCode> {
        let name = name.into();
        segment(self.ask(&Request::OpenSegment { name, read_only }), false)
    }

    fn remove(&self, name: &str) -> Result<(), RefusalCode> {
        let name = name.into();
        match self.ask(&Request::RemoveSegment { name }).0 {
            Reply::Done => Ok(()),
            Reply::Refused { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    fn refused(&self) -> RefusalCode {
        match self.receive().expect("a refusal before the end").0 {
            Reply::Refused { code, .. } => code,
            other => panic!("{other:?}"),
        }
    }
}

fn segment(
    (reply, mut fds): (Reply, Vec<OwnedFd>),
    new: bool,
) -> Result<(Window, OwnedFd), RefusalCode> {
    match reply {
        Reply::Segment { mapping, created } => {
            assert_eq!((created, fds.len()), (new, 1));
            Ok((mapping, fds.remove(0)))
        }
        Reply::Refused { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed().as_secs() < 20, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

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
        client.send(&Request::RegisterThread { id: None });
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
        (entry.generation(), entry.pid()),
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

/// A client in a process of its own, which is killed.
struct Forked(nix::unistd::Pid);

impl Forked {
    fn new(act: impl FnOnce()) -> Self {
        // SAFETY: the child calls only `act`, which makes system calls and small allocations
        // (the C library's allocator is usable after a fork), and leaves without destructors.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Parent { child } => Self(child),
            nix::unistd::ForkResult::Child => {
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
                loop {
                    nix::unistd::pause();
                }
            }
        }
    }

    fn kill(&self) {
        nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(self.0, None).unwrap();
    }
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
fn segments_are_zero_shared_between_nodes_and_removed_when_unused() {
    let pod = TestPod::new();
    let garbage = vec![0xa5u8; POOL as usize];
    pod.file()
        .write_all_at(&garbage, pod.header().pool().offset)
        .unwrap();
    let (first, second) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let (a, b) = (first.hello(), second.hello());
    let (window, fd) = a.create("data", 5 << 20).unwrap();
    assert_eq!(window.size, 6 << 20);
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
        (1, "data", 6 << 20)
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
    let (name, size, mode) = ("a".into(), 1, 0o4777);
    let (reply, _) = client.ask(&Request::CreateSegment { name, size, mode });
    assert!(matches!(
        reply,
        Reply::Refused {
            code: RefusalCode::Invalid,
            ..
        }
    ));
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
        thread(id).bind(me, pid);
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
