//! KVM nodes as the manager sees them, with a VMM that is a test program.

mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lupin_abi::Cause;
use lupin_abi::event::FencePath;
use lupin_abi::layout::MIN_SYSTEM_SIZE;
use lupin_fabric::memory::{Geometry, PodMemory};
use lupin_fabric::podfile::Pod;
use lupin_fabric::power::vmm::VmmPower;
use lupin_fabric::power::{Instance, PowerControl, StartRequest};
use lupin_fabric::runtime::{NodeFolder, NodeRecord, RuntimeFolder};
use lupin_fabric::vmm_protocol::ExitStatus;
use support::vmm::{vmm_program as run_vmm, vmm_script};
use support::{Mapped, wait_until};

/// Not a test: the VMM of the tests.
#[test]
#[ignore = "is started by the other tests as a VMM"]
fn vmm_program() {
    run_vmm();
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
        for file in ["k", "i"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
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
            program: vmm_script(&self.folder.path().join(format!("vmm-{mode}")), mode),
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
    let times = instance.thread_times().unwrap();
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
