//! x86-64: how a vCPU looks when the kernel's 64-bit entry point is reached.

pub mod cpuid;
pub mod layout;
pub mod msrs;
pub mod regs;

/// An error while a vCPU was given its initial state.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {index}: {what}: {source}")]
pub struct SetupError {
    /// The vCPU's index.
    pub index: u8,
    /// The KVM operation that failed.
    pub what: &'static str,
    /// What KVM said.
    pub source: kvm_ioctls::Error,
}

/// Attaches the vCPU index and the operation's name to a KVM error.
pub(crate) fn setup_error(
    index: u8,
    what: &'static str,
) -> impl FnOnce(kvm_ioctls::Error) -> SetupError {
    move |source| SetupError {
        index,
        what,
        source,
    }
}
