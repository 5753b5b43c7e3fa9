//! Can this `/dev/kvm` run a stock kernel?
//!
//! Some machines offer a `/dev/kvm` that opens, creates VMs and vCPUs, and then interprets every
//! instruction in software: ordinary code crawls, and what the interpreter does not know ends
//! the guest. So the probe runs a few instructions that every kernel executes early, and times
//! a loop.

mod payload;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::{kvm_userspace_memory_region, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use crate::arch::layout::MIB;
use crate::arch::x86_64::{cpuid, regs};
use crate::kvm;
use crate::vcpu::kick::KickHandle;
use payload::{Features, LOOP_ITERATIONS, Payload};

/// Longest time that the guest part may take.
const TIME_LIMIT: Duration = Duration::from_millis(1500);
/// A loop iteration (three instructions) that takes longer than this is interpreted. Real
/// virtualization, also when nested in an emulator, takes 1 to 100 ns; an interpreter 1500.
/// Processor time, so that a busy machine is not taken for a slow one.
const SLOW_ITERATION: Duration = Duration::from_nanos(700);

/// Memory of the probe's guest.
const MEMORY: u64 = 2 * MIB;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
/// x87 and SSE state.
const XCR0: u64 = 0b11;

/// Say whether /dev/kvm can run stock kernels, and if not, why.
///
/// Exit status 0: usable, 7: not.
#[derive(Clone, Debug, clap::Args)]
pub struct ProbeArgs {
    /// Print one JSON object: usable, reason, micros
    #[arg(long)]
    pub json: bool,
}

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// Whether stock kernels will run.
    pub usable: bool,
    /// Whether the answer does not depend on how busy the machine is: guest code did run, or
    /// an instruction failed.
    pub certain: bool,
    /// Why, in words for people.
    pub reason: String,
    /// How long the probe took.
    pub duration: Duration,
}

impl ProbeReport {
    /// The report as a JSON object.
    pub fn to_json(&self) -> String {
        serde_json::json!({
            "usable": self.usable,
            "reason": self.reason,
            "micros": self.duration.as_micros() as u64,
        })
        .to_string()
    }
}

/// Probes `/dev/kvm`. Takes milliseconds where it is usable and less than two seconds where it
/// is not.
pub fn probe() -> ProbeReport {
    let started = Instant::now();
    let (usable, certain, reason) = match examine() {
        Ok(per_iteration) => {
            let nanos = per_iteration.as_nanos();
            let reason = format!("runs guest code natively ({nanos} ns a loop iteration)");
            (true, true, reason)
        }
        Err(Failure::Fails(reason)) => (false, true, reason),
        Err(Failure::Slow(reason)) => (false, false, reason),
    };
    ProbeReport {
        usable,
        certain,
        reason,
        duration: started.elapsed(),
    }
}

/// Why the payload did not work.
enum Failure {
    /// An operation or an instruction failed.
    Fails(String),
    /// It took too long.
    Slow(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Fails(reason)
    }
}

/// Runs the payload and returns the time of one loop iteration.
fn examine() -> Result<Duration, Failure> {
    let guest = Guest::new()?;
    let per_iteration = guest.run()?;
    if per_iteration > SLOW_ITERATION {
        return Err(Failure::Slow(format!(
            "it interprets guest code in software ({} ns a loop iteration): far too slow for a \
             kernel",
            per_iteration.as_nanos()
        )));
    }
    Ok(per_iteration)
}

/// The probe's guest: one vCPU in long mode at the start of the payload.
struct Guest {
    // Field order: the vCPU and the VM refer to the memory.
    vcpu: VcpuFd,
    _vm: kvm_ioctls::VmFd,
    _memory: GuestMemoryMmap,
    payload: Payload,
}

impl Guest {
    fn new() -> Result<Self, String> {
        let failed = |what: &str, e: &dyn std::fmt::Display| format!("it cannot {what}: {e}");
        let kvm = kvm::open().map_err(|e| e.to_string())?;
        let vm = kvm::create_vm(&kvm).map_err(|e| e.to_string())?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)])
            .map_err(|e| failed("get memory", &e))?;
        let host = memory
            .find_region(GuestAddress(0))
            .and_then(|region| region.get_host_address(MemoryRegionAddress(0)).ok())
            .ok_or("guest memory has no address")?;
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY,
            userspace_addr: host as u64,
            ..Default::default()
        };
        // SAFETY: the host range is the whole of `memory`, which outlives the VM (field order).
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| failed("map memory", &e))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| failed("tell its CPUID", &e))?;
        let cpuid = cpuid::for_vcpu(&supported, 0, 1, false).map_err(|e| format!("{e:?}"))?;
        let features = Features::of(&cpuid);
        let payload = Payload::new(&features);
        memory
            .write_slice(&payload.code, GuestAddress(payload::CODE_START))
            .map_err(|e| failed("write memory", &e))?;
        regs::write_boot_tables(&memory).map_err(|e| failed("write memory", &e))?;

        let vcpu = vm.create_vcpu(0).map_err(|e| failed("create a vCPU", &e))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|e| failed("set CPUID", &e))?;
        regs::setup_fpu(&vcpu, 0).map_err(|e| e.to_string())?;
        regs::setup_long_mode(&vcpu, 0, payload::CODE_START).map_err(|e| e.to_string())?;
        let mut sregs = vcpu.get_sregs().map_err(|e| failed("get registers", &e))?;
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
        if features.xsave {
            sregs.cr4 |= CR4_OSXSAVE;
        }
        vcpu.set_sregs(&sregs)
            .map_err(|e| failed("set registers", &e))?;
        if features.xsave {
            let mut xcrs = kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            };
            xcrs.xcrs[0] = kvm_xcr {
                value: XCR0,
                ..Default::default()
            };
            vcpu.set_xcrs(&xcrs).map_err(|e| failed("set XCR0", &e))?;
        }
        let mut general = vcpu.get_regs().map_err(|e| failed("get registers", &e))?;
        general.rbx = payload::BUFFER_START;
        vcpu.set_regs(&general)
            .map_err(|e| failed("set registers", &e))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
            payload,
        })
    }

    /// Runs to the end of the payload, on a thread that can be interrupted.
    fn run(mut self) -> Result<Duration, Failure> {
        crate::vcpu::kick::install_signal_handler().map_err(|e| e.to_string())?;
        let kick = Arc::new(KickHandle::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        let (theirs, stopped) = (Arc::clone(&kick), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                let result = {
                    let _registered = theirs.register(&mut self.vcpu);
                    self.execute(&stopped)
                };
                // The receiver waits for it.
                let _ = sender.send(result);
            })
            .map_err(|e| e.to_string())?;
        let mut patience = TIME_LIMIT;
        let result = loop {
            match receiver.recv_timeout(patience) {
                Ok(result) => break result,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    break Err(Failure::Fails("the probe's thread failed".into()));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    // Release: pairs with the Acquire in `execute`, see `kick`.
                    stop.store(true, Ordering::Release);
                    kick.kick();
                    patience = Duration::from_millis(1);
                }
            }
        };
        let _ = thread.join();
        result
    }

    fn execute(&mut self, stop: &AtomicBool) -> Result<Duration, Failure> {
        let mut done = 0;
        let mut loop_started = Duration::ZERO;
        loop {
            let doing = self.payload.steps.get(done).copied().unwrap_or("the end");
            let message = |how: &str| format!("it cannot run `{doing}`: {how}");
            let failed = |how: &str| Err(Failure::Fails(message(how)));
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(payload::REPORT_PORT, _)) => {
                    done += 1;
                    if done + 1 == self.payload.steps.len() {
                        loop_started = thread_time();
                    }
                }
                Ok(VcpuExit::Hlt) if done == self.payload.steps.len() => {
                    // The last report came just before; the difference is two instructions.
                    return Ok((thread_time() - loop_started) / LOOP_ITERATIONS);
                }
                Ok(VcpuExit::InternalError) => {
                    return failed(
                        "KVM_EXIT_INTERNAL_ERROR (it interprets guest code in software)",
                    );
                }
                Ok(VcpuExit::Shutdown) => return failed("triple fault"),
                Ok(exit) => return failed(&format!("{exit:?}")),
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    crate::vcpu::kick::clear(&mut self.vcpu);
                    if stop.load(Ordering::Acquire) {
                        let how = format!("not done after {TIME_LIMIT:?}");
                        return Err(Failure::Slow(message(&how)));
                    }
                }
                Err(e) => return failed(&e.to_string()),
            }
        }
    }
}

/// Processor time of the calling thread, its guest included.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live, writable `timespec`. The clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_in_time_and_says_why() {
        let report = probe();
        println!("{}", report.to_json());
        assert!(report.duration < Duration::from_secs(2), "{report:?}");
        assert!(!report.reason.is_empty());
        if !std::path::Path::new("/dev/kvm").exists() {
            assert!(!report.usable);
            assert!(report.reason.contains("/dev/kvm"), "{report:?}");
        }
    }
}
