//! Shared mappings of pod memory.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping, unmapped when dropped.
///
/// Other nodes store to the same memory, so it is handed out as a pointer for the views of
/// `lupin-abi`, or as atomic words, never as a slice of bytes.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain shared memory without thread affinity, accessed through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out only pointers and atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared.
    ///
    /// # Errors
    /// What `mmap` says, or `InvalidInput` for a length of zero or beyond the address space.
    pub fn new(fd: impl AsFd, offset: u64, len: u64, writable: bool) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len).map_err(invalid)?;
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(offset).map_err(invalid)?;
        let mut prot = ProtFlags::PROT_READ;
        prot.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, fd, offset) }?;
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    /// The first byte.
    pub fn base(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped; never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping as words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, `len / 8` words long, and lives as long as `self`;
        // any bit pattern is a valid word and atomics allow concurrent stores.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; every view of it borrows `self`.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
