//! `lupin-vmm run`: one guest, from its arguments to its exit status.

pub mod config;
mod devices;
pub mod machine;
pub mod options;
pub mod outcome;
mod platform;

use std::error::Error;
use std::sync::Arc;
use std::{io, thread};

use lupin_fabric::sys::is_want;
use lupin_fabric::vmm_protocol::{ExitRecord, ExitStatus};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use config::RunArgs;
pub use machine::Machine;
use outcome::{Outcome, OutcomeSlot};

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// KVM is missing or unusable.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    /// The kernel, the initramfs or the command line cannot be used.
    #[error(transparent)]
    Load(#[from] crate::loader::LoadError),
    /// Guest RAM or pod memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// An argument that only this host cannot fulfil.
    #[error("{0}")]
    Argument(String),
    /// A file or socket named by an argument.
    #[error("{option}: {source}")]
    File {
        /// The option and what it names.
        option: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] crate::virtio::block::DiskError),
    /// A vCPU could not be set up.
    #[error(transparent)]
    Vcpu(#[from] crate::arch::x86_64::SetupError),
    /// The machine could not be assembled.
    #[error("{0}")]
    Internal(String),
}

impl RunError {
    /// The exit status that tells the caller whose fault it was: whoever asks for the same again
    /// gets [`ExitStatus::BadArguments`] and [`ExitStatus::NoKvm`] again.
    pub fn status(&self) -> ExitStatus {
        use crate::loader::LoadError;
        if is_want_of_host(self) {
            return ExitStatus::Internal;
        }
        match self {
            Self::Kvm(_) => ExitStatus::NoKvm,
            Self::Load(LoadError::Write { .. }) => ExitStatus::Internal,
            Self::Load(_) | Self::Argument(_) | Self::File { .. } | Self::Disk(_) => {
                ExitStatus::BadArguments
            }
            Self::Memory(e) if e.is_bad_argument() => ExitStatus::BadArguments,
            Self::Memory(_) | Self::Vcpu(_) | Self::Internal(_) => ExitStatus::Internal,
        }
    }

    /// An internal error, with what was being done.
    pub(crate) fn internal(what: &str, error: impl std::fmt::Display) -> Self {
        Self::Internal(format!("{what}: {error}"))
    }
}

/// Whether an error comes down to something that the host lacks now and may have later.
fn is_want_of_host(error: &(dyn Error + 'static)) -> bool {
    let of_kvm = |e: &kvm_ioctls::Error| is_want(&io::Error::from_raw_os_error(e.errno()));
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<io::Error>().is_some_and(is_want)
            || error.downcast_ref().is_some_and(of_kvm)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Runs a guest until it ends and returns the exit status of the process.
///
/// The outcome is logged and, with a runtime folder, written there as an [`ExitRecord`].
pub fn run(args: &RunArgs) -> ExitStatus {
    let slot = Arc::new(OutcomeSlot::default());
    // First of all, so that a run that is told to stop while it starts also says so.
    let result = watch_signals(Arc::clone(&slot))
        .map_err(|e| RunError::internal("signals", e))
        .and_then(|()| Machine::build(args, &slot));
    let outcome = match result {
        Ok(machine) => machine.run(),
        Err(e) => Outcome::new(e.status(), e.to_string()),
    };
    let name = args.name.as_deref().unwrap_or("guest");
    match outcome.status {
        ExitStatus::PowerOff | ExitStatus::Stopped | ExitStatus::Reset => {
            log::info!("{name}: {}", outcome.detail);
        }
        _ => log::error!("{name}: {}", outcome.detail),
    }
    if let Some(folder) = &args.runtime_dir {
        let record = ExitRecord {
            pid: std::process::id(),
            generation: args.pod_memory.as_ref().map_or(0, |pod| pod.generation),
            status: outcome.status,
            detail: outcome.detail,
        };
        if let Err(e) = record.write(folder) {
            log::error!(
                "{name}: cannot write the exit record to {}: {e}",
                folder.display()
            );
        }
    }
    outcome.status
}

/// SIGTERM and SIGINT end the run, and SIGHUP (the terminal is gone) unless whoever started us
/// had it ignored.
fn watch_signals(outcome: Arc<OutcomeSlot>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    if !is_ignored(SIGHUP)? {
        signals.add_signal(SIGHUP)?;
    }
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                let detail = format!("stopped by {name}");
                outcome.report(Outcome::new(ExitStatus::Stopped, detail));
            }
        })?;
    Ok(())
}

fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: `sigaction` is plain data, for which all-zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action changes nothing; the other pointer is to a live `sigaction`.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::KvmError;
    use crate::loader::LoadError;

    #[test]
    fn what_the_host_may_have_later_is_no_bad_argument() {
        let kernel = |errno| {
            RunError::from(LoadError::Open {
                option: "kernel",
                path: "k".into(),
                source: io::Error::from_raw_os_error(errno),
            })
        };
        let kvm = |errno| {
            RunError::from(KvmError::Create {
                what: "make a VM",
                source: kvm_ioctls::Error::new(errno),
            })
        };
        for errno in [libc::ENOMEM, libc::EMFILE, libc::ENFILE] {
            assert_eq!(kernel(errno).status(), ExitStatus::Internal);
            assert_eq!(kvm(errno).status(), ExitStatus::Internal);
        }
        assert_eq!(kernel(libc::ENOENT).status(), ExitStatus::BadArguments);
        assert_eq!(kernel(libc::EACCES).status(), ExitStatus::BadArguments);
        assert_eq!(kvm(libc::EINVAL).status(), ExitStatus::NoKvm);
    }
}
