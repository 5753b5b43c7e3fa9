//! Model-specific registers at boot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{SetupError, setup_error};

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, fixed ranges off, everything write-back. Without it a guest takes memory
/// that no variable MTRR covers, pod memory among it, for uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// Sets the registers that firmware would have set.
pub fn setup(vcpu: &VcpuFd, index: u8) -> Result<(), SetupError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("two entries are below KVM's limit");
    let written = vcpu
        .set_msrs(&msrs)
        .map_err(setup_error(index, "set MSRs"))?;
    if written != entries.len() {
        // KVM stops at the first register that it refuses.
        log::warn!(
            "vCPU {index}: KVM refused MSR {:#x}",
            entries[written].index
        );
    }
    Ok(())
}
