//! Registers, page tables and local APIC of a vCPU as the 64-bit boot protocol asks:
//! long mode, identity-mapped, flat segments, interrupts off, `rsi` = `boot_params`.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{
    BOOT_GDT_START, BOOT_PD_START, BOOT_PDPT_START, BOOT_PML4_START, BOOT_STACK_POINTER,
    ZERO_PAGE_START,
};
use super::{SetupError, setup_error};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;

/// Selector of the code segment in the boot protocol (`__BOOT_CS`).
const BOOT_CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments (`__BOOT_DS`).
const BOOT_DATA_SELECTOR: u16 = 0x18;

/// null, unused, 64-bit code, flat data.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 0x7;
const APIC_MODE_NMI: u32 = 0x4;

/// Writes the descriptor table and the page tables that every boot vCPU uses.
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (i, descriptor) in GDT.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(BOOT_GDT_START + i as u64 * 8))?;
    }
    let table = PTE_PRESENT | PTE_WRITABLE;
    memory.write_obj(BOOT_PDPT_START | table, GuestAddress(BOOT_PML4_START))?;
    for gib in 0..4u64 {
        let directory = BOOT_PD_START + gib * 4096;
        memory.write_obj(directory | table, GuestAddress(BOOT_PDPT_START + gib * 8))?;
        for entry in 0..512u64 {
            let page = (gib << 30) | (entry << 21);
            memory.write_obj(
                page | table | PTE_LARGE,
                GuestAddress(directory + entry * 8),
            )?;
        }
    }
    Ok(())
}

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// Puts a vCPU into long mode on the tables of [`write_boot_tables`], at `entry`.
///
/// Only the boot processor needs it: the others wait for INIT and SIPI.
pub fn setup_long_mode(vcpu: &VcpuFd, index: u8, entry: u64) -> Result<(), SetupError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(setup_error(index, "get special registers"))?;
    let data = segment(BOOT_DATA_SELECTOR, false);
    sregs.cs = segment(BOOT_CODE_SELECTOR, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy TSS must be present in long mode.
    sregs.tr.type_ = 0xb;
    sregs.gdt.base = BOOT_GDT_START;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = BOOT_PML4_START;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(setup_error(index, "set special registers"))?;
    let regs = kvm_regs {
        rflags: 0x2,
        rip: entry,
        rsp: BOOT_STACK_POINTER,
        rbp: BOOT_STACK_POINTER,
        rsi: ZERO_PAGE_START,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(setup_error(index, "set registers"))
}

/// Sets the FPU to its state after reset.
pub fn setup_fpu(vcpu: &VcpuFd, index: u8) -> Result<(), SetupError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(setup_error(index, "set FPU"))
}

/// Wires the local interrupt pins as firmware does: the PIC to LINT0, NMI to LINT1.
pub fn setup_lapic(vcpu: &VcpuFd, index: u8) -> Result<(), SetupError> {
    let mut lapic = vcpu
        .get_lapic()
        .map_err(setup_error(index, "get local APIC"))?;
    for (register, mode) in [
        (APIC_LVT_LINT0, APIC_MODE_EXTINT),
        (APIC_LVT_LINT1, APIC_MODE_NMI),
    ] {
        let bytes: [u8; 4] = std::array::from_fn(|i| lapic.regs[register + i] as u8);
        let value = (u32::from_le_bytes(bytes) & !0x700) | (mode << 8);
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = byte as _;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(setup_error(index, "set local APIC"))
}
