//! Assembles a machine from its parts, and runs it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use lupin_fabric::vmm_protocol::{CONTROL_SOCKET, ExitStatus};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::outcome::{Outcome, OutcomeSlot};
use super::{RunArgs, RunError};
use crate::acpi::{self, AcpiSpec};
use crate::arch::layout::{
    KVM_IDENTITY_MAP_START, KVM_TSS_START, PCI_ECAM_START, PCI_MMIO_SIZE, PCI_MMIO_START,
    SERIAL_GSI, ram_ranges,
};
use crate::arch::x86_64::{cpuid, msrs, regs};
use crate::control::ControlListener;
use crate::devices::bus::DroppedAccesses;
use crate::devices::output::Output;
use crate::devices::power::PowerControl;
use crate::devices::serial::{InputDrained, InterruptLine, SerialDevice, SerialSpec};
use crate::devices::serial_input::{self, RawTerminal};
use crate::devices::{DeviceBus, ExitHandler};
use crate::fence::FenceThread;
use crate::irq::{GsiRoutes, KvmEvents};
use crate::kvm::{self, KvmError};
use crate::loader::cmdline::CommandLine;
use crate::loader::{self, BootSpec};
use crate::memory::{MemoryError, PodMemory, PodSlots, ram, slots};
use crate::pci::{HostBridge, PciBus, PciBusSpec, PvPanic, PvPanicEvent, PvPanicSpec};
use crate::vcpu::{MAX_CPUS, Vcpus};

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
    // Dropped last, in this order: the VM refers to the memory.
    _vm: Arc<VmFd>,
    _ram: GuestMemoryMmap,
}

impl Machine {
    /// Checks the arguments and assembles the machine. Its vCPU threads exist and wait.
    ///
    /// # Errors
    /// [`RunError`] names what is wrong.
    pub fn build(args: &RunArgs, outcome: &Arc<OutcomeSlot>) -> Result<Self, RunError> {
        if let Some(folder) = &args.runtime_dir
            && !folder.is_dir()
        {
            return Err(RunError::Argument(format!(
                "--runtime-dir {}: no such folder",
                folder.display()
            )));
        }
        args.memory.check(ram::host_total())?;
        let pod = args
            .pod_memory
            .as_ref()
            .map(|spec| PodMemory::attach(spec, args.memory.size))
            .transpose()?
            .map(Arc::new);

        // Errors in files are reported even where there is no KVM.
        let memory = args.memory.allocate()?;
        let entry = load_guest(args, &memory, pod.as_deref())?;

        let kvm = kvm::open()?;
        check_cpus(&kvm, args.cpus.count)?;
        let vm = Arc::new(create_vm(&kvm)?);
        let cpuids = cpuid_tables(&kvm, &vm, args.cpus.count)?;
        let sections = pod.as_ref().map(|pod| pod.ranges()).unwrap_or_default();
        check_address_bits(&cpuids[0], args.memory.size, &sections)?;

        let first_slot = slots::map_ram(&vm, &memory)?;
        let pod_slots = match &pod {
            Some(pod) => PodSlots::map(Arc::clone(&vm), Arc::clone(pod), first_slot)?,
            None => PodSlots::none(Arc::clone(&vm)),
        };

        let irq = |e: crate::irq::IrqError| RunError::internal("interrupt routing", e);
        let events = KvmEvents::new(Arc::clone(&vm));
        let routes = GsiRoutes::new(Arc::new(events)).map_err(irq)?;

        let output = args.serial.open_output().map_err(|source| RunError::File {
            option: format!("--serial {:?}", args.serial),
            source,
        })?;
        let (serial, drained) = serial_port(&routes, &output)?;
        let dropped = Arc::new(DroppedAccesses::new(&sections));
        let pci = pci_bus(outcome)?;
        let handler: Arc<dyn ExitHandler> = Arc::new(DeviceBus {
            serial: Arc::clone(&serial),
            power: PowerControl::default(),
            pci,
            dropped: Arc::clone(&dropped),
        });

        let fds = create_vcpus(&vm, &cpuids, entry)?;
        let vcpus = Vcpus::spawn(fds, &handler, outcome)
            .map_err(|e| RunError::internal("vCPU threads", e))?;

        let doorbell = event_fd()?;
        if let Some(folder) = &args.runtime_dir {
            let path = folder.join(CONTROL_SOCKET);
            let listener = ControlListener::bind(&path).map_err(|source| RunError::File {
                option: format!("--runtime-dir: {}", path.display()),
                source,
            })?;
            let spec = args.pod_memory.as_ref();
            FenceThread {
                listener,
                slots: Arc::new(pod_slots),
                node: spec.map_or(0, |pod| pod.node.get()),
                generation: spec.map_or(0, |pod| pod.generation),
                vcpu_tids: vcpus.tids().to_vec(),
                doorbell,
                doorbells: Arc::new(AtomicU64::new(0)),
                dropped,
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
            _vm: vm,
            _ram: memory,
        })
    }

    /// Runs the guest until something ends it.
    pub fn run(self) -> Outcome {
        let terminal = if self.interactive {
            self.start_input()
        } else {
            None
        };
        self.vcpus.start();
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

fn check_cpus(kvm: &Kvm, count: u8) -> Result<(), RunError> {
    let max = kvm.get_max_vcpus().min(usize::from(MAX_CPUS));
    if usize::from(count) > max {
        return Err(RunError::Argument(format!(
            "--cpus count={count}: this host's KVM allows at most {max}"
        )));
    }
    Ok(())
}

fn check_address_bits(
    cpuid: &kvm_bindings::CpuId,
    ram_size: u64,
    sections: &[crate::arch::layout::Range],
) -> Result<(), MemoryError> {
    let bits = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == 0x8000_0008)
        .map_or(36, |e| e.eax & 0xff);
    let ram = ram_ranges(ram_size);
    let end = sections
        .iter()
        .chain(&ram)
        .map(|range| range.end())
        .max()
        .unwrap_or(0);
    if bits < 64 && end > 1 << bits {
        return Err(MemoryError::AddressBits { end, bits });
    }
    Ok(())
}

/// A VM with KVM's own pages, interrupt controllers and timer.
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm::create_vm(kvm)?;
    let error = |what| move |source| KvmError::Create { what, source };
    vm.set_identity_map_address(KVM_IDENTITY_MAP_START)
        .map_err(error("place the identity map"))?;
    vm.set_tss_address(KVM_TSS_START as usize)
        .map_err(error("place the TSS"))?;
    vm.create_irq_chip()
        .map_err(error("create the interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(error("create the timer"))?;
    Ok(vm)
}

fn cpuid_tables(kvm: &Kvm, vm: &VmFd, cpus: u8) -> Result<Vec<kvm_bindings::CpuId>, RunError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| KvmError::Create {
            what: "read its CPUID table",
            source,
        })?;
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    (0..cpus)
        .map(|index| {
            cpuid::for_vcpu(&supported, index, cpus, tsc_deadline)
                .map_err(|e| RunError::internal("CPUID", format!("{e:?}")))
        })
        .collect()
}

fn create_vcpus(
    vm: &VmFd,
    cpuids: &[kvm_bindings::CpuId],
    entry: u64,
) -> Result<Vec<VcpuFd>, RunError> {
    let mut fds = Vec::new();
    for (index, cpuid) in (0u8..).zip(cpuids) {
        let error = |what| crate::arch::x86_64::setup_error(index, what);
        let fd = vm.create_vcpu(index.into()).map_err(error("create"))?;
        fd.set_cpuid2(cpuid).map_err(error("set CPUID"))?;
        msrs::setup(&fd, index)?;
        regs::setup_fpu(&fd, index)?;
        regs::setup_lapic(&fd, index)?;
        if index == 0 {
            regs::setup_long_mode(&fd, index, entry)?;
        }
        fds.push(fd);
    }
    Ok(fds)
}

fn serial_port(
    routes: &GsiRoutes,
    output: &Output,
) -> Result<(Arc<Mutex<SerialDevice>>, EventFd), RunError> {
    let interrupt = event_fd()?;
    routes
        .bind(&interrupt, SERIAL_GSI)
        .map_err(|e| RunError::internal("serial port", e))?;
    // Blocking: the input thread waits on it.
    let drained = EventFd::new(0).map_err(|e| RunError::internal("event descriptor", e))?;
    let ours = drained
        .try_clone()
        .map_err(|e| RunError::internal("event descriptor", e))?;
    let serial = SerialDevice::with_events(
        InterruptLine(interrupt),
        InputDrained(drained),
        output.writer(),
    );
    Ok((Arc::new(Mutex::new(serial)), ours))
}

fn pci_bus(outcome: &Arc<OutcomeSlot>) -> Result<Arc<PciBus>, RunError> {
    let bus = PciBus::new(PciBusSpec {
        ecam: PCI_ECAM_START,
        mmio32: PCI_MMIO_START..PCI_MMIO_START + PCI_MMIO_SIZE,
        mmio64: None,
    });
    let add = |function| {
        bus.add(None, function)
            .map_err(|e| RunError::internal("PCI", e))
    };
    add(Arc::new(HostBridge))?;
    let outcome = Arc::clone(outcome);
    // No crash kernel: to the other nodes, a node that writes a dump is as dead as any other.
    let spec = PvPanicSpec {
        crash_loaded: false,
    };
    add(Arc::new(PvPanic::new(spec, move |event: PvPanicEvent| {
        let detail = format!("the guest kernel panicked ({event:?})");
        outcome.report(Outcome::new(ExitStatus::Panic, detail));
    })))?;
    Ok(Arc::new(bus))
}

fn event_fd() -> Result<EventFd, RunError> {
    EventFd::new(EFD_NONBLOCK).map_err(|e| RunError::internal("event descriptor", e))
}
