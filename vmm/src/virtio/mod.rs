//! Virtio 1.x devices behind PCI.
//!
//! ```text
//!   vCPU thread                      │ device thread
//!   ─────────────────────────────────┼──────────────────────────────────────────
//!   VirtioPci: registers ── mailbox ─┼─> Worker ── start, stop ──> VirtioDevice
//!      │                             │     ^  │                       │
//!      │ notify: ioeventfd (in KVM) ─┼─────┘  └─ queue notified ──────┤
//!      │ device config ──────────────┼─> DeviceConfig (shared)        │
//!      └ status, ISR, vectors <──────┼─ Shared <── interrupts, ───────┘
//!                                    │             NEEDS_RESET
//! ```
//!
//! vCPU threads touch registers only. Starting and resetting go through a mailbox, so no vCPU ever
//! waits for device I/O; a driver that resets the device polls the status register, as the
//! specification tells it to, until the device thread is done.
//!
//! Rings and descriptors are the guest's and may say anything: [`VirtQueue`] checks every chain
//! before a device sees it, and the first impossible one stops the device and sets
//! `DEVICE_NEEDS_RESET`.

pub mod block;
pub mod console;
mod pci;
mod queue;
pub mod rng;
mod shared;
mod thread;
mod worker;

#[cfg(test)]
pub(crate) mod fake_driver;
#[cfg(test)]
mod pci_test;
#[cfg(test)]
mod queue_test;

pub use pci::VirtioPci;
pub use queue::{Chain, QueueError, VirtQueue};
pub use thread::{DeviceThread, ThreadError};
pub use worker::{DEVICE_EVENT, Worker};

use std::sync::Arc;

use event_manager::{EventOps, Events};

/// A virtio device, independent of its transport. Lives on a device thread.
///
/// # Contract
/// The transport calls [`watch`](Self::watch) once, then any number of rounds of
/// [`start`](Self::start), [`notified`](Self::notified) and [`ready`](Self::ready) in any order,
/// [`stop`](Self::stop). `ready` may also be called while stopped. An `Err` from any of them makes
/// the transport call `stop` and ask the driver for a reset.
///
/// No method may block or loop without bound on what guest or peer do: all devices share the
/// thread.
pub trait VirtioDevice: Send {
    /// Name for logs.
    fn name(&self) -> &'static str;

    /// Virtio device ID.
    fn device_id(&self) -> u16;

    /// PCI class, subclass, interface: `0xCCSSPP`.
    fn pci_class(&self) -> u32;

    /// Feature bits offered besides `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;

    /// Largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device-specific configuration.
    fn config(&self) -> Arc<dyn DeviceConfig>;

    /// Registers the device's own descriptors, with event data from [`DEVICE_EVENT`] upwards.
    fn watch(&mut self, ops: &mut EventOps);

    /// The driver is ready. `queues[n]` is `None` where the driver did not enable queue n.
    ///
    /// # Errors
    /// A queue is broken.
    fn start(
        &mut self,
        features: u64,
        queues: Vec<Option<VirtQueue>>,
        ops: &mut EventOps,
    ) -> Result<(), QueueError>;

    /// The queues are gone: drop them and everything the guest said.
    fn stop(&mut self, ops: &mut EventOps);

    /// The driver rang queue `queue`.
    ///
    /// # Errors
    /// A queue is broken.
    fn notified(&mut self, queue: usize, ops: &mut EventOps) -> Result<(), QueueError>;

    /// One of the device's own descriptors is ready.
    ///
    /// # Errors
    /// A queue is broken.
    fn ready(&mut self, events: Events, ops: &mut EventOps) -> Result<(), QueueError>;
}

/// The device-specific configuration, read by vCPU threads.
pub trait DeviceConfig: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u32;

    /// Reads at `offset`; what lies beyond the end stays as it is (zero).
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset`. Most configurations are read-only.
    fn write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
}
