//! vCPUs: one thread each, which runs the guest and hands what leaves it to the devices.
//!
//! ```text
//!            ┌────────────── KVM_RUN ◄─────────────┐
//!            ▼                                     │
//!   I/O, MMIO ──► ExitHandler ──► Continue ────────┤
//!            │               └──► PowerOff, Reset ─┼─► outcome
//!   EINTR, EAGAIN ──► asked to stop? ── no ────────┘
//!            │                      └── yes ──► thread ends
//!            │      or to pause? ─── yes ──► waits at the gate
//!   shutdown, internal error ──► outcome
//! ```

pub mod gate;
pub mod kick;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, process};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use lupin_fabric::vmm_protocol::ExitStatus;

use crate::devices::{Action, ExitHandler};
use crate::run::options::{KeyValues, OptionError};
use crate::run::outcome::{Outcome, OutcomeSlot};
use gate::{Gate, Pauser};
use kick::KickHandle;

/// Most vCPUs of a guest: 8-bit APIC ids, 255 is the broadcast.
pub const MAX_CPUS: u8 = 254;

/// `--cpus count=N`
///
/// Number of vCPUs, at least 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// How many.
    pub count: u8,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self { count: 1 }
    }
}

impl FromStr for CpuSpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let count: u32 = KeyValues::parse(text, &["count"])?.number("count")?;
        match u8::try_from(count) {
            Ok(count) if (1..=MAX_CPUS).contains(&count) => Ok(Self { count }),
            _ => Err(OptionError::value("count", count, "is not in 1 to 254")),
        }
    }
}

/// All vCPU threads of a machine.
pub struct Vcpus {
    threads: Vec<(Arc<KickHandle>, JoinHandle<()>)>,
    stop: Arc<AtomicBool>,
    start: Arc<Barrier>,
    gate: Arc<Gate>,
    tids: Vec<u32>,
}

impl Vcpus {
    /// Starts one thread for each vCPU, in index order. The threads wait for
    /// [`start`](Self::start) before they enter the guest.
    ///
    /// # Errors
    /// When a thread cannot be started or the kick signal cannot be installed.
    pub fn spawn(
        fds: Vec<VcpuFd>,
        handler: &Arc<dyn ExitHandler>,
        outcome: &Arc<OutcomeSlot>,
    ) -> io::Result<Self> {
        kick::install_signal_handler()?;
        let stop = Arc::new(AtomicBool::new(false));
        let start = Arc::new(Barrier::new(fds.len() + 1));
        let gate = Arc::new(Gate::default());
        let mut threads = Vec::new();
        let mut tids = Vec::new();
        for (index, fd) in fds.into_iter().enumerate() {
            let vcpu = Vcpu {
                index,
                fd,
                handler: Arc::clone(handler),
                outcome: Arc::clone(outcome),
                stop: Arc::clone(&stop),
                gate: Arc::clone(&gate),
            };
            let kick = Arc::new(KickHandle::default());
            let (theirs, start) = (Arc::clone(&kick), Arc::clone(&start));
            let (sender, receiver) = std::sync::mpsc::channel();
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    let _ = sender.send(kick::current_tid());
                    start.wait();
                    vcpu.main(&theirs);
                })?;
            tids.push(receiver.recv().map_err(io::Error::other)?);
            threads.push((kick, thread));
        }
        Ok(Self {
            threads,
            stop,
            start,
            gate,
            tids,
        })
    }

    /// Kernel thread ids, by vCPU index.
    pub fn tids(&self) -> &[u32] {
        &self.tids
    }

    /// What pauses and resumes them.
    pub fn pauser(&self) -> Pauser {
        Pauser {
            gate: Arc::clone(&self.gate),
            kicks: self
                .threads
                .iter()
                .map(|(kick, _)| Arc::clone(kick))
                .collect(),
        }
    }

    /// Lets the guest run.
    pub fn start(&self) {
        self.start.wait();
    }

    /// Makes all threads leave the guest and waits for them, at most `patience`. Returns whether
    /// all have ended.
    pub fn stop(self, patience: Duration) -> bool {
        // Release: pairs with the Acquire in the threads, see `kick`.
        self.stop.store(true, Ordering::Release);
        self.gate.wake();
        let deadline = Instant::now() + patience;
        loop {
            let mut running = 0;
            for (kick, thread) in &self.threads {
                if !thread.is_finished() {
                    running += 1;
                    kick.kick();
                }
            }
            if running == 0 {
                break;
            }
            if Instant::now() >= deadline {
                log::error!("{running} vCPU threads do not stop");
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        for (_, thread) in self.threads {
            // Panics were caught and reported by the thread itself.
            let _ = thread.join();
        }
        true
    }
}

struct Vcpu {
    index: usize,
    fd: VcpuFd,
    handler: Arc<dyn ExitHandler>,
    outcome: Arc<OutcomeSlot>,
    stop: Arc<AtomicBool>,
    gate: Arc<Gate>,
}

/// What one return from KVM_RUN means for the loop.
enum Step {
    Run,
    Stop,
    End(Outcome),
    /// KVM_EXIT_INTERNAL_ERROR; details are in the run structure.
    InternalError,
}

impl Vcpu {
    fn main(mut self, kick: &KickHandle) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            let _registered = kick.register(&mut self.fd);
            self.run()
        }));
        self.gate.leave();
        match result {
            Ok(None) => {}
            Ok(Some(outcome)) => self.outcome.report(outcome),
            Err(_) => self.outcome.report(Outcome::new(
                ExitStatus::Internal,
                format!("the thread of vCPU {} panicked", self.index),
            )),
        }
    }

    /// Runs the guest until it is told to stop (`None`) or something ends the guest.
    fn run(&mut self) -> Option<Outcome> {
        loop {
            match self.step() {
                Step::Run => {}
                Step::Stop => return None,
                Step::End(outcome) => return Some(outcome),
                Step::InternalError => return Some(self.internal_error()),
            }
        }
    }

    fn step(&mut self) -> Step {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) => return self.run_failed(e),
        };
        let end = |status, detail: String| Step::End(Outcome::new(status, detail));
        let crash = |detail: String| end(ExitStatus::Crash, detail);
        let action = match exit {
            VcpuExit::IoIn(port, data) => {
                data.fill(0xff);
                self.handler.pio_read(port, data);
                Action::Continue
            }
            VcpuExit::IoOut(port, data) => self.handler.pio_write(port, data),
            VcpuExit::MmioRead(address, data) => {
                data.fill(0xff);
                self.handler.mmio_read(address, data);
                Action::Continue
            }
            VcpuExit::MmioWrite(address, data) => self.handler.mmio_write(address, data),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr => Action::Continue,
            VcpuExit::Shutdown => return crash(format!("triple fault on vCPU {}", self.index)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Action::PowerOff,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Action::Reset("KVM system event"),
            VcpuExit::InternalError => return Step::InternalError,
            VcpuExit::FailEntry(reason, cpu) => {
                return crash(format!(
                    "vCPU {} cannot enter the guest on CPU {cpu}: hardware reason {reason:#x}",
                    self.index
                ));
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                return end(
                    ExitStatus::Internal,
                    format!("guest memory at {gpa:#x} ({size} bytes) has no backing"),
                );
            }
            // With the in-kernel irqchip, HLT does not exit.
            VcpuExit::Hlt => return crash(format!("vCPU {} halted for ever", self.index)),
            other => {
                return end(
                    ExitStatus::Internal,
                    format!("vCPU {}: unexpected exit {other:?}", self.index),
                );
            }
        };
        match action {
            Action::Continue => Step::Run,
            Action::PowerOff => end(ExitStatus::PowerOff, "the guest powered off".into()),
            Action::Reset(how) => end(ExitStatus::Reset, format!("the guest reset ({how})")),
        }
    }

    fn run_failed(&mut self, error: kvm_ioctls::Error) -> Step {
        match error.errno() {
            // EINTR: kicked, or any other signal. EAGAIN: waiting for its SIPI. Both normal.
            libc::EINTR | libc::EAGAIN => {
                kick::clear(&mut self.fd);
                if self.gate.pass(&self.stop) {
                    self.tell_guest_of_pause();
                }
                if self.stop.load(Ordering::Acquire) {
                    Step::Stop
                } else {
                    Step::Run
                }
            }
            libc::EFAULT => Step::End(Outcome::new(
                ExitStatus::Internal,
                format!(
                    "vCPU {}: guest memory lost its backing (was the pod memory file truncated?)",
                    self.index
                ),
            )),
            _ => Step::End(Outcome::new(
                ExitStatus::Internal,
                format!(
                    "vCPU {}: KVM_RUN in process {}: {error}",
                    self.index,
                    process::id()
                ),
            )),
        }
    }

    /// The guest's watchdogs shall not take the pause for a lockup. A guest without kvmclock
    /// cannot be told.
    fn tell_guest_of_pause(&self) {
        if let Err(e) = self.fd.kvmclock_ctrl() {
            log::debug!(
                "vCPU {}: the guest is not told of its pause: {e}",
                self.index
            );
        }
    }

    fn internal_error(&mut self) -> Outcome {
        let rip = self
            .fd
            .get_regs()
            .map_or_else(|_| "unknown".into(), |r| format!("{:#x}", r.rip));
        // SAFETY: KVM fills `internal` of the union before it exits with
        // KVM_EXIT_INTERNAL_ERROR, and all of its fields are integers.
        let (suberror, data) = unsafe {
            let internal = &self.fd.get_kvm_run().__bindgen_anon_1.internal;
            (internal.suberror, internal.data)
        };
        let what = if suberror == KVM_INTERNAL_ERROR_EMULATION {
            let bytes = instruction_bytes(&data);
            format!("an instruction that KVM cannot emulate{bytes}")
        } else {
            format!("KVM internal error {suberror}")
        };
        let detail = format!("vCPU {}: {what} at rip {rip}", self.index);
        Outcome::new(ExitStatus::Crash, detail)
    }
}

/// The bytes of the instruction that could not be emulated, where KVM reports them: flags in
/// the first word (bit 0: bytes follow), then one byte of length, then up to 15 of code.
fn instruction_bytes(data: &[u64; 16]) -> String {
    if data[0] & 1 == 0 {
        return String::new();
    }
    let raw: Vec<u8> = data[1..3].iter().flat_map(|w| w.to_le_bytes()).collect();
    let len = usize::from(raw[0]).min(15);
    let hex: Vec<String> = raw[1..=len].iter().map(|b| format!("{b:02x}")).collect();
    format!(" ({})", hex.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_counts() {
        assert_eq!("count=3".parse(), Ok(CpuSpec { count: 3 }));
        for text in ["count=0", "count=255", "count=x", "3"] {
            assert!(text.parse::<CpuSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn shows_the_instruction_that_failed() {
        let mut data = [0; 16];
        assert_eq!(instruction_bytes(&data), "");
        data[0] = 1;
        data[1] = u64::from_le_bytes([3, 0xf0, 0x0f, 0xc7, 0, 0, 0, 0]);
        assert_eq!(instruction_bytes(&data), " (f0 0f c7)");
    }
}
