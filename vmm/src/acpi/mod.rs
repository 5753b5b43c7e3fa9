//! ACPI tables: what a stock kernel learns about processors, interrupts, PCI, memory
//! proximity, power-off and reset.
//!
//! Full (not hardware-reduced) ACPI with the PM1a blocks of a PC: stock kernels keep their
//! ordinary interrupt set-up and power off through `\_S5`. There is no SMI command port, so
//! ACPI mode is on from the start, and nothing ever raises the SCI.
//!
//! The tables lie in the BIOS area, RSDP first; kernels get its address in `boot_params` and
//! would find it by scanning, too.

mod dsdt;
mod fadt;
mod madt;
mod numa;

#[cfg(test)]
mod acpi_test;

use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::arch::layout::{ACPI_END, ACPI_START, PCI_BUS_COUNT, PCI_ECAM_START, Range};

const OEM_ID: [u8; 6] = *b"LUPIN ";
const OEM_TABLE_ID: [u8; 8] = *b"LUPINVMM";
const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct AcpiSpec<'a> {
    /// Number of processors; APIC ids are `0..cpus`.
    pub cpus: u8,
    /// Guest RAM: NUMA node 0, with all processors.
    pub ram: &'a [Range],
    /// Pod memory sections: NUMA node 1, without processors. Empty: a plain VM.
    pub sections: &'a [Range],
}

/// The tables do not fit.
#[derive(Debug, thiserror::Error)]
#[error("ACPI tables need {needed} bytes, but the BIOS area has {room}")]
pub struct AcpiError {
    needed: usize,
    room: usize,
}

/// All tables as one block of bytes for [`ACPI_START`], the RSDP at its beginning.
pub fn build(spec: &AcpiSpec) -> Result<Vec<u8>, AcpiError> {
    let mut block = Block::default();
    block.reserve(Rsdp::len());
    let dsdt = block.add(&dsdt::dsdt());
    let facs = block.add(&acpi_tables::facs::FACS::new());
    let mut tables = vec![
        block.add(&fadt::fadt(dsdt, facs)),
        block.add(&madt::madt(spec.cpus)),
        block.add(&mcfg()),
    ];
    if !spec.sections.is_empty() {
        tables.push(block.add(&numa::srat(spec)));
        tables.push(block.add(&numa::slit()));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = block.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    block.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let (needed, room) = (block.bytes.len(), (ACPI_END - ACPI_START) as usize);
    if needed > room {
        return Err(AcpiError { needed, room });
    }
    Ok(block.bytes)
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM_START, 0, 0, PCI_BUS_COUNT - 1);
    mcfg
}

/// The block of tables under construction.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn reserve(&mut self, len: usize) {
        self.bytes.resize(self.bytes.len() + len, 0);
    }

    /// Appends a table and returns its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        // The FACS asks for 64 bytes, the others for 8 or less.
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}
