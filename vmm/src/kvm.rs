//! Opens `/dev/kvm` and checks that it can do what this VMM needs.

use std::io;

use kvm_ioctls::{Cap, Kvm, VmFd};

/// The version that KVM has had since Linux 2.6.22.
const API_VERSION: i32 = 12;

const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::ReadonlyMem, "read-only memory slots"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID tables"),
    (Cap::SetTssAddr, "TSS placement"),
];

/// KVM is missing or unusable.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm: {source}{hint}")]
    Open {
        /// What the system said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Too old or too new.
    #[error("/dev/kvm speaks API version {0}, not {API_VERSION}")]
    Version(i32),
    /// A feature is missing.
    #[error("/dev/kvm lacks {0}")]
    Lacks(&'static str),
    /// No VM could be created.
    #[error("/dev/kvm: cannot {what}: {source}")]
    Create {
        /// The operation that failed.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`KvmError`] says what is missing and what to do about it.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| {
        let source = io::Error::from_raw_os_error(e.errno());
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                " (load the module kvm_intel or kvm_amd, or enable virtualization in the firmware)"
            }
            io::ErrorKind::PermissionDenied => " (be root or a member of the group kvm)",
            _ => "",
        };
        KvmError::Open { source, hint }
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::Version(version));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Lacks(name)),
        None => Ok(kvm),
    }
}

/// Creates a VM. A signal that arrives meanwhile makes the kernel give up with `EINTR`.
///
/// # Errors
/// [`KvmError::Create`].
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => {
                return result.map_err(|source| KvmError::Create {
                    what: "create a VM",
                    source,
                });
            }
        }
    }
}
