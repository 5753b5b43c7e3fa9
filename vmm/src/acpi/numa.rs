//! SRAT and SLIT: pod memory is a NUMA node of its own, without processors, as a CXL memory
//! expander is on a real host.

use acpi_tables::sdt::Sdt;
use acpi_tables::slit::SLIT;

use super::{AcpiSpec, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::layout::Range;

/// Proximity domain of processors and RAM.
pub(super) const LOCAL: u32 = 0;
/// Proximity domain of pod memory.
const POD: u32 = 1;
/// SLIT distance of a directly attached CXL device; 10 is local, 20 the other socket.
const POD_DISTANCE: u8 = 25;

const ENABLED: u32 = 1;

pub(super) fn srat(spec: &AcpiSpec) -> Sdt {
    let mut body = Vec::new();
    body.extend(1u32.to_le_bytes());
    body.extend([0; 8]);
    for cpu in 0..spec.cpus {
        // Processor local APIC affinity: the domain's low byte, APIC id, flags, the rest zero.
        body.extend([0, 16, LOCAL as u8, cpu]);
        body.extend(ENABLED.to_le_bytes());
        body.extend([0; 8]);
    }
    for range in spec.ram {
        memory(&mut body, LOCAL, range);
    }
    // One entry for each section: a kernel with HMAT support may take an entry for one device.
    for range in spec.sections {
        memory(&mut body, POD, range);
    }
    let mut srat = Sdt::new(*b"SRAT", 36, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    srat.append_slice(&body);
    srat
}

fn memory(body: &mut Vec<u8>, domain: u32, range: &Range) {
    body.extend([1, 40]);
    body.extend(domain.to_le_bytes());
    body.extend([0; 2]);
    body.extend(range.start.to_le_bytes());
    body.extend(range.size.to_le_bytes());
    body.extend([0; 4]);
    body.extend(ENABLED.to_le_bytes());
    body.extend([0; 8]);
}

pub(super) fn slit() -> SLIT {
    let mut slit = SLIT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, 2);
    slit.set_distance(LOCAL as usize, POD as usize, POD_DISTANCE);
    slit
}
