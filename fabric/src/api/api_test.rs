use std::alloc::{Layout, alloc_zeroed};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind};
use lupin_abi::fabric::{FabricSection, RING_SLOTS};
use lupin_abi::layout::FABRIC_SIZE;
use lupin_abi::port::{ExecStatus, INITIAL_CREDIT};
use lupin_abi::{Event, NodeId};

use super::client::StreamItem;
use super::clients::MAX_STREAMS;
use super::server::MAX_CLIENTS;
use super::*;
use crate::agent_link::fake::FakeAgent;
use crate::agent_link::{AgentLink, ExecMessage, ExecSpec, LinkTarget};

/// A manager of one node, number 3 named `n3`, that does nothing but remember.
struct FakeManager {
    fabric: &'static FabricSection,
    link: Arc<AgentLink>,
    calls: Mutex<Vec<String>>,
}

impl PodControl for FakeManager {
    fn status(&self) -> PodStatus {
        sample::pod(vec![sample::node(3, "n3")])
    }

    fn fabric(&self) -> &FabricSection {
        self.fabric
    }

    fn kill(&self, node: NodeId) -> Result<(), ControlError> {
        self.calls.lock().unwrap().push(format!("kill {node}"));
        Ok(())
    }

    fn steer(&self, node: NodeId, action: NodeAction) -> Result<(), ControlError> {
        let mut calls = self.calls.lock().unwrap();
        calls.push(format!("{action:?} {node}"));
        Ok(())
    }

    fn down(&self, grace: Duration) {
        self.calls.lock().unwrap().push(format!("down {grace:?}"));
    }

    fn upgrade(&self, program: Option<std::path::PathBuf>) -> Result<(), ControlError> {
        let mut calls = self.calls.lock().unwrap();
        calls.push(format!("upgrade {program:?}"));
        Ok(())
    }

    fn add(&self, node: &str) -> Result<NodeId, ControlError> {
        self.calls.lock().unwrap().push(format!("add {node}"));
        Ok(NodeId::new(2).unwrap())
    }

    fn reload(&self, dry_run: bool) -> Result<Vec<Difference>, ControlError> {
        self.calls.lock().unwrap().push(format!("reload {dry_run}"));
        Ok(vec![Difference {
            what: "[memory]".into(),
            effect: Effect::Refused,
            why: Some("because".into()),
        }])
    }

    fn link(&self, _node: NodeId) -> Result<Arc<AgentLink>, ControlError> {
        Ok(self.link.clone())
    }
}

struct Bench {
    folder: tempfile::TempDir,
    manager: Arc<FakeManager>,
    server: Option<Server>,
    agent: FakeAgent,
}

fn bench() -> Bench {
    let layout = Layout::from_size_align(FABRIC_SIZE as usize, 4096).unwrap();
    // SAFETY: the layout is not empty; the memory is zeroed, aligned, never freed and used
    // through the section's atomics only.
    let fabric = unsafe { FabricSection::from_ptr(alloc_zeroed(layout)) };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let agent = FakeAgent::listen(&socket, 3, 1, None);
    let target = LinkTarget {
        socket,
        pod_id: 7,
        node: NodeId::new(3).unwrap(),
        generation: 1,
    };
    let manager = Arc::new(FakeManager {
        fabric,
        link: AgentLink::start(target, |_| {}).unwrap(),
        calls: Mutex::default(),
    });
    let server = Server::start(manager.clone(), &folder.path().join(CONTROL_SOCKET)).unwrap();
    Bench {
        folder,
        manager,
        server: Some(server),
        agent,
    }
}

impl Bench {
    fn client(&self) -> Client {
        Client::connect(self.folder.path()).unwrap()
    }

    fn raw(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join(CONTROL_SOCKET)).unwrap()
    }

    fn append(&self, node: u32) {
        self.manager.fabric.append(&Event {
            seq: 0,
            time_ns: 5,
            epoch: 1,
            kind: EventKind::NodeStarted,
            node,
            old_generation: 0,
            generation: 1,
            cause: Cause::None,
            evidence: [0; EVIDENCE_WORDS],
        });
    }

    fn exec(&self, argv: &[&str]) -> Result<client::ExecStream, ClientError> {
        let argv = argv.iter().map(|&word| word.into()).collect();
        let spec = ExecSpec {
            argv,
            ..ExecSpec::default()
        };
        self.client().exec("n3", spec)
    }
}

#[test]
fn requests_reach_the_manager_by_name_or_id() {
    let bench = bench();
    let socket = bench.folder.path().join(CONTROL_SOCKET);
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let mut client = bench.client();
    let mut status = client.status().unwrap();
    let usage = status.nodes[0].usage.take();
    assert_eq!(status, bench.manager.status());
    assert!(usage.is_some_and(|usage| usage.memory_bytes > 0 && usage.threads > 1));
    client.kill("n3").unwrap();
    client.kill("3").unwrap();
    let refused = client.kill("n4").unwrap_err().to_string();
    assert_eq!(refused, "the pod has no node n4");
    client.down(Duration::from_secs(2)).unwrap();
    let calls = bench.manager.calls.lock().unwrap().clone();
    assert_eq!(calls, ["kill 3", "kill 3", "down 2s"]);
}

#[test]
fn nobody_listens_once_the_server_is_gone() {
    let mut bench = bench();
    let mut waiting = bench.client();
    waiting.status().unwrap();
    assert!(!waiting.wait_end(Duration::from_millis(30)).unwrap());
    bench.server = None;
    assert!(waiting.wait_end(Duration::from_secs(5)).unwrap());
    let error = Client::connect(bench.folder.path()).unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
}

#[test]
fn what_was_asked_before_is_answered_when_the_server_goes() {
    let mut bench = bench();
    let mut follower = bench.client().events(None, true).unwrap();
    let busy = bench.manager.calls.lock().unwrap();
    let server = bench.server.take();
    std::thread::scope(|scope| {
        let mut client = bench.client();
        let asking = scope.spawn(move || client.upgrade(None));
        // Until it has been read by the server, which then waits for the manager.
        std::thread::sleep(Duration::from_millis(100));
        let going = scope.spawn(move || drop(server));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!going.is_finished(), "the server did not wait");
        drop(busy);
        asking.join().unwrap().unwrap();
        going.join().unwrap();
    });
    // Who follows is not waited for, since it never has all.
    let item = follower.next_item();
    assert!(!matches!(item, Ok(Some(StreamItem::Event(_)))), "{item:?}");
    assert_eq!(*bench.manager.calls.lock().unwrap(), ["upgrade None"]);
}

#[test]
fn a_stale_socket_is_replaced_and_a_file_in_the_way_is_not() {
    let bench = bench();
    let other = bench.folder.path().join("other.sock");
    drop(std::os::unix::net::UnixListener::bind(&other).unwrap());
    Server::start(bench.manager.clone(), &other).unwrap();
    std::fs::write(&other, "precious").unwrap();
    let error = Server::start(bench.manager.clone(), &other).unwrap_err();
    assert!(error.to_string().contains("in the way"), "{error}");
    let long = bench.folder.path().join("x".repeat(120));
    let error = Server::start(bench.manager.clone(), &long).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
}

#[test]
fn what_is_not_a_request_is_refused_by_name() {
    let bench = bench();
    let mut stream = bench.raw();
    for (request, why) in [
        ("{\"restart\":{}}\n", "unknown variant `restart`"),
        ("{\"kill\":{\"nod\":\"1\"}}\n", "unknown field `nod`"),
        ("garbage\n", "expected value"),
        (
            "{\"exec\":{\"node\":\"3\",\"argv\":[]}}\n",
            "needs a program",
        ),
    ] {
        stream.write_all(request.as_bytes()).unwrap();
        let mut reply = String::new();
        BufReader::new(&stream).read_line(&mut reply).unwrap();
        assert!(
            reply.contains("bad-request") && reply.contains(why),
            "{reply}"
        );
    }
    // A line without an end is not collected for ever.
    let flood = vec![b'x'; 2 * wire::MAX_LINE];
    let _ = stream.write_all(&flood);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(bench.client().status().is_ok());
}

#[test]
fn events_come_in_order_and_losses_are_told() {
    let bench = bench();
    for node in 1..=3 {
        bench.append(node);
    }
    let mut all = bench.client().events(None, false).unwrap();
    for node in 1..=3 {
        let Some(StreamItem::Event(event)) = all.next_item().unwrap() else {
            panic!("no event for {node}");
        };
        assert_eq!((event.seq, event.node), (u64::from(node), node));
    }
    assert_eq!(all.next_item().unwrap(), None);
    let mut follower = bench.client().events(Some(3), true).unwrap();
    assert!(matches!(
        follower.next_item().unwrap(),
        Some(StreamItem::Event(Event { seq: 3, .. }))
    ));
    bench.append(9);
    assert!(matches!(
        follower.next_item().unwrap(),
        Some(StreamItem::Event(Event { seq: 4, .. }))
    ));
    for _ in 0..2 * RING_SLOTS {
        bench.append(1);
    }
    let mut late = bench.client().events(Some(2), false).unwrap();
    let Some(StreamItem::Lost { from: 2, resume }) = late.next_item().unwrap() else {
        panic!("the loss was not told");
    };
    let Some(StreamItem::Event(event)) = late.next_item().unwrap() else {
        panic!("no event after the loss");
    };
    assert_eq!(event.seq, resume);
}

#[test]
fn commands_run_with_input_output_and_status() {
    let bench = bench();
    let echo = bench.exec(&["echo", "hello"]).unwrap();
    let (stdout, stderr, status) = echo.collect().unwrap();
    assert_eq!((stdout.as_slice(), stderr.len()), (&b"hello"[..], 0));
    assert_eq!(status, ExecStatus::Code(0));
    let hang = bench.exec(&["hang"]).unwrap();
    hang.input.signal(libc::SIGINT).unwrap();
    assert_eq!(hang.collect().unwrap().2, ExecStatus::Signal(libc::SIGINT));
    let lost = bench.exec(&["hang-up"]).unwrap();
    assert_eq!(lost.collect().unwrap().2, ExecStatus::NodeLost);
    // The link comes back by itself, and the next command waits for it.
    let next = bench.exec(&["exit", "9"]).unwrap();
    assert_eq!(next.collect().unwrap().2, ExecStatus::Code(9));
}

#[test]
fn a_slow_reader_of_64_mib_holds_up_nobody() {
    const TOTAL: usize = 64 << 20;
    let bench = bench();
    let cat = bench.exec(&["cat"]).unwrap();
    std::thread::scope(|scope| {
        let input = &cat.input;
        scope.spawn(move || {
            let chunk = vec![b'y'; 1 << 20];
            for _ in 0..TOTAL / chunk.len() {
                assert!(input.write(&chunk).unwrap());
            }
            input.close().unwrap();
        });
        std::thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        let echo = bench.exec(&["echo", "prompt"]).unwrap();
        assert_eq!(echo.collect().unwrap().0, b"prompt");
        assert!(began.elapsed() < Duration::from_secs(1));
        let mut total = 0;
        loop {
            match cat.recv().unwrap() {
                ExecMessage::Output { data, .. } => total += data.len(),
                ExecMessage::Exited(status) => {
                    assert_eq!((total, status), (TOTAL, ExecStatus::Code(0)));
                    break;
                }
                _ => {}
            }
        }
    });
}

#[test]
fn a_client_that_leaves_takes_its_command_with_it() {
    let bench = bench();
    let hang = bench.exec(&["hang"]).unwrap();
    assert_eq!(hang.recv().unwrap(), ExecMessage::Started { pid: 42 });
    drop(hang);
    // One that never reads leaves as well.
    let zeros = bench.exec(&["zeros", "100000000"]).unwrap();
    drop(zeros);
    let deadline = Instant::now() + Duration::from_secs(5);
    while bench.agent.seen.lock().unwrap().signals.len() < 2 {
        assert!(Instant::now() < deadline, "the command was not ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(bench.client().status().is_ok());
}

#[test]
fn a_client_that_breaks_the_frames_loses_its_command_only() {
    let bench = bench();
    for attack in [vec![0xff; 100], {
        let data = vec![0; 32 << 10];
        let message = lupin_abi::port::ToAgent::Stdin { channel: 0, data };
        let frame = lupin_abi::port::encode(&message).unwrap();
        // Beyond the credit of a command that takes nothing.
        frame.repeat(INITIAL_CREDIT as usize / (32 << 10) + 1)
    }] {
        let mut stream = bench.raw();
        stream
            .write_all(b"{\"exec\":{\"node\":\"3\",\"argv\":[\"hang\"]}}\n")
            .unwrap();
        let _ = stream.write_all(&attack);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.starts_with(b"{\"exec\":{}}\n"));
    }
    let echo = bench.exec(&["echo", "fine"]).unwrap();
    assert_eq!(echo.collect().unwrap().0, b"fine");
}

#[test]
fn clients_and_streams_are_limited_and_streams_leave_room_for_requests() {
    let bench = bench();
    let followers: Vec<_> = (0..MAX_STREAMS)
        .map(|_| {
            let mut stream = bench.client().events(None, true).unwrap();
            bench.append(1);
            stream.next_item().unwrap();
            stream
        })
        .collect();
    let error = bench.client().events(None, true).unwrap().next_item();
    assert!(error.unwrap_err().to_string().contains("too many"));
    assert!(bench.client().status().is_ok());
    let wait_free = |wanted: usize| {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let mut idle: Vec<_> = (0..wanted).map(|_| bench.client()).collect();
            if idle.iter_mut().all(|client| client.status().is_ok()) {
                return idle;
            }
            assert!(Instant::now() < deadline, "no room for {wanted} clients");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    drop(wait_free(MAX_CLIENTS - MAX_STREAMS));
    drop(followers);
    let idle = wait_free(MAX_CLIENTS);
    let error = bench.client().status().unwrap_err().to_string();
    assert_eq!(error, "too many control clients at once (at most 64)");
    drop(idle);
    wait_free(1);
}
