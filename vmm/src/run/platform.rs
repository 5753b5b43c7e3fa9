//! The virtual hardware that KVM itself provides: the VM, its interrupt controllers and timer,
//! and its vCPUs.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::RunError;
use crate::arch::layout::{KVM_IDENTITY_MAP_START, KVM_TSS_START, Range, ram_ranges};
use crate::arch::x86_64::{cpuid, msrs, regs, setup_error};
use crate::kvm::{self, KvmError};
use crate::memory::MemoryError;
use crate::vcpu::MAX_CPUS;

/// CPUID leaf with the number of physical address bits.
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
/// What processors without that leaf have.
const LEAST_ADDRESS_BITS: u32 = 36;

/// Checks the number of vCPUs against what this host's KVM allows.
pub(super) fn check_cpus(kvm: &Kvm, count: u8) -> Result<(), RunError> {
    let max = kvm.get_max_vcpus().min(usize::from(MAX_CPUS));
    if usize::from(count) > max {
        return Err(RunError::Argument(format!(
            "--cpus count={count}: this host's KVM allows at most {max}"
        )));
    }
    Ok(())
}

/// Checks that RAM and sections lie within the guest's physical address space.
pub(super) fn check_address_bits(
    cpuid: &CpuId,
    ram_size: u64,
    sections: &[Range],
) -> Result<(), MemoryError> {
    let bits = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == LEAF_ADDRESS_SIZES)
        .map_or(LEAST_ADDRESS_BITS, |e| e.eax & 0xff);
    let ram = ram_ranges(ram_size);
    let end = sections
        .iter()
        .chain(&ram)
        .map(|range| range.end())
        .max()
        .unwrap_or(0);
    if bits < 64 && end > 1 << bits {
        return Err(MemoryError::AddressBits { end, bits });
    }
    Ok(())
}

/// A VM with KVM's own pages, interrupt controllers and timer.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm::create_vm(kvm)?;
    let error = |what| move |source| KvmError::Create { what, source };
    vm.set_identity_map_address(KVM_IDENTITY_MAP_START)
        .map_err(error("place the identity map"))?;
    vm.set_tss_address(KVM_TSS_START as usize)
        .map_err(error("place the TSS"))?;
    vm.create_irq_chip()
        .map_err(error("create the interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(error("create the timer"))?;
    Ok(vm)
}

/// The CPUID table of each vCPU.
pub(super) fn cpuid_tables(kvm: &Kvm, vm: &VmFd, cpus: u8) -> Result<Vec<CpuId>, RunError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| KvmError::Create {
            what: "read its CPUID table",
            source,
        })?;
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    (0..cpus)
        .map(|index| {
            cpuid::for_vcpu(&supported, index, cpus, tsc_deadline)
                .map_err(|e| RunError::internal("CPUID", format!("{e:?}")))
        })
        .collect()
}

/// Creates the vCPUs, the first at the kernel's `entry`; the others wait for its start-up IPI.
pub(super) fn create_vcpus(
    vm: &VmFd,
    cpuids: &[CpuId],
    entry: u64,
) -> Result<Vec<VcpuFd>, RunError> {
    let mut fds = Vec::new();
    for (index, cpuid) in (0u8..).zip(cpuids) {
        let error = |what| setup_error(index, what);
        let fd = vm.create_vcpu(index.into()).map_err(error("create"))?;
        fd.set_cpuid2(cpuid).map_err(error("set CPUID"))?;
        msrs::setup(&fd, index)?;
        regs::setup_fpu(&fd, index)?;
        regs::setup_lapic(&fd, index)?;
        if index == 0 {
            regs::setup_long_mode(&fd, index, entry)?;
        }
        fds.push(fd);
    }
    Ok(fds)
}
