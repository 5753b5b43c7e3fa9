//! Memory that is taken away while a program uses it: an error instead of the program's end.
//!
//! A segment can be revoked ([`Pod::revoke_segment`](crate::Pod::revoke_segment), or its group
//! ends). In guests the agent then unbinds the segment's device, and whoever still touches it gets
//! SIGBUS, whose default is the end of the process. A program that would rather go on asks for it,
//! mapping by mapping:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pod = lupin::Pod::attach()?;
//! let mut segment = pod.open_segment("frames", lupin::shm::Access::ReadWrite)?;
//! segment.guard()?;
//! // ... work on it; then, before believing what was read:
//! segment.intact()?;
//! # Ok(())
//! # }
//! ```
//!
//! The first access to revoked memory puts private zeros in the place of the whole mapping, marks
//! it, and goes on. So no code has to be ready for an error in the middle of a load, and:
//!
//! * What is read after the revocation is zero, or what this process wrote itself. Nothing that
//!   was read since the last [`intact`](crate::shm::Mapping::intact) that succeeded may be believed
//!   until the next one succeeds.
//! * What is written reaches nobody. A lock that is taken there excludes nobody, and whoever waits
//!   there for others waits until its own time-out.
//! * A mark stays. The way back is to drop the segment and to open one anew.
//! * A system call that is given such memory fails with `EFAULT`, and marks nothing.
//! * Only faults in guarded mappings are turned: any other SIGBUS, a memory error of the hardware
//!   among them, goes to the handler that was there before, or ends the process as it would have.
//!   A handler that the program installs *later* must do the same for this one.
//! * At most [`MAX_GUARDED`] mappings are guarded at a time.
//!
//! # What comes back
//!
//! In guests, all processes of a node use a segment's devices together. When one of them is expelled
//! from the group of the segment, the devices are taken from all; those who are still members have
//! them again at once: the library maps the segment anew, in the same place, under the first access
//! that meets the gap, which then goes on as if nothing had been. Nobody asks for that, mapping by
//! mapping: it holds for all segments of groups, guarded or not, on nodes where memory can be taken
//! away.
//! It takes a thread of its own (`lupin-remap`), which sleeps otherwise. A process that was forked
//! off by one that has this thread has none itself: nothing comes back there. A system call that is
//! given such memory before it came back fails with `EFAULT`.
//!
//! The handler makes system calls that are safe there (`mmap`, `futex`, and `sigaction` to let a
//! foreign signal have its default), takes no lock and allocates nothing.

mod remap;

use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::shm::Access;
pub(crate) use remap::{Opener, Parts};

/// The most mappings that are guarded, or mapped anew when they have to be, at a time in one process.
pub const MAX_GUARDED: usize = 1024;

/// Why a mapping cannot be guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The handler cannot be installed.
    #[error("the handler for SIGBUS cannot be installed: {0}")]
    Handler(io::Error),
    /// There are too many.
    #[error("{MAX_GUARDED} mappings are guarded already: drop some")]
    Full,
    /// The thread that maps segments anew cannot be started.
    #[error("the thread that maps segments anew cannot be started: {0}")]
    Thread(io::Error),
}

/// The mapping was taken away: what was read from it lately may not be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the segment was revoked; what was read from it lately is not what is in it")]
pub struct Revoked;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Mapped anew if it can be; nothing else.
const WATCHED: u32 = 2;
const GUARDED: u32 = 3;
const REVOKED: u32 = 4;

/// A guarded range of addresses, as the handler finds it.
struct Slot {
    state: AtomicU32,
    base: AtomicUsize,
    len: AtomicUsize,
    /// Whether it can be mapped anew: see [`remap`].
    remap: AtomicU32,
}

static SLOTS: [Slot; MAX_GUARDED] = [const {
    Slot {
        state: AtomicU32::new(FREE),
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        remap: AtomicU32::new(remap::NEVER),
    }
}; MAX_GUARDED];

/// What was done with SIGBUS before; null until the handler is installed. Never freed.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(core::ptr::null_mut());

/// The handler is there.
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// A range of addresses that the handler knows. Dropped before the range is unmapped.
#[derive(Debug)]
pub(crate) struct Guard(&'static Slot);

impl core::fmt::Debug for Slot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.base.load(Ordering::Relaxed))
    }
}

impl Guard {
    /// Guards a shared mapping of this process, which stays mapped as long as this.
    pub(crate) fn new(base: usize, len: usize) -> Result<Self, GuardError> {
        let guard = Self::take(base, len)?;
        guard.begin();
        Ok(guard)
    }

    /// Has a shared mapping of this process, which stays mapped as long as this, mapped anew by
    /// what `open` gives when it is taken away.
    pub(crate) fn restoring(
        base: usize,
        len: usize,
        access: Access,
        open: Opener,
    ) -> Result<Self, GuardError> {
        let guard = Self::take(base, len)?;
        remap::enter(guard.0, access, open)?;
        // Release: as in `begin`.
        guard.0.state.store(WATCHED, Ordering::Release);
        Ok(guard)
    }

    /// From here on what is taken away, and cannot be had again, becomes zeros and a mark.
    pub(crate) fn begin(&self) {
        if self.0.state.load(Ordering::Relaxed) < GUARDED {
            // Release: a handler that sees the state sees the range.
            self.0.state.store(GUARDED, Ordering::Release);
        }
    }

    /// Whether it has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) >= GUARDED
    }

    fn take(base: usize, len: usize) -> Result<Self, GuardError> {
        install().map_err(GuardError::Handler)?;
        let take = |slot: &&Slot| {
            let state = &slot.state;
            let taken = state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed);
            taken.is_ok()
        };
        let slot = SLOTS.iter().find(take).ok_or(GuardError::Full)?;
        slot.base.store(base, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        Ok(Self(slot))
    }

    /// Whether the range was revoked and touched.
    pub(crate) fn is_revoked(&self) -> bool {
        // Acquire: the accesses that the caller asks about come before the look only with a
        // fence of its own; see `Mapping::intact`.
        self.0.state.load(Ordering::Acquire) == REVOKED
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        remap::leave(self.0);
        self.0.state.store(FREE, Ordering::Release);
    }
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    // A child of fork must not meet a lock that a thread of its parent held, so in most cases
    // there is none.
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    // SAFETY: an all-zero sigaction is valid: the default, no flags, an empty mask.
    let mut before: Box<libc::sigaction> = Box::new(unsafe { core::mem::zeroed() });
    // SAFETY: asks only, into memory of ours.
    if unsafe { libc::sigaction(libc::SIGBUS, core::ptr::null(), &raw mut *before) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // Known before the handler can run. Between the two calls nobody else installs one, unless
    // the program does so in another thread at this very moment.
    BEFORE.store(Box::into_raw(before), Ordering::Release);
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    // SAFETY: as above; then a handler of the kind that SA_SIGINFO says, which is safe at any
    // instruction.
    let installed = unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &raw const action, core::ptr::null_mut())
    };
    if installed == -1 {
        // What BEFORE names is leaked: a few bytes, where a system refuses what none refuses.
        return Err(io::Error::last_os_error());
    }
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

/// SIGBUS. Runs at any instruction of any thread.
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a valid siginfo; for SIGBUS with a code of the kernel's it has an
    // address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    if code != libc::BUS_ADRERR || !replace(address) {
        chain(signal, code, info, context);
    }
}

/// Puts zeros in the place of the guarded range around `address`; false if there is none.
fn replace(address: usize) -> bool {
    for slot in &SLOTS {
        // Acquire: pairs with the Release of `Guard::new`.
        let state = slot.state.load(Ordering::Acquire);
        let (base, len) = (
            slot.base.load(Ordering::Relaxed),
            slot.len.load(Ordering::Relaxed),
        );
        if state < WATCHED || address.wrapping_sub(base) >= len {
            continue;
        }
        if remap::keeping_errno(|| remap::restore(slot)) {
            return true;
        }
        if slot.state.load(Ordering::Acquire) < GUARDED {
            return false;
        }
        // Also where another thread has done so already: its zeros make room for other zeros.
        // SAFETY: a range that belongs to a mapping that is guarded, hence not yet unmapped, since
        // the thread that faulted uses it; what lies there may change at any time for its users.
        let zeros = remap::keeping_errno(|| unsafe {
            libc::mmap(
                core::ptr::without_provenance_mut(base),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        });
        if zeros == libc::MAP_FAILED {
            return false;
        }
        slot.state.store(REVOKED, Ordering::Release);
        return true;
    }
    false
}

/// Does what would have been done without this module.
fn chain(signal: c_int, code: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE.load(Ordering::Acquire);
    // SAFETY: set before the handler was installed, and never freed afterwards.
    let before = unsafe { &*before };
    match before.sa_sigaction {
        // A signal that somebody sent may be ignored; a fault cannot be.
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default for this signal; `raise` makes it pending until this handler
            // returns. A fault would happen again anyway.
            unsafe {
                let mut action: libc::sigaction = core::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const action, core::ptr::null_mut());
                libc::raise(signal);
            }
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: SA_SIGINFO says that it is a function of this type.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { core::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO it is a function of this type.
            let handler: extern "C" fn(c_int) = unsafe { core::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
#[path = "revocation_test.rs"]
mod revocation_test;
