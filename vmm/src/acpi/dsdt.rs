//! DSDT: the PCI host bridge with its windows, the serial port, and `\_S5`.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::numa::LOCAL;
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::layout::{
    PCI_BUS_COUNT, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO_SIZE, PCI_MMIO_START, PM1A_EVENT_PORT,
    SERIAL_GSI, SERIAL_PORT, SERIAL_PORT_COUNT,
};
use crate::devices::power::SLEEP_TYPE_S5;

/// PCI configuration mechanism 1: address and data port.
const PCI_CONFIG_PORT: u16 = 0xcf8;
const PCI_CONFIG_PORTS: u8 = 8;

pub(super) fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    system_bus(&mut aml);
    // SLP_TYPa, SLP_TYPb, two reserved.
    let (s5, zero) = (SLEEP_TYPE_S5, 0u8);
    Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &zero, &zero])).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn system_bus(sink: &mut dyn AmlSink) {
    let zero = 0u8;
    // The host bridge. Its memory window ends far below pod memory, so that no BAR is ever
    // placed there. Functions have message-signalled interrupts only: no `_PRT`.
    let pci_hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let pci_cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let pci_segment = Name::new("_SEG".into(), &zero);
    let pci_uid = Name::new("_UID".into(), &zero);
    let pci_bus = Name::new("_BBN".into(), &zero);
    // Next to the processors, not to pod memory.
    let pci_proximity = Name::new("_PXM".into(), &LOCAL);
    let buses = AddressSpace::new_bus_number(0u16, u16::from(PCI_BUS_COUNT) - 1);
    let config = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, PCI_CONFIG_PORTS);
    let ports_low = AddressSpace::new_io(0u16, PCI_CONFIG_PORT - 1, None);
    let ports_high =
        AddressSpace::new_io(PCI_CONFIG_PORT + u16::from(PCI_CONFIG_PORTS), 0xffff, None);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO_START as u32,
        (PCI_MMIO_START + PCI_MMIO_SIZE - 1) as u32,
        None,
    );
    let pci_crs = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&buses, &config, &ports_low, &ports_high, &memory]),
    );
    let pci = Device::new(
        "PCI0".into(),
        vec![
            &pci_hid,
            &pci_cid,
            &pci_segment,
            &pci_uid,
            &pci_bus,
            &pci_proximity,
            &pci_crs,
        ],
    );

    // Motherboard resources: kernels use ECAM only where something has reserved it.
    let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let board_uid = Name::new("_UID".into(), &zero);
    let ecam = Memory32Fixed::new(true, PCI_ECAM_START as u32, PCI_ECAM_SIZE as u32);
    let power = IO::new(PM1A_EVENT_PORT, PM1A_EVENT_PORT, 1, 8);
    let board_crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &power]));
    let board = Device::new("MBRD".into(), vec![&board_hid, &board_uid, &board_crs]);

    let com_hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let com_uid = Name::new("_UID".into(), &zero);
    let com_interrupt = Interrupt::new(true, true, false, false, SERIAL_GSI);
    let com_ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORT_COUNT as u8);
    let com_crs = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&com_interrupt, &com_ports]),
    );
    let com = Device::new("COM1".into(), vec![&com_hid, &com_uid, &com_crs]);

    Scope::new("_SB_".into(), vec![&pci, &board, &com]).to_aml_bytes(sink);
}
