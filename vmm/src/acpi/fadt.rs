//! FADT: power-off and reset registers, and which legacy devices there are not.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::layout::{PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_CONTROL_PORT, SCI_GSI};
use crate::devices::power::RESET_VALUE;

/// There are devices on the ISA bus (the serial port).
const LEGACY_DEVICES: u16 = 1 << 0;
/// Do not look for a VGA adapter.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// Do not look for a CMOS clock: every read of the absent one would cost a second.
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

fn io(bits: u8, access: AccessSize, port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

pub(super) fn fadt(dsdt: u64, facs: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        // Kernels look for the FACS through the 32-bit pointer first.
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        // Set means: the button is not a fixed hardware feature. There are no buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = io(32, AccessSize::WordAccess, PM1A_EVENT_PORT);
    fadt.x_pm1a_cnt_blk = io(16, AccessSize::WordAccess, PM1A_CONTROL_PORT);
    fadt.reset_reg = io(8, AccessSize::ByteAccess, RESET_CONTROL_PORT);
    fadt.reset_value = RESET_VALUE;
    // Worse than the limits of the specification: no C2, no C3.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}
