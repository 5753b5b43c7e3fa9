//! The memory map that the kernel gets in `boot_params`.

use linux_loader::loader::bootparam::boot_e820_entry;

use crate::arch::layout::{
    ACPI_END, ACPI_START, EBDA_START, HIMEM_START, PCI_ECAM_SIZE, PCI_ECAM_START, Range, ram_ranges,
};

const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI: u32 = 3;
/// Linux's own type for "specific purpose" memory: the kernel leaves it to the dax drivers.
/// It must come through this table: as a `memmap=` option it takes effect only after the
/// kernel has chosen where to decompress itself.
const SOFT_RESERVED: u32 = 0xefff_ffff;

/// The memory map of a guest with `ram_size` bytes of RAM and the given sections.
///
/// Every section has an entry of its own; the gaps between them keep the kernel from merging
/// entries of the same type.
pub fn map(ram_size: u64, sections: &[Range]) -> Vec<boot_e820_entry> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind: u32| {
        if end > start {
            map.push(boot_e820_entry {
                addr: start,
                size: end - start,
                r#type: kind,
            });
        }
    };
    for range in ram_ranges(ram_size) {
        if range.start == 0 {
            add(0, EBDA_START, RAM);
            add(EBDA_START, 0xa_0000, RESERVED);
            add(ACPI_START, ACPI_END, ACPI);
            add(HIMEM_START, range.end(), RAM);
            add(PCI_ECAM_START, PCI_ECAM_START + PCI_ECAM_SIZE, RESERVED);
        } else {
            add(range.start, range.end(), RAM);
        }
    }
    for section in sections {
        add(section.start, section.end(), SOFT_RESERVED);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::{GIB, MIB, place_sections};

    #[test]
    fn entries_are_sorted_disjoint_and_sections_never_touch() {
        for ram in [128 * MIB, 6 * GIB] {
            let sections = place_sections(ram, &[2 * MIB, 2 * MIB, 64 * MIB, GIB]);
            let map = map(ram, &sections);
            let mut end = 0;
            let mut last_kind = 0;
            for entry in &map {
                let (addr, size, kind) = (entry.addr, entry.size, entry.r#type);
                assert!(addr >= end);
                if kind == SOFT_RESERVED && last_kind == SOFT_RESERVED {
                    assert!(addr >= end + 2 * MIB);
                }
                (end, last_kind) = (addr + size, kind);
            }
            assert_eq!(map.iter().filter(|e| e.r#type == SOFT_RESERVED).count(), 4);
            let total: u64 = map.iter().filter(|e| e.r#type == RAM).map(|e| e.size).sum();
            assert_eq!(total, ram - (HIMEM_START - EBDA_START));
        }
    }

    #[test]
    fn a_plain_vm_has_no_soft_reserved_memory() {
        assert!(map(GIB, &[]).iter().all(|e| e.r#type != SOFT_RESERVED));
    }
}
