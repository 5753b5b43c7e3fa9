//! Nodes that fail while this host lacks what it takes to start them again: programs, kernels,
//! processes, descriptors, room on the disk. Needs root.
//!
//! What must hold whatever is lacking: the failure is handled to its end, with every event; the
//! other node notices nothing; the cause, the error number and what to do are told; and the node
//! comes back when the host has what it takes, by itself or by `start`.

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use lupin_abi::event::{Cause, Event, EventKind};
use lupin_abi::fabric::{NodeState, RingRead};
use lupin_abi::{Generation, NodeId};
use lupin_fabric::api::client::ClientError;
use lupin_fabric::api::{ControlError, NodeAction};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::vmm::{vmm_program as run_vmm, vmm_script};
use support::{Mapped, TestPod, node_program as run_node, wait_until};

/// Not a test: the program of the nodes that the tests start.
#[test]
#[ignore = "is started by the other tests as a node"]
fn node_program() {
    run_node();
}

/// Not a test: the VMM of the tests.
#[test]
#[ignore = "is started by the other tests as a VMM"]
fn vmm_program() {
    run_vmm();
}

/// The exit code of an inner test that cannot be made here.
const SKIPPED: i32 = 77;

/// What a pod's memory says.
struct Books(Mapped);

impl Books {
    fn of(pod: &TestPod) -> Self {
        let file = std::fs::File::open(pod.folder.path().join("pod")).unwrap();
        Self(Mapped::read_only(file.as_raw_fd()))
    }

    fn entry(&self, node: u32) -> (NodeState, Generation) {
        let entry = self.0.fabric().entry(NodeId::new(node).unwrap());
        (entry.state(), entry.generation())
    }

    fn events(&self, node: u32) -> Vec<Event> {
        let head = self.0.fabric().state().ring_head();
        let read = |seq| match self.0.fabric().read(seq) {
            RingRead::Event(event) => event,
            other => panic!("event {seq}: {other:?}"),
        };
        let all = (1..=head).map(read);
        all.filter(|event| event.node == node).collect()
    }

    /// The failures of a node to start for this error of the host.
    fn refusals(&self, node: u32, errno: i32) -> usize {
        let events = self.events(node).into_iter();
        let refusals = events.filter(|e| {
            (e.kind, e.cause) == (EventKind::FailureDetected, Cause::StartFailed)
                && e.evidence[2] == errno as u64
        });
        refusals.count()
    }

    /// Every life but the last has failed once, in the right order, and with every event.
    fn check(&self, node: u32) {
        use EventKind::*;
        let steps = [FailureDetected, Fenced, GenerationRaised, Rung];
        let events = self.events(node);
        let (_, generation) = self.entry(node);
        for old in 1..generation {
            let of_life = |e: &&Event| e.old_generation == old && steps.contains(&e.kind);
            let told: Vec<_> = events.iter().filter(of_life).map(|e| e.kind).collect();
            assert_eq!(told, steps, "life {old} of node {node}: {events:#?}");
        }
    }

    /// The other node has noticed nothing.
    fn check_untouched(&self, node: u32) {
        assert_eq!(self.entry(node), (NodeState::Joined, 1));
    }
}

#[test]
fn a_guest_whose_program_or_kernel_is_gone_stays_down_until_it_is_started_again() {
    let mut pod = TestPod::new(2, "");
    let text = std::fs::read_to_string(&pod.file).unwrap();
    let guest = "id = 2\nbackend = \"kvm\"\nkernel = \"k\"\ninitramfs = \"i\"\nmemory = \"64M\"\n";
    std::fs::write(&pod.file, text.replace("id = 2\n", guest)).unwrap();
    let folder = pod.folder.path().to_owned();
    let [vmm, hidden, kernel, initramfs] = ["vmm", "hidden", "k", "i"].map(|n| folder.join(n));
    for file in [&kernel, &initramfs] {
        std::fs::write(file, "").unwrap();
    }
    vmm_script(&vmm, "polite");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let books = Books::of(&pod);

    let hide = |file: &Path| std::fs::rename(file, &hidden).unwrap();
    let unhide = |file: &Path| std::fs::rename(&hidden, file).unwrap();
    let mode = |bits| std::fs::set_permissions(&vmm, PermissionsExt::from_mode(bits)).unwrap();
    type Act<'a> = Box<dyn Fn() + 'a>;
    let lacks: [(&str, i32, Act<'_>, Act<'_>); 5] = [
        (
            "there is no VMM at",
            libc::ENOENT,
            Box::new(|| hide(&vmm)),
            Box::new(|| unhide(&vmm)),
        ),
        (
            "Permission denied",
            libc::EACCES,
            Box::new(|| mode(0o644)),
            Box::new(|| mode(0o755)),
        ),
        (
            "no program for this machine",
            libc::ENOEXEC,
            Box::new(|| {
                hide(&vmm);
                std::fs::write(&vmm, "\x7fELF of something else").unwrap();
                mode(0o755);
            }),
            Box::new(|| unhide(&vmm)),
        ),
        (
            kernel.to_str().unwrap(),
            0,
            Box::new(|| hide(&kernel)),
            Box::new(|| unhide(&kernel)),
        ),
        (
            initramfs.to_str().unwrap(),
            0,
            Box::new(|| hide(&initramfs)),
            Box::new(|| unhide(&initramfs)),
        ),
    ];
    for (words, errno, take, give_back) in lacks {
        let (_, before) = books.entry(2);
        take();
        pod.client().kill("n2").unwrap();
        wait_until("the guest to be given up", || {
            books.entry(2) == (NodeState::Down, before + 2)
        });
        let node = pod.status().nodes.remove(1);
        assert_eq!(node.cause, Cause::StartFailed);
        let detail = node.detail.unwrap_or_default();
        assert!(detail.contains(words), "{words:?} is not in {detail:?}");
        let mut failed = books.events(2).into_iter();
        let failed = failed
            .rfind(|e| e.kind == EventKind::FailureDetected)
            .unwrap();
        let code = if errno == 0 { 2 } else { 0 };
        assert_eq!(failed.evidence[..3], [code, 0, errno as u64], "{words}");
        // It does not run, so it cannot be restarted; and starting it is no use yet.
        match pod
            .client()
            .steer("n2", NodeAction::Restart { grace_ms: 0 })
        {
            Err(ClientError::Refused(ControlError::WrongState { why, .. })) => {
                assert!(why.contains("start"), "{why}");
            }
            other => panic!("{other:?}"),
        }
        pod.client().steer("n2", NodeAction::Start {}).unwrap();
        wait_until("the guest to be given up again", || {
            books.entry(2) == (NodeState::Down, before + 3)
        });
        give_back();
        pod.client().steer("n2", NodeAction::Start {}).unwrap();
        wait_until("the guest to be back", || {
            books.entry(2) == (NodeState::Joined, before + 3)
        });
        books.check_untouched(1);
    }
    books.check(2);
    assert_eq!(pod.status().nodes[0].pid, first.nodes[0].pid);
}

/// Sets the soft limit of a process; returns the one before.
fn limit(pid: u32, resource: libc::__rlimit_resource_t, soft: u64) -> u64 {
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a null new limit changes nothing; `before` is alive.
    let read = unsafe { libc::prlimit(pid as i32, resource, std::ptr::null(), &mut before) };
    assert_eq!(read, 0);
    let new = libc::rlimit {
        rlim_cur: soft,
        ..before
    };
    // SAFETY: `new` is alive; a null old limit is not stored to.
    let set = unsafe { libc::prlimit(pid as i32, resource, &new, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    before.rlim_cur
}

/// Node 1 of a pod fails by `signal` while its manager lacks something, for `errno`.
fn fails_while_lacking(resource: libc::__rlimit_resource_t, soft: u64, signal: Signal, errno: i32) {
    let mut pod = TestPod::new(2, "");
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let books = Books::of(&pod);
    let manager = pod.manager.as_ref().unwrap().id();
    let before = limit(manager, resource, soft);
    let node = Pid::from_raw(first.nodes[0].pid.unwrap() as i32);
    kill(node, signal).unwrap();
    // Tried again, with pauses.
    wait_until("two attempts to start it", || books.refusals(1, errno) >= 2);
    books.check_untouched(2);
    limit(manager, resource, before);
    wait_until("the node to be back", || {
        books.entry(1).0 == NodeState::Joined
    });
    books.check(1);
    books.check_untouched(2);
    let last = pod.status();
    assert_eq!(last.nodes[1].pid, first.nodes[1].pid);
    // And all of the manager works again.
    let (_, generation) = books.entry(1);
    pod.client().kill("n1").unwrap();
    wait_until("the node to be started again", || {
        pod.has_joined("n1", generation + 1)
    });
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
}

#[test]
fn a_manager_without_descriptors_tries_until_it_has_some() {
    // Not one more than the standard ones.
    fails_while_lacking(libc::RLIMIT_NOFILE, 3, Signal::SIGKILL, libc::EMFILE);
}

/// Runs a test of this program by another program, which gives it what it needs.
fn run_inside(wrapper: &[&str], test: &str) {
    let output = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let refused = ["unshare:", "setpriv:"];
    let refused = refused.iter().any(|program| said.starts_with(program));
    if output.status.code() == Some(SKIPPED) || refused {
        eprintln!("skipped, this host does not allow it: {said}");
        return;
    }
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{out}\n{said}");
    assert!(out.contains("1 passed"), "{out}");
}

#[test]
fn a_manager_without_processes_tries_until_it_has_some() {
    // Root has no limit of processes, but whoever is root in a user namespace only has.
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let namespaces = ["unshare", "--user", "--map-root-user", "--mount"];
    run_inside(&[nobody, namespaces].concat(), "without_processes");
}

/// Not a test: a part of the one above.
#[test]
#[ignore = "is started by another test in a user namespace"]
fn without_processes() {
    // Hung, so that there is something to fence, for which there is no thread.
    fails_while_lacking(libc::RLIMIT_NPROC, 1, Signal::SIGSTOP, libc::EAGAIN);
}

#[test]
fn a_pod_whose_runtime_folder_is_full_loses_nothing() {
    run_inside(
        &["unshare", "--mount", "--propagation=private"],
        "without_room",
    );
}

/// Files below a folder whose names end so.
fn files(folder: &Path, end: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&path, end));
        } else if path.to_str().is_some_and(|name| name.ends_with(end)) {
            found.push(path.display().to_string());
        }
    }
    found
}

/// Not a test: a part of the one above.
#[test]
#[ignore = "is started by another test in a mount namespace"]
fn without_room() {
    let mut pod = TestPod::new(2, "");
    let run = pod.folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let tmpfs = nix::mount::mount(
        Some("none"),
        &run,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=1M"),
    );
    if let Err(e) = tmpfs {
        eprintln!("no mount: {e}");
        std::process::exit(SKIPPED);
    }
    // The log as well.
    std::os::unix::fs::symlink(run.join("log"), pod.folder.path().join("log")).unwrap();
    pod.start();
    let first = pod.wait_joined(&[1, 1]);
    let books = Books::of(&pod);
    let filler = run.join("filler");
    let fill = || {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&filler)
            .unwrap();
        while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
    };
    fill();

    // What cannot be put on record is refused, and nothing is begun.
    let text = std::fs::read_to_string(&pod.file).unwrap();
    std::fs::write(&pod.file, text + "[[node]]\nid = 3\n").unwrap();
    let grace_ms = 100;
    let steer = |action| pod.client().steer("n2", action);
    let wait_ms = 100;
    for (what, answer) in [
        ("restart", steer(NodeAction::Restart { grace_ms })),
        ("stop", steer(NodeAction::Stop { grace_ms })),
        ("drain", steer(NodeAction::Drain { wait_ms, grace_ms })),
        ("rm", steer(NodeAction::Remove { grace_ms })),
        ("add", pod.client().add("n3")),
        ("reload", pod.client().reload(false).map(drop)),
    ] {
        match answer {
            Err(ClientError::Refused(ControlError::NotRecorded { why })) => {
                assert!(why.contains("No space left"), "{what}: {why}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    books.check_untouched(2);

    // A node that fails is fenced, raised and told as ever; it cannot be started.
    let pid = |node: usize| Pid::from_raw(first.nodes[node].pid.unwrap() as i32);
    kill(pid(0), Signal::SIGKILL).unwrap();
    wait_until("an attempt to start it", || {
        fill();
        books.refusals(1, libc::ENOSPC) >= 1
    });
    // Another manager takes over without writing anything.
    let epoch = pod.status().epoch;
    pod.kill_manager();
    fill();
    pod.start();
    let status = pod.status();
    assert!(status.epoch > epoch);
    assert_eq!(status.nodes[1].pid, first.nodes[1].pid);
    books.check_untouched(2);

    std::fs::remove_file(&filler).unwrap();
    wait_until("the node to be back", || {
        books.entry(1).0 == NodeState::Joined
    });
    books.check(1);
    books.check_untouched(2);
    assert_eq!(files(&run, ".new"), Vec::<String>::new());
    pod.client().add("n3").unwrap();
    wait_until("the new node", || pod.has_joined("n3", 1));
    pod.signal_manager(libc::SIGTERM);
    assert_eq!(pod.wait_for_end().code(), Some(0), "{}", pod.log());
}
