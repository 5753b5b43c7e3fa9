//! The virtio-pci transport: registers in BAR0, one doorbell and one MSI-X vector per queue.
//!
//! ```text
//!   BAR0  0x0000  common configuration
//!         0x1000  ISR status
//!         0x2000  device configuration
//!         0x3000  notification: queue n at 4n (ioeventfd)
//!         0x4000  MSI-X table
//!         0x8000  MSI-X pending bits
//! ```
//!
//! Modern only: no transitional interface, no INTx. Status bits go up as the driver sets them:
//!
//! ```text
//!   0 ─> ACKNOWLEDGE ─> DRIVER ─> FEATURES_OK ─> DRIVER_OK ──(broken ring)──> + NEEDS_RESET
//!   ^                             (only if the                │                     │
//!   └──── device thread done <─── features are ours) <── driver writes 0 <──────────┘
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::shared::Shared;
use super::worker::{Command, Mailbox};
use super::{DeviceConfig, QueueError, VirtQueue, VirtioDevice, Worker};
use crate::irq::{DoorbellSink, GsiRoutes, IrqError};
use crate::pci::msix::MsixSpec;
use crate::pci::{BarKind, BarSpec, Capability, Identity, Msix, PciFunction};

const BAR: usize = 0;
const BAR_SIZE: u64 = 0x1_0000;
const COMMON: u64 = 0x0000;
const COMMON_SIZE: u32 = 56;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_MAX: u32 = 0x1000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_STRIDE: u32 = 4;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0x8000;

/// Most queues that notification area and MSI-X table have room for.
const MAX_QUEUES: usize = 512;

const VENDOR: u16 = 0x1af4;
/// PCI device ID of virtio device ID 0.
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
const CAPABILITY_VENDOR: u8 = 0x09;

/// Structures named by the vendor capabilities (virtio 1.2, 4.1.4).
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

/// Status bits that a driver may set.
const DRIVER_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// A virtio device as a PCI function: what vCPU threads touch of it.
pub struct VirtioPci {
    name: &'static str,
    identity: Identity,
    offered: u64,
    config: Arc<dyn DeviceConfig>,
    mem: GuestMemoryMmap,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    doorbells: Arc<Vec<EventFd>>,
    sink: Arc<dyn DoorbellSink>,
    /// Where BAR0 was decoded when the doorbells were bound.
    bound: Mutex<Option<u64>>,
    registers: Mutex<Registers>,
}

/// What the driver has written.
struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// The driver asked for a reset and the device thread has not answered yet.
    resetting: bool,
}

#[derive(Clone, Default)]
struct QueueRegisters {
    max: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl VirtioPci {
    /// Makes a PCI function of `device`, and the worker that runs it: put the one on the bus and
    /// the other on a device thread. `mem` is the memory in which rings and buffers may lie; pod
    /// memory must not be part of it.
    ///
    /// # Errors
    /// When event descriptors run out.
    ///
    /// # Panics
    /// If the device has more than 512 queues: an error of the program.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemoryMmap,
        routes: &Arc<GsiRoutes>,
        sink: Arc<dyn DoorbellSink>,
    ) -> Result<(Arc<Self>, Worker), IrqError> {
        let sizes = device.queue_sizes();
        assert!(
            sizes.len() <= MAX_QUEUES,
            "{} has too many queues",
            device.name()
        );
        let doorbells: Result<Vec<_>, _> =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let doorbells = Arc::new(doorbells.map_err(IrqError::EventFd)?);
        let mailbox = Arc::new(Mailbox::new().map_err(IrqError::EventFd)?);
        // One vector per queue and one for configuration changes.
        let vectors = sizes.len() as u16 + 1;
        let spec = MsixSpec {
            vectors,
            bar: BAR,
            table: MSIX_TABLE,
            pba: MSIX_PBA,
        };
        let shared = Shared::new(Msix::new(spec, Arc::clone(routes)), sizes.len());
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_id(),
            revision: 1,
            class: device.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let function = Arc::new(Self {
            name: device.name(),
            identity,
            offered: device.features() | 1 << VIRTIO_F_VERSION_1,
            config: device.config(),
            mem,
            shared: Arc::clone(&shared),
            mailbox: Arc::clone(&mailbox),
            doorbells: Arc::clone(&doorbells),
            sink,
            bound: Mutex::new(None),
            registers: Mutex::new(Registers::new(&sizes)),
        });
        Ok((
            function,
            Worker {
                device,
                shared,
                mailbox,
                doorbells,
                running: false,
            },
        ))
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // No code under this lock panics half way through a change.
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The common configuration as bytes: simpler than a decision for every field and width.
    fn common(&self) -> [u8; COMMON_SIZE as usize] {
        let mut registers = self.registers();
        if self.shared.status() == 0 {
            registers.resetting = false;
        }
        let select = registers.queue_select;
        let queue = registers
            .queues
            .get(usize::from(select))
            .cloned()
            .unwrap_or_default();
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut bytes = [0; COMMON_SIZE as usize];
        let mut at = 0;
        let mut put = |value: &[u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
            at += value.len();
        };
        put(&registers.device_feature_select.to_le_bytes());
        put(&half(self.offered, registers.device_feature_select).to_le_bytes());
        put(&registers.driver_feature_select.to_le_bytes());
        put(&half(registers.driver_features, registers.driver_feature_select).to_le_bytes());
        put(&self.shared.config_vector().to_le_bytes());
        put(&(registers.queues.len() as u16).to_le_bytes());
        put(&[self.shared.status()]);
        put(&[0]); // generation: no device configuration here ever changes
        put(&select.to_le_bytes());
        put(&queue.size.to_le_bytes());
        put(&self.shared.queue_vector(usize::from(select)).to_le_bytes());
        put(&u16::from(queue.enabled).to_le_bytes());
        put(&select.to_le_bytes()); // queue_notify_off: in units of the stride
        put(&queue.descriptors.to_le_bytes());
        put(&queue.driver.to_le_bytes());
        put(&queue.device.to_le_bytes());
        bytes
    }

    /// A write to the common configuration. What does not fit a field exactly is ignored.
    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut word = [0; 8];
        let Some(bytes) = word.get_mut(..data.len()) else {
            return;
        };
        bytes.copy_from_slice(data);
        let value = u64::from_le_bytes(word);
        let mut registers = self.registers();
        let select = usize::from(registers.queue_select);
        // The driver settles features before FEATURES_OK and queues before DRIVER_OK.
        let status = self.shared.status();
        let negotiating = status & VIRTIO_CONFIG_S_FEATURES_OK as u8 == 0;
        let running = status & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0;
        match (offset, data.len()) {
            (0, 4) => registers.device_feature_select = value as u32,
            (8, 4) => registers.driver_feature_select = value as u32,
            (12, 4) if negotiating => match registers.driver_feature_select {
                0 => set_half(&mut registers.driver_features, 0, value),
                1 => set_half(&mut registers.driver_features, 4, value),
                _ => {}
            },
            (16, 2) => self.shared.set_config_vector(value as u16),
            (20, 1) => self.write_status(&mut registers, value as u8),
            (22, 2) => registers.queue_select = value as u16,
            (26, 2) => self.shared.set_queue_vector(select, value as u16),
            (24..56, _) if !running => {
                if let Some(queue) = registers.queues.get_mut(select) {
                    queue.write(offset, data.len(), value);
                }
            }
            _ => {}
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u8) {
        let status = self.shared.status();
        if registers.resetting {
            if status != 0 {
                return;
            }
            registers.resetting = false;
        }
        if value == 0 {
            registers.reset();
            // Only the device thread may take back what it was given.
            registers.resetting = status != 0;
            if registers.resetting {
                self.mailbox.send(Command::Reset);
            } else {
                self.shared.reset();
            }
            return;
        }
        let mut fresh = value & DRIVER_BITS & !status;
        let features_ok = VIRTIO_CONFIG_S_FEATURES_OK as u8;
        if fresh & features_ok != 0 && !self.acceptable(registers.driver_features) {
            fresh &= !features_ok;
        }
        let driver_ok = VIRTIO_CONFIG_S_DRIVER_OK as u8;
        if (status | fresh) & features_ok == 0 {
            fresh &= !driver_ok;
        }
        self.shared.add_status(fresh);
        if fresh & driver_ok != 0 {
            self.start(registers);
        }
    }

    fn acceptable(&self, features: u64) -> bool {
        let modern = features >> VIRTIO_F_VERSION_1 & 1 != 0;
        let ours = features & !self.offered == 0;
        if !modern || !ours {
            let offered = self.offered;
            crate::guest_warn!(
                "{}: driver chose features {features:#x} of {offered:#x}",
                self.name
            );
        }
        modern && ours
    }

    fn start(&self, registers: &Registers) {
        let queues: Result<Vec<_>, _> = registers
            .queues
            .iter()
            .enumerate()
            .map(|(n, queue)| self.queue(n, queue))
            .collect();
        match queues {
            Ok(queues) => {
                let features = registers.driver_features;
                self.mailbox.send(Command::Start { features, queues });
            }
            Err(e) => {
                crate::guest_warn!("{}: {e}; the device does not start", self.name);
                self.shared.needs_reset();
            }
        }
    }

    fn queue(&self, n: usize, from: &QueueRegisters) -> Result<Option<VirtQueue>, QueueError> {
        if !from.enabled {
            return Ok(None);
        }
        let mut queue = Queue::new(from.max)?;
        queue.try_set_size(from.size)?;
        queue.try_set_desc_table_address(GuestAddress(from.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(from.driver))?;
        queue.try_set_used_ring_address(GuestAddress(from.device))?;
        queue.set_ready(true);
        let (shared, doorbells) = (Arc::clone(&self.shared), Arc::clone(&self.doorbells));
        VirtQueue::new(queue, n, self.mem.clone(), shared, doorbells).map(Some)
    }

    fn move_doorbells(&self, from: Option<u64>, to: Option<u64>) {
        let place = |bar: u64, n: usize| bar + NOTIFY + n as u64 * u64::from(NOTIFY_STRIDE);
        for (n, doorbell) in self.doorbells.iter().enumerate() {
            let unbound = from.map(|bar| self.sink.unbind_doorbell(doorbell, place(bar, n)));
            let bound = to.map(|bar| self.sink.bind_doorbell(doorbell, place(bar, n)));
            for outcome in unbound.into_iter().chain(bound) {
                if let Err(e) = outcome {
                    // Notifications then exit to user space and arrive through `bar_write`.
                    crate::guest_warn!("{}: {e}", self.name);
                }
            }
        }
    }
}

impl Registers {
    fn new(sizes: &[u16]) -> Self {
        let queue = |&max: &u16| QueueRegisters {
            max,
            size: max,
            ..Default::default()
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
            resetting: false,
        }
    }

    fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
        *self = Self::new(&sizes);
    }
}

impl QueueRegisters {
    fn write(&mut self, offset: u64, len: usize, value: u64) {
        match (offset, len) {
            (24, 2) => self.size = value as u16,
            // A queue cannot be disabled again but by a reset.
            (28, 2) => self.enabled |= value == 1,
            (32 | 36, 4) => set_half(&mut self.descriptors, offset - 32, value),
            (40 | 44, 4) => set_half(&mut self.driver, offset - 40, value),
            (48 | 52, 4) => set_half(&mut self.device, offset - 48, value),
            (32, 8) => self.descriptors = value,
            (40, 8) => self.driver = value,
            (48, 8) => self.device = value,
            _ => {}
        }
    }
}

/// Replaces the lower (`byte` 0) or upper (`byte` 4) half of `target`.
fn set_half(target: &mut u64, byte: u64, value: u64) {
    let shift = 8 * byte;
    *target = *target & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
}

/// A capability that says where a structure lies in BAR0.
fn structure(kind: u8, offset: u64, length: u32) -> Capability {
    // The length of the whole capability, with the two bytes before the body.
    let mut body = vec![16, kind, BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    Capability::read_only(CAPABILITY_VENDOR, body)
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        self.name
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn bars(&self) -> Vec<BarSpec> {
        let kind = BarKind::Memory32;
        vec![BarSpec {
            index: BAR,
            kind,
            size: BAR_SIZE,
            prefetchable: false,
        }]
    }

    fn capabilities(&self) -> Vec<Capability> {
        let length = self.doorbells.len() as u32 * NOTIFY_STRIDE;
        let mut notify = structure(VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, length);
        notify.body[0] += 4;
        notify.body.extend(NOTIFY_STRIDE.to_le_bytes());
        let mut window = structure(VIRTIO_PCI_CAP_PCI_CFG, 0, 0);
        window.body[0] += 4;
        window.body.extend([0; 4]);
        window.bar_window = true;
        // The driver chooses BAR, offset and length. The data bytes are not stored.
        window.writable = [[0, 0, 0xff, 0, 0, 0].as_slice(), [0xff; 8].as_slice()].concat();
        let mut list = vec![
            structure(VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_SIZE),
            structure(VIRTIO_PCI_CAP_ISR_CFG, ISR, 4),
        ];
        // Linux refuses a device with an empty one.
        let device = self.config.size().min(DEVICE_MAX);
        if device > 0 {
            list.push(structure(VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, device));
        }
        list.extend([notify, window]);
        list
    }

    fn msix(&self) -> Option<Arc<Msix>> {
        Some(Arc::clone(&self.shared.msix))
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => {
                let common = self.common();
                for (at, byte) in (offset as usize..).zip(data) {
                    *byte = common.get(at).copied().unwrap_or(0);
                }
            }
            ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.shared.take_isr();
                }
            }
            DEVICE..NOTIFY => self.config.read(offset - DEVICE, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset, data),
            DEVICE..NOTIFY => self.config.write(offset - DEVICE, data),
            // Where the kernel does not catch it: a doorbell that could not be bound, or a
            // notification through the configuration window.
            NOTIFY.. => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_STRIDE);
                if let Some(doorbell) = self.doorbells.get(queue as usize)
                    && let Err(e) = doorbell.write(1)
                {
                    crate::guest_warn!("{}: ringing queue {queue} failed: {e}", self.name);
                }
            }
            _ => {}
        }
    }

    fn bar_moved(&self, _bar: usize, address: Option<u64>) {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        self.move_doorbells(*bound, address);
        *bound = address;
    }
}
