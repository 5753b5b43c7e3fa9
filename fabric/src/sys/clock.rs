//! The only clock that the manager judges by.

use nix::time::{ClockId, clock_gettime};

/// The host's monotonic clock, in nanoseconds. Comes from the same clock in every process of this
/// boot, so a new manager may compare with what its predecessor wrote.
pub fn monotonic_ns() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux and its value is never negative.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
