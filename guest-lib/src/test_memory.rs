//! Sections of pod memory for unit tests, made of leaked zero pages.

use std::alloc::{Layout, alloc_zeroed};

use lupin_abi::fabric::FabricSection;
use lupin_abi::instances::InstancesSection;
use lupin_abi::layout::{FABRIC_SIZE, INSTANCES_SIZE};

fn zero_pages(size: u64) -> *const u8 {
    let layout = Layout::from_size_align(size as usize, 4096).unwrap();
    // SAFETY: no caller passes a size of 0.
    unsafe { alloc_zeroed(layout) }
}

pub(crate) fn fabric_section() -> &'static FabricSection {
    // SAFETY: leaked pages of the section's size, used through atomics only.
    unsafe { FabricSection::from_ptr(zero_pages(FABRIC_SIZE)) }
}

pub(crate) fn instances_section() -> &'static InstancesSection {
    // SAFETY: leaked pages of the section's size, used through atomics only.
    unsafe { InstancesSection::from_ptr(zero_pages(INSTANCES_SIZE)) }
}
