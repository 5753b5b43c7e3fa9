//! A small PCI Express host: one segment, functions on bus 0, configuration through ECAM and
//! through ports 0xcf8/0xcfc, BARs that the VMM places before boot and the guest may move.
//!
//! ```text
//!   vCPU exit ──> PciBus::mmio_* ──> ECAM range ────> Slot: config space, BAR registers,
//!            └──> PciBus::io_*  ──> 0xcf8, 0xcfc ─┘    MSI-X capability
//!                     │                                     │ enabled / moved
//!                     └──────> BAR map (windows only) <─────┘
//!                                 │
//!                                 └──> MSI-X table and PBA, else PciFunction::bar_read/_write
//! ```
//!
//! Functions have message-signalled interrupts only: no function has an INTx pin, so the machine
//! needs no `_PRT`.
//!
//! An address outside the windows given in [`PciBusSpec`] is never decoded, wherever the guest puts
//! a BAR: a guest cannot lay a device over pod memory.

pub mod bus;
pub mod config;
pub mod host_bridge;
pub mod msix;
pub mod pvpanic;
mod slot;

#[cfg(test)]
mod bus_test;
#[cfg(test)]
mod msix_test;

pub use bus::{PciBus, PciBusSpec, PciError};
pub use config::{BarKind, BarSpec, Capability, Identity};
pub use host_bridge::HostBridge;
pub use msix::Msix;
pub use pvpanic::{PvPanic, PvPanicEvent, PvPanicSpec};

use std::sync::Arc;

/// Number of base address registers of a type-0 header.
pub const BARS: usize = 6;

/// What a device gives the bus.
///
/// The bus keeps the configuration space (header, BARs, command register, capabilities, MSI-X
/// table) and calls the function only for what is its own.
///
/// # Contract
/// * Every method may be called from any vCPU thread, several at once.
/// * No method may block: a vCPU waits for it. Work belongs on a device thread.
/// * No method may call into the [`PciBus`]: [`bar_moved`](Self::bar_moved) runs under the lock of
///   the function's configuration space.
/// * `identity`, `bars`, `capabilities` and `msix` are read once, by [`PciBus::add`].
pub trait PciFunction: Send + Sync {
    /// Name for logs and errors.
    fn name(&self) -> &str;

    /// Vendor, device, class and subsystem numbers.
    fn identity(&self) -> Identity;

    /// The BARs. A 64-bit BAR takes two registers.
    fn bars(&self) -> Vec<BarSpec> {
        Vec::new()
    }

    /// Capabilities besides MSI-X, in list order.
    fn capabilities(&self) -> Vec<Capability> {
        Vec::new()
    }

    /// The function's interrupts, if it has any. The bus adds the capability and serves table and
    /// pending bits; they must lie within a BAR of [`bars`](Self::bars).
    fn msix(&self) -> Option<Arc<Msix>> {
        None
    }

    /// Reads `data.len()` (1, 2, 4 or 8) bytes at `offset` within BAR `bar`. The access lies within
    /// the BAR. Fills the whole of `data`, which arrives zeroed.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        let _ = (bar, offset, data);
    }

    /// Writes `data` at `offset` within BAR `bar`. The access lies within the BAR.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        let _ = (bar, offset, data);
    }

    /// BAR `bar` is now decoded at `address`, or not decoded at all (`None`). Called on changes
    /// only, in order. The place to bind and unbind doorbells.
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        let _ = (bar, address);
    }
}
