//! The interface as its clients see it: every route, every bound, and what is not HTTP at all.

mod client;
mod schema;

use std::alloc::{Layout, alloc_zeroed};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind};
use lupin_abi::fabric::{FabricSection, NodeState, RING_SLOTS};
use lupin_abi::layout::FABRIC_SIZE;
use lupin_abi::{Event, NodeId};
use serde_json::Value;

use super::problem::{PROBLEM_JSON, Problem};
use super::server::MAX_CONNECTIONS;
use super::*;
use crate::agent_link::AgentLink;
use crate::api::{ControlError, Difference, Effect, NodeAction, PodControl, PodStatus, sample};
use client::{Answer, Stream, ask, get, post};

const LIMIT: Duration = Duration::from_secs(20);

/// A manager of two nodes, 3 named `n3` and 4 named `off`, that only remembers what it was asked.
struct FakeManager {
    fabric: &'static FabricSection,
    asked: Mutex<Vec<String>>,
}

impl PodControl for FakeManager {
    fn status(&self) -> PodStatus {
        let mut off = sample::node(4, "off");
        off.state = NodeState::Down;
        (off.joined_in_ns, off.pid, off.heartbeat) = (None, None, None);
        off.detail = Some("it \"stays\" down\n".into());
        sample::pod(vec![sample::node(3, "n3"), off])
    }

    fn fabric(&self) -> &FabricSection {
        self.fabric
    }

    fn kill(&self, node: NodeId) -> Result<(), ControlError> {
        self.asked.lock().unwrap().push(format!("kill {node}"));
        if node.get() == 4 {
            return Err(ControlError::WrongState {
                node: 4,
                state: NodeState::Down,
                why: "only a node that runs can be killed".into(),
            });
        }
        Ok(())
    }

    fn steer(&self, node: NodeId, action: NodeAction) -> Result<(), ControlError> {
        let mut asked = self.asked.lock().unwrap();
        asked.push(format!("{action:?} {node}"));
        if node.get() == 4 && !matches!(action, NodeAction::Start {}) {
            return Err(ControlError::WrongState {
                node: 4,
                state: NodeState::Down,
                why: "it does not run".into(),
            });
        }
        Ok(())
    }

    fn down(&self, grace: Duration) {
        self.asked.lock().unwrap().push(format!("down {grace:?}"));
    }

    fn upgrade(&self, _program: Option<std::path::PathBuf>) -> Result<(), ControlError> {
        Ok(())
    }

    fn add(&self, node: &str) -> Result<NodeId, ControlError> {
        self.asked.lock().unwrap().push(format!("add {node}"));
        match node {
            "n5" => Ok(NodeId::new(5).unwrap()),
            "n3" => Err(ControlError::WrongState {
                node: 3,
                state: NodeState::Joined,
                why: "the pod has it already".into(),
            }),
            _ => Err(ControlError::BadRequest {
                why: "the pod file has no such node".into(),
            }),
        }
    }

    fn reload(&self, dry_run: bool) -> Result<Vec<Difference>, ControlError> {
        self.asked.lock().unwrap().push(format!("reload {dry_run}"));
        Ok(vec![Difference {
            what: "[memory]".into(),
            effect: Effect::Refused,
            why: Some("because".into()),
        }])
    }

    fn link(&self, _node: NodeId) -> Result<Arc<AgentLink>, ControlError> {
        Err(ControlError::GoingDown)
    }
}

struct Bench {
    folder: tempfile::TempDir,
    manager: Arc<FakeManager>,
    server: Option<HttpServer>,
}

const TOKEN: &str = "0123456789abcdefghij";

fn bench_with(patience: Patience, tcp: bool) -> Bench {
    let layout = Layout::from_size_align(FABRIC_SIZE as usize, 4096).unwrap();
    // SAFETY: the layout is not empty; the memory is zeroed, aligned, never freed and used
    // through the section's atomics only.
    let fabric = unsafe { FabricSection::from_ptr(alloc_zeroed(layout)) };
    let manager = Arc::new(FakeManager {
        fabric,
        asked: Mutex::default(),
    });
    let folder = tempfile::tempdir().unwrap();
    let tcp = tcp.then(|| {
        let file = folder.path().join("token");
        std::fs::write(&file, TOKEN).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        ("127.0.0.1:0".parse().unwrap(), Token::load(&file).unwrap())
    });
    let options = Options {
        socket: Some(folder.path().join(API_SOCKET)),
        tcp,
        patience,
    };
    let server = Some(HttpServer::start(manager.clone(), options).unwrap());
    Bench {
        folder,
        manager,
        server,
    }
}

fn bench() -> Bench {
    bench_with(Patience::default(), false)
}

impl Bench {
    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join(API_SOCKET)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn ask(&self, request: &str) -> Answer {
        ask(self.raw(), request)
    }

    fn append(&self, kind: EventKind, cause: Cause) {
        self.manager.fabric.append(&Event {
            seq: 0,
            time_ns: 5,
            epoch: 1,
            kind,
            node: 3,
            old_generation: 0,
            generation: 1,
            cause,
            evidence: [0; EVIDENCE_WORDS],
        });
    }

    fn asked(&self) -> Vec<String> {
        self.manager.asked.lock().unwrap().clone()
    }
}

fn problem(answer: &Answer) -> Problem {
    assert_eq!(
        answer.header("content-type"),
        Some(PROBLEM_JSON),
        "{answer:?}"
    );
    let problem: Problem = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem.status, answer.status);
    assert!(!problem.detail.is_empty() && !problem.advice.is_empty());
    problem
}

#[test]
fn the_description_in_the_repository_is_that_of_this_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == openapi::document(),
        "docs/openapi.json is stale: cargo run -p lupin-fabric --bin lupin-fabricd -- openapi > docs/openapi.json"
    );
}

#[test]
fn every_route_is_described_and_answers_as_it_is_described() {
    let bench = bench();
    bench.append(EventKind::FailureDetected, Cause::Hang);
    let document: Value = serde_json::from_str(&openapi::document()).unwrap();
    let cases = [
        ("get", "/v1/pod", get("/v1/pod"), 200),
        ("get", "/v1/nodes", get("/v1/nodes"), 200),
        ("get", "/v1/nodes/{node}", get("/v1/nodes/n3"), 200),
        ("get", "/v1/nodes/{node}", get("/v1/nodes/4"), 200),
        ("get", "/v1/nodes/{node}", get("/v1/nodes/n9"), 404),
        (
            "post",
            "/v1/nodes/{node}/kill",
            post("/v1/nodes/3/kill", ""),
            202,
        ),
        (
            "post",
            "/v1/nodes/{node}/kill",
            post("/v1/nodes/x/kill", ""),
            404,
        ),
        (
            "post",
            "/v1/nodes/{node}/kill",
            post("/v1/nodes/off/kill", "{}"),
            409,
        ),
        (
            "post",
            "/v1/pod/down",
            post("/v1/pod/down", "{\"grace_ms\":20}"),
            202,
        ),
        (
            "post",
            "/v1/pod/down",
            post("/v1/pod/down", "{\"grace\":20}"),
            400,
        ),
        ("get", "/v1/events", get("/v1/events"), 200),
        ("get", "/v1/events", get("/v1/events?form=3"), 400),
        ("get", "/metrics", get("/metrics"), 200),
        ("get", "/openapi.json", get("/openapi.json"), 200),
        ("get", "/healthz", get("/healthz"), 200),
    ];
    let mut cases = Vec::from(cases);
    let add = "/v1/nodes/{node}/add";
    cases.push(("post", add, post("/v1/nodes/n5/add", ""), 202));
    cases.push(("post", add, post("/v1/nodes/n6/add", ""), 400));
    cases.push(("post", add, post("/v1/nodes/n3/add", "{}"), 409));
    let reload = "/v1/pod/reload";
    cases.push(("post", reload, post(reload, ""), 200));
    cases.push(("post", reload, post(reload, "{\"dry\":true}"), 400));
    let verbs = [
        "pause",
        "resume",
        "restart",
        "stop",
        "start",
        "drain",
        "drain/cancel",
        "remove",
    ];
    let paths = verbs.map(|verb| format!("/v1/nodes/{{node}}/{verb}"));
    for (verb, path) in verbs.iter().zip(&paths) {
        let ask = |node: &str| post(&format!("/v1/nodes/{node}/{verb}"), "");
        cases.push(("post", path, ask("n3"), 202));
        cases.push(("post", path, ask("n9"), 404));
        if *verb != "start" {
            cases.push(("post", path, ask("off"), 409));
        }
    }
    for (method, path, request, status) in &cases {
        let answer = bench.ask(request);
        assert_eq!(answer.status, *status, "{method} {path}: {answer:?}");
        schema::check(&document, method, path, &answer);
    }
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let asked = cases.iter().any(|case| case.0 == method && case.1 == path);
            assert!(asked, "{method} {path} is described and was not asked");
        }
    }
    let asked = bench.asked();
    assert_eq!(asked[..3], ["kill 3", "kill 4", "down 20ms"]);
    for what in [
        "Pause 3",
        "Resume 3",
        "Restart { grace_ms: 5000 } 3",
        "Start 3",
        "Drain { wait_ms: 60000, grace_ms: 5000 } 3",
        "CancelDrain 3",
        "Remove { grace_ms: 5000 } 3",
        "add n5",
        "reload false",
    ] {
        assert!(asked.iter().any(|asked| asked == what), "{asked:?}");
    }
}

#[test]
fn what_is_refused_says_why_and_what_to_do() {
    let bench = bench();
    let large = "x".repeat(app::MAX_BODY + 1);
    for (request, status, code, word) in [
        (get("/v2/pod"), 404, "no-such-route", "/v2/pod"),
        (get("/v1/nodes/n9"), 404, "no-such-node", "n9"),
        (get("/v1/nodes/%ff"), 400, "bad-request", "UTF-8"),
        (post("/v1/nodes/off/kill", ""), 409, "wrong-state", "runs"),
        (
            post("/v1/nodes/n3/kill", "{\"hard\":1}"),
            400,
            "bad-request",
            "hard",
        ),
        (post("/v1/pod", ""), 405, "wrong-method", "/v1/pod"),
        (get("/v1/pod/down"), 405, "wrong-method", "down"),
        (post("/v1/pod/down", "{"), 400, "bad-request", "body"),
        (
            post("/v1/pod/down", "{\"grace_ms\":-1}"),
            400,
            "bad-request",
            "-1",
        ),
        (post("/v1/pod/down", &large), 413, "too-large", "65536"),
        (get("/v1/events?from=x"), 400, "bad-request", "from"),
        (get("/v1/events?follow=maybe"), 400, "bad-request", "follow"),
    ] {
        let answer = bench.ask(&request);
        assert_eq!(answer.status, status, "{request}: {answer:?}");
        let problem = problem(&answer);
        assert_eq!(problem.code, code);
        assert!(problem.detail.contains(word), "{problem:?}");
    }
    // An empty body is a wish without particulars.
    assert_eq!(bench.ask(&post("/v1/pod/down", "")).status, 202);
    assert_eq!(bench.asked(), ["kill 4", "down 5s"]);
}

#[test]
fn every_problem_has_a_status_of_its_kind() {
    for kind in problem::Kind::ALL {
        assert!(kind.status().is_client_error() || kind.status().is_server_error());
        let problem = Problem::new(kind, "x");
        assert!(!problem.code.is_empty() && !problem.title.is_empty());
    }
}

#[test]
fn over_tcp_a_token_is_asked_for() {
    let bench = bench_with(Patience::default(), true);
    let address = bench.server.as_ref().and_then(HttpServer::tcp).unwrap();
    let ask = |head: &str| {
        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        ask(stream, head)
    };
    let with = |token: &str| {
        format!(
            "GET /v1/pod HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\nconnection: close\r\n\r\n"
        )
    };
    for head in [
        get("/v1/pod"),
        with("Bearer wrong"),
        with(TOKEN),
        get("/nowhere"),
    ] {
        let answer = ask(&head);
        assert_eq!(answer.status, 401, "{head}: {answer:?}");
        assert_eq!(problem(&answer).code, "unauthorized");
        assert!(answer.header("www-authenticate").is_some());
    }
    assert_eq!(ask(&post("/v1/nodes/n3/kill", "")).status, 401);
    assert!(bench.asked().is_empty());
    assert_eq!(ask(&with(&format!("Bearer {TOKEN}"))).status, 200);
    assert_eq!(ask(&get("/healthz")).status, 200);
    // On this host, permissions of the socket decide.
    assert_eq!(bench.ask(&get("/v1/pod")).status, 200);
    let mode = std::fs::metadata(bench.folder.path().join(API_SOCKET)).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o660);
}

#[test]
fn followers_get_each_event_once_in_both_formats_until_the_end() {
    let mut bench = bench();
    bench.append(EventKind::ManagerStarted, Cause::None);
    let mut lines = Stream::open(bench.raw(), &get("/v1/events?follow=true&from=1"));
    let sse = "GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\nlast-event-id: 1\r\n\r\n";
    let mut sent = Stream::open(bench.raw(), sse);
    assert_eq!(lines.header("content-type"), Some("application/x-ndjson"));
    assert_eq!(sent.header("content-type"), Some("text/event-stream"));
    for _ in 0..20 {
        bench.append(EventKind::NodeStarted, Cause::None);
    }
    for seq in 1..=21 {
        let event: Event = serde_json::from_str(&lines.line().unwrap()).unwrap();
        assert_eq!(event.seq, seq);
    }
    for seq in 2..=21 {
        assert_eq!(sent.line().unwrap(), format!("id: {seq}"));
        assert_eq!(sent.line().unwrap(), "event: event");
        assert!(sent.line().unwrap().starts_with("data: {\"seq\":"));
        assert_eq!(sent.line().unwrap(), "");
    }
    // What happens last is told as well.
    bench.append(EventKind::ManagerStopped, Cause::None);
    bench.server = None;
    assert!(lines.line().unwrap().contains("manager-stopped"));
    assert_eq!(lines.line(), None);
    assert_eq!(sent.line().unwrap(), "id: 22");
    assert!(!bench.folder.path().join(API_SOCKET).exists());
}

#[test]
fn events_that_were_overwritten_are_marked_and_counted() {
    let bench = bench();
    for _ in 0..2 * RING_SLOTS {
        bench.append(EventKind::NodeStarted, Cause::None);
    }
    let answer = bench.ask(&get("/v1/events?from=5"));
    let text = String::from_utf8(answer.body).unwrap();
    let mut lines = text.lines();
    let mark: events::LostEvents = serde_json::from_str(lines.next().unwrap()).unwrap();
    assert_eq!(mark.lost.from, 5);
    let event: Event = serde_json::from_str(lines.next().unwrap()).unwrap();
    assert_eq!(event.seq, mark.lost.resume);
    assert_eq!(
        2 + lines.count() as u64,
        2 * RING_SLOTS as u64 - event.seq + 2
    );
    let metrics = String::from_utf8(bench.ask(&get("/metrics")).body).unwrap();
    let lost = mark.lost.resume - 5;
    let series = format!("lupin_events_lost_total{{pod=\"demo\",reader=\"followers\"}} {lost}\n");
    assert!(metrics.contains(&series), "{metrics}");
    // Whoever does not ask for the oldest does not miss them.
    let answer = bench.ask(&get("/v1/events"));
    assert!(!String::from_utf8(answer.body).unwrap().contains("lost"));
}

#[test]
fn streams_and_connections_are_bounded_and_given_back() {
    let bench = bench();
    bench.append(EventKind::NodeStarted, Cause::None);
    let follow = get("/v1/events?follow=true");
    let streams: Vec<_> = (0..app::MAX_STREAMS)
        .map(|_| {
            let mut stream = Stream::open(bench.raw(), &follow);
            stream.line().unwrap();
            stream
        })
        .collect();
    let answer = bench.ask(&follow);
    assert_eq!((answer.status, &*problem(&answer).code), (429, "too-many"));
    assert_eq!(bench.ask(&get("/v1/pod")).status, 200);
    let idle: Vec<_> = (app::MAX_STREAMS..MAX_CONNECTIONS)
        .map(|_| bench.raw())
        .collect();
    let refused = |expected: bool| {
        let begin = Instant::now();
        // Others are noticed as gone, or as there, a moment later.
        while (bench.ask(&get("/healthz")).status == 429) != expected {
            assert!(begin.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    refused(true);
    assert_eq!(problem(&bench.ask(&get("/healthz"))).code, "too-many");
    drop((streams, idle));
    refused(false);
    assert_eq!(bench.ask(&get("/v1/events")).status, 200);
}

#[test]
fn who_is_slow_is_given_up_and_holds_up_nobody() {
    let patience = Patience {
        head: Duration::from_millis(200),
        write: Duration::from_millis(200),
        ..Patience::default()
    };
    let bench = bench_with(patience, false);
    // A head that never ends, and a connection on which nothing is said.
    let (mut half, mut silent) = (bench.raw(), bench.raw());
    half.write_all(b"GET /v1/pod HTTP/1.1\r\nhost: x\r\n")
        .unwrap();
    for stream in [&mut half, &mut silent] {
        let mut rest = Vec::new();
        // Closed, with a word or without one.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"));
    }
    // A follower that reads nothing while much happens.
    let mut stuck = bench.raw();
    stuck
        .write_all(get("/v1/events?follow=true").as_bytes())
        .unwrap();
    let begin = Instant::now();
    loop {
        for _ in 0..2000 {
            bench.append(EventKind::NodeStarted, Cause::None);
        }
        assert_eq!(bench.ask(&get("/healthz")).status, 200);
        // The other end is closed: a write says so.
        if stuck.write_all(b"x").is_err() {
            break;
        }
        assert!(begin.elapsed() < LIMIT, "a stuck follower is kept");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_manager_that_stands_still_is_told_by_healthz() {
    let patience = Patience {
        manager: Duration::from_millis(1500),
        ..Patience::default()
    };
    let bench = bench_with(patience, false);
    let wait = |status: u16, beat: bool| {
        let begin = Instant::now();
        loop {
            if beat {
                bench.manager.fabric.state().beat_manager();
            }
            let answer = bench.ask(&get("/healthz"));
            if answer.status == status {
                break answer;
            }
            assert!(begin.elapsed() < LIMIT, "{answer:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    assert_eq!(problem(&wait(503, false)).code, "manager-hung");
    wait(200, true);
}

#[test]
fn bytes_that_are_not_http_hurt_nobody() {
    let bench = bench();
    let whole = post("/v1/nodes/n3/kill", "{ }");
    // xorshift64 (Marsaglia 2003): only variety is asked of it.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..400 {
        let mut bytes = whole.clone().into_bytes();
        match round % 4 {
            // Cut off.
            0 => bytes.truncate(random() as usize % bytes.len()),
            // Some bytes changed.
            1 => {
                for _ in 0..=random() % 8 {
                    let at = random() as usize % bytes.len();
                    bytes[at] = random() as u8;
                }
            }
            // Noise.
            2 => bytes = (0..random() % 600).map(|_| random() as u8).collect(),
            // A head of endless length.
            _ => {
                let more = (0..random() % 60_000).map(|_| b'a' + random() as u8 % 26);
                bytes.splice(40..40, more);
            }
        }
        let mut stream = bench.raw();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "));
    }
    let begin = Instant::now();
    while bench.ask(&get("/v1/pod")).status != 200 {
        assert!(begin.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nothing but what was asked for happened, and only to a node that there is.
    assert!(
        bench
            .asked()
            .iter()
            .all(|what| what == "kill 3" || what == "kill 4")
    );
}
