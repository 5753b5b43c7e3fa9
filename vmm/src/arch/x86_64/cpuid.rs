//! CPUID: the host's features with the topology of this guest.
//!
//! KVM reports what the host's processor and KVM itself can do. Everything that describes
//! *where* a processor sits (APIC id, cores in a package, cache sharing) is still that of
//! the host thread which asked, so it is rewritten: one package, one thread for each core,
//! APIC id = vCPU index. Both vendors' leaves are handled, as the host decides the vendor.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_VENDOR: u32 = 0x0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE_INTEL: u32 = 0x4;
const LEAF_PERFMON: u32 = 0xA;
const LEAF_TOPOLOGY: u32 = 0xB;
const LEAF_TOPOLOGY_V2: u32 = 0x1F;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_CACHE_AMD: u32 = 0x8000_001D;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001E;
const LEAF_PERFMON_AMD: u32 = 0x8000_0022;
const LEAF_TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_PERFCTR_CORE: u32 = 1 << 23;
const EXTENDED_ECX_PERFCTR_NB: u32 = 1 << 24;

/// The number of low APIC id bits that tell the cores of a package apart.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn is_amd(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|e| {
        // The first four letters of "AuthenticAMD" and "HygonGenuine".
        e.function == LEAF_VENDOR && (e.ebx == 0x6874_7541 || e.ebx == 0x6f67_7948)
    })
}

/// Derives the CPUID table of vCPU `index` of `cpus` from what KVM supports.
///
/// # Errors
/// Fails when the table has no room for the topology leaves, which KVM's limit of entries
/// does not allow for the tables it reports itself.
pub fn for_vcpu(
    supported: &CpuId,
    index: u8,
    cpus: u8,
    tsc_deadline_timer: bool,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let apic_id = u32::from(index);
    let count = u32::from(cpus);
    let amd = is_amd(supported);
    let max_leaf = supported
        .as_slice()
        .iter()
        .find(|e| e.function == LEAF_VENDOR)
        .map_or(0, |e| e.eax);

    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|e| {
            !matches!(
                e.function,
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_TOPOLOGY_AMD_V2
            )
        })
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (apic_id << 24);
                entry.ecx |= FEATURES_ECX_HYPERVISOR | FEATURES_ECX_X2APIC;
                if tsc_deadline_timer {
                    entry.ecx |= FEATURES_ECX_TSC_DEADLINE;
                }
                if cpus > 1 {
                    entry.edx |= FEATURES_EDX_HTT;
                } else {
                    entry.edx &= !FEATURES_EDX_HTT;
                }
            }
            LEAF_CACHE_INTEL if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff)
                    | (sharing(entry.eax, count) << 14)
                    | (((1 << core_bits(cpus)) - 1) << 26);
            }
            // No virtual performance counters: nobody here needs them, and each would be one
            // more piece of host state to keep apart.
            LEAF_PERFMON | LEAF_PERFMON_AMD => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            LEAF_EXTENDED_FEATURES => {
                entry.ecx &= !(EXTENDED_ECX_PERFCTR_CORE | EXTENDED_ECX_PERFCTR_NB);
            }
            LEAF_ADDRESS_SIZES if amd => {
                entry.ecx = (core_bits(cpus) << 12) | (count - 1);
            }
            LEAF_CACHE_AMD if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | (sharing(entry.eax, count) << 14);
            }
            LEAF_TOPOLOGY_AMD => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (apic_id, apic_id & 0xff, 0, 0);
            }
            _ => {}
        }
    }
    if max_leaf >= LEAF_TOPOLOGY {
        // Sub-leaf 0: threads of a core (type 1); 1: cores of the package (type 2); 2: end.
        for (level, (shift, processors, kind)) in
            [(0, 1, 1), (core_bits(cpus), count, 2), (0, 0, 0)]
                .into_iter()
                .enumerate()
        {
            entries.push(kvm_cpuid_entry2 {
                function: LEAF_TOPOLOGY,
                index: level as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: level as u32 | (kind << 8),
                edx: apic_id,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries)
}

/// Encodes how many processors share a cache: private up to level 2, then all.
fn sharing(eax: u32, cpus: u32) -> u32 {
    let level = (eax >> 5) & 0x7;
    if level >= 3 { cpus - 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ..Default::default()
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .expect("leaf present")
    }

    #[test]
    fn topology_is_one_core_per_vcpu() {
        let host = CpuId::from_entries(&[
            entry(LEAF_VENDOR, 0x10, 0x6874_7541),
            entry(LEAF_FEATURES, 0, 0x3f10_0800),
            entry(LEAF_PERFMON, 7, 7),
            entry(LEAF_TOPOLOGY, 9, 9),
            entry(LEAF_ADDRESS_SIZES, 0, 0),
            entry(LEAF_TOPOLOGY_AMD, 0x3f, 0x101),
        ])
        .unwrap();
        let guest = for_vcpu(&host, 2, 3, true).unwrap();
        let features = find(&guest, LEAF_FEATURES, 0);
        assert_eq!(features.ebx, 0x0203_0800);
        assert_ne!(features.ecx & FEATURES_ECX_HYPERVISOR, 0);
        assert_ne!(features.edx & FEATURES_EDX_HTT, 0);
        assert_eq!(find(&guest, LEAF_PERFMON, 0).eax, 0);
        let cores = find(&guest, LEAF_TOPOLOGY, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        assert_eq!(find(&guest, LEAF_ADDRESS_SIZES, 0).ecx, (2 << 12) | 2);
        assert_eq!(find(&guest, LEAF_TOPOLOGY_AMD, 0).eax, 2);
    }

    #[test]
    fn one_cpu_needs_no_core_bits() {
        assert_eq!(core_bits(1), 0);
        assert_eq!(core_bits(2), 1);
        assert_eq!(core_bits(5), 3);
    }
}
