//! Every store that this crate makes to pod memory.
//!
//! A node may die between any two of them, so each operation must leave something that another
//! node can finish or undo after *every* store. That is only believable when all of them are
//! tried: in tests, and with the feature `crash-points`, the functions below count, and can end
//! the calling thread's operation before its n-th store (see [`crash`]). Otherwise they are the
//! atomic operation and nothing else.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Whether the store may happen: false only for an operation that already "died" in a test.
#[inline(always)]
fn may_store() -> bool {
    #[cfg(any(test, feature = "crash-points"))]
    {
        crash::before_store()
    }
    #[cfg(not(any(test, feature = "crash-points")))]
    {
        true
    }
}

/// Stores a word.
#[inline]
pub fn store64(cell: &AtomicU64, value: u64, order: Ordering) {
    if may_store() {
        cell.store(value, order);
    }
}

/// Stores a half word.
#[inline]
pub fn store32(cell: &AtomicU32, value: u32, order: Ordering) {
    if may_store() {
        cell.store(value, order);
    }
}

/// Compares and swaps a word; `failure` is `Acquire`, or `Relaxed` if `success` is.
///
/// # Errors
/// The word that was found, when it is not `current`.
#[inline]
pub fn cas64(cell: &AtomicU64, current: u64, new: u64, order: Ordering) -> Result<u64, u64> {
    let failure = match order {
        Ordering::Relaxed | Ordering::Release => Ordering::Relaxed,
        Ordering::SeqCst => Ordering::SeqCst,
        _ => Ordering::Acquire,
    };
    if may_store() {
        cell.compare_exchange(current, new, order, failure)
    } else {
        Err(cell.load(Ordering::Relaxed))
    }
}

/// Swaps a half word.
#[inline]
pub fn swap32(cell: &AtomicU32, value: u32, order: Ordering) -> u32 {
    if may_store() {
        cell.swap(value, order)
    } else {
        cell.load(Ordering::Relaxed)
    }
}

/// Adds to a half word, wrapping; returns the old value.
#[inline]
pub fn add32(cell: &AtomicU32, value: u32, order: Ordering) -> u32 {
    if may_store() {
        cell.fetch_add(value, order)
    } else {
        cell.load(Ordering::Relaxed)
    }
}

/// Adds to a word, wrapping; returns the old value.
#[inline]
pub fn add64(cell: &AtomicU64, value: u64, order: Ordering) -> u64 {
    if may_store() {
        cell.fetch_add(value, order)
    } else {
        cell.load(Ordering::Relaxed)
    }
}

/// Fills a word of memory that is the caller's alone until it publishes it with a store above.
///
/// `Relaxed`, always: the store that publishes gives the order.
#[inline(always)]
pub fn fill64(cell: &AtomicU64, value: u64) {
    if may_store() {
        cell.store(value, Ordering::Relaxed);
    }
}

/// Fills a byte, as [`fill64`].
#[inline(always)]
pub fn fill8(cell: &AtomicU8, value: u8) {
    if may_store() {
        cell.store(value, Ordering::Relaxed);
    }
}

/// Deaths on demand, for tests.
#[cfg(any(test, feature = "crash-points"))]
#[doc(hidden)]
pub mod crash {
    use core::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    #[derive(Clone, Copy, PartialEq)]
    enum Fate {
        /// Nobody counts.
        Lives,
        /// Dies before the store that finds 0.
        DiesAfter(u64),
        /// Counts stores from 0.
        Counts(u64),
        /// Died; its remaining stores, made by destructors during the unwinding, do not happen.
        Dead,
    }

    thread_local! {
        static FATE: Cell<Fate> = const { Cell::new(Fate::Lives) };
    }

    struct Died;

    /// How an operation ended.
    #[derive(Debug, PartialEq, Eq)]
    pub enum Ended<T> {
        /// It made fewer stores than it was allowed.
        Completed(T),
        /// It died.
        Died,
    }

    pub(super) fn before_store() -> bool {
        FATE.with(|fate| match fate.get() {
            Fate::Lives => true,
            Fate::Dead => false,
            Fate::Counts(n) => {
                fate.set(Fate::Counts(n + 1));
                true
            }
            Fate::DiesAfter(0) => {
                fate.set(Fate::Dead);
                resume_unwind(Box::new(Died));
            }
            Fate::DiesAfter(n) => {
                fate.set(Fate::DiesAfter(n - 1));
                true
            }
        })
    }

    /// Runs `operation` on this thread and lets it die before its store number `stores` (from 0).
    pub fn dies_after<T>(stores: u64, operation: impl FnOnce() -> T) -> Ended<T> {
        FATE.with(|fate| fate.set(Fate::DiesAfter(stores)));
        let result = catch_unwind(AssertUnwindSafe(operation));
        FATE.with(|fate| fate.set(Fate::Lives));
        match result {
            Ok(value) => Ended::Completed(value),
            Err(payload) if payload.is::<Died>() => Ended::Died,
            Err(payload) => resume_unwind(payload),
        }
    }

    /// Runs `operation` and returns how many stores it made.
    pub fn count<T>(operation: impl FnOnce() -> T) -> (T, u64) {
        FATE.with(|fate| fate.set(Fate::Counts(0)));
        let value = operation();
        let stores = FATE.with(|fate| match fate.replace(Fate::Lives) {
            Fate::Counts(n) => n,
            _ => 0,
        });
        (value, stores)
    }
}
