use super::*;
use crate::arch::layout::{GIB, MIB};

fn spec<'a>(ram: &'a [Range], sections: &'a [Range]) -> AcpiSpec<'a> {
    AcpiSpec {
        cpus: 3,
        ram,
        sections,
    }
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().unwrap())
}

fn u64_at(block: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(block[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Walks RSDP -> XSDT -> tables as a kernel does and returns them by signature.
fn walk(block: &[u8]) -> Vec<(String, Vec<u8>)> {
    assert_eq!(&block[..8], b"RSD PTR ");
    assert_eq!(sum(&block[..20]), 0);
    assert_eq!(sum(&block[..36]), 0);
    let table = |address: u64| {
        let at = (address - ACPI_START) as usize;
        let bytes = block[at..at + u32_at(block, at + 4) as usize].to_vec();
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    let (signature, xsdt) = table(u64_at(block, 24));
    assert_eq!(signature, "XSDT");
    assert_eq!(sum(&xsdt), 0);
    let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|p| table(u64_at(p, 0))).collect();
    let fadt = tables[0].1.clone();
    tables.push(table(u64_at(&fadt, 140)));
    for (signature, bytes) in &tables {
        assert_eq!(sum(bytes), 0, "{signature}");
    }
    tables
}

#[test]
fn a_plain_vm_has_the_tables_of_a_pc() {
    let ram = [Range {
        start: 0,
        size: GIB,
    }];
    let tables = walk(&build(&spec(&ram, &[])).unwrap());
    let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
}

#[test]
fn sections_are_a_numa_node_without_processors() {
    let ram = [Range {
        start: 0,
        size: GIB,
    }];
    let sections = [
        Range {
            start: 5 * GIB,
            size: 2 * MIB,
        },
        Range {
            start: 6 * GIB,
            size: GIB,
        },
    ];
    let tables = walk(&build(&spec(&ram, &sections)).unwrap());
    let (_, srat) = tables.iter().find(|(name, _)| name == "SRAT").unwrap();
    let mut at = 48;
    let mut pod_memory = Vec::new();
    while at < srat.len() {
        let entry = &srat[at..at + srat[at + 1] as usize];
        match (entry[0], u32_at(entry, 2)) {
            (0, _) => assert_eq!(entry[2], 0, "every processor is in domain 0"),
            (1, 1) => pod_memory.push(Range {
                start: u64_at(entry, 8),
                size: u64_at(entry, 16),
            }),
            _ => {}
        }
        at += entry.len();
    }
    assert_eq!(pod_memory, sections);
}

#[test]
fn the_largest_machine_fits() {
    let ram = [Range {
        start: 0,
        size: GIB,
    }];
    let spec = AcpiSpec {
        cpus: 254,
        ram: &ram,
        sections: &[ram[0]],
    };
    assert!(build(&spec).unwrap().len() < (ACPI_END - ACPI_START) as usize);
}

#[test]
fn the_fadt_points_at_a_facs() {
    let ram = [Range {
        start: 0,
        size: GIB,
    }];
    let block = build(&spec(&ram, &[])).unwrap();
    let (_, fadt) = walk(&block).swap_remove(0);
    let facs = u32_at(&fadt, 36) as u64;
    assert_eq!(facs % 64, 0);
    assert_eq!(&block[(facs - ACPI_START) as usize..][..4], b"FACS");
}
