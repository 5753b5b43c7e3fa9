//! Which types may lie in memory that several operating systems share.

use core::mem::ManuallyDrop;
use core::sync::atomic::{
    AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicIsize, AtomicU8, AtomicU16, AtomicU32,
    AtomicU64, AtomicUsize,
};

use lupin_abi::system::LockWords;

/// A type whose values may lie in a segment.
///
/// # Safety
/// Implementors promise all of this:
/// * the layout is fixed: `repr(C)`, `repr(transparent)` or a primitive, without padding that is
///   ever read, so that all programs of the pod agree on it;
/// * every bit pattern is a valid value, for another node may have stored anything;
/// * it holds nothing that means something in one process only: no address, descriptor, thread
///   id of a kernel, or type with such a thing inside (`Box`, `Mutex`, `&T`, ...);
/// * dropping it does nothing.
pub unsafe trait PodSafe: Sized + 'static {}

/// A [`PodSafe`] type that several nodes may use through `&T` at once: all its changes are
/// atomic operations.
///
/// # Safety
/// Besides [`PodSafe`]'s, the promise that `T` consists of atomics only, as far as it can be
/// read or written through `&T`.
pub unsafe trait PodShared: PodSafe + Sync {}

macro_rules! plain {
    ($($type:ty),*) => {$(
        // SAFETY: a primitive number: fixed layout, every bit pattern valid, no drop.
        unsafe impl PodSafe for $type {}
    )*};
}
plain!(
    u8,
    u16,
    u32,
    u64,
    u128,
    usize,
    i8,
    i16,
    i32,
    i64,
    i128,
    isize,
    f32,
    f64,
    ()
);

macro_rules! shared {
    ($($type:ty),*) => {$(
        // SAFETY: the layout of the number inside; every bit pattern valid; no drop.
        unsafe impl PodSafe for $type {}
        // SAFETY: an atomic.
        unsafe impl PodShared for $type {}
    )*};
}
shared!(
    AtomicU8,
    AtomicU16,
    AtomicU32,
    AtomicU64,
    AtomicUsize,
    AtomicI8,
    AtomicI16,
    AtomicI32,
    AtomicI64,
    AtomicIsize
);

// SAFETY: an array has its element's layout, repeated.
unsafe impl<T: PodSafe, const N: usize> PodSafe for [T; N] {}
// SAFETY: its elements are atomics only.
unsafe impl<T: PodShared, const N: usize> PodShared for [T; N] {}
// SAFETY: `repr(C)` of atomics.
unsafe impl PodSafe for LockWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for LockWords {}
// SAFETY: transparent, and never drops what is inside.
unsafe impl<T: PodSafe> PodSafe for ManuallyDrop<T> {}

// `bool` and `AtomicBool` are missing on purpose: most of their bit patterns are invalid.
