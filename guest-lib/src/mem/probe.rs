//! Another memory under this crate, for model checkers.

use core::cell::Cell;
use core::sync::atomic::Ordering;

/// What an access does. Narrow values are zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Loads.
    Load,
    /// Stores the value.
    Store(u64),
    /// Stores `new` if it finds `current`.
    Cas {
        /// What it expects.
        current: u64,
        /// What it stores.
        new: u64,
    },
    /// Swaps.
    Swap(u64),
    /// Adds, wrapping.
    Add(u64),
    /// Sets bits.
    Or(u64),
    /// Clears the other bits.
    And(u64),
    /// Orders and accesses nothing.
    Fence,
}

impl Kind {
    /// Whether it can change memory.
    pub fn stores(self) -> bool {
        !matches!(self, Self::Load | Self::Fence)
    }
}

/// Makes accesses in this crate's place.
pub trait Probe {
    /// Makes an access of `width` bytes at `address`; returns what it found there. A compare and
    /// swap has stored if that is what it expected.
    fn access(&self, address: usize, width: usize, kind: Kind, order: Ordering) -> u64;

    /// Lets others run, because the caller waits for one of them.
    fn pause(&self);
}

thread_local! {
    static PROBE: Cell<Option<&'static dyn Probe>> = const { Cell::new(None) };
}

/// Sends all accesses of the calling thread to `probe` while `body` runs.
pub fn with<T>(probe: &'static dyn Probe, body: impl FnOnce() -> T) -> T {
    struct Restore(Option<&'static dyn Probe>);
    impl Drop for Restore {
        fn drop(&mut self) {
            PROBE.set(self.0);
        }
    }
    let _restore = Restore(PROBE.replace(Some(probe)));
    body()
}

pub(super) fn access(address: usize, width: usize, kind: Kind, order: Ordering) -> Option<u64> {
    Some(PROBE.get()?.access(address, width, kind, order))
}

pub(super) fn pause() -> bool {
    PROBE.get().is_some_and(|probe| {
        probe.pause();
        true
    })
}
