//! The robust process-shared mutex of the C library: what a program of one machine would use.

use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// A robust process-shared mutex in shared memory.
pub struct RobustMutex {
    mutex: NonNull<libc::pthread_mutex_t>,
}

// SAFETY: a process-shared mutex is made to be used by any thread.
unsafe impl Send for RobustMutex {}
// SAFETY: as above.
unsafe impl Sync for RobustMutex {}

const BYTES: usize = 4096;

impl RobustMutex {
    pub fn new() -> io::Result<Self> {
        // SAFETY: new memory at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mutex = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        // SAFETY: initialises the attributes, which the following calls are given, and then the
        // mutex in memory that is large enough, page aligned and nobody else's.
        let results = unsafe {
            let attributes = attributes.as_mut_ptr();
            [
                libc::pthread_mutexattr_init(attributes),
                libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED),
                libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST),
                libc::pthread_mutex_init(mutex.as_ptr(), attributes),
                libc::pthread_mutexattr_destroy(attributes),
            ]
        };
        match results.into_iter().find(|result| *result != 0) {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(Self { mutex }),
        }
    }

    /// Locks. Nobody dies in a benchmark, so anything but success is a defect of it.
    pub fn lock(&self) {
        // SAFETY: initialised by `new`, and mapped for as long as `self`.
        let result = unsafe { libc::pthread_mutex_lock(self.mutex.as_ptr()) };
        assert_eq!(result, 0, "pthread_mutex_lock");
    }

    /// Unlocks what the calling thread locked.
    pub fn unlock(&self) {
        // SAFETY: as in `lock`.
        let result = unsafe { libc::pthread_mutex_unlock(self.mutex.as_ptr()) };
        assert_eq!(result, 0, "pthread_mutex_unlock");
    }
}

impl Drop for RobustMutex {
    fn drop(&mut self) {
        // SAFETY: the memory that `new` mapped; no thread uses the mutex any more.
        unsafe { libc::munmap(self.mutex.as_ptr().cast(), BYTES) };
    }
}
