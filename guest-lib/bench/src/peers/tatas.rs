//! Test-and-test-and-set locks that nobody survives.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};

use lupin::wait::{Pacer, Parking};

/// The recoverable lock without recovery: no owner, no judge, no check at the release; it waits
/// by the same policy and costs its waiters the same. What is left of a ratio of the two is the
/// price of recoverability.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Tatas {
    held: AtomicU32,
    waiters: AtomicU32,
    wake: AtomicU32,
}

impl Tatas {
    #[inline]
    pub fn lock(&self) {
        if !self.try_lock() {
            self.wait();
        }
    }

    #[inline]
    fn try_lock(&self) -> bool {
        self.held
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) {
        let mut pacer = Pacer::new(None);
        let mut slept = false;
        loop {
            if self.held.load(Ordering::Acquire) == 0 {
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
            if self.held.load(Ordering::Acquire) == 0 {
                continue;
            }
            slept = true;
            let _ = pacer.sleep_on(&self.wake, seen);
        }
    }

    #[inline]
    pub fn unlock(&self) {
        self.held.store(0, Ordering::Release);
        self.parking().wake(1);
    }

    #[inline]
    fn parking(&self) -> Parking<'_> {
        Parking {
            flag: &self.waiters,
            word: &self.wake,
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
