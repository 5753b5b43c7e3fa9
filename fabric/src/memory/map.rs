//! The mapping of the sections that a manager touches.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::Range;
use lupin_abi::node::NodeSection;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A shared, writable mapping of the first bytes of a pod memory.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain shared memory that is touched through atomics only (the abi's
// sections), from any thread; nothing in it is tied to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which must be that long: a page beyond the end of
    /// the file would be a SIGBUS in the manager.
    pub fn new(file: &File, len: u64) -> std::io::Result<Self> {
        let too_long = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| too_long())?;
        let size = NonZeroUsize::new(len).ok_or_else(too_long)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing, and no
        // Rust reference to it exists yet.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    /// The fabric section, at offset 0.
    pub fn fabric(&self) -> &FabricSection {
        assert!(self.len >= size_of::<FabricSection>());
        // SAFETY: the mapping is page aligned, at least as long as the section (asserted), lives
        // as long as `&self`, and this crate touches it through the abi's atomics only.
        unsafe { FabricSection::from_ptr(self.base.as_ptr()) }
    }

    /// The node section at `range`.
    ///
    /// # Panics
    /// If the range is not inside the mapping or not aligned: the caller takes it from a checked
    /// header and maps all node sections.
    pub fn node(&self, range: Range) -> &NodeSection {
        assert!(range.end() <= self.len as u64 && range.offset.is_multiple_of(4096));
        // SAFETY: inside the mapping and aligned (asserted); otherwise as in `fabric`.
        unsafe { NodeSection::from_ptr(self.base.as_ptr().add(range.offset as usize)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; references into it borrow `self`.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
