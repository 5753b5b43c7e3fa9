//! Positioned file I/O straight to and from guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// Fills `memory` from `file` at `offset`.
///
/// # Errors
/// Of `pread`; `UnexpectedEof` if the file ends before `memory` does.
pub(super) fn read_at(file: &File, offset: u64, memory: &VolatileSlice) -> io::Result<()> {
    let guard = memory.ptr_guard_mut();
    let (start, len) = (guard.as_ptr(), guard.len());
    transfer(offset, len, io::ErrorKind::UnexpectedEof, |done, at| {
        // SAFETY: `start..start + len` is guest memory that `guard` keeps mapped, and `done` is
        // less than `len`. The kernel writes there; no reference to these bytes exists, because
        // guest memory is only ever accessed through volatile slices.
        unsafe { libc::pread(file.as_raw_fd(), start.add(done).cast(), len - done, at) }
    })
}

/// Writes `memory` into `file` at `offset`.
///
/// # Errors
/// Of `pwrite`; `WriteZero` if it makes no progress.
pub(super) fn write_at(file: &File, offset: u64, memory: &VolatileSlice) -> io::Result<()> {
    let guard = memory.ptr_guard();
    let (start, len) = (guard.as_ptr(), guard.len());
    transfer(offset, len, io::ErrorKind::WriteZero, |done, at| {
        // SAFETY: as in `read_at`, but the kernel only reads. The guest may change the bytes
        // meanwhile: then it wrote a mixture, and is the only one who sees it.
        unsafe { libc::pwrite(file.as_raw_fd(), start.add(done).cast(), len - done, at) }
    })
}

/// Calls `step` with bytes done so far and the file position until `len` bytes are done.
fn transfer(
    offset: u64,
    len: usize,
    at_end: io::ErrorKind,
    mut step: impl FnMut(usize, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let at = libc::off_t::try_from(offset + done as u64)
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        match step(done, at) {
            0 => return Err(at_end.into()),
            moved @ 1.. => done += moved.unsigned_abs(),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What to do with a range of a file that the guest no longer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// It reads as zero, and takes no space if the file system can do that.
    Punch,
    /// It reads as zero, and keeps its space.
    Zero,
}

/// Makes `len` bytes at `offset` zero.
///
/// # Errors
/// Of `fallocate`; file systems that know neither mode get zeros written.
pub(super) fn clear(file: &File, offset: u64, len: u64, how: Clear) -> io::Result<()> {
    let mode = libc::FALLOC_FL_KEEP_SIZE
        | match how {
            Clear::Punch => libc::FALLOC_FL_PUNCH_HOLE,
            Clear::Zero => libc::FALLOC_FL_ZERO_RANGE,
        };
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let at = libc::off_t::try_from(offset).map_err(too_large)?;
    let count = libc::off_t::try_from(len).map_err(too_large)?;
    // SAFETY: no memory is passed; the descriptor is open for as long as `file` is borrowed.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, at, count) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => write_zeros(file, offset, len),
        _ => Err(error),
    }
}

fn write_zeros(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while len > 0 {
        let piece = len.min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..piece as usize], offset)?;
        (offset, len) = (offset + piece, len - piece);
    }
    Ok(())
}
