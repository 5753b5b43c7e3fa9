//! Who answers a guest's access.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::power::PowerControl;
use super::serial::SerialDevice;
use crate::arch::layout::{Range, SERIAL_PORT, SERIAL_PORT_COUNT};
use crate::pci::PciBus;

/// What a guest's access asks the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Action {
    /// Nothing: run on.
    Continue,
    /// Power off.
    PowerOff,
    /// Reset, through the named register.
    Reset(&'static str),
}

/// What a vCPU thread does with accesses that leave the guest.
///
/// Called from all vCPU threads at once. No method may block: the guest waits for it.
pub trait ExitHandler: Send + Sync {
    /// An `in` instruction. `data` arrives filled with ones, the answer of an empty bus.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// An `out` instruction.
    fn pio_write(&self, port: u16, data: &[u8]) -> Action;
    /// A load outside all memslots. `data` arrives filled with ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store outside all memslots, or to a read-only one.
    fn mmio_write(&self, address: u64, data: &[u8]) -> Action;
}

/// Guest accesses to pod memory that did not reach it.
#[derive(Debug)]
pub struct DroppedAccesses {
    fabric: Option<Range>,
    others: Vec<Range>,
    /// Stores to the read-only fabric section. A count: Relaxed.
    pub fabric_writes: AtomicU64,
    /// Accesses to deleted memslots. A count: Relaxed.
    pub fenced: AtomicU64,
    last_log: Mutex<Option<Instant>>,
}

impl DroppedAccesses {
    /// At most one line in the log for each such period.
    const LOG_INTERVAL: Duration = Duration::from_secs(1);

    /// Counts accesses to the given ranges; the first is the fabric section.
    pub fn new(sections: &[Range]) -> Self {
        Self {
            fabric: sections.first().copied(),
            others: sections.iter().skip(1).copied().collect(),
            fabric_writes: AtomicU64::new(0),
            fenced: AtomicU64::new(0),
            last_log: Mutex::new(None),
        }
    }

    /// Whether the access was one to pod memory; counts it then.
    pub(crate) fn take(&self, address: u64, store: bool) -> bool {
        if self.fabric.is_some_and(|fabric| fabric.contains(address)) {
            if store {
                let count = self.fabric_writes.fetch_add(1, Ordering::Relaxed) + 1;
                self.log(format_args!(
                    "guest store to the read-only fabric section at {address:#x} dropped \
                     ({count} so far)"
                ));
            }
            true
        } else if self.others.iter().any(|section| section.contains(address)) {
            let count = self.fenced.fetch_add(1, Ordering::Relaxed) + 1;
            self.log(format_args!(
                "access of the fenced guest to pod memory at {address:#x} dropped ({count} so far)"
            ));
            true
        } else {
            false
        }
    }

    fn log(&self, message: std::fmt::Arguments) {
        // Another vCPU that is logging right now suffices.
        let Ok(mut last) = self.last_log.try_lock() else {
            return;
        };
        let now = Instant::now();
        if last.is_none_or(|last| now.duration_since(last) >= Self::LOG_INTERVAL) {
            *last = Some(now);
            log::warn!("{message}");
        }
    }
}

/// The devices of a machine.
pub struct DeviceBus {
    /// The first serial port.
    pub serial: Arc<Mutex<SerialDevice>>,
    /// ACPI power-off, reset.
    pub power: PowerControl,
    /// Everything else.
    pub pci: Arc<PciBus>,
    /// Pod memory that the guest may not reach.
    pub dropped: Arc<DroppedAccesses>,
}

impl DeviceBus {
    fn serial_register(port: u16) -> Option<u8> {
        let register = port.checked_sub(SERIAL_PORT)?;
        (register < SERIAL_PORT_COUNT).then_some(register as u8)
    }
}

impl ExitHandler for DeviceBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = Self::serial_register(port) {
            let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
            for byte in data {
                *byte = serial.read(register);
            }
        } else if let Some(value) = self.power.read(port) {
            for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
                *byte = value;
            }
        } else {
            self.pci.io_read(port, data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> Action {
        if let Some(register) = Self::serial_register(port) {
            let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
            for &byte in data {
                // The only error is that of the output, which never fails.
                if let Err(e) = serial.write(register, byte) {
                    log::debug!("serial port: {e:?}");
                }
            }
            return Action::Continue;
        }
        // Before the power registers: a four-byte access at 0xcf8 covers 0xcf9.
        if self.pci.io_write(port, data) {
            return Action::Continue;
        }
        let low = data.first().copied().unwrap_or(0);
        let high = data.get(1).copied().unwrap_or(0);
        self.power
            .write(port, u16::from_le_bytes([low, high]))
            .unwrap_or(Action::Continue)
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(address, data) {
            self.dropped.take(address, false);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> Action {
        if !self.pci.mmio_write(address, data) {
            self.dropped.take(address, true);
        }
        Action::Continue
    }
}
