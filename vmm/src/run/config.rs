//! The arguments of `lupin-vmm run`.

use std::path::PathBuf;

use crate::devices::serial::SerialSpec;
use crate::memory::{MemorySpec, PodMemorySpec};
use crate::vcpu::CpuSpec;
use crate::virtio::block::DiskSpec;

/// Run one guest in this process until it ends.
///
/// The exit status says how it ended: 0 power-off, 1 internal error, 2 bad arguments,
/// 3 guest reset, 4 guest panic, 5 guest crash, 6 stopped by request (SIGTERM, SIGINT, control
/// socket), 7 KVM missing or unusable.
///
/// While the guest starts, the VMM tries whether this KVM can run a kernel at all, and gives up
/// if it cannot. LUPIN_VMM_KVM_CHECK=off leaves that out, for guests that are no kernels.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Linux kernel: a bzImage with a 64-bit entry point, as distributions ship it
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,

    /// Initramfs for the kernel
    #[arg(long, value_name = "PATH")]
    pub initramfs: PathBuf,

    /// Added to the kernel command line; the last of two equal parameters wins
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,

    /// Number of vCPUs
    #[arg(long, value_name = "count=N", default_value = "count=1")]
    pub cpus: CpuSpec,

    /// Guest RAM: a multiple of 4 KiB with suffix K, M or G
    #[arg(long, value_name = "size=SIZE", default_value = "size=256M")]
    pub memory: MemorySpec,

    /// Formatted pod memory, which of its nodes this guest is, and which life of it
    /// [default: none, a plain VM]
    #[arg(long, value_name = "file=PATH,node=ID,generation=G")]
    pub pod_memory: Option<PodMemorySpec>,

    /// Where ttyS0 leads; with tty, Ctrl-A x stops the guest and Ctrl-A Ctrl-A is Ctrl-A
    #[arg(long, value_name = "file=PATH|tty|null", default_value = "null")]
    pub serial: SerialSpec,

    /// A disk, a raw image or block device; may be given several times, for vda, vdb and so on.
    /// With overlay, FILE is only read and can be shared: what the guest writes goes to the
    /// overlay, which is begun anew and gone when the guest ends, unless keep=on
    #[arg(
        long = "disk",
        value_name = "path=FILE[,readonly=on][,overlay=FILE[,keep=on]][,id=TEXT]"
    )]
    pub disks: Vec<DiskSpec>,

    /// Existing folder for control.sock, agent.sock and exit.json [default: none of them]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// Name in log messages
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}
