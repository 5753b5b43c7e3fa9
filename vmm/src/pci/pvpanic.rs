//! pvpanic: one byte through which a guest kernel says that it has panicked.
//!
//! The device is function 1b36:0011 with a register at offset 0 of BAR0. A read tells which events
//! the device understands; a write reports one. Stock driver: `pvpanic-pci`.

use super::{BarKind, BarSpec, Identity, PciFunction};

/// Register bit: the guest has panicked and will not go on.
const PANICKED: u8 = 1 << 0;
/// Register bit: the guest has panicked and runs its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The smallest memory BAR.
const BAR_SIZE: u64 = 16;

/// What the guest reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PvPanicEvent {
    /// A panic; nothing more will come from this guest.
    Panicked,
    /// A panic; the guest runs its crash kernel now and will act by itself.
    CrashLoaded,
}

/// How the device behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PvPanicSpec {
    /// Offer [`PvPanicEvent::CrashLoaded`], so that a guest with a loaded crash kernel is not
    /// taken for dead before it has written its dump.
    pub crash_loaded: bool,
}

impl Default for PvPanicSpec {
    fn default() -> Self {
        Self { crash_loaded: true }
    }
}

/// The device.
pub struct PvPanic {
    events: u8,
    report: Box<dyn Fn(PvPanicEvent) + Send + Sync>,
}

impl PvPanic {
    /// A device that calls `report` for each event, on the vCPU thread that wrote it: `report` must
    /// not block. A guest may write as often as it likes.
    pub fn new(spec: PvPanicSpec, report: impl Fn(PvPanicEvent) + Send + Sync + 'static) -> Self {
        let events = if spec.crash_loaded {
            PANICKED | CRASH_LOADED
        } else {
            PANICKED
        };
        Self {
            events,
            report: Box::new(report),
        }
    }
}

impl PciFunction for PvPanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            class: 0x08_80_00, // system peripheral, other
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec {
            index: 0,
            kind: BarKind::Memory32,
            size: BAR_SIZE,
            prefetchable: false,
        }]
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.events;
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        let (0, Some(&byte)) = (offset, data.first()) else {
            return;
        };
        let reported = byte & self.events;
        // Both at once would mean both; the crash kernel then has the last word.
        if reported & CRASH_LOADED != 0 {
            (self.report)(PvPanicEvent::CrashLoaded);
        } else if reported & PANICKED != 0 {
            (self.report)(PvPanicEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn device(spec: PvPanicSpec) -> (PvPanic, Arc<Mutex<Vec<PvPanicEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        (
            PvPanic::new(spec, move |event| log.lock().unwrap().push(event)),
            seen,
        )
    }

    #[test]
    fn tells_what_it_understands() {
        for (crash_loaded, expected) in [(true, 3), (false, 1)] {
            let (device, _) = device(PvPanicSpec { crash_loaded });
            let mut byte = [0];
            device.bar_read(0, 0, &mut byte);
            assert_eq!(byte, [expected]);
        }
    }

    #[test]
    fn reports_each_event() {
        let (device, seen) = device(PvPanicSpec::default());
        device.bar_write(0, 0, &[1]);
        device.bar_write(0, 0, &[2]);
        assert_eq!(
            *seen.lock().unwrap(),
            [PvPanicEvent::Panicked, PvPanicEvent::CrashLoaded]
        );
    }

    #[test]
    fn ignores_unknown_bits_and_other_offsets() {
        let (device, seen) = device(PvPanicSpec {
            crash_loaded: false,
        });
        device.bar_write(0, 0, &[0xfe]);
        device.bar_write(0, 1, &[1]);
        device.bar_write(0, 0, &[]);
        assert!(seen.lock().unwrap().is_empty());
    }
}
