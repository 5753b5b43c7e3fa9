//! Memory that was taken from a whole node for the sake of one process, and that this process may
//! have again: mapped anew in the same place, under the very access that missed it.
//!
//! The handler of SIGBUS cannot ask an agent. It says what is wanted, and sleeps; one thread of the
//! process, which has nothing to do otherwise, opens the memory anew and maps it:
//!
//! ```text
//!   READY --a fault: the handler--> WANTED --opened--> MAPPING --mapped--> READY   the access is made again
//!                                     |                   |
//!                                     |                   +---in vain---> GONE    zeros, or the end
//!                                     +--refused, or too late-------------> GONE
//! ```

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{GuardError, SLOTS, Slot};
use crate::client::wake::Blocked;
use crate::shm::Access;

/// Nothing is mapped anew here.
pub(super) const NEVER: u32 = 0;
const READY: u32 = 1;
const WANTED: u32 = 2;
const MAPPING: u32 = 3;
const GONE: u32 = 4;

/// How long an access waits for its memory, in milliseconds. Tests change it.
static PATIENCE: AtomicU32 = AtomicU32::new(20_000);

fn patience() -> Duration {
    Duration::from_millis(PATIENCE.load(Ordering::Relaxed).into())
}

/// Parts of files or devices: descriptor, offset and length in bytes.
pub(crate) type Parts = Vec<(OwnedFd, u64, u64)>;
/// Opens anew what was mapped; `None` if this process may not have it any more.
pub(crate) type Opener = Box<dyn Fn() -> Option<Parts> + Send>;

/// What is mapped anew, and where.
struct Place {
    base: usize,
    len: usize,
    access: Access,
    open: Opener,
}

/// `None` once the mapping is dropped: nothing may be mapped there any more.
type Shared = Arc<Mutex<Option<Place>>>;

/// By the numbers of their slots.
static PLACES: Mutex<BTreeMap<usize, Shared>> = Mutex::new(BTreeMap::new());
/// The process that has the thread; 0 before. A process that was forked off has none.
static STARTED_BY: AtomicU32 = AtomicU32::new(0);
/// Counts what is wanted; the thread sleeps on it.
static CALLS: AtomicU32 = AtomicU32::new(0);

// No code panics in a critical section here but a foreign opener, which leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets what a slot names be mapped anew by what `open` gives; not in a process that was forked off
/// by one with the thread, for the locks above may be held by threads that it does not have.
pub(super) fn enter(slot: &'static Slot, access: Access, open: Opener) -> Result<(), GuardError> {
    if !start()? {
        return Ok(());
    }
    let place = Place {
        base: slot.base.load(Ordering::Relaxed),
        len: slot.len.load(Ordering::Relaxed),
        access,
        open,
    };
    lock(&PLACES).insert(number(slot), Arc::new(Mutex::new(Some(place))));
    slot.remap.store(READY, Ordering::Release);
    Ok(())
}

/// Nothing is mapped there any more once this returns.
pub(super) fn leave(slot: &'static Slot) {
    if slot.remap.load(Ordering::Acquire) == NEVER {
        return;
    }
    // A child of fork has no thread that could be at it, and no honest copy of the locks.
    if has_thread() {
        let place = lock(&PLACES).remove(&number(slot));
        if let Some(place) = place {
            *lock(&place) = None;
        }
    }
    slot.remap.store(NEVER, Ordering::Release);
}

/// Has the memory of a slot mapped anew. For the handler: waits, but takes no lock and allocates
/// nothing. False if it cannot be had.
pub(super) fn restore(slot: &Slot) -> bool {
    if !has_thread() {
        return false;
    }
    let wanted = slot
        .remap
        .compare_exchange(READY, WANTED, Ordering::AcqRel, Ordering::Acquire);
    if !matches!(wanted, Ok(_) | Err(WANTED | MAPPING)) {
        return false;
    }
    // Release: the thread that sees the call sees the wish.
    CALLS.fetch_add(1, Ordering::Release);
    futex_wake(&CALLS);
    // Reads the clock: a system call that is safe here.
    let deadline = Instant::now() + patience();
    loop {
        // Acquire: pairs with the Release of `serve_one`, which comes after the mapping.
        match slot.remap.load(Ordering::Acquire) {
            WANTED => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    // Nothing is mapped from here on where the caller puts something else.
                    move_on(slot, WANTED, GONE);
                } else {
                    futex_wait(&slot.remap, WANTED, Some(left));
                }
            }
            // A few system calls of a thread of this process.
            MAPPING => futex_wait(&slot.remap, MAPPING, None),
            outcome => return outcome == READY,
        }
    }
}

/// Changes what a slot is in, and says so to all who wait; false if it is in something else.
fn move_on(slot: &Slot, from: u32, to: u32) -> bool {
    let moved = slot
        .remap
        .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
    if moved.is_ok() {
        futex_wake(&slot.remap);
    }
    moved.is_ok()
}

fn has_thread() -> bool {
    // SAFETY: a system call without pointers. Not `std::process`, for the handler.
    let pid = unsafe { libc::getpid() }.unsigned_abs();
    STARTED_BY.load(Ordering::Acquire) == pid
}

fn number(slot: &'static Slot) -> usize {
    let offset = core::ptr::from_ref(slot).addr() - SLOTS.as_ptr().addr();
    offset / size_of::<Slot>()
}

/// Starts the thread, once in a process; false if another process has it.
fn start() -> Result<bool, GuardError> {
    let pid = std::process::id();
    let before = STARTED_BY.compare_exchange(0, pid, Ordering::AcqRel, Ordering::Acquire);
    if let Err(starter) = before {
        return Ok(starter == pid);
    }
    // Signals are for the program's threads.
    let blocked = Blocked::all();
    let spawned = std::thread::Builder::new()
        .name("lupin-remap".into())
        .stack_size(256 << 10)
        .spawn(serve);
    drop(blocked);
    spawned.map(|_| true).map_err(|error| {
        STARTED_BY.store(0, Ordering::Release);
        GuardError::Thread(error)
    })
}

fn serve() {
    loop {
        let seen = CALLS.load(Ordering::Acquire);
        for slot in &SLOTS {
            if slot.remap.load(Ordering::Acquire) == WANTED {
                serve_one(slot);
            }
        }
        futex_wait(&CALLS, seen, None);
    }
}

fn serve_one(slot: &'static Slot) {
    let Some(place) = lock(&PLACES).get(&number(slot)).cloned() else {
        return;
    };
    // Held until the outcome is said: whoever drops the mapping waits for that.
    let place = lock(&place);
    let Some(place) = &*place else {
        return;
    };
    let Some(parts) = (place.open)() else {
        move_on(slot, WANTED, GONE);
        return;
    };
    // Unless it came too late.
    if move_on(slot, WANTED, MAPPING) {
        let outcome = if place.map(&parts) { READY } else { GONE };
        move_on(slot, MAPPING, outcome);
    }
}

impl Place {
    /// Maps the parts over what is there; false if they are not what was there, or cannot be
    /// touched either.
    fn map(&self, parts: &Parts) -> bool {
        // What was appended since is not mapped.
        let mut ends = parts.iter().scan(0u64, |end, (_, _, len)| {
            *end = end.saturating_add(*len);
            Some(*end)
        });
        let Some(last) = ends.position(|end| end == self.len as u64) else {
            return false;
        };
        let mut at = self.base;
        for (fd, offset, len) in &parts[..=last] {
            let Ok(offset) = libc::off_t::try_from(*offset) else {
                return false;
            };
            let len = *len as usize;
            // SAFETY: the lengths add up to that of the range, which is a shared mapping whose
            // owner cannot drop it meanwhile; it is replaced by one of the same kind. What lies
            // there is used through atomics only.
            let mapped = unsafe {
                libc::mmap(
                    core::ptr::without_provenance_mut(at),
                    len,
                    crate::shm::protection(self.access),
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    fd.as_raw_fd(),
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED || !can_be_read(at) {
                return false;
            }
            at += len;
        }
        true
    }
}

/// Whether memory can be read, asked of the kernel, which gives an error in place of a signal. So
/// an access is not made again, and again in vain, for ever.
fn can_be_read(at: usize) -> bool {
    let mut ends = [-1; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } == -1 {
        return false;
    }
    // SAFETY: just made, known to nobody else.
    let ends = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: the kernel checks the address.
    let written = unsafe { libc::write(ends[1].as_raw_fd(), core::ptr::without_provenance(at), 1) };
    written == 1
}

/// Sleeps until woken, or `word` is not `seen`, or `bound` is over, or for no reason.
fn futex_wait(word: &AtomicU32, seen: u32, bound: Option<Duration>) {
    let bound = bound.map(|bound| libc::timespec {
        tv_sec: libc::time_t::try_from(bound.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: bound.subsec_nanos().into(),
    });
    let until = bound
        .as_ref()
        .map_or(core::ptr::null(), core::ptr::from_ref);
    let flags = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: both pointers are valid for the call; the kernel only reads through them.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), flags, seen, until) };
}

/// Wakes all who sleep on `word`.
fn futex_wake(word: &AtomicU32) {
    let flags = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel uses the address as a key.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), flags, i32::MAX) };
}

/// Gives the error of the last system call back to the code that a signal interrupted.
pub(super) fn keeping_errno<T>(act: impl FnOnce() -> T) -> T {
    // SAFETY: the place of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else uses it.
    let saved = unsafe { *errno };
    let result = act();
    // SAFETY: as above.
    unsafe { *errno = saved };
    result
}

#[cfg(test)]
#[path = "remap_test.rs"]
mod remap_test;
