//! Guest-physical memory: RAM, which devices may touch, and pod memory, which they may not.
//!
//! The two never meet in one object. Devices hold a `GuestMemoryMmap` of RAM only, so that no
//! virtio queue can be pointed at pod memory and no device thread can store there after a
//! fence; pod memory exists as memslots alone.

pub mod pod;
pub mod ram;
pub mod slots;

pub use pod::{PodMemory, PodMemorySpec};
pub use ram::MemorySpec;
pub use slots::{FenceReport, PodSlots};

use std::io;

/// An error while guest memory was set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The RAM size is not usable.
    #[error("--memory size={size}: {why}")]
    RamSize {
        /// Bytes asked for.
        size: u64,
        /// The rule that it breaks.
        why: String,
    },
    /// The host has no room for the RAM.
    #[error("cannot reserve {size} bytes of guest RAM: {source}")]
    Reserve {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// The pod memory cannot be opened or mapped.
    #[error("--pod-memory file={path}: {what}: {source}")]
    PodFile {
        /// The file.
        path: String,
        /// The operation that failed.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The pod memory is not what it should be.
    #[error("--pod-memory file={path}: {source}")]
    PodLayout {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: lupin_abi::AttachError,
    },
    /// The pod has no such node.
    #[error("--pod-memory node={node}: the pod in {path} has nodes 1 to {capacity}")]
    PodNode {
        /// The file.
        path: String,
        /// The node asked for.
        node: u32,
        /// How many nodes the pod has room for.
        capacity: u32,
    },
    /// Guest-physical addresses would exceed what the processor can address.
    #[error(
        "guest memory would end at {end:#x}, but this processor has {bits} physical address bits; \
         use less RAM or a smaller pool"
    )]
    AddressBits {
        /// First address after the last section or RAM range.
        end: u64,
        /// Physical address bits of the processor.
        bits: u32,
    },
    /// KVM refused a memslot.
    #[error("KVM memslot {slot} ({what}, {size:#x} bytes at {start:#x}): {source}")]
    Slot {
        /// Slot number.
        slot: u32,
        /// What lies there.
        what: &'static str,
        /// Guest-physical start.
        start: u64,
        /// Bytes.
        size: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

impl MemoryError {
    /// Whether the operator asked for something impossible, as opposed to a failure of ours or of
    /// the host.
    pub fn is_bad_argument(&self) -> bool {
        !matches!(self, Self::Slot { .. } | Self::Reserve { .. })
    }
}
