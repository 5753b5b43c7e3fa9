//! Pointers that mean the same in every process of the pod.
//!
//! A segment is mapped at another address in every process, so a pointer inside it stores the
//! distance from itself to its target. Both move together, and the distance stays.
//!
//! Such a pointer is only right where it lies: a copy of its word elsewhere would point
//! elsewhere. So the types here are neither `Copy` nor `Clone`, are changed in place through
//! shared references, and refuse to point anywhere while they do not lie in the segment
//! themselves; [`OffsetPtr::assign`] is the copy that rewrites the distance. Following one is
//! checked against the mapping: whatever another node stored in it, the result is a place in the
//! segment or an error.
//!
//! The word 0 is null, so that scrubbed memory holds null pointers. A pointer to its own address
//! has distance 0 as well; it is stored as a distance that no mapping can have.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::mem::{cas64, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::{Mapping, ShmError};

/// The word of a pointer to its own address: farther than any mapping is long.
const TO_ITSELF: u64 = 1 << 63;

/// A self-relative pointer, for words that one owner changes at a time: its loads and stores are
/// `Relaxed`. Under a lock, or in a block that is published as a whole.
#[repr(transparent)]
pub struct OffsetPtr<T> {
    inner: AtomicOffsetPtr<T>,
}

/// A self-relative pointer that several nodes change at once.
#[repr(transparent)]
pub struct AtomicOffsetPtr<T> {
    word: AtomicU64,
    target: PhantomData<fn() -> *const T>,
}

// SAFETY: one word; every bit pattern is null, a place that `follow` checks, or an error.
unsafe impl<T: 'static> PodSafe for AtomicOffsetPtr<T> {}
// SAFETY: the word is an atomic.
unsafe impl<T: 'static> PodShared for AtomicOffsetPtr<T> {}
// SAFETY: transparent over AtomicOffsetPtr.
unsafe impl<T: 'static> PodSafe for OffsetPtr<T> {}
// SAFETY: transparent over AtomicOffsetPtr.
unsafe impl<T: 'static> PodShared for OffsetPtr<T> {}

impl<T: PodShared> AtomicOffsetPtr<T> {
    /// A null pointer, to be placed into a segment.
    pub const fn null() -> Self {
        Self {
            word: AtomicU64::new(0),
            target: PhantomData,
        }
    }

    /// What it points to. `order` is that of a load; `Acquire` to see what the target's
    /// publisher stored before.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`] or [`ShmError::Unaligned`] if it leads to a place where no `T`
    /// of `memory` can be.
    pub fn load<'m>(
        &self,
        memory: &'m Mapping,
        order: Ordering,
    ) -> Result<Option<&'m T>, ShmError> {
        self.follow(memory, load64(&self.word, order))
    }

    /// Points it to `target`. `order` is that of a store; `Release` to publish the target.
    ///
    /// # Errors
    /// [`ShmError::Foreign`] if the pointer or the target do not lie in `memory`.
    pub fn store(
        &self,
        memory: &Mapping,
        target: Option<&T>,
        order: Ordering,
    ) -> Result<(), ShmError> {
        store64(&self.word, self.word_for(memory, target)?, order);
        Ok(())
    }

    /// Points it to `new` if it points to `current`. The inner result is what it pointed to
    /// otherwise. `order` is that of the successful swap; a failed one loads with its load half.
    ///
    /// # Errors
    /// As [`load`](Self::load) and [`store`](Self::store).
    pub fn compare_exchange<'m>(
        &self,
        memory: &'m Mapping,
        current: Option<&T>,
        new: Option<&T>,
        order: Ordering,
    ) -> Result<Result<(), Option<&'m T>>, ShmError> {
        let (old, new) = (self.word_for(memory, current)?, self.word_for(memory, new)?);
        match cas64(&self.word, old, new, order) {
            Ok(_) => Ok(Ok(())),
            Err(found) => Ok(Err(self.follow(memory, found)?)),
        }
    }

    /// Whether it is null.
    pub fn is_null(&self) -> bool {
        load64(&self.word, Ordering::Relaxed) == 0
    }

    fn address(&self) -> u64 {
        core::ptr::from_ref(self).addr() as u64
    }

    fn follow<'m>(&self, memory: &'m Mapping, word: u64) -> Result<Option<&'m T>, ShmError> {
        let distance = match word {
            0 => return Ok(None),
            TO_ITSELF => 0,
            distance => distance,
        };
        // Wrapping on purpose: the distance is signed, and the bounds check judges the sum.
        let base = memory.as_ptr().addr() as u64;
        let offset = self.address().wrapping_add(distance).wrapping_sub(base);
        memory.get(offset).map(Some)
    }

    fn word_for(&self, memory: &Mapping, target: Option<&T>) -> Result<u64, ShmError> {
        let own = memory.offset_of(self)?;
        let Some(target) = target else { return Ok(0) };
        match memory.offset_of(target)?.wrapping_sub(own) {
            0 => Ok(TO_ITSELF),
            distance => Ok(distance),
        }
    }
}

impl<T: PodShared> OffsetPtr<T> {
    /// A null pointer, to be placed into a segment.
    pub const fn null() -> Self {
        Self {
            inner: AtomicOffsetPtr::null(),
        }
    }

    /// What it points to.
    ///
    /// # Errors
    /// As [`AtomicOffsetPtr::load`].
    pub fn get<'m>(&self, memory: &'m Mapping) -> Result<Option<&'m T>, ShmError> {
        self.inner.load(memory, Ordering::Relaxed)
    }

    /// Points it to `target`.
    ///
    /// # Errors
    /// As [`AtomicOffsetPtr::store`].
    pub fn set(&self, memory: &Mapping, target: Option<&T>) -> Result<(), ShmError> {
        self.inner.store(memory, target, Ordering::Relaxed)
    }

    /// Points it to where `other` points: a copy that keeps the target and not the distance.
    ///
    /// # Errors
    /// As [`get`](Self::get) and [`set`](Self::set).
    pub fn assign(&self, memory: &Mapping, other: &Self) -> Result<(), ShmError> {
        self.set(memory, other.get(memory)?)
    }

    /// Whether it is null.
    pub fn is_null(&self) -> bool {
        self.inner.is_null()
    }
}

impl<T> fmt::Debug for AtomicOffsetPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match load64(&self.word, Ordering::Relaxed) {
            0 => f.write_str("null"),
            TO_ITSELF => f.write_str("self"),
            distance => write!(f, "self{:+}", distance as i64),
        }
    }
}

impl<T> fmt::Debug for OffsetPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[cfg(test)]
#[path = "offset_ptr_test.rs"]
mod offset_ptr_test;
