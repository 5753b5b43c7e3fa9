//! Assembles a machine from its parts, and runs it.

use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_ioctls::VmFd;
use lupin_fabric::vmm_protocol::{CONTROL_SOCKET, ExitStatus};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::outcome::{Outcome, OutcomeSlot};
use super::{RunArgs, RunError, devices, platform};
use crate::acpi::{self, AcpiSpec};
use crate::arch::layout::ram_ranges;
use crate::arch::x86_64::regs;
use crate::control::ControlListener;
use crate::devices::bus::DroppedAccesses;
use crate::devices::output::Output;
use crate::devices::power::PowerControl;
use crate::devices::serial::{SerialDevice, SerialSpec};
use crate::devices::serial_input::{self, RawTerminal};
use crate::devices::{DeviceBus, ExitHandler};
use crate::fence::FenceThread;
use crate::irq::{GsiRoutes, KvmEvents};
use crate::kvm;
use crate::loader::cmdline::CommandLine;
use crate::loader::{self, BootSpec};
use crate::memory::{PodMemory, PodSlots, ram, slots};
use crate::probe;
use crate::vcpu::Vcpus;
use crate::virtio::DeviceThread;

/// How long vCPU threads get to leave the guest.
const VCPU_PATIENCE: Duration = Duration::from_secs(2);
/// How long queued console output gets to be written.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

/// A machine, ready to run.
pub struct Machine {
    vcpus: Vcpus,
    output: Output,
    serial: Arc<Mutex<SerialDevice>>,
    drained: EventFd,
    interactive: bool,
    outcome: Arc<OutcomeSlot>,
    // Never joined: at the end of the run the process ends, whatever a device is doing.
    _device_threads: Vec<ManuallyDrop<DeviceThread>>,
    // The VM refers to the memory of both, so it goes first.
    _vm: Arc<VmFd>,
    _pod_slots: Arc<PodSlots>,
    _ram: GuestMemoryMmap,
}

impl Machine {
    /// Checks the arguments and assembles the machine. Its vCPU threads exist and wait; whatever
    /// ends the run is reported to `outcome`.
    ///
    /// # Errors
    /// [`RunError`] names what is wrong.
    pub fn build(args: &RunArgs, outcome: &Arc<OutcomeSlot>) -> Result<Self, RunError> {
        if let Some(folder) = &args.runtime_dir {
            check_folder(folder)?;
        }
        args.memory.check(ram::host_total())?;
        let pod = args
            .pod_memory
            .as_ref()
            .map(|spec| PodMemory::attach(spec, args.memory.size))
            .transpose()?
            .map(Arc::new);
        // Errors in files are reported even where there is no KVM.
        let disks = devices::open_disks(&args.disks)?;
        let memory = args.memory.allocate()?;
        let entry = load_guest(args, &memory, pod.as_deref())?;

        let kvm = kvm::open()?;
        platform::check_cpus(&kvm, args.cpus.count)?;
        let vm = Arc::new(platform::create_vm(&kvm)?);
        let cpuids = platform::cpuid_tables(&kvm, &vm, args.cpus.count)?;
        let sections = pod.as_deref().map(PodMemory::ranges).unwrap_or_default();
        platform::check_address_bits(&cpuids[0], args.memory.size, &sections)?;

        let first_slot = slots::map_ram(&vm, &memory)?;
        let pod_slots = Arc::new(match pod {
            Some(pod) => PodSlots::map(Arc::clone(&vm), pod, first_slot)?,
            None => PodSlots::none(Arc::clone(&vm)),
        });

        let events = KvmEvents::new(Arc::clone(&vm));
        let routes = GsiRoutes::new(Arc::new(events.clone()))
            .map_err(|e| RunError::internal("interrupt routing", e))?;
        let output = args.serial.open_output().map_err(|source| RunError::File {
            option: format!("--serial {}", args.serial),
            source,
        })?;
        let (serial, drained) = devices::serial_port(&routes, &output)?;
        let dropped = Arc::new(DroppedAccesses::new(&sections));
        let pci = devices::pci_bus(outcome)?;
        let doorbell = devices::event_fd()?;
        let doorbells = Arc::new(AtomicU64::new(0));
        let mut workers = Vec::new();
        if let Some(folder) = &args.runtime_dir {
            let events = events.clone();
            workers.push(devices::fabric_device(
                folder, &doorbell, &doorbells, &pci, &memory, &routes, events,
            )?);
        }
        workers.push(devices::entropy_source(
            &pci,
            &memory,
            &routes,
            events.clone(),
        )?);
        let thread = devices::device_thread("devices", outcome)?;
        for worker in workers {
            thread
                .add(Box::new(worker))
                .map_err(|e| RunError::internal("device thread", e))?;
        }
        let mut device_threads = vec![ManuallyDrop::new(thread)];
        let mut disk_counters = Vec::new();
        for disk in disks {
            let events = events.clone();
            let (thread, counters) = devices::disk(disk, &pci, &memory, &routes, events, outcome)?;
            device_threads.push(ManuallyDrop::new(thread));
            disk_counters.push(counters);
        }
        let handler: Arc<dyn ExitHandler> = Arc::new(DeviceBus {
            serial: Arc::clone(&serial),
            power: PowerControl::default(),
            pci,
            dropped: Arc::clone(&dropped),
        });

        let fds = platform::create_vcpus(&vm, &cpuids, entry)?;
        let vcpus = Vcpus::spawn(fds, &handler, outcome)
            .map_err(|e| RunError::internal("vCPU threads", e))?;
        if let Some(folder) = &args.runtime_dir {
            let path = folder.join(CONTROL_SOCKET);
            let listener = ControlListener::bind(&path).map_err(|source| RunError::File {
                option: format!("--runtime-dir: {}", path.display()),
                source,
            })?;
            let spec = args.pod_memory.as_ref();
            FenceThread {
                listener,
                slots: Arc::clone(&pod_slots),
                node: spec.map_or(0, |pod| pod.node.get()),
                generation: spec.map_or(0, |pod| pod.generation),
                vcpu_tids: vcpus.tids().to_vec(),
                doorbell,
                doorbells,
                disks: disk_counters,
                dropped,
                pauser: vcpus.pauser(),
                outcome: Arc::clone(outcome),
            }
            .spawn()
            .map_err(|e| RunError::internal("fence thread", e))?;
        }

        Ok(Self {
            vcpus,
            output,
            serial,
            drained,
            interactive: args.serial == SerialSpec::Tty,
            outcome: Arc::clone(outcome),
            _device_threads: device_threads,
            _vm: vm,
            _pod_slots: pod_slots,
            _ram: memory,
        })
    }

    /// Runs the guest until something ends it.
    pub fn run(self) -> Outcome {
        let terminal = self.interactive.then(|| self.start_input()).flatten();
        self.vcpus.start();
        if std::env::var_os(KVM_CHECK).is_none_or(|value| value != "off") {
            check_kvm(Arc::clone(&self.outcome));
        }
        let outcome = self.outcome.wait();
        self.vcpus.stop(VCPU_PATIENCE);
        self.output.finish(OUTPUT_PATIENCE);
        drop(terminal);
        outcome
    }

    fn start_input(&self) -> Option<RawTerminal> {
        let terminal = RawTerminal::enter();
        let outcome = Arc::clone(&self.outcome);
        let stop = move || {
            outcome.report(Outcome::new(
                ExitStatus::Stopped,
                "stopped from the terminal",
            ));
        };
        let started = self
            .drained
            .try_clone()
            .and_then(|drained| serial_input::start(Arc::clone(&self.serial), drained, stop));
        if let Err(e) = started {
            log::warn!("the serial port has no input: {e}");
        }
        terminal
    }
}

/// Set to `off` for guests that are no kernels: they may run where a kernel cannot.
const KVM_CHECK: &str = "LUPIN_VMM_KVM_CHECK";

/// Ends the run if this KVM cannot run a kernel. There, the guest would crawl for minutes before
/// it fails; elsewhere, the probe's milliseconds run beside the guest's first ones. Slowness
/// alone is no reason: the host may just be busy.
fn check_kvm(outcome: Arc<OutcomeSlot>) {
    let probe = move || {
        let report = probe::probe();
        if !report.usable && report.certain {
            let detail = format!("/dev/kvm is not usable: {}", report.reason);
            outcome.report(Outcome::new(ExitStatus::NoKvm, detail));
        }
    };
    if let Err(e) = thread::Builder::new().name("check-kvm".into()).spawn(probe) {
        log::warn!("/dev/kvm was not probed: {e}");
    }
}

fn check_folder(folder: &Path) -> Result<(), RunError> {
    if folder.is_dir() {
        return Ok(());
    }
    let folder = folder.display();
    Err(RunError::Argument(format!(
        "--runtime-dir {folder}: no such folder"
    )))
}

fn load_guest(
    args: &RunArgs,
    memory: &GuestMemoryMmap,
    pod: Option<&PodMemory>,
) -> Result<u64, RunError> {
    let ram = ram_ranges(args.memory.size);
    let sections = pod.map(PodMemory::ranges).unwrap_or_default();
    let tables = acpi::build(&AcpiSpec {
        cpus: args.cpus.count,
        ram: &ram,
        sections: &sections,
    })
    .map_err(|e| RunError::internal("ACPI", e))?;
    let command_line = CommandLine::new(pod, &args.cmdline);
    log::debug!("kernel command line: {}", command_line.as_str());
    let entry = loader::load(
        memory,
        &BootSpec {
            kernel: &args.kernel,
            initramfs: &args.initramfs,
            command_line: &command_line,
            acpi: &tables,
            ram_size: args.memory.size,
            sections: &sections,
        },
    )?;
    regs::write_boot_tables(memory).map_err(|e| RunError::internal("boot page tables", e))?;
    Ok(entry)
}
