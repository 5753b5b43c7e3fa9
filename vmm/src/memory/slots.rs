//! KVM memslots, and the fence: the deletion of those through which a guest can store to pod
//! memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::{MemoryError, PodMemory};

/// Registers all of `ram` with KVM, in slots from 0 upwards. Returns the first free slot.
///
/// # Errors
/// [`MemoryError::Slot`].
pub fn map_ram(vm: &VmFd, ram: &GuestMemoryMmap) -> Result<u32, MemoryError> {
    let mut slot = 0;
    for region in ram.iter() {
        let start = region.start_addr().0;
        let size = region.len();
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: region
                .get_host_address(MemoryRegionAddress(0))
                .map_or(0, |address| address as u64),
        };
        // SAFETY: the host range is the whole of a mapped RAM region, which the machine keeps
        // for as long as the VM exists.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
            slot,
            what: "RAM",
            start,
            size,
            source,
        })?;
        slot += 1;
    }
    Ok(slot)
}

/// What a fence did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FenceReport {
    /// Writable slots that are deleted, now or by an earlier call.
    pub slots: u32,
    /// Nanoseconds that this call spent deleting; 0 if an earlier one had done it.
    pub nanos: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    number: u32,
    what: &'static str,
    start: u64,
    size: u64,
}

/// The memslots of pod memory.
///
/// Any thread may call [`fence`](Self::fence) at any time, with vCPUs running; it takes no lock
/// but its own.
#[derive(Debug)]
pub struct PodSlots {
    vm: Arc<VmFd>,
    /// Those still there. Held while slots are deleted, so that a second caller returns only
    /// when the fence is complete.
    writable: Mutex<Vec<Slot>>,
    total: u32,
    fenced: AtomicBool,
    /// Keeps the mappings that the slots refer to.
    _memory: Option<Arc<PodMemory>>,
}

impl PodSlots {
    /// No pod memory: a fence finds nothing to do.
    pub fn none(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            writable: Mutex::default(),
            total: 0,
            fenced: AtomicBool::new(false),
            _memory: None,
        }
    }

    /// Registers the sections of `memory` with KVM, in slots from `first_slot` upwards, the
    /// fabric section read-only.
    ///
    /// # Errors
    /// [`MemoryError::Slot`].
    pub fn map(
        vm: Arc<VmFd>,
        memory: Arc<PodMemory>,
        first_slot: u32,
    ) -> Result<Self, MemoryError> {
        let mut writable = Vec::new();
        for (number, section) in (first_slot..).zip(&memory.sections) {
            let slot = Slot {
                number,
                what: section.kind.name(),
                start: section.guest.start,
                size: section.guest.size,
            };
            let region = kvm_userspace_memory_region {
                slot: number,
                flags: if section.writable {
                    0
                } else {
                    KVM_MEM_READONLY
                },
                guest_phys_addr: slot.start,
                memory_size: slot.size,
                userspace_addr: section.host_address(),
            };
            // SAFETY: the host range is a whole section's mapping, which `_memory` keeps for as
            // long as this value; the machine drops it after the vCPUs are gone.
            unsafe { vm.set_user_memory_region(region) }.map_err(slot_error(slot))?;
            if section.writable {
                writable.push(slot);
            }
        }
        Ok(Self {
            vm,
            total: writable.len() as u32,
            writable: Mutex::new(writable),
            fenced: AtomicBool::new(false),
            _memory: Some(memory),
        })
    }

    /// Deletes the writable slots. When it returns `Ok`, no store of the guest reaches pod
    /// memory any more: KVM removes the mappings and flushes the TLBs of running vCPUs before
    /// the ioctl returns. Idempotent.
    ///
    /// # Errors
    /// [`MemoryError::Slot`] for the first slot that KVM did not delete; the others are
    /// deleted all the same, and another call tries again.
    pub fn fence(&self) -> Result<FenceReport, MemoryError> {
        let started = Instant::now();
        // A panic cannot leave the list half changed; what it names is still there.
        let mut writable = self.writable.lock().unwrap_or_else(PoisonError::into_inner);
        let had_work = !writable.is_empty();
        let mut failed = None;
        writable.retain(|slot| match self.delete(slot) {
            Ok(()) => false,
            Err(error) => {
                failed.get_or_insert(error);
                true
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        // Release: who sees the flag (Acquire) may rely on the deletions.
        self.fenced.store(true, Ordering::Release);
        let nanos = if had_work {
            started.elapsed().as_nanos() as u64
        } else {
            0
        };
        Ok(FenceReport {
            slots: self.total,
            nanos,
        })
    }

    /// Whether a fence has completed.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    fn delete(&self, slot: &Slot) -> Result<(), MemoryError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            guest_phys_addr: slot.start,
            // Size 0 deletes.
            ..Default::default()
        };
        // SAFETY: a deletion refers to no host memory.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(slot_error(*slot))
    }
}

fn slot_error(slot: Slot) -> impl FnOnce(kvm_ioctls::Error) -> MemoryError {
    move |source| MemoryError::Slot {
        slot: slot.number,
        what: slot.what,
        start: slot.start,
        size: slot.size,
        source,
    }
}
