//! Mapped shared memory, and the only ways to touch it.
//!
//! Another node may store to any byte at any time. So there is no `&[u8]` and no `&mut T` here:
//! what is read and written in place is atomic ([`PodShared`]), and everything else is copied in
//! or out word by word with atomic accesses. A copy that races with a writer gives torn bytes,
//! never undefined behaviour; protocols above (publish with `Release`, read with `Acquire`) see
//! to it that no copy races.

use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use crate::pod_safe::PodShared;
use crate::revocation::{Guard, GuardError, Opener, Revoked};

/// What a mapping may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads only. A store ends the process with SIGSEGV: that is the page tables at work.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// Why memory cannot be mapped or touched.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// `mmap` refused.
    #[error("cannot map {len} bytes at offset {offset} of the shared memory: {source}")]
    Map {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// An access beyond the end.
    #[error("{len} bytes at offset {offset} are not inside a mapping of {mapped} bytes")]
    OutOfBounds {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Bytes mapped.
        mapped: u64,
    },
    /// An offset that the type cannot lie at.
    #[error("offset {offset} is not a multiple of {align}")]
    Unaligned {
        /// Offset in bytes.
        offset: u64,
        /// Alignment in bytes.
        align: u64,
    },
    /// Something that should lie in the mapping lies elsewhere.
    #[error("the pointer or its target does not lie in the segment")]
    Foreign,
}

/// A range of bytes as single bytes, whole words, and single bytes.
type Split<'m> = (&'m [AtomicU8], &'m [AtomicU64], &'m [AtomicU8]);

/// A shared mapping of a file or device; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    access: Access,
    guard: Option<Guard>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and all access is atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` on. The descriptor may be closed afterwards.
    ///
    /// # Errors
    /// [`ShmError::Map`] with the reason of `mmap`.
    pub fn new(fd: impl AsFd, offset: u64, len: u64, access: Access) -> Result<Self, ShmError> {
        let failed = |source| ShmError::Map {
            offset,
            len,
            source,
        };
        let invalid = || failed(io::Error::from_raw_os_error(libc::EINVAL));
        let (Ok(size), Ok(at)) = (usize::try_from(len), libc::off_t::try_from(offset)) else {
            return Err(invalid());
        };
        if size > isize::MAX as usize {
            return Err(invalid());
        }
        // SAFETY: a new mapping at an address of the kernel's choice; no memory of ours changes.
        let base = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                size,
                protection(access),
                libc::MAP_SHARED,
                fd.as_fd().as_raw_fd(),
                at,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        Ok(Self {
            base,
            len: size,
            access,
            guard: None,
        })
    }

    /// Maps parts of files or devices, each a descriptor, an offset and a length in bytes, one
    /// after the other, so that offsets go on from one part to the next. Lengths are multiples of
    /// the page size; of several parts, the first begins at an address that is a multiple of
    /// 2 MiB, which devices ask for. The descriptors may be closed afterwards.
    ///
    /// # Errors
    /// [`ShmError::Map`] with the reason of `mmap`; nothing stays mapped then.
    pub fn of_parts<F: AsFd>(parts: &[(F, u64, u64)], access: Access) -> Result<Self, ShmError> {
        if let [(fd, offset, len)] = parts {
            return Self::new(fd, *offset, *len, access);
        }
        let lengths = parts.iter().map(|(_, _, len)| *len);
        let len = lengths.fold(0, u64::saturating_add);
        // Owns the addresses until it is filled, and afterwards.
        let mut whole = Self::reserve(len, access)?;
        let mut at = 0;
        for (fd, offset, len) in parts {
            whole.place(at, fd.as_fd().as_raw_fd(), *offset, *len)?;
            at += *len as usize;
        }
        Ok(whole)
    }

    /// Addresses without memory, aligned for devices.
    fn reserve(len: u64, access: Access) -> Result<Self, ShmError> {
        let failed = |source| ShmError::Map {
            offset: 0,
            len,
            source,
        };
        let invalid = || failed(io::Error::from_raw_os_error(libc::EINVAL));
        let align = lupin_abi::layout::GRANULE as usize;
        let size = usize::try_from(len).ok().filter(|size| *size > 0);
        let size = size.ok_or_else(invalid)?;
        let room = size
            .checked_add(align)
            .filter(|r| *r <= isize::MAX as usize);
        let room = room.ok_or_else(invalid)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; no memory of ours changes.
        let start =
            unsafe { libc::mmap(core::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let before = start.addr().wrapping_neg() % align;
        let base = start.wrapping_byte_add(before);
        let after = room - before - size;
        // SAFETY: both ranges lie in what was mapped just now, outside of what is kept; an empty
        // one is refused by the kernel.
        unsafe {
            libc::munmap(start, before);
            libc::munmap(base.wrapping_byte_add(size), after);
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        Ok(Self {
            base,
            len: size,
            access,
            guard: None,
        })
    }

    /// Maps a part over addresses of this mapping, from byte `at` on.
    fn place(&mut self, at: usize, fd: libc::c_int, offset: u64, len: u64) -> Result<(), ShmError> {
        let failed = |source| ShmError::Map {
            offset,
            len,
            source,
        };
        let (Ok(size), Ok(from)) = (usize::try_from(len), libc::off_t::try_from(offset)) else {
            return Err(failed(io::Error::from_raw_os_error(libc::EINVAL)));
        };
        // The lengths of the parts add up to that of the whole.
        debug_assert!(at + size <= self.len);
        // SAFETY: the range lies in this mapping, to which nobody has a reference yet.
        let placed = unsafe {
            libc::mmap(
                self.base.as_ptr().add(at).cast(),
                size,
                protection(self.access),
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd,
                from,
            )
        };
        match placed == libc::MAP_FAILED {
            true => Err(failed(io::Error::last_os_error())),
            false => Ok(()),
        }
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether nothing is mapped (never true: the kernel refuses it).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// From here on, a revocation is an error that [`intact`](Self::intact) tells, and no longer
    /// the end of the process. See [`revocation`](crate::revocation) for what that means.
    ///
    /// # Errors
    /// [`GuardError`]; the mapping is as it was.
    pub fn guard(&mut self) -> Result<(), GuardError> {
        match &self.guard {
            Some(guard) => guard.begin(),
            None => self.guard = Some(Guard::new(self.base.as_ptr().addr(), self.len)?),
        }
        Ok(())
    }

    /// Has the mapping, of which nobody has a reference yet, mapped anew by what `open` gives when
    /// it is taken away.
    pub(crate) fn restored_by(&mut self, open: Opener) -> Result<(), GuardError> {
        let base = self.base.as_ptr().addr();
        self.guard = Some(Guard::restoring(base, self.len, self.access, open)?);
        Ok(())
    }

    /// Whether it is guarded.
    pub fn is_guarded(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::has_begun)
    }

    /// Whether all accesses of this thread up to here met what is in the shared memory. Always so
    /// for a mapping that is not guarded: its revocation would have ended the process.
    ///
    /// # Errors
    /// [`Revoked`].
    pub fn intact(&self) -> Result<(), Revoked> {
        // The signal of an access comes in its place in the program; the fence keeps the compiler
        // from moving an access behind the look.
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
        match self.guard.as_ref().is_some_and(Guard::is_revoked) {
            true => Err(Revoked),
            false => Ok(()),
        }
    }

    /// What the mapping may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Where the mapping begins in this process, page aligned. For the views of
    /// [`lupin_abi`], whose `from_ptr` says what else must hold.
    pub fn as_ptr(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// A value of atomics at `offset`.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`].
    #[inline]
    pub fn get<T: PodShared>(&self, offset: u64) -> Result<&T, ShmError> {
        let at = self.check(offset, size_of::<T>() as u64, align_of::<T>() as u64)?;
        // SAFETY: in bounds and aligned, mapped for as long as `self`, and of atomics only, for
        // which every bit pattern is valid and stores by others are allowed (`PodShared`).
        Ok(unsafe { &*self.base.as_ptr().add(at).cast::<T>() })
    }

    /// Where a value of this mapping lies in it, in bytes from its start.
    ///
    /// # Errors
    /// [`ShmError::Foreign`] if it does not lie in this mapping.
    pub fn offset_of<T>(&self, value: &T) -> Result<u64, ShmError> {
        let address = core::ptr::from_ref(value).addr();
        let offset = address.wrapping_sub(self.base.as_ptr().addr());
        match offset.checked_add(size_of::<T>()) {
            Some(end) if end <= self.len => Ok(offset as u64),
            _ => Err(ShmError::Foreign),
        }
    }

    /// `count` values of atomics, one after the other, from `offset` on.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`].
    pub fn get_slice<T: PodShared>(&self, offset: u64, count: u64) -> Result<&[T], ShmError> {
        let bytes = count.checked_mul(size_of::<T>() as u64);
        let bytes = bytes.ok_or_else(|| self.out_of_bounds(offset, u64::MAX))?;
        let at = self.check(offset, bytes, align_of::<T>() as u64)?;
        // SAFETY: as in `get`; `count` elements were checked, so they fit an isize.
        Ok(unsafe {
            core::slice::from_raw_parts(self.base.as_ptr().add(at).cast::<T>(), count as usize)
        })
    }

    /// Copies bytes out. `Relaxed` loads: whoever reads what another published has done an
    /// `Acquire` load before.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`]; `out` is untouched then.
    pub fn copy_out(&self, offset: u64, out: &mut [u8]) -> Result<(), ShmError> {
        let (head, words, tail) = self.split(offset, out.len())?;
        let (first, rest) = out.split_at_mut(head.len());
        let (middle, last) = rest.split_at_mut(words.len() * 8);
        load_bytes(head, first);
        for (chunk, word) in middle.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&crate::mem::load64(word, Ordering::Relaxed).to_ne_bytes());
        }
        load_bytes(tail, last);
        Ok(())
    }

    /// Copies bytes in. `Relaxed` stores: the caller publishes them with a `Release` store of
    /// its own.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`]; nothing is stored then.
    ///
    /// # Panics
    /// If the mapping is read-only: a mistake of the program and not of its input.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> Result<(), ShmError> {
        assert_eq!(
            self.access,
            Access::ReadWrite,
            "store to a read-only mapping"
        );
        let (head, words, tail) = self.split(offset, bytes.len())?;
        let (first, rest) = bytes.split_at(head.len());
        let (middle, last) = rest.split_at(words.len() * 8);
        store_bytes(head, first);
        for (chunk, word) in middle.chunks_exact(8).zip(words) {
            let mut value = [0; 8];
            value.copy_from_slice(chunk);
            crate::mem::fill64(word, u64::from_ne_bytes(value));
        }
        store_bytes(tail, last);
        Ok(())
    }

    /// The bytes before the first whole word, the words, and the bytes after them.
    fn split(&self, offset: u64, len: usize) -> Result<Split<'_>, ShmError> {
        // Mappings are page aligned, so offsets tell the alignment.
        let head = (offset.wrapping_neg() % 8).min(len as u64);
        let words = (len as u64 - head) / 8;
        let tail = len as u64 - head - words * 8;
        let after = self.check(offset, len as u64, 1)? as u64 + head;
        Ok((
            self.get_slice(offset, head)?,
            self.get_slice(if words == 0 { 0 } else { after }, words)?,
            self.get_slice(after + words * 8, tail)?,
        ))
    }

    #[inline]
    fn check(&self, offset: u64, len: u64, align: u64) -> Result<usize, ShmError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len as u64 => {}
            _ => return Err(self.out_of_bounds(offset, len)),
        }
        if !offset.is_multiple_of(align) {
            return Err(ShmError::Unaligned { offset, align });
        }
        Ok(offset as usize)
    }

    #[cold]
    fn out_of_bounds(&self, offset: u64, len: u64) -> ShmError {
        ShmError::OutOfBounds {
            offset,
            len,
            mapped: self.len as u64,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: the handler maps nothing where something else may be mapped next.
        self.guard = None;
        // SAFETY: `base` and `len` are what `mmap` gave; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
    }
}

pub(crate) fn protection(access: Access) -> libc::c_int {
    match access {
        Access::ReadOnly => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    }
}

fn load_bytes(cells: &[AtomicU8], out: &mut [u8]) {
    for (byte, cell) in out.iter_mut().zip(cells) {
        *byte = crate::mem::load8(cell, Ordering::Relaxed);
    }
}

fn store_bytes(cells: &[AtomicU8], bytes: &[u8]) {
    for (byte, cell) in bytes.iter().zip(cells) {
        crate::mem::fill8(cell, *byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn mapping(access: Access) -> Mapping {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..4096u32).map(|n| n as u8).collect();
        file.write_all(&bytes).unwrap();
        Mapping::new(&file, 0, 4096, access).unwrap()
    }

    #[test]
    fn copies_at_every_alignment_are_exact() {
        let m = mapping(Access::ReadWrite);
        for offset in 0..17u64 {
            for len in 0..40usize {
                let mut out = vec![0xaa; len];
                m.copy_out(offset, &mut out).unwrap();
                let expected: Vec<u8> = (0..len).map(|n| (n as u64 + offset) as u8).collect();
                assert_eq!(out, expected, "{offset} {len}");
            }
        }
        for offset in 0..17u64 {
            for len in 0..40usize {
                m.copy_in(1024, &[0; 128]).unwrap();
                let bytes: Vec<u8> = (0..len).map(|n| n as u8 + 1).collect();
                m.copy_in(1040 + offset, &bytes).unwrap();
                let mut all = [0u8; 128];
                m.copy_out(1024, &mut all).unwrap();
                let at = 16 + offset as usize;
                assert_eq!(&all[at..at + len], bytes);
                assert!(all[..at].iter().chain(&all[at + len..]).all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn nothing_beyond_the_end_is_touched() {
        let m = mapping(Access::ReadOnly);
        let mut out = [0; 8];
        assert!(m.copy_out(4088, &mut out).is_ok());
        for offset in [4089, 4096, 1 << 40, u64::MAX - 3] {
            assert!(matches!(
                m.copy_out(offset, &mut out),
                Err(ShmError::OutOfBounds { .. })
            ));
            assert!(m.get::<AtomicU64>(offset).is_err());
        }
        assert!(m.get_slice::<AtomicU64>(0, 512).is_ok());
        assert!(m.get_slice::<AtomicU64>(0, 513).is_err());
        assert!(m.get_slice::<AtomicU64>(8, u64::MAX / 8).is_err());
        assert!(m.get_slice::<AtomicU64>(8, u64::MAX).is_err());
        assert!(matches!(
            m.get::<AtomicU64>(4),
            Err(ShmError::Unaligned { align: 8, .. })
        ));
    }

    #[test]
    fn parts_lie_one_after_the_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * 4096).unwrap();
        let whole = Mapping::new(&file, 0, 4 * 4096, Access::ReadWrite).unwrap();
        for page in 0..4u8 {
            whole
                .copy_in(u64::from(page) * 4096, &[page; 4096])
                .unwrap();
        }
        let parts = [(&file, 3 * 4096, 4096), (&file, 0, 2 * 4096)];
        let mapped = Mapping::of_parts(&parts, Access::ReadWrite).unwrap();
        assert_eq!(
            (mapped.len(), mapped.as_ptr().addr() % (2 << 20)),
            (3 * 4096, 0)
        );
        let mut out = [9; 2];
        for (at, expected) in [(0, [3, 3]), (4095, [3, 0]), (2 * 4096 - 1, [0, 1])] {
            mapped.copy_out(at, &mut out).unwrap();
            assert_eq!(out, expected);
        }
        assert!(mapped.copy_out(3 * 4096 - 1, &mut out).is_err());
        mapped.copy_in(4095, &[7, 8]).unwrap();
        whole.copy_out(4 * 4096 - 2, &mut out).unwrap();
        assert_eq!(out, [3, 7]);
        let lengths = |a, b| {
            let parts = [(&file, 0, a), (&file, 0, b)];
            Mapping::of_parts(&parts, Access::ReadOnly).is_ok()
        };
        assert!(lengths(4096, 4096));
        assert!(!lengths(4096, u64::MAX - 4096) && !lengths(0, 0) && !lengths(4096, 0));
        assert!(Mapping::of_parts::<std::fs::File>(&[], Access::ReadOnly).is_err());
    }

    #[test]
    fn a_mapping_that_cannot_be_says_why() {
        let file = tempfile::tempfile().unwrap();
        for (offset, len) in [(0, 0), (1, 4096), (0, u64::MAX), (u64::MAX, 4096)] {
            let error = Mapping::new(&file, offset, len, Access::ReadOnly).unwrap_err();
            assert!(matches!(error, ShmError::Map { .. }), "{error}");
        }
    }
}
