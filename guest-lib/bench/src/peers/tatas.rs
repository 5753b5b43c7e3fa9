//! Test-and-test-and-set locks that nobody survives.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lupin::abi::system::LockWords;
use lupin::wait::{Pacer, Parking};

const FREE: u64 = 0;
const HELD: u64 = 1;

/// The recoverable lock without recovery: it knows no owner and asks no judge. It lies in the same
/// kind of memory in the same places, waits by the same policy, and costs its waiters the same.
/// What is left of a ratio of the two is the price of recoverability.
pub struct Tatas<'a>(&'a LockWords);

impl<'a> Tatas<'a> {
    /// The lock in `words`, all zero.
    pub fn new(words: &'a LockWords) -> Self {
        Self(words)
    }

    fn held(&self) -> &AtomicU64 {
        &self.0.owner
    }

    #[inline(always)]
    pub fn lock(&self) {
        if !self.try_lock() {
            self.wait();
        }
    }

    #[inline(always)]
    fn try_lock(&self) -> bool {
        self.held()
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Acquire)
            .is_ok()
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) {
        let mut pacer = Pacer::new(None);
        let mut slept = false;
        loop {
            if self.held().load(Ordering::Acquire) == FREE {
                if self.try_lock() {
                    if slept {
                        self.parking().pass_on();
                    }
                    return;
                }
                continue;
            }
            if pacer.spin() {
                continue;
            }
            let seen = self.parking().announce();
            if self.held().load(Ordering::Acquire) == FREE {
                continue;
            }
            slept = true;
            let _ = pacer.sleep_on(&self.0.wake, seen);
        }
    }

    #[inline(always)]
    pub fn unlock(&self) {
        self.held().store(FREE, Ordering::Release);
        self.parking().wake(1);
    }

    #[inline(always)]
    fn parking(&self) -> Parking<'_> {
        Parking {
            flag: &self.0.waiters,
            word: &self.0.wake,
        }
    }
}

/// The lock of the textbooks: one byte's worth of state, and its waiters spin until they get it.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Spinning {
    held: AtomicU32,
}

impl Spinning {
    pub fn lock(&self) {
        while self
            .held
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            while self.held.load(Ordering::Relaxed) != 0 {
                spin_loop();
            }
        }
    }

    pub fn unlock(&self) {
        self.held.store(0, Ordering::Release);
    }
}
