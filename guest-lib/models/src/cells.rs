//! Accesses of the models themselves: they go the library's way, so that they are crash points
//! and races like its own.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::probe::Kind;

use crate::machine;

/// Loads a word, `Relaxed`.
pub fn get(cell: &AtomicU64) -> u64 {
    machine::access(cell.as_ptr().addr(), 8, Kind::Load, Ordering::Relaxed)
}

/// Stores a word, `Relaxed`.
pub fn put(cell: &AtomicU64, value: u64) {
    machine::access(
        cell.as_ptr().addr(),
        8,
        Kind::Store(value),
        Ordering::Relaxed,
    );
}

/// Loads a word, `Acquire`.
pub fn get_acquire(cell: &AtomicU64) -> u64 {
    machine::access(cell.as_ptr().addr(), 8, Kind::Load, Ordering::Acquire)
}
