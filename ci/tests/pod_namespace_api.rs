//! Steering and watching pods of namespace nodes by HTTP, and by the command line's live views.
//!
//! Every test needs root (namespaces) and the built products; `cargo xtask test` runs them.

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::*;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use lupin_abi::event::{Cause, Event, EventKind};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// Asks once; status and body.
fn ask(socket: &Path, method: &str, path: &str) -> (u16, String) {
    let asked = async {
        let stream = tokio::net::UnixStream::connect(socket)
            .await
            .expect("api.sock");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("handshake");
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "pod")
            .body(Full::<Bytes>::default())
            .expect("request");
        let answer = sender.send_request(request).await.expect("answer");
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.expect("body").to_bytes();
        drop(sender);
        connection.await.expect("connection").expect("end");
        (status, String::from_utf8(body.into()).expect("text"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("executor");
    let bounded = async { tokio::time::timeout(LIMIT, asked).await };
    runtime.block_on(bounded).expect("in time")
}

fn json(socket: &Path, method: &str, path: &str) -> Value {
    let (status, body) = ask(socket, method, path);
    assert!(
        (200..300).contains(&status),
        "{method} {path}: {status} {body}"
    );
    serde_json::from_str(&body).expect("JSON")
}

/// The value of a series.
fn metric(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.rsplit(' ')
        .next()
        .and_then(|value| value.parse().ok())
        .expect("a number")
}

#[test]
#[ignore = "needs root and the built products"]
fn a_kill_by_http_is_carried_out_told_and_counted_also_by_the_next_manager() {
    let pod = up(&namespace_spec("api", 2));
    let socket = pod.runtime().join("api/api.sock");
    let nodes = json(&socket, "GET", "/v1/nodes");
    for node in nodes.as_array().expect("nodes") {
        assert_eq!(node["state"], "joined", "{node}");
        assert!(node["heartbeat"]["left_ns"].as_u64() > Some(0), "{node}");
        assert!(node["usage"]["memory_bytes"].as_u64() > Some(0), "{node}");
    }
    assert_eq!(ask(&socket, "GET", "/healthz").0, 200);
    let (status, body) = ask(&socket, "POST", "/v1/nodes/n9/kill");
    assert!(
        status == 404 && body.contains("no-such-node"),
        "{status} {body}"
    );

    let accepted = json(&socket, "POST", "/v1/nodes/n1/kill");
    expect_failure(&pod, 1, 1, Cause::Operator, LIMIT);
    let from = accepted["events_from"].as_u64().expect("number");
    let (_, lines) = ask(&socket, "GET", &format!("/v1/events?from={from}"));
    let first: Event = serde_json::from_str(lines.lines().next().expect("a line")).expect("event");
    assert_eq!((first.kind, first.node), (EventKind::FailureDetected, 1));

    let counted = |what: &str| {
        let (_, text) = ask(&socket, "GET", "/metrics");
        let failures = "lupin_failures_total{pod=\"api\",node=\"n1\",cause=\"operator\"}";
        assert_eq!(metric(&text, failures), 1.0, "{what}");
        for histogram in ["fence", "notification", "outage"] {
            let series = format!("lupin_{histogram}_seconds_count{{pod=\"api\"");
            assert_eq!(metric(&text, &series), 1.0, "{what}: {histogram}");
        }
        assert_eq!(
            metric(&text, "lupin_join_seconds_count{pod=\"api\"}"),
            3.0,
            "{what}"
        );
        metric(&text, "lupin_epoch{pod=\"api\"}")
    };
    let epoch = counted("the first manager");
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    kill(manager, Signal::SIGKILL).expect("kill");
    wait_until("the manager is gone", LIMIT, || !alive(manager));
    assert!(pod.up().expect("up").success());
    assert_eq!(counted("the next manager"), epoch + 1.0);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_follower_outlives_the_manager_misses_nothing_and_ends_with_the_pod() {
    let pod = up(&namespace_spec("follow", 2));
    let mut command = pod.verb("events");
    command.args(["--follow", "--json"]).stdin(Stdio::null());
    let mut follower = KillOnDrop(command.stdout(Stdio::piped()).spawn().expect("events"));
    let mut lines = BufReader::new(follower.0.stdout.take().expect("stdout")).lines();
    let mut seen: Vec<Value> = Vec::new();
    let mut until = |stop: &dyn Fn(&Value) -> bool| loop {
        let line = lines.next().expect("the stream goes on").expect("a line");
        let value: Value = serde_json::from_str(&line).expect("JSON");
        seen.push(value.clone());
        if stop(&value) {
            break;
        }
    };
    let joined = |value: &Value| value["kind"] == "node-joined" && value["node"] == 2;
    until(&joined);
    let manager = Pid::from_raw(pod.manager_pid().expect("manager"));
    // Asked for while there is somebody to answer.
    let node = pid(&pod, 2);
    kill(manager, Signal::SIGKILL).expect("kill");
    until(&|value| value["manager"]["lost"]["pid"] == manager.as_raw());
    kill(node, Signal::SIGKILL).expect("kill");
    wait_until("both are gone", LIMIT, || !alive(manager) && !alive(node));
    assert!(pod.up().expect("up").success());
    until(&|value| value["manager"]["found"]["epoch"].as_u64() > Some(1));
    until(&joined);
    assert!(pod.down().expect("down").status.success());
    let status = follower.0.wait().expect("the follower ends");
    assert!(status.success(), "{status}");
    let events: Vec<Event> = seen
        .into_iter()
        .filter_map(|value| serde_json::from_value(value).ok())
        .collect();
    for pair in events.windows(2) {
        assert_eq!(pair[0].seq + 1, pair[1].seq, "{pair:#?}");
    }
    check_failure(&events, 2, 1, Cause::VmmExit);
}

#[test]
#[ignore = "needs root and the built products"]
fn a_follower_ends_with_its_reader() {
    let pod = up(&namespace_spec("reader", 1));
    let mut command = pod.verb("events");
    command.arg("--follow").stdin(Stdio::null());
    let mut follower = KillOnDrop(command.stdout(Stdio::piped()).spawn().expect("events"));
    let mut stdout = BufReader::new(follower.0.stdout.take().expect("stdout"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a line");
    drop(stdout);
    // Nothing more happens in this pod.
    wait_until("the follower ends", LIMIT, || {
        follower.0.try_wait().expect("wait").is_some()
    });
}

#[test]
#[ignore = "needs root and the built products"]
fn top_prints_plain_text_where_there_is_no_terminal() {
    let pod = up(&namespace_spec("top", 2));
    let output = pod.verb("top").stdin(Stdio::null()).output().expect("top");
    let shown = text(&output);
    assert!(output.status.success(), "{shown}");
    for word in ["2 of 2 nodes joined", "STEAL", "n2", "joined"] {
        assert!(shown.contains(word), "{word:?} is not in {shown}");
    }
    assert!(!shown.contains('\x1b'), "{shown}");
    let output = pod.verb("ps").arg("--wide").output().expect("ps");
    assert!(text(&output).contains("FALSE ALARMS"), "{}", text(&output));
}

#[test]
#[ignore = "needs root and the built products"]
fn a_token_that_everybody_can_read_is_refused_before_anything_starts() {
    use std::os::unix::fs::PermissionsExt;
    let pod = create(&namespace_spec("token", 1));
    let toml = std::fs::read_to_string(pod.file()).expect("pod file");
    let api = "\n[api]\nlisten = \"127.0.0.1:0\"\ntoken_file = \"secret\"\n";
    std::fs::write(pod.file(), toml + api).expect("pod file");
    let secret = pod.folder.join("secret");
    std::fs::write(&secret, "0123456789abcdefghij").expect("token");
    let up = |mode: u32| {
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(mode)).expect("mode");
        pod.verb("up").stdin(Stdio::null()).output().expect("up")
    };
    let output = up(0o644);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("chmod 0600"), "{}", text(&output));
    let output = up(0o600);
    assert!(output.status.success(), "{}", text(&output));
}
