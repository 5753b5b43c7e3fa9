//! Interrupt routes and event descriptors that the kernel half of the machine knows about.
//!
//! Everything a device needs from the hypervisor is behind two small traits, so that devices and
//! their tests never see `/dev/kvm`:
//!
//! * [`IrqSink`]: replace the routing table; bind and unbind an event descriptor to a GSI;
//! * [`DoorbellSink`]: bind and unbind an event descriptor to a guest-physical store.
//!
//! [`KvmEvents`] implements both. [`GsiRoutes`] owns the one routing table of the machine: KVM
//! replaces the whole table at every call, so two owners would erase each other's routes.
//!
//! ```text
//!   device thread --- eventfd write ---> irqfd ---> GSI ---> routing table ---> LAPIC of a vCPU
//!                     (MsiVector)                   (24..)   (GsiRoutes)
//! ```
//!
//! A global system interrupt (GSI) below [`FIRST_MSI_GSI`] is a pin of the IOAPIC (and, below 16,
//! of the PIC pair); those above are MSI messages handed out by [`GsiRoutes::allocate`].

mod kvm;
mod routes;
mod vector;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod routes_test;

pub use kvm::KvmEvents;
pub use routes::{FIRST_MSI_GSI, GsiRoutes};
pub use vector::MsiVector;

use vmm_sys_util::eventfd::EventFd;

/// What a message-signalled interrupt writes, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address of the store (the LAPIC window, `0xfeex_xxxx`).
    pub address: u64,
    /// The 32-bit value stored: vector, delivery mode, trigger.
    pub data: u32,
}

/// One line of the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// GSI to pin `pin` of in-kernel chip `chip` (`KVM_IRQCHIP_*`).
    Pin {
        /// The GSI routed.
        gsi: u32,
        /// `KVM_IRQCHIP_PIC_MASTER`, `KVM_IRQCHIP_PIC_SLAVE` or `KVM_IRQCHIP_IOAPIC`.
        chip: u32,
        /// Input pin of that chip.
        pin: u32,
    },
    /// GSI to an MSI message.
    Msi {
        /// The GSI routed.
        gsi: u32,
        /// What is sent when the GSI is raised.
        message: MsiMessage,
    },
}

/// Why an interrupt could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// The routing table is full.
    #[error(
        "no interrupt route left: all {0} MSI routes of this machine are in use; give it fewer devices"
    )]
    Exhausted(usize),
    /// The kernel refused the table.
    #[error("KVM_SET_GSI_ROUTING with {entries} entries failed: {source}")]
    Routing {
        /// Number of entries in the refused table.
        entries: usize,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel refused an irqfd.
    #[error("binding an event descriptor to GSI {gsi} failed: {source}")]
    IrqFd {
        /// The GSI concerned.
        gsi: u32,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel refused an ioeventfd.
    #[error("binding an event descriptor to guest address {address:#x} failed: {source}")]
    IoEventFd {
        /// Guest-physical address concerned.
        address: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// No event descriptor could be made.
    #[error("creating an event descriptor failed: {0} (is the limit of open files too low?)")]
    EventFd(#[source] std::io::Error),
}

/// The side of the hypervisor that raises interrupts.
///
/// Calls may come from any thread. None of them may call back into [`GsiRoutes`].
pub trait IrqSink: Send + Sync {
    /// Replaces the whole routing table.
    ///
    /// # Errors
    /// [`IrqError::Routing`]; the former table then stays in force.
    fn set_routes(&self, routes: &[Route]) -> Result<(), IrqError>;

    /// From now on a write to `fd` raises `gsi`.
    ///
    /// # Errors
    /// [`IrqError::IrqFd`].
    fn bind_irq(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError>;

    /// Ends what [`bind_irq`](Self::bind_irq) began.
    ///
    /// # Errors
    /// [`IrqError::IrqFd`].
    fn unbind_irq(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError>;
}

/// The side of the hypervisor that turns guest stores into event descriptor writes.
pub trait DoorbellSink: Send + Sync {
    /// From now on a guest store of any value and width to `address` writes to `fd` and does not
    /// exit to user space.
    ///
    /// # Errors
    /// [`IrqError::IoEventFd`], for example when `address` is taken.
    fn bind_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), IrqError>;

    /// Ends what [`bind_doorbell`](Self::bind_doorbell) began.
    ///
    /// # Errors
    /// [`IrqError::IoEventFd`].
    fn unbind_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), IrqError>;
}
