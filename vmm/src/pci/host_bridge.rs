//! The host bridge at 00:00.0: a function that is there, and nothing else.
//!
//! Linux accepts ports 0xcf8/0xcfc as configuration mechanism #1 only if it finds a host bridge
//! behind them.

use super::{Identity, PciFunction};

/// A host bridge without registers.
#[derive(Debug, Default)]
pub struct HostBridge;

impl PciFunction for HostBridge {
    fn name(&self) -> &str {
        "host-bridge"
    }

    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x0008, // the generic PCI Express host bridge of that vendor
            class: 0x06_00_00,
            subsystem_vendor: 0x1b36,
            subsystem: 0x0008,
            ..Identity::default()
        }
    }
}
