//! MADT: local APICs, the IOAPIC and the interrupt source overrides of a PC.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::layout::{IOAPIC_START, LAPIC_START, SCI_GSI};

/// The two 8259 PICs are there.
const PCAT_COMPAT: u32 = 1;
const LAPIC_ENABLED: u32 = 1;
/// Active high, level-triggered: the convention for the SCI with an IOAPIC.
const ACTIVE_HIGH_LEVEL: u16 = 0x1 | 0xc;
/// Polarity and trigger as the bus has them.
const CONFORMS: u16 = 0;

pub(super) fn madt(cpus: u8) -> Sdt {
    let mut body = Vec::new();
    body.extend((LAPIC_START as u32).to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        // Processor local APIC: processor uid and APIC id are both the vCPU's index.
        body.extend([0, 8, cpu, cpu]);
        body.extend(LAPIC_ENABLED.to_le_bytes());
    }
    // IOAPIC 0, GSI base 0.
    body.extend([1, 12, 0, 0]);
    body.extend((IOAPIC_START as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The timer, ISA IRQ 0, arrives at pin 2 (the routing table does the same).
    for (irq, gsi, flags) in [
        (0, 2, CONFORMS),
        (SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL),
    ] {
        body.extend([2, 10, 0, irq]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    // NMI at LINT1 of all processors.
    body.extend([4, 6, 0xff, 0, 0, 1]);

    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&body);
    madt
}
