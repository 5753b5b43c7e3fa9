//! Test-and-test-and-set locks that nobody survives.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};

use lupin::wait::{Pacer, wake};

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
    pub fn lock(&self) {
        if self.try_lock() {
            return;
        }
        let mut pacer = Pacer::new(None);
        let mut slept = false;
        loop {
            if self.held.load(Ordering::Acquire) == 0 {
                if self.try_lock() {
                    if slept {
                        self.waiters.store(1, Ordering::Relaxed);
                    }
                    return;
                }
                continue;
            }
            if pacer.spin() {
                continue;
            }
            self.waiters.store(1, Ordering::SeqCst);
            let seen = self.wake.load(Ordering::SeqCst);
            if self.held.load(Ordering::SeqCst) == 0 {
                continue;
            }
            slept = true;
            let _ = pacer.sleep_on(&self.wake, seen);
        }
    }

    fn try_lock(&self) -> bool {
        self.held
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    pub fn unlock(&self) {
        self.held.swap(0, Ordering::SeqCst);
        if self.waiters.load(Ordering::SeqCst) != 0 {
            self.waiters.swap(0, Ordering::SeqCst);
            wake(&self.wake, 1);
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
