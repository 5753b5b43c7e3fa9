//! The devices of a machine: serial port, PCI bus, pvpanic, the fabric device, disks, and the
//! entropy source.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use lupin_abi::port::{AGENT_PORT, FABRIC_PORT};
use lupin_fabric::vmm_protocol::{AGENT_SOCKET, ExitStatus};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::RunError;
use super::outcome::{Outcome, OutcomeSlot};
use crate::arch::layout::{PCI_ECAM_START, PCI_MMIO_SIZE, PCI_MMIO_START, SERIAL_GSI};
use crate::devices::output::Output;
use crate::devices::serial::{InputDrained, InterruptLine, SerialDevice};
use crate::irq::{GsiRoutes, KvmEvents};
use crate::pci::{HostBridge, PciBus, PciBusSpec, PvPanic, PvPanicEvent, PvPanicSpec};
use crate::virtio::block::{Block, Disk, DiskCounters, DiskSpec, MAX_DISKS};
use crate::virtio::console::{Console, ConsoleError, ConsoleSpec, PortBackend, PortSpec};
use crate::virtio::rng::Rng;
use crate::virtio::{DeviceThread, VirtioPci, Worker};

/// An event descriptor whose reads and writes do not block.
pub(super) fn event_fd() -> Result<EventFd, RunError> {
    EventFd::new(EFD_NONBLOCK).map_err(|e| RunError::internal("event descriptor", e))
}

/// The first serial port, and the descriptor that is signalled when the guest has emptied its
/// receive FIFO.
pub(super) fn serial_port(
    routes: &GsiRoutes,
    output: &Output,
) -> Result<(Arc<Mutex<SerialDevice>>, EventFd), RunError> {
    let error = |e| RunError::internal("event descriptor", e);
    let interrupt = event_fd()?;
    routes
        .bind(&interrupt, SERIAL_GSI)
        .map_err(|e| RunError::internal("serial port", e))?;
    // Blocking: the input thread waits on it.
    let drained = EventFd::new(0).map_err(error)?;
    let ours = drained.try_clone().map_err(error)?;
    let serial = SerialDevice::with_events(
        InterruptLine(interrupt),
        InputDrained(drained),
        output.writer(),
    );
    Ok((Arc::new(Mutex::new(serial)), ours))
}

/// The PCI bus with the host bridge and pvpanic.
pub(super) fn pci_bus(outcome: &Arc<OutcomeSlot>) -> Result<Arc<PciBus>, RunError> {
    let bus = PciBus::new(PciBusSpec {
        ecam: PCI_ECAM_START,
        mmio32: PCI_MMIO_START..PCI_MMIO_START + PCI_MMIO_SIZE,
        mmio64: None,
    });
    let outcome = Arc::clone(outcome);
    // No crash kernel: to the other nodes, a node that writes a dump is as dead as any other.
    let spec = PvPanicSpec {
        crash_loaded: false,
    };
    let pvpanic = PvPanic::new(spec, move |event: PvPanicEvent| {
        let detail = format!("the guest kernel panicked ({event:?})");
        outcome.report(Outcome::new(ExitStatus::Panic, detail));
    });
    let error = |e| RunError::internal("PCI", e);
    bus.add(None, Arc::new(HostBridge)).map_err(error)?;
    bus.add(None, Arc::new(pvpanic)).map_err(error)?;
    Ok(Arc::new(bus))
}

/// The fabric device: a console with the port that `doorbell` rings and the port behind the
/// agent socket in `folder`. It runs on the device thread that gets the worker.
pub(super) fn fabric_device(
    folder: &Path,
    doorbell: &EventFd,
    doorbells: &Arc<AtomicU64>,
    bus: &PciBus,
    memory: &GuestMemoryMmap,
    routes: &Arc<GsiRoutes>,
    events: KvmEvents,
) -> Result<Worker, RunError> {
    let error = |e: &dyn std::fmt::Display| RunError::internal("fabric device", e);
    let console = Console::new(ConsoleSpec {
        ports: vec![
            PortSpec {
                name: FABRIC_PORT.into(),
                backend: PortBackend::Doorbell {
                    ring: doorbell.try_clone().map_err(|e| error(&e))?,
                    delivered: Arc::clone(doorbells),
                    // The guest has nothing to say there.
                    on_write: Box::new(|_| {}),
                },
            },
            PortSpec {
                name: AGENT_PORT.into(),
                backend: PortBackend::Socket {
                    path: folder.join(AGENT_SOCKET),
                },
            },
        ],
    })
    .map_err(|e| match e {
        ConsoleError::Listen { path, source } => RunError::File {
            option: format!("--runtime-dir: {}", path.display()),
            source,
        },
        e => error(&e),
    })?;
    let (function, worker) =
        VirtioPci::new(Box::new(console), memory.clone(), routes, Arc::new(events))
            .map_err(|e| error(&e))?;
    bus.add(None, function).map_err(|e| error(&e))?;
    Ok(worker)
}

/// The host's random bytes for the guest. It runs on the device thread that gets the worker.
pub(super) fn entropy_source(
    bus: &PciBus,
    memory: &GuestMemoryMmap,
    routes: &Arc<GsiRoutes>,
    events: KvmEvents,
) -> Result<Worker, RunError> {
    let error = |e: &dyn std::fmt::Display| RunError::internal("entropy source", e);
    let device = Box::new(Rng::new().map_err(|e| error(&e))?);
    let (function, worker) =
        VirtioPci::new(device, memory.clone(), routes, Arc::new(events)).map_err(|e| error(&e))?;
    bus.add(None, function).map_err(|e| error(&e))?;
    Ok(worker)
}

/// Opens and locks the disks of the command line.
pub(super) fn open_disks(specs: &[DiskSpec]) -> Result<Vec<(Disk, String)>, RunError> {
    if specs.len() > MAX_DISKS {
        let count = specs.len();
        let message = format!("--disk: {count} disks; a guest has at most {MAX_DISKS}");
        return Err(RunError::Argument(message));
    }
    let open = |(n, spec): (usize, &DiskSpec)| {
        let id = spec.id.clone().unwrap_or_else(|| format!("disk{n}"));
        Ok((spec.open()?, id))
    };
    specs.iter().enumerate().map(open).collect()
}

/// A disk on a thread of its own, because its I/O may block.
pub(super) fn disk(
    (disk, id): (Disk, String),
    bus: &PciBus,
    memory: &GuestMemoryMmap,
    routes: &Arc<GsiRoutes>,
    events: KvmEvents,
    outcome: &Arc<OutcomeSlot>,
) -> Result<(DeviceThread, Arc<DiskCounters>), RunError> {
    let error = |e: &dyn std::fmt::Display| RunError::internal("disk", e);
    let block = Block::new(disk, &id);
    let counters = block.counters();
    let (function, worker) =
        VirtioPci::new(Box::new(block), memory.clone(), routes, Arc::new(events))
            .map_err(|e| error(&e))?;
    bus.add(None, function).map_err(|e| error(&e))?;
    let thread = device_thread("disk", outcome)?;
    thread.add(Box::new(worker)).map_err(|e| error(&e))?;
    Ok((thread, counters))
}

/// A thread on which devices do their I/O. If it fails, the machine ends.
pub(super) fn device_thread(
    name: &str,
    outcome: &Arc<OutcomeSlot>,
) -> Result<DeviceThread, RunError> {
    let outcome = Arc::clone(outcome);
    DeviceThread::spawn(name, move |why| {
        outcome.report(Outcome::new(ExitStatus::Internal, why));
    })
    .map_err(|e| RunError::internal("device thread", e))
}
