//! The header of an allocator, and how it comes into being although its creator may die.
//!
//! `magic`, `creator` and `seal` are stored in this order: data of an unknown kind is never
//! claimed, a claim says who is at it, and what is sealed is complete. Until then everything
//! that a dead creator left is written again by the next.

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use super::error::BuddyError;
use crate::liveness::Liveness;
use crate::lock::LockError;
use crate::log::checksum;
use crate::mem::{cas64, fill64, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};

/// Constant words of a header.
pub(super) const FIELDS: usize = 5;

/// The first line of an allocator.
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct Header {
    magic: AtomicU64,
    /// Who creates it, or did.
    creator: AtomicU64,
    /// 0 until it is complete; then the checksum of the fields.
    seal: AtomicU64,
    fields: [AtomicU64; FIELDS],
}

const _: () = assert!(size_of::<Header>() == 64);

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for Header {}
// SAFETY: all fields are atomics.
unsafe impl PodShared for Header {}

/// What a creator is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    /// Write everything, then [`Header::seal`] it.
    Fresh,
    /// Nothing: it is complete, and of the same shape.
    Complete,
}

impl Header {
    /// Claims the creation of what `magic` and `fields` describe, at offset `at`.
    pub(super) fn claim(
        &self,
        at: u64,
        magic: u64,
        fields: [u64; FIELDS],
        me: InstanceId,
        judge: &impl Liveness,
    ) -> Result<Claimed, BuddyError> {
        if me.is_none() {
            return Err(LockError::NoInstance(me).into());
        }
        match cas64(&self.magic, 0, magic, Ordering::AcqRel) {
            Ok(_) => {}
            Err(found) if found == magic => {}
            Err(_) => return Err(not_this(at, "it holds other data")),
        }
        let complete = || match self.read(at, magic)? == fields {
            true => Ok(Claimed::Complete),
            false => Err(not_this(at, "it has another shape")),
        };
        let creator = load64(&self.creator, Ordering::Acquire);
        if load64(&self.seal, Ordering::Acquire) != 0 {
            return complete();
        }
        let claim = InstanceId::from_word(creator);
        if creator != 0 && claim != me && judge.is_alive(claim) {
            return Err(BuddyError::BeingCreated(claim));
        }
        if let Err(other) = cas64(&self.creator, creator, me.word(), Ordering::AcqRel) {
            return Err(BuddyError::BeingCreated(InstanceId::from_word(other)));
        }
        // The creator before may have sealed it between the two looks, and died after that.
        if load64(&self.seal, Ordering::Acquire) != 0 {
            return complete();
        }
        for (cell, field) in self.fields.iter().zip(fields) {
            fill64(cell, field);
        }
        Ok(Claimed::Fresh)
    }

    /// Opens to everybody what the caller has written.
    pub(super) fn seal(&self, fields: [u64; FIELDS], me: InstanceId) -> Result<(), BuddyError> {
        let creator = InstanceId::from_word(load64(&self.creator, Ordering::Acquire));
        if creator != me {
            return Err(BuddyError::BeingCreated(creator));
        }
        // Release: whoever reads the seal finds everything written.
        store64(&self.seal, checksum(fields), Ordering::Release);
        Ok(())
    }

    /// The fields of what is complete.
    pub(super) fn read(&self, at: u64, magic: u64) -> Result<[u64; FIELDS], BuddyError> {
        // Acquire: pairs with the Release of `seal`.
        let seal = load64(&self.seal, Ordering::Acquire);
        let found = load64(&self.magic, Ordering::Acquire);
        if found != magic && found != 0 {
            return Err(not_this(at, "it holds other data"));
        }
        if seal == 0 {
            return Err(BuddyError::Unfinished(self.creator()));
        }
        let mut fields = [0; FIELDS];
        for (field, cell) in fields.iter_mut().zip(&self.fields) {
            *field = load64(cell, Ordering::Relaxed);
        }
        match found == magic && checksum(fields) == seal {
            true => Ok(fields),
            false => Err(not_this(at, "its header is damaged")),
        }
    }

    /// Who creates it, or did.
    pub(super) fn creator(&self) -> InstanceId {
        InstanceId::from_word(load64(&self.creator, Ordering::Acquire))
    }
}

fn not_this(at: u64, why: &'static str) -> BuddyError {
    BuddyError::NotThis { at, why }
}
