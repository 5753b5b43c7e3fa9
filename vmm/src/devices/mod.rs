//! Devices that are not on the PCI bus, and the dispatch of guest accesses to all devices.

pub mod bus;
pub mod output;
pub mod power;
pub mod serial;
pub mod serial_input;

pub use bus::{Action, DeviceBus, ExitHandler};
