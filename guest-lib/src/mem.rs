//! Every access that this crate makes to pod memory.
//!
//! A node may die between any two stores, and another may store between any two loads, so each
//! operation must be right for every such moment. That is only believable when all of them are
//! tried. So all accesses go through this module, which is one of three things:
//!
//! * in products: the atomic operation and nothing else;
//! * in tests, and with the feature `crash-points`: the same, counted, so that the operation can
//!   be ended before its n-th store, or one store of the program be left out ([`crash`]);
//! * the same build with a [`probe`] installed: whatever the probe makes of the access, for
//!   model checkers that bring their own memory and their own scheduler.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

#[cfg(any(test, feature = "crash-points"))]
#[doc(hidden)]
pub mod crash;
#[cfg(any(test, feature = "crash-points"))]
#[doc(hidden)]
pub mod probe;

/// Defines an access: the atomic operation itself, what a probe is told instead, and, for an
/// access that stores, what it returns where the store does not happen any more.
macro_rules! access {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($cell:ident: &$type:ty $(, $arg:ident: $arg_type:ty)*)
        -> $result:ty { real: $real:expr, dead: $dead:expr, probe: $kind:expr, $answer:expr }) => {
        $(#[$doc])*
        #[inline(always)]
        #[cfg_attr(any(test, feature = "crash-points"), track_caller)]
        #[allow(clippy::unused_unit, reason = "a store returns nothing")]
        $vis fn $name($cell: &$type $(, $arg: $arg_type)*, order: Ordering) -> $result {
            #[cfg(any(test, feature = "crash-points"))]
            {
                if let Some(found) = probe::access($cell.as_ptr().addr(), size_of::<$type>(), $kind, order) {
                    let answer: fn(u64 $(, $arg_type)*) -> $result = $answer;
                    return answer(found $(, $arg)*);
                }
                if !crash::may($kind) {
                    return $dead;
                }
            }
            $real(order)
        }
    };
}

access! {
    /// Loads a word.
    pub fn load64(cell: &AtomicU64) -> u64 {
        real: |order| cell.load(order), dead: 0,
        probe: Kind::Load, |found| found
    }
}
access! {
    /// Loads a half word.
    pub fn load32(cell: &AtomicU32) -> u32 {
        real: |order| cell.load(order), dead: 0,
        probe: Kind::Load, |found| found as u32
    }
}
access! {
    /// Stores a word.
    pub fn store64(cell: &AtomicU64, value: u64) -> () {
        real: |order| cell.store(value, order), dead: (),
        probe: Kind::Store(value), |_, _| ()
    }
}
access! {
    /// Stores a half word.
    pub fn store32(cell: &AtomicU32, value: u32) -> () {
        real: |order| cell.store(value, order), dead: (),
        probe: Kind::Store(value.into()), |_, _| ()
    }
}
access! {
    /// Compares and swaps a word. Fails with the word that was found; the failure's order is the
    /// load half of `order`.
    pub fn cas64(cell: &AtomicU64, current: u64, new: u64) -> Result<u64, u64> {
        real: |order| cell.compare_exchange(current, new, order, load_half(order)),
        dead: Err(cell.load(Ordering::Relaxed)),
        probe: Kind::Cas { current, new },
        |found, current, _| if found == current { Ok(found) } else { Err(found) }
    }
}
access! {
    /// Compares and swaps a half word, as [`cas64`].
    pub fn cas32(cell: &AtomicU32, current: u32, new: u32) -> Result<u32, u32> {
        real: |order| cell.compare_exchange(current, new, order, load_half(order)),
        dead: Err(cell.load(Ordering::Relaxed)),
        probe: Kind::Cas { current: current.into(), new: new.into() },
        |found, current, _| if found as u32 == current { Ok(current) } else { Err(found as u32) }
    }
}
access! {
    /// Swaps a word; returns the old one.
    pub fn swap64(cell: &AtomicU64, value: u64) -> u64 {
        real: |order| cell.swap(value, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Swap(value), |found, _| found
    }
}
access! {
    /// Swaps a half word; returns the old one.
    pub fn swap32(cell: &AtomicU32, value: u32) -> u32 {
        real: |order| cell.swap(value, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Swap(value.into()), |found, _| found as u32
    }
}
access! {
    /// Adds to a word, wrapping; returns the old one.
    pub fn add64(cell: &AtomicU64, value: u64) -> u64 {
        real: |order| cell.fetch_add(value, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Add(value), |found, _| found
    }
}
access! {
    /// Adds to a half word, wrapping; returns the old one.
    pub fn add32(cell: &AtomicU32, value: u32) -> u32 {
        real: |order| cell.fetch_add(value, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Add(value.into()), |found, _| found as u32
    }
}
access! {
    /// Sets bits of a word; returns the old one.
    pub fn or64(cell: &AtomicU64, bits: u64) -> u64 {
        real: |order| cell.fetch_or(bits, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Or(bits), |found, _| found
    }
}
access! {
    /// Sets bits of a half word; returns the old one.
    pub fn or32(cell: &AtomicU32, bits: u32) -> u32 {
        real: |order| cell.fetch_or(bits, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::Or(bits.into()), |found, _| found as u32
    }
}
access! {
    /// Keeps bits of a word and clears the others; returns the old one.
    pub fn and64(cell: &AtomicU64, bits: u64) -> u64 {
        real: |order| cell.fetch_and(bits, order), dead: cell.load(Ordering::Relaxed),
        probe: Kind::And(bits), |found, _| found
    }
}

/// What an access does, for a probe.
#[cfg(any(test, feature = "crash-points"))]
use probe::Kind;

/// Fills a word of memory that is the caller's alone until it publishes it with a store above.
///
/// `Relaxed`, always: the store that publishes gives the order.
#[inline(always)]
#[cfg_attr(any(test, feature = "crash-points"), track_caller)]
pub fn fill64(cell: &AtomicU64, value: u64) {
    store64(cell, value, Ordering::Relaxed);
}

access! {
    /// Stores a byte; see [`fill8`].
    fn store8(cell: &AtomicU8, value: u8) -> () {
        real: |order| cell.store(value, order), dead: (),
        probe: Kind::Store(value.into()), |_, _| ()
    }
}
access! {
    /// Loads a byte.
    pub fn load8(cell: &AtomicU8) -> u8 {
        real: |order| cell.load(order), dead: 0,
        probe: Kind::Load, |found| found as u8
    }
}

/// Fills a byte, as [`fill64`].
#[inline(always)]
#[cfg_attr(any(test, feature = "crash-points"), track_caller)]
pub fn fill8(cell: &AtomicU8, value: u8) {
    store8(cell, value, Ordering::Relaxed);
}

/// Orders accesses of the calling thread, as [`core::sync::atomic::fence`].
#[inline(always)]
#[cfg_attr(any(test, feature = "crash-points"), track_caller)]
pub fn fence(order: Ordering) {
    #[cfg(any(test, feature = "crash-points"))]
    if probe::access(0, 0, Kind::Fence, order).is_some() {
        return;
    }
    core::sync::atomic::fence(order);
}

/// Gives way while the caller waits for another thread; true if a probe's scheduler did, so that
/// the caller must neither spin nor sleep.
#[inline(always)]
pub fn gave_way() -> bool {
    #[cfg(any(test, feature = "crash-points"))]
    if probe::tell(|probe| probe.pause()) {
        return true;
    }
    false
}

/// Whether a probe is installed: time does not pass then, and only [`gave_way`], [`slept`] and
/// accesses let others run.
#[inline(always)]
pub fn is_modelled() -> bool {
    #[cfg(any(test, feature = "crash-points"))]
    if probe::tell(|_| ()) {
        return true;
    }
    false
}

/// The class of the node on which a probe lets the caller run; `None` without a probe.
#[inline(always)]
pub fn class() -> Option<u32> {
    let mut _class = None;
    #[cfg(any(test, feature = "crash-points"))]
    probe::tell(|probe| _class = Some(probe.class()));
    _class
}

/// Sleeps in a probe's scheduler while `word` holds `seen`, as one of these nodes' classes; false
/// without a probe.
#[inline(always)]
pub fn slept(word: &AtomicU32, seen: u32, classes: u32) -> bool {
    #[cfg(any(test, feature = "crash-points"))]
    if probe::tell(|probe| probe.sleep(word.as_ptr().addr(), seen, classes)) {
        return true;
    }
    let _ = (word, seen, classes);
    false
}

/// Wakes sleepers of these classes in a probe's scheduler, and says how many; `None` without a
/// probe.
#[inline(always)]
pub fn woke(word: &AtomicU32, count: i32, classes: u32) -> Option<usize> {
    let mut _woken = None;
    #[cfg(any(test, feature = "crash-points"))]
    probe::tell(|probe| _woken = Some(probe.wake(word.as_ptr().addr(), count, classes)));
    let _ = (word, count, classes);
    _woken
}

/// The order of the load of a compare-and-swap that fails.
#[inline(always)]
const fn load_half(order: Ordering) -> Ordering {
    match order {
        Ordering::Relaxed | Ordering::Release => Ordering::Relaxed,
        Ordering::SeqCst => Ordering::SeqCst,
        _ => Ordering::Acquire,
    }
}
