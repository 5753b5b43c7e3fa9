//! Power-off and reset: the PM1a registers of ACPI, the reset control register, and as much
//! of a keyboard controller as pulses the reset line.

use std::sync::atomic::{AtomicU16, Ordering};

use super::Action;
use crate::arch::layout::{
    I8042_COMMAND_PORT, PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_CONTROL_PORT,
};

/// Sleep type that `\_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Value that ACPI writes to the reset register: hard reset, processors included.
pub const RESET_VALUE: u8 = 0x06;

const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
/// ACPI mode is on; it cannot be switched off.
const SCI_ENABLE: u16 = 1 << 0;
/// Reset control register: reset now.
const RESET_CPU: u8 = 1 << 2;
/// Keyboard controller command: pulse output line 0, which is the reset line.
const I8042_PULSE_RESET: u8 = 0xfe;

/// The registers. Ports outside the three blocks are not answered.
#[derive(Debug, Default)]
pub struct PowerControl {
    // Each register is a word that only guest accesses touch: Relaxed.
    event_enable: AtomicU16,
    control: AtomicU16,
    reset_control: AtomicU16,
}

impl PowerControl {
    /// Reads a register; `None` if no register is at `port`.
    pub fn read(&self, port: u16) -> Option<u16> {
        match port {
            // Status: no event is ever pending.
            PM1A_EVENT_PORT => Some(0),
            p if p == PM1A_EVENT_PORT + 2 => Some(self.event_enable.load(Ordering::Relaxed)),
            PM1A_CONTROL_PORT => Some(self.control.load(Ordering::Relaxed) | SCI_ENABLE),
            RESET_CONTROL_PORT => Some(self.reset_control.load(Ordering::Relaxed)),
            // Input buffer empty, no data: ready for a command.
            I8042_COMMAND_PORT => Some(0),
            _ => None,
        }
    }

    /// Writes a register; `None` if no register is at `port`.
    pub fn write(&self, port: u16, value: u16) -> Option<Action> {
        let action = match port {
            PM1A_EVENT_PORT => Action::Continue,
            p if p == PM1A_EVENT_PORT + 2 => {
                self.event_enable.store(value, Ordering::Relaxed);
                Action::Continue
            }
            PM1A_CONTROL_PORT => {
                self.control.store(value & !SLEEP_ENABLE, Ordering::Relaxed);
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & 0x7;
                if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    Action::PowerOff
                } else {
                    Action::Continue
                }
            }
            RESET_CONTROL_PORT => {
                let value = value as u8;
                self.reset_control
                    .store(u16::from(value & !RESET_CPU), Ordering::Relaxed);
                if value & RESET_CPU != 0 {
                    Action::Reset("reset control register")
                } else {
                    Action::Continue
                }
            }
            I8042_COMMAND_PORT if value as u8 == I8042_PULSE_RESET => {
                Action::Reset("keyboard controller")
            }
            I8042_COMMAND_PORT => Action::Continue,
            _ => return None,
        };
        Some(action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let power = PowerControl::default();
        let s5 = u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT;
        assert_eq!(power.write(PM1A_CONTROL_PORT, s5), Some(Action::Continue));
        assert_eq!(
            power.write(PM1A_CONTROL_PORT, SLEEP_ENABLE),
            Some(Action::Continue)
        );
        assert_eq!(
            power.write(PM1A_CONTROL_PORT, s5 | SLEEP_ENABLE),
            Some(Action::PowerOff)
        );
        assert_eq!(power.read(PM1A_CONTROL_PORT), Some(s5 | SCI_ENABLE));
    }

    #[test]
    fn every_way_to_reset() {
        let power = PowerControl::default();
        let reset = |port, value| matches!(power.write(port, value), Some(Action::Reset(_)));
        assert!(reset(RESET_CONTROL_PORT, u16::from(RESET_VALUE)));
        assert!(!reset(RESET_CONTROL_PORT, 0x02));
        assert!(reset(I8042_COMMAND_PORT, 0xfe));
        assert!(!reset(I8042_COMMAND_PORT, 0xaa));
        assert_eq!(power.write(0x80, 1), None);
    }
}
