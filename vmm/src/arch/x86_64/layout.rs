//! The guest-physical address map.
//!
//! ```text
//! 0x0000_0000  RAM; boot structures below 640 KiB, ACPI tables at 0xE0000,
//!              kernel from its preferred address, initramfs at the top
//! 0xC000_0000  PCI window (`_CRS` of the host bridge), 512 MiB
//! 0xE000_0000  ECAM: PCI configuration space of bus 0, 1 MiB
//! 0xFEC0_0000  IOAPIC, then local APICs at 0xFEE0_0000
//! 0xFFFB_C000  KVM's identity page and TSS (Intel hosts without unrestricted guest)
//! 4 GiB        the rest of RAM
//! above        pod memory sections, each with a gap before it
//! ```
//!
//! The sections are above all RAM so that a guest kernel's own placement (KASLR,
//! PCI BARs, crash kernels) never meets them.

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Size of a page and granularity of guest RAM, bytes.
pub const PAGE_SIZE: u64 = 4096;

/// End of the RAM that lies below the PCI window.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 4 * GIB;

/// Start of the memory window that the PCI host bridge hands out to BARs.
pub const PCI_MMIO_START: u64 = 0xC000_0000;
/// Size of the PCI memory window, bytes.
pub const PCI_MMIO_SIZE: u64 = 512 * MIB;
/// Start of the PCI Express configuration space (ECAM).
pub const PCI_ECAM_START: u64 = 0xE000_0000;
/// Number of PCI buses that ECAM covers.
pub const PCI_BUS_COUNT: u8 = 1;
/// Size of ECAM, bytes: 1 MiB for each bus.
pub const PCI_ECAM_SIZE: u64 = PCI_BUS_COUNT as u64 * MIB;

/// Registers of the in-kernel IOAPIC.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Registers of the local APICs.
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// One page for KVM's identity-mapped page table.
pub const KVM_IDENTITY_MAP_START: u64 = 0xFFFB_C000;
/// Three pages for KVM's TSS.
pub const KVM_TSS_START: u64 = 0xFFFB_D000;

/// Global descriptor table of the boot vCPU.
pub const BOOT_GDT_START: u64 = 0x500;
/// `struct boot_params` ("zero page").
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Page tables that identity-map the first 4 GiB: PML4, PDPT, four PDs.
pub const BOOT_PML4_START: u64 = 0x9000;
/// Page directory pointer table.
pub const BOOT_PDPT_START: u64 = 0xA000;
/// First of four page directories.
pub const BOOT_PD_START: u64 = 0xB000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the command line, bytes, the terminating NUL included.
pub const CMDLINE_MAX: usize = 0x1_0000;

/// End of conventional memory (where a PC's EBDA starts).
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first, in the BIOS area where kernels also scan for it.
pub const ACPI_START: u64 = 0xE_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// Start of extended memory.
pub const HIMEM_START: u64 = 0x10_0000;

/// I/O ports of the first serial port (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of I/O ports of a 16550.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Interrupt line of COM1.
pub const SERIAL_GSI: u32 = 4;
/// ACPI PM1a event block (4 bytes).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// ACPI PM1a control register (2 bytes).
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Interrupt line of ACPI's SCI. Nothing raises it; ACPI insists that it exists.
pub const SCI_GSI: u32 = 9;
/// PIIX-style reset control register; also ACPI's reset register.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// Command and status port of the keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Alignment of every pod memory section: the granularity of devdax.
pub const SECTION_ALIGN: u64 = 2 * MIB;
/// Least distance between two sections, and between RAM and the first: soft-reserved
/// ranges that touch are merged by the guest kernel into one dax region.
pub const SECTION_GAP: u64 = 2 * MIB;
/// A section of at least this size starts at a multiple of it where that costs only
/// address space: binding dax with 1 GiB alignment is an order of magnitude cheaper.
pub const SECTION_HUGE_ALIGN: u64 = GIB;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Number of bytes.
    pub size: u64,
}

impl Range {
    /// The first address after the range.
    pub const fn end(&self) -> u64 {
        self.start + self.size
    }

    /// Whether `address` lies in the range.
    pub const fn contains(&self, address: u64) -> bool {
        address >= self.start && address - self.start < self.size
    }
}

/// Splits `size` bytes of RAM around the PCI window and the APICs.
pub fn ram_ranges(size: u64) -> Vec<Range> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![Range {
        start: 0,
        size: low,
    }];
    if size > low {
        ranges.push(Range {
            start: HIGH_RAM_START,
            size: size - low,
        });
    }
    ranges
}

/// Places sections of the given sizes above `size` bytes of RAM, in order.
///
/// Every section is [`SECTION_ALIGN`]ed, those of 1 GiB and more [`SECTION_HUGE_ALIGN`]ed,
/// and at least [`SECTION_GAP`] after what precedes it.
pub fn place_sections(ram_size: u64, sizes: &[u64]) -> Vec<Range> {
    let ram_end = ram_ranges(ram_size).last().map_or(0, Range::end);
    let mut next = ram_end.max(HIGH_RAM_START);
    sizes
        .iter()
        .map(|&size| {
            let align = if size >= SECTION_HUGE_ALIGN {
                SECTION_HUGE_ALIGN
            } else {
                SECTION_ALIGN
            };
            let start = (next + SECTION_GAP).next_multiple_of(align);
            next = start + size;
            Range { start, size }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_one_range() {
        assert_eq!(
            ram_ranges(256 * MIB),
            [Range {
                start: 0,
                size: 256 * MIB
            }]
        );
        assert_eq!(ram_ranges(LOW_RAM_END).len(), 1);
    }

    #[test]
    fn large_ram_continues_at_4_gib() {
        let ranges = ram_ranges(8 * GIB);
        assert_eq!(ranges[0].end(), LOW_RAM_END);
        assert_eq!(
            ranges[1],
            Range {
                start: HIGH_RAM_START,
                size: 8 * GIB - LOW_RAM_END
            }
        );
    }

    #[test]
    fn sections_are_aligned_apart_and_above_ram() {
        for ram in [64 * MIB, LOW_RAM_END, 5 * GIB + 4096] {
            let sizes = [2 * MIB, 4 * MIB, 62 * MIB, 2 * GIB];
            let sections = place_sections(ram, &sizes);
            let mut end = ram_ranges(ram).last().unwrap().end().max(HIGH_RAM_START);
            for (section, size) in sections.iter().zip(sizes) {
                assert_eq!(section.size, size);
                assert_eq!(section.start % SECTION_ALIGN, 0);
                assert!(section.start >= end + SECTION_GAP);
                end = section.end();
            }
            assert_eq!(sections[3].start % GIB, 0);
        }
    }

    #[test]
    fn fixed_windows_are_disjoint() {
        let windows = [
            (PCI_MMIO_START, PCI_MMIO_SIZE),
            (PCI_ECAM_START, PCI_ECAM_SIZE),
            (IOAPIC_START, PAGE_SIZE),
            (LAPIC_START, PAGE_SIZE),
            (KVM_IDENTITY_MAP_START, PAGE_SIZE),
            (KVM_TSS_START, 3 * PAGE_SIZE),
        ];
        let mut end = LOW_RAM_END;
        for (start, size) in windows {
            assert!(start >= end, "{start:#x}");
            end = start + size;
        }
        assert!(end <= HIGH_RAM_START);
    }
}
