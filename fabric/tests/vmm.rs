//! KVM nodes as the manager sees them, with a VMM that is a test program: it speaks the protocol
//! of a VMM, and its "virtual CPU" is a thread that stores into pod memory.

mod support;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lupin_abi::event::FencePath;
use lupin_abi::layout::MIN_SYSTEM_SIZE;
use lupin_abi::node::AgentState;
use lupin_abi::{Cause, NodeId};
use lupin_fabric::memory::{Geometry, PodMemory};
use lupin_fabric::podfile::Pod;
use lupin_fabric::power::vmm::VmmPower;
use lupin_fabric::power::{Instance, PowerControl, StartRequest};
use lupin_fabric::runtime::{NodeFolder, NodeRecord, RuntimeFolder};
use lupin_fabric::vmm_protocol::{ExitRecord, ExitStatus, Reply, Request};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
    listen, recv, sendmsg, socket,
};
use support::{Mapped, wait_until};

const ARGS: &str = "LUPIN_TEST_VMM";
const MODE: &str = "LUPIN_TEST_VMM_MODE";

/// Not a test: the VMM of the tests.
#[test]
#[ignore = "is started by the other tests as a VMM"]
fn vmm_program() {
    let (Ok(args), Ok(mode)) = (std::env::var(ARGS), std::env::var(MODE)) else {
        return;
    };
    let words: Vec<_> = args.split(' ').collect();
    let after = |flag: &str| words[words.iter().position(|w| *w == flag).unwrap() + 1];
    assert_eq!(words[0], "run");
    let folder = PathBuf::from(after("--runtime-dir"));
    let key = |name: &str| {
        let mut pairs = after("--pod-memory").split(',').map(|p| p.split_once('='));
        pairs.find_map(|p| p.filter(|p| p.0 == name)).unwrap().1
    };
    let (node, generation) = (
        key("node").parse().unwrap(),
        key("generation").parse().unwrap(),
    );
    assert_eq!(key("heartbeat_ms"), "8");
    let exit = |status: ExitStatus| -> ! {
        let record = ExitRecord {
            pid: std::process::id(),
            generation,
            status,
            detail: "as the test wished".into(),
        };
        record.write(&folder).unwrap();
        std::process::exit(status.code());
    };
    if let Some(status) = ExitStatus::ALL
        .into_iter()
        .find(|s| mode == format!("{s:?}"))
    {
        exit(status);
    }

    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(key("file"))
        .unwrap();
    let memory: &'static Mapped = Box::leak(Box::new(Mapped::of_fd(file.as_raw_fd())));
    let (fenced, stopped) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (tid_sender, tid) = std::sync::mpsc::channel();
    let paused = Arc::new(AtomicBool::new(false));
    let (f, s, p) = (fenced.clone(), stopped.clone(), paused.clone());
    std::thread::spawn(move || {
        tid_sender
            .send(nix::unistd::gettid().as_raw() as u32)
            .unwrap();
        let section = memory.node(NodeId::new(node).unwrap());
        section.introduce(generation, 1, 1);
        section.set_state(AgentState::Joined);
        while !f.load(Ordering::Acquire) {
            if p.load(Ordering::Acquire) {
                std::thread::yield_now();
                continue;
            }
            memory.word(0).fetch_add(1, Ordering::Relaxed);
            section.beat();
        }
        s.store(true, Ordering::Release);
        loop {
            std::thread::park();
        }
    });
    let vcpu = tid.recv().unwrap();
    let bell = EventFd::new().unwrap();
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = UnixAddr::new(&folder.join("control.sock")).unwrap();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    // Counts rings where the test can see them.
    let bell_for_thread = bell.as_fd().try_clone_to_owned().unwrap();
    std::thread::spawn(move || {
        let mut count = [0u8; 8];
        while nix::unistd::read(&bell_for_thread, &mut count) == Ok(8) {
            memory
                .word(1)
                .fetch_add(u64::from_ne_bytes(count), Ordering::Relaxed);
        }
    });
    let lock = Arc::new(Mutex::new(()));
    loop {
        let fd = accept(listener.as_raw_fd()).unwrap();
        // SAFETY: accept has just made it.
        let client = unsafe { OwnedFd::from_raw_fd(fd) };
        let _one_at_a_time = lock.lock().unwrap();
        let mut packet = vec![0u8; 1 << 16];
        while let Ok(length @ 1..) = recv(client.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            let request: Request = serde_json::from_slice(&packet[..length]).unwrap();
            let reply = match request {
                Request::Hello => Reply::Hello {
                    pid: std::process::id(),
                    node,
                    generation,
                    vcpu_tids: vec![vcpu],
                },
                Request::Fence if mode == "deaf" => continue,
                Request::Fence => {
                    fenced.store(true, Ordering::Release);
                    while !stopped.load(Ordering::Acquire) {}
                    Reply::Fenced { slots: 3, nanos: 7 }
                }
                // The first time it takes too long.
                Request::Pause if !paused.swap(true, Ordering::Release) => Reply::Error {
                    message: "1 vCPUs have not left the guest yet".into(),
                },
                Request::Pause => Reply::Paused,
                Request::Resume => {
                    paused.store(false, Ordering::Release);
                    Reply::Resumed
                }
                Request::Quit => exit(ExitStatus::Stopped),
                Request::Status => Reply::Error {
                    message: "not here".into(),
                },
            };
            let bells = [bell.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&bells)];
            let with_bell = matches!(reply, Reply::Hello { .. });
            sendmsg::<()>(
                client.as_raw_fd(),
                &[std::io::IoSlice::new(&serde_json::to_vec(&reply).unwrap())],
                if with_bell { &rights } else { &[] },
                MsgFlags::empty(),
                None,
            )
            .unwrap();
        }
    }
}

/// A node of that VMM, without a manager.
struct Bench {
    folder: tempfile::TempDir,
    pod: Pod,
    memory: PodMemory,
    node_folder: NodeFolder,
    mapped: Mapped,
    _runtime: RuntimeFolder,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = "name = \"test\"\n[memory]\npath = \"pod\"\npool = \"2M\"\n\
                    node_capacity = 1\n[[node]]\nid = 1\nkernel = \"k\"\ninitramfs = \"i\"\n";
        let pod = Pod::parse(text, &folder.path().join("pod.toml")).unwrap();
        let geometry = Geometry {
            name: "test".into(),
            node_capacity: 1,
            system: MIN_SYSTEM_SIZE,
            pool: 2 << 20,
        };
        let memory = PodMemory::open(&pod.memory.path, &geometry).unwrap();
        let runtime = RuntimeFolder::open(&folder.path().join("run"), "test", 2).unwrap();
        let node_folder = runtime.node("n1").unwrap();
        let mapped = Mapped::of_fd(memory.inheritable().as_raw_fd());
        Self {
            folder,
            pod,
            memory,
            node_folder,
            mapped,
            _runtime: runtime,
        }
    }

    fn power(&self, mode: &str) -> VmmPower {
        VmmPower {
            program: vmm_script(self.folder.path(), mode),
            fence_bound: Duration::from_millis(200),
        }
    }

    fn request(&self, generation: u32) -> StartRequest<'_> {
        StartRequest {
            node: &self.pod.nodes[0],
            generation,
            folder: &self.node_folder,
            memory: &self.memory,
            heartbeat_period: Duration::from_millis(8),
        }
    }

    fn start(&self, mode: &str, generation: u32) -> Arc<dyn Instance> {
        self.node_folder.clean().unwrap();
        let prepared = self.power(mode).prepare(&self.request(generation)).unwrap();
        prepared.release().unwrap()
    }

    fn wait_for_stores(&self) {
        let before = self.mapped.word(0).load(Ordering::Relaxed);
        wait_until("the node to store", || {
            self.mapped.word(0).load(Ordering::Relaxed) > before + 1000
        });
    }

    /// The counter must not move any more.
    fn check_still(&self) {
        let word: &AtomicU64 = self.mapped.word(0);
        let before = word.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(
            word.load(Ordering::Relaxed),
            before,
            "a store after the fence"
        );
    }
}

fn vmm_script(folder: &Path, mode: &str) -> PathBuf {
    let path = folder.join(format!("vmm-{mode}"));
    let exe = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\n{ARGS}=\"$*\" {MODE}={mode} exec {} --exact vmm_program --ignored --nocapture\n",
        exe.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn wait_gone(instance: &Arc<dyn Instance>) {
    wait_until("the VMM to end", || instance.is_gone());
}

#[test]
fn the_polite_fence_leaves_a_process_that_quits() {
    let bench = Bench::new();
    let instance = bench.start("polite", 1);
    bench.wait_for_stores();
    wait_until("the bell", || instance.ring());
    let rung = bench.mapped.word(1);
    wait_until("the ring to arrive", || rung.load(Ordering::Relaxed) > 0);
    let times = instance.thread_times();
    assert_eq!(times.len(), 1);
    assert!(times[0].run_ns > 0);
    let fence = instance.fence().unwrap();
    assert_eq!((fence.path, fence.slots), (FencePath::Memslots, 3));
    bench.check_still();
    assert!(!instance.is_gone());
    instance.quit();
    wait_gone(&instance);
    assert_eq!(instance.exit().cause, Cause::Operator);
    assert_eq!(instance.fence().unwrap().path, FencePath::Exited);
}

#[test]
fn a_guest_is_paused_and_resumed_through_its_vmm() {
    let bench = Bench::new();
    let instance = bench.start("polite", 1);
    bench.wait_for_stores();
    wait_until("the bell", || instance.ring());
    instance.pause().unwrap();
    instance.pause().unwrap();
    // The last store of this simple VMM may be under way.
    std::thread::sleep(Duration::from_millis(10));
    bench.check_still();
    instance.resume().unwrap();
    bench.wait_for_stores();
    instance.pause().unwrap();
    assert_eq!(instance.fence().unwrap().path, FencePath::Memslots);
    instance.kill();
    wait_gone(&instance);
    assert!(instance.pause().is_err());
}

#[test]
fn a_vmm_that_does_not_answer_is_killed_in_bounded_time() {
    let bench = Bench::new();
    for (generation, stop) in [(1, false), (2, true)] {
        let instance = bench.start("deaf", generation);
        bench.wait_for_stores();
        // It listens: what follows is not the quick end of a VMM that cannot be reached.
        wait_until("the bell", || instance.ring());
        if stop {
            let pid = nix::unistd::Pid::from_raw(instance.process().pid as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        }
        let begin = Instant::now();
        let fence = instance.fence().unwrap();
        assert_eq!(fence.path, FencePath::Killed);
        assert!(fence.nanos >= 200_000_000);
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert!(instance.is_gone());
        bench.check_still();
        assert_eq!(instance.exit().evidence, [0, 9]);
    }
}

#[test]
fn what_ended_a_vmm_is_told_by_its_exit_also_to_a_manager_that_did_not_start_it() {
    let bench = Bench::new();
    for (generation, status) in (1..).zip(ExitStatus::ALL) {
        let instance = bench.start(&format!("{status:?}"), generation);
        wait_gone(&instance);
        let exit = instance.exit();
        let (cause, permanent) = match status {
            ExitStatus::PowerOff => (Cause::GuestPowerOff, false),
            ExitStatus::Internal => (Cause::VmmExit, false),
            ExitStatus::BadArguments | ExitStatus::NoKvm => (Cause::StartFailed, true),
            ExitStatus::Reset => (Cause::GuestReboot, false),
            ExitStatus::Panic => (Cause::Panic, false),
            ExitStatus::Crash => (Cause::TripleFault, false),
            ExitStatus::Stopped => (Cause::Operator, false),
        };
        assert_eq!(
            (exit.cause, exit.permanent),
            (cause, permanent),
            "{status:?}"
        );
        assert_eq!(exit.evidence[0], status.code() as u64);
        assert_eq!(exit.detail, "as the test wished");
        let record = NodeRecord {
            process: instance.process(),
            host_boot_id: String::new(),
            generation,
            backend: "kvm".into(),
            started_ns: 0,
        };
        let power = bench.power("polite");
        assert_eq!(power.last_words(&bench.node_folder, &record).cause, cause);
        let request = bench.request(generation);
        assert!(power.adopt(&request, &record).unwrap().is_none());
    }
}

#[test]
fn a_running_vmm_is_found_again_with_its_bell() {
    let bench = Bench::new();
    let first = bench.start("polite", 5);
    bench.wait_for_stores();
    let record = NodeRecord {
        process: first.process(),
        host_boot_id: String::new(),
        generation: 5,
        backend: "kvm".into(),
        started_ns: 0,
    };
    let power = bench.power("polite");
    let again = power.adopt(&bench.request(5), &record).unwrap().unwrap();
    wait_until("the bell", || again.ring());
    let fence = again.fence().unwrap();
    assert_eq!(fence.path, FencePath::Memslots);
    bench.check_still();
    again.kill();
    wait_gone(&again);
    assert!(first.is_gone());
}

#[test]
fn a_vmm_that_is_not_there_is_an_error_with_advice() {
    let bench = Bench::new();
    let power = VmmPower {
        program: "/nonexistent/lupin-vmm".into(),
        fence_bound: Duration::from_millis(200),
    };
    let error = power.prepare(&bench.request(1)).err().unwrap();
    assert!(error.permanent);
    assert!(error.message.contains("--vmm"), "{error}");
}
