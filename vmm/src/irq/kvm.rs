//! The traits of this module on a KVM virtual machine.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{DoorbellSink, IrqError, IrqSink, Route};

/// Event descriptors and interrupt routes of one KVM virtual machine.
#[derive(Debug, Clone)]
pub struct KvmEvents {
    vm: Arc<VmFd>,
}

impl KvmEvents {
    /// Wraps `vm`, which must have its in-kernel irqchip (`KVM_CREATE_IRQCHIP`) already.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

fn entry(route: &Route) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry::default();
    match *route {
        Route::Pin { gsi, chip, pin } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: chip, pin };
        }
        Route::Msi { gsi, message } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
        }
    }
    entry
}

fn os(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl IrqSink for KvmEvents {
    fn set_routes(&self, routes: &[Route]) -> Result<(), IrqError> {
        let refused = |source| IrqError::Routing {
            entries: routes.len(),
            source,
        };
        let entries: Vec<_> = routes.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| {
            refused(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{e:?}"),
            ))
        })?;
        self.vm.set_gsi_routing(&table).map_err(|e| refused(os(e)))
    }

    fn bind_irq(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        self.vm
            .register_irqfd(fd, gsi)
            .map_err(|e| IrqError::IrqFd { gsi, source: os(e) })
    }

    fn unbind_irq(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        self.vm
            .unregister_irqfd(fd, gsi)
            .map_err(|e| IrqError::IrqFd { gsi, source: os(e) })
    }
}

impl DoorbellSink for KvmEvents {
    fn bind_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), IrqError> {
        self.vm
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| IrqError::IoEventFd {
                address,
                source: os(e),
            })
    }

    fn unbind_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), IrqError> {
        self.vm
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| IrqError::IoEventFd {
                address,
                source: os(e),
            })
    }
}
