//! Nodes that come and go while a pod runs, and operators who ask for what cannot be. Needs root.

mod support;

use std::process::{Command, Stdio};

use lupin_abi::NodeId;
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::client::ClientError;
use lupin_fabric::api::{Client, ControlError, Effect, NodeAction};
use support::{Mapped, TestPod, node_program as run_node, wait_until};

/// Not a test: the program of the nodes that the tests start.
#[test]
#[ignore = "is started by the other tests as a node"]
fn node_program() {
    run_node();
}

const REMOVE: NodeAction = NodeAction::Remove { grace_ms: 100 };
const DRAIN: NodeAction = NodeAction::Drain {
    wait_ms: 60_000,
    grace_ms: 100,
};

/// Writes a pod file with these nodes, and the rest as before.
fn write_nodes(pod: &TestPod, nodes: &[u32]) {
    let text = std::fs::read_to_string(&pod.file).unwrap();
    let head = text.split("[[node]]").next().unwrap();
    let nodes = nodes.iter().map(|n| format!("[[node]]\nid = {n}\n"));
    std::fs::write(&pod.file, head.to_string() + &nodes.collect::<String>()).unwrap();
}

fn ids(pod: &TestPod) -> Vec<u32> {
    pod.status().nodes.iter().map(|node| node.id).collect()
}

fn refused(answer: Result<(), ClientError>) -> ControlError {
    match answer {
        Err(ClientError::Refused(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nodes_come_and_go_and_managers_die_over_it() {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let memory = std::fs::File::open(pod.folder.path().join("pod")).unwrap();
    let memory = Mapped::read_only(std::os::fd::AsRawFd::as_raw_fd(&memory));
    let entry = |node| memory.fabric().entry(NodeId::new(node).unwrap());

    // What was confirmed is done, whoever is there to do it.
    write_nodes(&pod, &[1, 2, 3]);
    pod.client().add("n3").unwrap();
    pod.kill_manager();
    pod.start();
    pod.wait_joined(&[1, 1, 1]);
    assert_eq!(ids(&pod), [1, 2, 3]);

    pod.client().steer("n2", DRAIN).unwrap();
    // Asked twice, it is ignored, or too late already.
    let _ = pod.client().steer("2", DRAIN);
    pod.kill_manager();
    pod.start();
    wait_until("the node to be drained", || {
        entry(2).state() == NodeState::Down
    });
    assert_eq!(entry(2).generation(), 2);
    pod.client().steer("n2", NodeAction::Start {}).unwrap();
    pod.wait_joined(&[1, 2, 1]);

    pod.client().steer("n2", REMOVE).unwrap();
    pod.kill_manager();
    pod.start();
    wait_until("the node to be removed", || ids(&pod) == [1, 3]);
    assert_eq!(
        (entry(2).state(), entry(2).generation()),
        (NodeState::Absent, 3)
    );

    // The file still has it, so it comes back, with a generation that nobody had.
    let differences = pod.client().reload(false).unwrap();
    assert_eq!(differences.len(), 1, "{differences:?}");
    assert_eq!(differences[0].effect, Effect::Now);
    pod.wait_joined(&[1, 3, 1]);
    assert_eq!(pod.client().reload(false).unwrap(), []);
    let last = pod.status();
    assert_eq!(
        last.nodes[0].pid, first.nodes[0].pid,
        "node 1 was not touched"
    );

    // Down and up: the file says who is in the pod.
    write_nodes(&pod, &[1, 2]);
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
    pod.start();
    pod.wait_joined(&[2, 4]);
    assert_eq!(
        (entry(3).state(), entry(3).generation()),
        (NodeState::Absent, 2)
    );
}

#[test]
fn a_pod_file_that_changes_while_its_pod_runs_is_judged_by_its_parts() {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let whole = std::fs::read_to_string(&pod.file).unwrap();
    for (text, words) in [
        ("name = 1", "invalid type"),
        (&whole.replace("id = 2", "id = 9"), "node_capacity"),
    ] {
        std::fs::write(&pod.file, text).unwrap();
        match pod.client().reload(false) {
            Err(ClientError::Refused(ControlError::BadRequest { why })) => {
                assert!(why.contains("pod.toml") && why.contains(words), "{why}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            refused(pod.client().add("n2")),
            ControlError::BadRequest { .. }
        ));
    }
    let changed = whole
        .replace("pool = \"2M\"", "pool = \"4M\"")
        .replace("id = 2\n", "id = 3\n")
        .replace("id = 1\n", "id = 1\nrestart = \"never\"\n");
    std::fs::write(&pod.file, changed).unwrap();
    let dry = pod.client().reload(true).unwrap();
    let told: Vec<_> = dry.iter().map(|d| (d.what.as_str(), d.effect)).collect();
    assert_eq!(
        told,
        [
            ("[memory]", Effect::Refused),
            ("node 1 (n1): policies and hooks", Effect::Now),
            ("node 2 (n2)", Effect::Refused),
            ("node 3 (n3): added", Effect::Now),
        ]
    );
    assert_eq!(ids(&pod), [1, 2]);
    assert_eq!(pod.client().reload(false).unwrap(), dry);
    wait_until("the new node", || pod.has_joined("n3", 1));
    // A manager that is killed now leaves the pod as it is, not as the file says.
    pod.kill_manager();
    std::fs::write(&pod.file, whole).unwrap();
    pod.start();
    let after = pod.wait_joined(&[1, 1, 1]);
    for (old, new) in first.nodes.iter().zip(&after.nodes) {
        assert_eq!(old.pid, new.pid);
    }
    pod.client().kill("n1").unwrap();
    wait_until("the new policy to be kept to", || {
        pod.status().nodes[0].state == NodeState::Down
    });
}

#[test]
fn many_operators_at_once_get_answers_and_the_pod_stays_whole() {
    let mut pod = TestPod::new(3, "");
    pod.start();
    pod.wait_joined(&[1, 1, 1]);
    let runtime = pod.runtime();
    let rounds = 12;
    let workers: Vec<_> = (0..6)
        .map(|worker| {
            let runtime = runtime.clone();
            std::thread::spawn(move || {
                let grace_ms = 20;
                for round in 0..rounds {
                    let node = ["n2", "n3", "2", "n9", "", "\u{1f4a5}"][(worker + round) % 6];
                    let mut client = Client::connect(&runtime).unwrap();
                    let answer = match (worker * 5 + round) % 9 {
                        0 => client.kill(node),
                        1 => client.steer(node, NodeAction::Pause {}),
                        2 => client.steer(node, NodeAction::Resume {}),
                        3 => client.steer(node, NodeAction::Restart { grace_ms }),
                        4 => client.steer(node, NodeAction::Stop { grace_ms }),
                        5 => client.steer(node, REMOVE),
                        6 => client.add(node),
                        7 => client.steer(node, DRAIN),
                        _ => client.steer(node, NodeAction::CancelDrain {}),
                    };
                    match answer {
                        Ok(()) | Err(ClientError::Refused(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    // Everything comes to rest, and back.
    wait_until("the nodes to be well again", || {
        for name in ["n2", "n3"] {
            let mut client = pod.client();
            let _ = client.steer(name, NodeAction::CancelDrain {});
            let _ = client.steer(name, NodeAction::Resume {});
            let _ = client.steer(name, NodeAction::Start {});
            let _ = client.add(name);
        }
        let status = pod.status();
        let joined = status.nodes.iter().filter(|n| n.state == NodeState::Joined);
        joined.count() == 3
    });
    let status = pod.status();
    assert_eq!(
        (status.nodes[0].generation, status.nodes[0].restarts),
        (1, 0)
    );
    // Each failure has raised a generation once.
    let mut events = pod.client().events(None, false).unwrap();
    let mut raised = [0; 4];
    while let Some(item) = events.next_item().unwrap() {
        if let lupin_fabric::api::client::StreamItem::Event(event) = item
            && event.kind == lupin_abi::event::EventKind::GenerationRaised
        {
            raised[event.node as usize] += 1;
            assert_eq!(event.generation, event.old_generation + 1);
        }
    }
    for node in &status.nodes {
        assert_eq!(
            node.generation,
            1 + raised[node.id as usize],
            "{}",
            pod.log()
        );
    }
}

#[test]
fn a_program_that_is_missing_at_a_restart_takes_one_node_down_until_it_is_back() {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let agent = pod.folder.path().join("agent");
    let hidden = pod.folder.path().join("hidden");
    std::fs::rename(&agent, &hidden).unwrap();
    pod.client().kill("n1").unwrap();
    wait_until("the node to be given up", || {
        pod.status().nodes[0].state == NodeState::Down
    });
    let status = pod.status();
    let detail = status.nodes[0].detail.clone().unwrap();
    assert!(detail.contains("agent"), "{detail}");
    assert_eq!(status.nodes[1].pid, first.nodes[1].pid);
    std::fs::rename(&hidden, &agent).unwrap();
    pod.client().steer("n1", NodeAction::Start {}).unwrap();
    let generation = status.nodes[0].generation;
    wait_until("the node to be back", || pod.has_joined("n1", generation));
}

#[test]
fn a_disk_without_room_for_the_pod_memory_is_told_and_left_as_it_was() {
    let pod = TestPod::new(1, "");
    let text = std::fs::read_to_string(&pod.file).unwrap();
    let small = pod.folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let text = text.replace("path = \"pod\"", "path = \"small/pod\"");
    std::fs::write(&pod.file, text).unwrap();
    // In a mount namespace of its own, so that nothing is left whatever happens.
    let script = "mount -t tmpfs -o size=512k none \"$1\" || exit 77; shift; \"$@\"; \
                  code=$?; ls -A \"$SMALL\"; exit $code";
    let manager = pod.command();
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(&small)
        .arg(manager.get_program())
        .args(manager.get_args())
        .env("SMALL", &small)
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || said.starts_with("unshare:") {
        eprintln!("skipped: no mount here: {output:?}");
        return;
    }
    assert_eq!(output.status.code(), Some(2), "{output:?}{}", pod.log());
    assert!(pod.log().contains("MiB free"), "{}", pod.log());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "",
        "nothing was begun"
    );
}
