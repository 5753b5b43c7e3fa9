//! Another memory under this crate, for model checkers.

use core::cell::Cell;
use core::panic::Location;
use core::sync::atomic::Ordering;

/// A place in the source that accesses pod memory: file, line, column.
pub type Site = (&'static str, u32, u32);

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

    /// As [`access`](Self::access), and told which line of the source asks.
    fn access_at(
        &self,
        _site: Site,
        address: usize,
        width: usize,
        kind: Kind,
        order: Ordering,
    ) -> u64 {
        self.access(address, width, kind, order)
    }

    /// Lets others run, because the caller waits for one of them.
    fn pause(&self);

    /// The class of the node on which the caller runs, below
    /// [`WAKE_CLASSES`](lupin_abi::id::WAKE_CLASSES).
    fn class(&self) -> u32 {
        0
    }

    /// Sleeps until the half word at `address` is woken for one of `classes` (a bit each), unless
    /// it no longer holds `seen`. May return early.
    fn sleep(&self, _address: usize, _seen: u32, _classes: u32) {
        self.pause();
    }

    /// Wakes up to `count` sleepers of the half word at `address` that sleep as one of `classes`;
    /// how many.
    fn wake(&self, _address: usize, _count: i32, _classes: u32) -> usize {
        0
    }
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

#[track_caller]
pub(super) fn access(address: usize, width: usize, kind: Kind, order: Ordering) -> Option<u64> {
    let probe = PROBE.get()?;
    let here = Location::caller();
    let site = (here.file(), here.line(), here.column());
    Some(probe.access_at(site, address, width, kind, order))
}

/// Tells the probe, if there is one.
pub(super) fn tell(what: impl FnOnce(&dyn Probe)) -> bool {
    PROBE.get().map(what).is_some()
}
