//! A guest driver for tests: finds the device on a bus, negotiates, and keeps rings by hand in a
//! `GuestMemoryMmap`. Everything goes the way a guest's accesses go, but for KVM.

use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{VirtioDevice, VirtioPci, Worker};
use crate::irq::fake::FakeHypervisor;
use crate::pci::{PciBus, PciBusSpec};

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// A descriptor as the guest writes it: address, length, flags, next.
pub(crate) type Raw = (u64, u32, u16, u16);

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

const MEMORY: usize = 4 << 20;
const RINGS: u64 = 0x1_0000;
/// Bytes for the three rings of a queue.
const RINGS_SIZE: u64 = 0x2000;
const BUFFERS: u64 = 0x10_0000;
const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0xc000_0000;

pub(crate) struct FakeDriver {
    pub(crate) bus: PciBus,
    pub(crate) mem: GuestMemoryMmap,
    pub(crate) hypervisor: Arc<FakeHypervisor>,
    pub(crate) bar: u64,
    manager: EventManager<Worker>,
    queues: Vec<Ring>,
}

#[derive(Clone, Default)]
struct Ring {
    size: u16,
    avail: u16,
    used: u16,
    descriptor: u16,
}

impl FakeDriver {
    /// Puts `device` on a fresh bus and enables its BAR.
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let (hypervisor, routes) = FakeHypervisor::new();
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (function, worker) =
            VirtioPci::new(device, mem.clone(), &routes, hypervisor.clone()).unwrap();
        let bus = PciBus::new(PciBusSpec {
            ecam: ECAM,
            mmio32: WINDOW..WINDOW + 0x100_0000,
            mmio64: None,
        });
        assert_eq!(bus.add(None, function), Ok(0));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(worker);
        let mut bar = [0; 4];
        assert!(bus.mmio_read(ECAM + 0x10, &mut bar));
        let bar = u64::from(u32::from_le_bytes(bar) & !0xf);
        assert!(bus.mmio_write(ECAM + 4, &6u16.to_le_bytes()));
        Self {
            bus,
            mem,
            hypervisor,
            bar,
            manager,
            queues: Vec::new(),
        }
    }

    pub(crate) fn config_read(&self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.mmio_read(ECAM + at, &mut data[..len]));
        u64::from_le_bytes(data)
    }

    pub(crate) fn config_write(&self, at: u64, len: usize, value: u64) {
        assert!(self.bus.mmio_write(ECAM + at, &value.to_le_bytes()[..len]));
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.mmio_read(self.bar + offset, &mut data[..len]));
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, len: usize, value: u64) {
        assert!(
            self.bus
                .mmio_write(self.bar + offset, &value.to_le_bytes()[..len])
        );
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(20, 1) as u8
    }

    pub(crate) fn set_status(&self, bits: u8) {
        self.write(20, 1, u64::from(self.status() | bits));
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(0, 4, 0);
        let low = self.read(4, 4);
        self.write(0, 4, 1);
        self.read(4, 4) << 32 | low
    }

    pub(crate) fn choose(&self, features: u64) {
        for (half, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(8, 4, half);
            self.write(12, 4, value);
        }
    }

    /// Lets the device thread's side do all it has to do.
    pub(crate) fn run(&mut self) {
        for _ in 0..1000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    /// The whole handshake: features, MSI-X (vector n+1 with data n+1 for queue n, 0 for
    /// configuration changes), queues, DRIVER_OK.
    pub(crate) fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.set_up_queues();
        self.set_status(DRIVER_OK);
        self.run();
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(DRIVER);
        self.choose(features);
        self.set_status(FEATURES_OK);
        assert_ne!(self.status() & FEATURES_OK, 0);
    }

    pub(crate) fn set_up_queues(&mut self) {
        let count = self.read(18, 2);
        self.enable_msix(count as u16 + 1);
        self.write(16, 2, 0);
        self.queues = vec![Ring::default(); count as usize];
        for n in 0..count {
            self.write(22, 2, n);
            self.queues[n as usize].size = self.read(24, 2) as u16;
            let (descriptors, driver, device) = Self::rings(n);
            for (at, address) in [(32, descriptors), (40, driver), (48, device)] {
                self.write(at, 4, address & 0xffff_ffff);
                self.write(at + 4, 4, address >> 32);
            }
            self.mem
                .write_slice(&[0; RINGS_SIZE as usize], GuestAddress(descriptors))
                .unwrap();
            self.write(26, 2, n + 1);
            assert_eq!(self.read(26, 2), n + 1);
            self.write(28, 2, 1);
        }
    }

    fn rings(queue: u64) -> (u64, u64, u64) {
        // Room for 256 descriptors.
        let base = RINGS + queue * RINGS_SIZE;
        (base, base + 0x1000, base + 0x1400)
    }

    fn capability(&self, id: u8) -> u64 {
        let mut at = self.config_read(0x34, 1);
        while self.config_read(at, 1) as u8 != id {
            at = self.config_read(at + 1, 1);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at
    }

    fn enable_msix(&self, vectors: u16) {
        let capability = self.capability(0x11);
        assert_eq!(
            self.config_read(capability + 2, 2) & 0x7ff,
            u64::from(vectors) - 1
        );
        let table = self.config_read(capability + 4, 4);
        self.config_write(capability + 2, 2, 0xc000);
        for vector in 0..u64::from(vectors) {
            self.write(table + 16 * vector, 4, 0xfee0_0000);
            self.write(table + 16 * vector + 4, 4, 0);
            self.write(table + 16 * vector + 8, 4, vector);
            self.write(table + 16 * vector + 12, 4, 0);
        }
        self.config_write(capability + 2, 2, 0x8000);
    }

    /// Writes descriptors from table index 0 on and offers
    /// `head`. Checks nothing.
    pub(crate) fn offer_raw(&mut self, queue: usize, table: &[Raw], head: u16) {
        let (descriptors, ..) = Self::rings(queue as u64);
        for (n, &(address, length, flags, next)) in (0..).zip(table) {
            let at = descriptors + 16 * n;
            self.mem.write_obj(address, GuestAddress(at)).unwrap();
            self.mem.write_obj(length, GuestAddress(at + 8)).unwrap();
            self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        self.publish(queue, head);
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let (_, driver, _) = Self::rings(queue as u64);
        let ring = &mut self.queues[queue];
        let slot = driver + 4 + 2 * u64::from(ring.avail % ring.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        self.set_avail_index(queue, self.queues[queue].avail);
    }

    pub(crate) fn set_avail_index(&self, queue: usize, index: u16) {
        let (_, driver, _) = Self::rings(queue as u64);
        self.mem.write_obj(index, GuestAddress(driver + 2)).unwrap();
    }

    /// Address of the 4 KiB buffer that belongs to descriptor `n` of `queue`.
    fn buffer(queue: usize, n: u16) -> u64 {
        BUFFERS + queue as u64 * 0x4_0000 + u64::from(n) * 0x1000
    }

    fn offer(&mut self, queue: usize, length: u32, flags: u16) -> u64 {
        let ring = &mut self.queues[queue];
        let n = ring.descriptor;
        ring.descriptor = (n + 1) % ring.size;
        let (descriptors, ..) = Self::rings(queue as u64);
        let (at, buffer) = (descriptors + 16 * u64::from(n), Self::buffer(queue, n));
        self.mem.write_obj(buffer, GuestAddress(at)).unwrap();
        self.mem.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.publish(queue, n);
        buffer
    }

    /// Offers a buffer with `data` for the device to read.
    pub(crate) fn send(&mut self, queue: usize, data: &[u8]) {
        assert!(data.len() <= 0x1000);
        let n = self.queues[queue].descriptor;
        self.mem
            .write_slice(data, GuestAddress(Self::buffer(queue, n)))
            .unwrap();
        self.offer(queue, data.len() as u32, 0);
        self.kick(queue);
    }

    /// Offers `count` buffers of `length` bytes for the device to fill.
    pub(crate) fn provide(&mut self, queue: usize, count: usize, length: u32) {
        for _ in 0..count {
            self.offer(queue, length, WRITE);
        }
        self.kick(queue);
    }

    /// Rings the queue's doorbell as KVM would.
    pub(crate) fn kick(&mut self, queue: usize) {
        assert!(self.hypervisor.store(self.bar + 0x3000 + 4 * queue as u64));
        self.run();
    }

    /// Chains given back since the last call, as (first descriptor, length).
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let (.., device) = Self::rings(queue as u64);
        let index: u16 = self.mem.read_obj(GuestAddress(device + 2)).unwrap();
        let ring = &mut self.queues[queue];
        let mut out = Vec::new();
        while ring.used != index {
            let at = device + 4 + 8 * u64::from(ring.used % ring.size);
            let head = self.mem.read_obj(GuestAddress(at)).unwrap();
            out.push((head, self.mem.read_obj(GuestAddress(at + 4)).unwrap()));
            ring.used = ring.used.wrapping_add(1);
        }
        out
    }

    /// Bytes in the buffers given back since the last call, one vector per buffer.
    pub(crate) fn received(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let used = self.used(queue);
        used.into_iter()
            .map(|(head, length)| {
                let mut data = vec![0; length as usize];
                let at = GuestAddress(Self::buffer(queue, head as u16));
                self.mem.read_slice(&mut data, at).unwrap();
                data
            })
            .collect()
    }

    /// Data words of the interrupts raised since the last call.
    pub(crate) fn interrupts(&self) -> Vec<u32> {
        self.hypervisor
            .delivered()
            .iter()
            .map(|message| message.data)
            .collect()
    }
}
