//! The routing table of the machine, with one owner.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};
use vmm_sys_util::eventfd::EventFd;

use super::{IrqError, IrqSink, MsiMessage, Route};

/// First GSI that is not a pin of the IOAPIC (which has 24).
pub const FIRST_MSI_GSI: u32 = 24;

/// Inputs of one 8259 PIC.
const PIC_PINS: u32 = 8;

/// ISA IRQ of the 8254 timer.
const TIMER: u32 = 0;

/// Input of the master PIC that the slave hangs on.
const CASCADE: u32 = 2;

/// MSI routes per machine. KVM takes 4096 entries; the pins use 38 of them.
const MAX_MSI_ROUTES: usize = 4000;

/// The GSI routing table: the pins of the interrupt controllers, and MSI routes.
///
/// Changes are collected and reach the kernel at [`commit`](Self::commit), once for a batch: each
/// replacement of the table costs the kernel an RCU grace period, and a guest driver programs its
/// vectors one after the other.
///
/// Lock order: a device's own lock may be held while calling in here, never the other way round.
pub struct GsiRoutes {
    sink: Arc<dyn IrqSink>,
    table: Mutex<Table>,
}

struct Table {
    /// `None`: allocated, without a message so far.
    msi: BTreeMap<u32, Option<MsiMessage>>,
    /// Whether `msi` differs from what the kernel has.
    dirty: bool,
}

impl GsiRoutes {
    /// Takes over the routing table of the machine behind `sink` and installs the pins: GSI 0-23
    /// to the IOAPIC, 0-15 to the two PICs as well, as on a PC (0 arrives at IOAPIC pin 2, so the
    /// MADT needs the interrupt source override 0 -> 2).
    ///
    /// # Errors
    /// [`IrqError::Routing`] when the kernel refuses, for example without an in-kernel irqchip.
    pub fn new(sink: Arc<dyn IrqSink>) -> Result<Arc<Self>, IrqError> {
        let table = Table {
            msi: BTreeMap::new(),
            dirty: true,
        };
        let routes = Self {
            sink,
            table: Mutex::new(table),
        };
        routes.commit()?;
        Ok(Arc::new(routes))
    }

    /// Reserves a GSI for an MSI message. It has no route until [`set`](Self::set).
    ///
    /// # Errors
    /// [`IrqError::Exhausted`].
    pub fn allocate(&self) -> Result<u32, IrqError> {
        let mut table = self.table();
        if table.msi.len() >= MAX_MSI_ROUTES {
            return Err(IrqError::Exhausted(MAX_MSI_ROUTES));
        }
        // The lowest free number: the kernel allocates its table up to the highest GSI in use.
        let mut gsi = FIRST_MSI_GSI;
        for &used in table.msi.keys() {
            if used != gsi {
                break;
            }
            gsi += 1;
        }
        table.msi.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives `gsi` (from [`allocate`](Self::allocate)) back. Takes effect at the next commit.
    pub fn free(&self, gsi: u32) {
        let mut table = self.table();
        if let Some(Some(_)) = table.msi.remove(&gsi) {
            table.dirty = true;
        }
    }

    /// Sets what `gsi` sends. Takes effect at the next commit; a GSI never allocated is ignored.
    pub fn set(&self, gsi: u32, message: MsiMessage) {
        let mut table = self.table();
        if let Some(route) = table.msi.get_mut(&gsi)
            && *route != Some(message)
        {
            *route = Some(message);
            table.dirty = true;
        }
    }

    /// Hands the table to the kernel if anything changed since the last time.
    ///
    /// # Errors
    /// [`IrqError::Routing`]; the changes stay collected and are tried again by the next call.
    pub fn commit(&self) -> Result<(), IrqError> {
        let mut table = self.table();
        if !table.dirty {
            return Ok(());
        }
        let mut routes = pins();
        routes.extend(
            table
                .msi
                .iter()
                .filter_map(|(&gsi, m)| m.map(|message| Route::Msi { gsi, message })),
        );
        self.sink.set_routes(&routes)?;
        table.dirty = false;
        Ok(())
    }

    /// From now on a write to `fd` raises `gsi`: a pin (edge), or an allocated MSI route.
    ///
    /// # Errors
    /// [`IrqError::IrqFd`].
    pub fn bind(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        self.sink.bind_irq(fd, gsi)
    }

    /// Ends what [`bind`](Self::bind) began.
    ///
    /// # Errors
    /// [`IrqError::IrqFd`].
    pub fn unbind(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        self.sink.unbind_irq(fd, gsi)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code under this lock panics half way through a change.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for GsiRoutes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GsiRoutes")
            .field("msi", &self.table().msi)
            .finish_non_exhaustive()
    }
}

/// The pins as on a PC: the timer, ISA IRQ 0, arrives at IOAPIC pin 2 (the MADT says so with an
/// interrupt source override), and GSI 2, which cascades the PICs, arrives nowhere.
fn pins() -> Vec<Route> {
    let isa = (0..2 * PIC_PINS).map(|gsi| {
        if gsi < PIC_PINS {
            Route::Pin {
                gsi,
                chip: KVM_IRQCHIP_PIC_MASTER,
                pin: gsi,
            }
        } else {
            Route::Pin {
                gsi,
                chip: KVM_IRQCHIP_PIC_SLAVE,
                pin: gsi - PIC_PINS,
            }
        }
    });
    let ioapic = (0..FIRST_MSI_GSI).map(|gsi| {
        let pin = if gsi == TIMER { CASCADE } else { gsi };
        Route::Pin {
            gsi,
            chip: KVM_IRQCHIP_IOAPIC,
            pin,
        }
    });
    let cascade = |route: &Route| matches!(route, Route::Pin { gsi: CASCADE, .. });
    isa.chain(ioapic).filter(|route| !cascade(route)).collect()
}
