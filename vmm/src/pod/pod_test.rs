use std::sync::{Arc, Mutex};

use clap::Parser;
use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind};
use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::layout::{FABRIC_SIZE, MIN_SYSTEM_SIZE};
use lupin_abi::{Event, NodeId};
use lupin_fabric::agent_link::AgentLink;
use lupin_fabric::api::{
    CONTROL_SOCKET, Difference, Effect, NodeAction, NodeStatus, PodControl, PodPhase, PodStatus,
    Server,
};

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    pod: PodArgs,
}

/// A manager of two nodes that only remembers what it was asked.
struct FakeManager {
    fabric: &'static FabricSection,
    asked: Mutex<Vec<String>>,
}

impl PodControl for FakeManager {
    fn status(&self) -> PodStatus {
        let node = |id: u32| NodeStatus {
            id,
            name: format!("n{id}"),
            backend: "kvm".into(),
            state: NodeState::Joined,
            generation: id,
            cause: Cause::None,
            restarts: 0,
            in_state_ns: 5,
            joined_in_ns: Some(7),
            pid: Some(100 + id),
            folder: format!("/nonexistent/n{id}").into(),
            detail: (id == 2).then(|| "a word to the operator".into()),
            heartbeat: None,
            false_alarms: 0,
            usage: None,
        };
        PodStatus {
            pod: "demo".into(),
            pod_id: "07".into(),
            phase: PodPhase::Running,
            // No process: what waits for its end does not wait.
            manager_pid: u32::MAX,
            epoch: 1,
            backup_pid: None,
            pod_file: "/demo.toml".into(),
            memory: "/demo.pod".into(),
            memory_bytes: 2 << 30,
            join_timeout_ms: 1000,
            newest_event: 0,
            nodes: vec![node(1), node(2)],
        }
    }

    fn fabric(&self) -> &FabricSection {
        self.fabric
    }

    fn kill(&self, node: NodeId) -> Result<(), ControlError> {
        if node.get() == 1 {
            return Err(ControlError::WrongState {
                node: 1,
                state: NodeState::Down,
                why: "only a running node can be killed".into(),
            });
        }
        self.asked.lock().unwrap().push(format!("kill {node}"));
        Ok(())
    }

    fn steer(&self, node: NodeId, action: NodeAction) -> Result<(), ControlError> {
        let mut asked = self.asked.lock().unwrap();
        asked.push(format!("{action:?} {node}"));
        Ok(())
    }

    fn down(&self, grace: Duration) {
        self.asked.lock().unwrap().push(format!("down {grace:?}"));
    }

    fn upgrade(&self, program: Option<std::path::PathBuf>) -> Result<(), ControlError> {
        let mut asked = self.asked.lock().unwrap();
        asked.push(format!("upgrade {program:?}"));
        Ok(())
    }

    fn add(&self, node: &str) -> Result<NodeId, ControlError> {
        self.asked.lock().unwrap().push(format!("add {node}"));
        Ok(NodeId::new(2).unwrap())
    }

    fn reload(&self, dry_run: bool) -> Result<Vec<Difference>, ControlError> {
        self.asked.lock().unwrap().push(format!("reload {dry_run}"));
        Ok(vec![Difference {
            what: "[memory]".into(),
            effect: Effect::Refused,
            why: Some("because".into()),
        }])
    }

    fn link(&self, node: NodeId) -> Result<Arc<AgentLink>, ControlError> {
        Err(ControlError::WrongState {
            node: node.get(),
            state: NodeState::Restarting,
            why: "it has no process".into(),
        })
    }
}

struct Bench {
    base: tempfile::TempDir,
    manager: Arc<FakeManager>,
    server: Option<Server>,
}

fn bench() -> Bench {
    let layout = std::alloc::Layout::from_size_align(FABRIC_SIZE as usize, 4096).unwrap();
    // SAFETY: the layout is not empty; the memory is zeroed, aligned, never freed and used
    // through the section's atomics only.
    let fabric = unsafe { FabricSection::from_ptr(std::alloc::alloc_zeroed(layout)) };
    fabric.append(&Event {
        seq: 0,
        time_ns: 5,
        epoch: 1,
        kind: EventKind::NodeStarted,
        node: 1,
        old_generation: 0,
        generation: 1,
        cause: Cause::None,
        evidence: [0; EVIDENCE_WORDS],
    });
    let manager = Arc::new(FakeManager {
        fabric,
        asked: Mutex::default(),
    });
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("demo");
    std::fs::create_dir(&folder).unwrap();
    let server = Server::start(manager.clone(), &folder.join(CONTROL_SOCKET)).unwrap();
    Bench {
        base,
        manager,
        server: Some(server),
    }
}

impl Bench {
    fn run(&self, words: &[&str]) -> i32 {
        let base = self.base.path().to_str().unwrap();
        let words = ["pod", "--runtime-dir", base]
            .into_iter()
            .chain(words.iter().copied());
        run(&Cli::try_parse_from(words).unwrap().pod)
    }

    fn pod_file(&self) -> String {
        let path = self.base.path().join("any-name.toml");
        let text = "name = \"demo\"\n[memory]\npath = \"demo.pod\"\npool = \"2M\"\n\
                    [defaults]\nbackend = \"namespace\"\n[[node]]\nid = 1\nname = \"n1\"\n";
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().into()
    }
}

#[test]
fn commands_end_with_the_status_that_the_help_promises() {
    let mut bench = bench();
    let file = bench.pod_file();
    assert_eq!(bench.run(&["ps"]), status::OK);
    assert_eq!(bench.run(&["ps", "demo", "--json"]), status::OK);
    assert_eq!(bench.run(&["ps", &file]), status::OK);
    assert_eq!(bench.run(&["ps", "demo", "--wide"]), status::OK);
    assert_eq!(
        bench.run(&["top", "demo", "--once", "--interval", "100ms"]),
        status::OK
    );
    assert_eq!(bench.run(&["events", "demo"]), status::OK);
    assert_eq!(
        bench.run(&["events", "demo", "--json", "--node", "n1"]),
        status::OK
    );
    assert_eq!(
        bench.run(&["events", "demo", "--node", "n9"]),
        status::WRONG_STATE
    );
    assert_eq!(bench.run(&["kill", "demo", "n2"]), status::OK);
    assert_eq!(bench.run(&["kill", "demo", "n1"]), status::WRONG_STATE);
    assert_eq!(bench.run(&["kill", "demo", "3"]), status::WRONG_STATE);
    assert_eq!(
        bench.run(&["exec", "demo", "n1", "true"]),
        status::EXEC_FAILED
    );
    assert_eq!(
        bench.run(&["exec", "demo", "n9", "true"]),
        status::EXEC_FAILED
    );
    assert_eq!(bench.run(&["console", "demo", "n9"]), status::WRONG_STATE);
    assert_eq!(bench.run(&["console", "demo", "n1"]), status::FAILED);
    for words in [
        &["add", "demo", "n2", "--no-wait"][..],
        &["drain", "demo", "n2", "--wait", "1s", "--no-wait"],
        // It does not drain.
        &["drain", "demo", "n2", "--cancel"],
        &["rm", "demo", "n2", "--grace", "0s", "--no-wait"],
    ] {
        assert_eq!(bench.run(words), status::OK, "{words:?}");
    }
    // Something was refused.
    assert_eq!(bench.run(&["reload", "demo"]), status::WRONG_STATE);
    let dry_run = ["reload", "demo", "--dry-run", "--json"];
    assert_eq!(bench.run(&dry_run), status::WRONG_STATE);
    // Up, a second time.
    assert_eq!(bench.run(&["up", &file]), status::WRONG_STATE);
    // Down: told, but this manager never ends.
    let down = ["down", "demo", "--grace", "1s", "--timeout", "50ms"];
    assert_eq!(bench.run(&down), status::TIMEOUT);
    let asked = bench.manager.asked.lock().unwrap().clone();
    assert_eq!(
        asked,
        [
            "kill 2",
            "add n2",
            "Drain { wait_ms: 1000, grace_ms: 5000 } 2",
            "CancelDrain 2",
            "Remove { grace_ms: 0 } 2",
            "reload false",
            "reload true",
            "down 1s",
        ]
    );
    bench.server = None;
    for words in [
        &["down", "demo"][..],
        &["ps", "demo"],
        &["top", "demo", "--once"],
        &["kill", "demo", "n1"],
    ] {
        assert_eq!(bench.run(words), status::NOT_RUNNING, "{words:?}");
    }
    assert_eq!(bench.run(&["ps"]), status::OK);
}

#[test]
fn the_record_outlives_the_manager() {
    let mut bench = bench();
    bench.server = None;
    let file = bench.pod_file();
    assert_eq!(bench.run(&["events", &file]), status::NOT_RUNNING);
    let header = lupin_abi::PodHeader::new(7, "demo", 1, MIN_SYSTEM_SIZE, 2 << 20).unwrap();
    let mut bytes = vec![0; header.total_size() as usize];
    bytes[..256].copy_from_slice(&header.encode());
    let memory = bench.base.path().join("demo.pod");
    std::fs::write(&memory, &bytes).unwrap();
    assert_eq!(bench.run(&["events", &file, "--json"]), status::OK);
    assert_eq!(bench.run(&["events", &file, "--node", "n1"]), status::OK);
    assert_eq!(
        bench.run(&["events", &file, "--node", "n2"]),
        status::WRONG_STATE
    );
    // Following needs somebody who writes.
    assert_eq!(bench.run(&["events", &file, "-f"]), status::NOT_RUNNING);
    for broken in [&bytes[..300], b"my diary"] {
        std::fs::write(&memory, broken).unwrap();
        assert_eq!(bench.run(&["events", &file]), status::NOT_RUNNING);
    }
}

#[test]
fn a_pod_is_found_by_file_or_name_or_the_answer_says_what_was_tried() {
    let bench = bench();
    let find = |given: &str| Place::find(bench.base.path(), given.as_ref());
    let file = bench.pod_file();
    assert_eq!(find(&file).unwrap().name, "demo");
    assert_eq!(find("demo").unwrap().folder, bench.base.path().join("demo"));
    let failure = find("dmeo").unwrap_err();
    assert_eq!(failure.status, status::NOT_RUNNING);
    assert!(
        failure.message.contains("running: demo"),
        "{}",
        failure.message
    );
    let failure = find("./none.toml").unwrap_err();
    assert_eq!(failure.status, status::BAD_ARGUMENTS);
    assert!(failure.message.contains("none.toml"), "{}", failure.message);
    for escape in ["..", "/", "", "."] {
        assert!(find(escape).is_err(), "{escape:?}");
    }
}

#[test]
fn arguments_are_checked_before_anything_is_done() {
    let parse = |words: &[&str]| Cli::try_parse_from(["pod"].iter().chain(words)).map(|_| ());
    assert!(parse(&["exec", "p", "n", "--", "ls", "-l"]).is_ok());
    assert!(parse(&["exec", "p", "n", "ls", "-l", "--help"]).is_ok());
    assert!(parse(&["exec", "-e", "A=1", "-w", "/tmp", "p", "n", "sh"]).is_ok());
    for bad in [
        &["exec", "p", "n"][..],
        &["exec", "-e", "A", "p", "n", "sh"],
        &["down", "p", "--grace", "soon"],
        &["up"],
        &["restart", "p"],
        &["drain", "p", "n", "--cancel", "--wait", "1s"],
        &["add", "p"],
        &["reload", "p", "n"],
        &["console", "p", "n", "-f", "--previous"],
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_manager_that_cannot_start_says_why() {
    let bench = bench();
    let path = bench.base.path().join("broken.toml");
    std::fs::write(&path, "name = \"x\"\nnodes = 3\n").unwrap();
    assert_eq!(
        bench.run(&["up", path.to_str().unwrap()]),
        status::BAD_ARGUMENTS
    );
    assert_eq!(
        bench.run(&["up", "/nonexistent.toml"]),
        status::BAD_ARGUMENTS
    );
}
