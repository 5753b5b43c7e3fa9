//! What transport (vCPU threads) and worker (device thread) share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use crate::pci::Msix;

/// Vector number that means "no interrupt".
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR bit: a queue has used buffers.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR bit: the configuration or the status changed.
const ISR_CONFIG: u8 = 1 << 1;

/// Status, interrupt cause and vectors of one device.
///
/// All atomics are relaxed: each word stands for itself. What the guest sees after an interrupt
/// (rings, status) is ordered by the interrupt's way through the kernel.
pub(super) struct Shared {
    pub(super) msix: Arc<Msix>,
    status: AtomicU8,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Shared {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        })
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Relaxed)
    }

    /// Adds status bits; only [`reset`](Self::reset) takes bits away.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::Relaxed);
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::Relaxed);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        // Last: the driver goes on when it reads zero. Release keeps the stores above before it.
        self.status.store(0, Ordering::Release);
    }

    /// Reads and clears the interrupt cause.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::Relaxed)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Sets the vector for configuration changes; one that does not exist becomes "none", which
    /// the driver sees when it reads back.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.existing(vector), Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queue_vectors
            .get(queue)
            .map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed))
    }

    /// As [`set_config_vector`](Self::set_config_vector), for a queue.
    pub(super) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(queue) {
            slot.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.spec().vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Tells the driver that `queue` has used buffers.
    pub(super) fn interrupt_queue(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::Relaxed);
        self.msix.raise(self.queue_vector(queue));
    }

    /// Tells the driver that the device is broken until it is reset.
    pub(super) fn needs_reset(&self) {
        let before = self
            .status
            .fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET as u8, Ordering::Relaxed);
        if before & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0 {
            self.isr.fetch_or(ISR_CONFIG, Ordering::Relaxed);
            self.msix.raise(self.config_vector());
        }
    }
}
