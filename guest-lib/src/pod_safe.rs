//! Which types may lie in memory that several operating systems share.
//!
//! Two marker traits say it: [`PodSafe`] for what can be copied in and out, [`PodShared`] for
//! what can also be used in place while other nodes use it. Programs derive them (feature
//! `derive`, on by default), and the derive checks what the traits promise:
//!
//! ```
//! use lupin::pod_safe::{PodSafe, PodShared};
//! use lupin::abi::system::LockWords;
//! use lupin::offset_ptr::AtomicOffsetPtr;
//! use std::sync::atomic::{AtomicU32, AtomicU64};
//!
//! #[derive(PodSafe, PodShared)]
//! #[repr(C)]
//! struct Account {
//!     lock: LockWords,
//!     balance: AtomicU64,
//!     next: AtomicOffsetPtr<Account>,
//!     number: AtomicU32,
//!     _reserved: [AtomicU32; 11],
//! }
//!
//! #[derive(Clone, Copy, PodSafe)]
//! #[repr(C)]
//! struct Point {
//!     x: f64,
//!     y: f64,
//! }
//! # fn safe<T: PodSafe>() {}
//! # fn shared<T: PodShared>() {}
//! # safe::<Point>();
//! # shared::<Account>();
//! # shared::<[Account; 3]>();
//! ```
//!
//! It refuses, with a message that names the field and says what to use instead: references, raw
//! pointers and function pointers, owners of memory of one process, types of one process
//! (`Mutex`, `Cell`), types most of whose bit patterns are invalid, enums, unions, padding, and
//! types that implement `Drop`.
#![cfg_attr(feature = "derive", doc = include_str!("pod_safe_refusals.md"))]

use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::sync::atomic::{
    AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicIsize, AtomicU8, AtomicU16, AtomicU32,
    AtomicU64, AtomicUsize,
};

use lupin_abi::system::LockWords;

#[cfg(feature = "derive")]
pub use lupin_derive::{PodSafe, PodShared};

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
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not known to have a place in pod memory",
    label = "not `PodSafe`",
    note = "a struct of the program: `#[derive(PodSafe)]` with `#[repr(C)]`",
    note = "instead of a pointer, reference or owner of memory: a `lupin::offset_ptr::OffsetPtr`, \
            or a slot, the offset of a block in a `u64`"
)]
pub unsafe trait PodSafe: Sized + 'static {}

/// A [`PodSafe`] type that several nodes may use through `&T` at once: all its changes are
/// atomic operations.
///
/// # Safety
/// Besides [`PodSafe`]'s, the promise that `T` consists of atomics only, as far as it can be
/// read or written through `&T`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be used in place by several nodes at once",
    label = "not `PodShared`",
    note = "all of it must be atomics: an `AtomicU64` instead of a `u64`",
    note = "a struct of the program: `#[derive(PodSafe, PodShared)]` with `#[repr(C)]`"
)]
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
// SAFETY: no bytes.
unsafe impl<T: 'static> PodSafe for PhantomData<T> {}
// SAFETY: no bytes; whether `T` allows the sharing is what the bound asks.
unsafe impl<T: 'static> PodShared for PhantomData<T> where Self: Sync {}

// `bool` and `AtomicBool` are missing on purpose: most of their bit patterns are invalid.
