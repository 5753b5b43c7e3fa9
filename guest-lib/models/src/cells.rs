//! Accesses of the models themselves: they go the library's way, so that they are crash points
//! and races like its own.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::probe::Kind;

use crate::machine;

/// Makes any access to a word; returns what it found.
pub fn access(cell: &AtomicU64, kind: Kind, order: Ordering) -> u64 {
    machine::access(cell.as_ptr().addr(), 8, kind, order)
}

/// Loads a word, `Relaxed`.
pub fn get(cell: &AtomicU64) -> u64 {
    access(cell, Kind::Load, Ordering::Relaxed)
}

/// Loads a word, `Acquire`.
pub fn get_acquire(cell: &AtomicU64) -> u64 {
    access(cell, Kind::Load, Ordering::Acquire)
}

/// Stores a word, `Relaxed`.
pub fn put(cell: &AtomicU64, value: u64) {
    access(cell, Kind::Store(value), Ordering::Relaxed);
}

/// Compares and swaps a word; whether it did.
pub fn cas(cell: &AtomicU64, current: u64, new: u64, order: Ordering) -> bool {
    access(cell, Kind::Cas { current, new }, order) == current
}

/// Gives way, waiting for somebody.
pub fn pause() {
    machine::pause();
}
