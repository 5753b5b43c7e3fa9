//! A manager as a service of a real systemd: set up as the guide says, in a Debian that is a guest
//! itself, with namespace nodes.
//!
//! Needs what `pod_debian.rs` needs; `cargo xtask test --only debian` runs it.

mod common;

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use common::*;
use serde_json::Value;

/// Emulated, a Debian takes two minutes from its kernel to its last service.
const LIMIT: Duration = Duration::from_secs(300);

const UNIT: &[u8] = include_bytes!("../../fabric/systemd/lupin-pod@.service");
const SYSUSERS: &[u8] = include_bytes!("../../fabric/systemd/sysusers.conf");
const TMPFILES: &[u8] = include_bytes!("../../fabric/systemd/tmpfiles.conf");

const POD: &str = "name = \"demo\"\n\
    [memory]\npath = \"/var/lib/lupin-demo.pod\"\npool = \"2M\"\nnode_capacity = 2\n\
    [heartbeat]\nperiod_ms = 100\npoll_ms = 200\ndeadline_ms = 20000\njoin_timeout_ms = 120000\n\
    [fence]\ntimeout_ms = 20000\n\
    [defaults]\nbackend = \"namespace\"\n\
    [[node]]\nid = 1\n[[node]]\nid = 2\n";

/// The Debian, which is node 1 of a pod.
struct Host(TestPod);

impl Host {
    fn sh(&self, script: &str) -> String {
        let output = self.0.exec_ok(1, &["sh", "-c", script]);
        output.unwrap_or_else(|e| panic!("{e}"))
    }

    /// `install`, from here to there.
    fn install(&self, content: &[u8], mode: &str, path: &str) {
        let script = format!("install -D -m {mode} /dev/stdin {path}");
        let mut child = self
            .0
            .exec(1, &["sh", "-c", &script])
            .stdin(Stdio::piped())
            .spawn()
            .expect("install starts");
        let mut stdin = child.stdin.take().expect("stdin");
        stdin.write_all(content).expect("content");
        drop(stdin);
        assert!(child.wait().expect("install").success(), "{path}");
    }

    fn property(&self, name: &str) -> String {
        let value = self.sh(&format!("systemctl show -p {name} --value lupin-pod@demo"));
        value.trim().into()
    }

    fn manager(&self) -> String {
        self.property("MainPID")
    }

    /// The pod of the service, if its manager answers.
    fn pod(&self) -> Option<Value> {
        let script = "lupin-vmm pod ps --runtime-dir /run/lupin/pods --json demo";
        let output = self.0.exec_ok(1, &["sh", "-c", script]).ok()?;
        serde_json::from_str(&output).ok()
    }

    /// Waits for a manager of this epoch, and for its nodes; their processes.
    fn wait_joined(&self, epoch: u64) -> Vec<Value> {
        let mut pids = Vec::new();
        wait_until("the nodes of the service", LIMIT, || {
            let Some(pod) = self.pod() else {
                return false;
            };
            let nodes = pod["nodes"].as_array().expect("nodes");
            pids = nodes.iter().map(|node| node["pid"].clone()).collect();
            pod["epoch"] == epoch && nodes.iter().all(|node| node["state"] == "joined")
        });
        pids
    }
}

#[test]
#[ignore = "needs a KVM that runs stock kernels, and a disk with a system"]
fn systemd_starts_a_manager_again_and_no_node_notices() {
    let host = Host(up(&debian_spec("service", 1)));
    wait_for_services(&host.0, 1, LIMIT);

    // As the guide says.
    for program in ["lupin-fabricd", "lupin-vmm"] {
        let content = std::fs::read(bin_dir().join(program)).expect("the products are built");
        host.install(&content, "755", &format!("/usr/bin/{program}"));
    }
    host.install(UNIT, "644", "/etc/systemd/system/lupin-pod@.service");
    host.install(SYSUSERS, "644", "/usr/lib/sysusers.d/lupin.conf");
    host.install(TMPFILES, "644", "/usr/lib/tmpfiles.d/lupin.conf");
    host.sh("systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload");
    let said = host.sh("systemd-analyze verify lupin-pod@demo.service 2>&1 || true");
    assert!(!said.contains("lupin-pod"), "{said}");

    // Without a pod file nothing is started, and a bad one ends it for good.
    host.sh("! systemctl start lupin-pod@demo");
    assert_eq!(host.property("AssertResult"), "no");
    host.install(b"name = 1\n", "600", "/etc/lupin/pods/demo.toml");
    host.sh("! systemctl start lupin-pod@demo");
    assert_eq!(host.property("ActiveState"), "failed");
    assert_eq!(host.property("ExecMainStatus"), "2");
    assert_eq!(host.property("NRestarts"), "0");
    let journal = host.sh("journalctl -u lupin-pod@demo -p err -o cat");
    assert!(journal.contains("demo.toml"), "{journal}");

    // `start` returns when the manager is in charge.
    host.install(POD.as_bytes(), "600", "/etc/lupin/pods/demo.toml");
    host.sh("systemctl start lupin-pod@demo");
    assert_eq!(host.property("ActiveState"), "active");
    let nodes = host.wait_joined(1);
    assert_eq!(
        host.sh("stat -c %G:%a /run/lupin/pods/demo").trim(),
        "lupin:750"
    );

    // One that dies, and one that hangs (the watchdog has 10 s).
    for (signal, epoch) in [("KILL", 2), ("STOP", 3)] {
        let before = host.manager();
        host.sh(&format!("kill -{signal} {before}"));
        assert_eq!(host.wait_joined(epoch), nodes, "after SIG{signal}");
        assert_ne!(host.manager(), before);
        assert_eq!(host.property("NRestarts"), (epoch - 1).to_string());
    }
    // What is started does not have the manager's shield against the OOM killer.
    let shields = format!(
        "cat /proc/{}/oom_score_adj /proc/{}/oom_score_adj",
        host.manager(),
        nodes[0]
    );
    assert_eq!(host.sh(&shields), "-900\n0\n");

    // A failure is handled under the new manager, and told to the journal.
    host.sh(&format!("kill -KILL {}", nodes[1]));
    wait_until("the node's next life", LIMIT, || {
        host.pod()
            .is_some_and(|pod| pod["nodes"][1]["generation"] == 2)
    });
    let again = host.wait_joined(3);
    assert_eq!(again[0], nodes[0]);
    let journal = host.sh("journalctl -u lupin-pod@demo -p warning -o cat");
    assert!(journal.contains("n2"), "{journal}");

    // Down, with everything that belongs to it.
    host.sh("systemctl stop lupin-pod@demo");
    assert_eq!(host.property("ActiveState"), "inactive");
    let left = format!(
        "ls -d /proc/{} /proc/{} 2>/dev/null || true",
        again[0], again[1]
    );
    assert_eq!(host.sh(&left), "");
    // And up once more, with the generations continued.
    host.sh("systemctl start lupin-pod@demo");
    let pods = host.wait_joined(4);
    assert_eq!(pods.len(), 2);
    let generations = host
        .pod()
        .map(|pod| [1, 2].map(|n: usize| pod["nodes"][n - 1]["generation"].as_u64()));
    assert_eq!(generations, Some([Some(2), Some(3)]));
    host.sh("systemctl stop lupin-pod@demo");
}
