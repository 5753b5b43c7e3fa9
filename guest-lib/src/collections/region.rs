//! The line with which every collection that lies directly in a mapping begins, and how it comes
//! into being.
//!
//! ```text
//!   all zero --CAS creator--> claimed by A --stores--> magic, fields, cleared body --seal--> open
//!                                 | dies anywhere                                       (for ever)
//!                                 v
//!                        CAS creator A -> B: B starts from nothing
//! ```
//!
//! The seal is the checksum of the constant fields; it is stored last, and nobody reads the body
//! before it. A creator may therefore die at any store, and whoever creates next takes over.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::CollectionError;
use crate::liveness::Liveness;
use crate::mem::{cas64, fill64, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::seal::{Seal, Unsealed};
use crate::shm::Mapping;
use crate::wait::deadline_after;

/// Constant words of a collection.
pub(super) const FIELDS: usize = 4;
/// Bytes of the line.
pub(super) const HEADER: u64 = 64;

/// Which collection: its first word, and its name for errors.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) magic: u64,
    pub(super) name: &'static str,
}

#[repr(C, align(64))]
pub(super) struct Header {
    magic: AtomicU64,
    creator: AtomicU64,
    seal: AtomicU64,
    fields: [AtomicU64; FIELDS],
    /// A hint that the collection may keep; not covered by the seal.
    pub(super) hint: AtomicU64,
}

// SAFETY: `repr(C)` of atomics without padding; any bits are valid; nothing to drop.
unsafe impl PodSafe for Header {}
// SAFETY: it consists of atomics.
unsafe impl PodShared for Header {}

/// Creates a collection of `bytes` bytes at `at`: claims the header, runs `clear` over whatever a
/// dead creator left in the body, and opens it.
pub(super) fn create<J: Liveness>(
    memory: &Mapping,
    (at, bytes): (u64, u64),
    kind: &Kind,
    fields: [u64; FIELDS],
    (me, judge): (InstanceId, &J),
) -> Result<(), CollectionError> {
    check_instance(me)?;
    let available = memory.len().saturating_sub(at);
    if bytes > available {
        return Err(CollectionError::TooSmall {
            needed: bytes,
            available,
        });
    }
    let header: &Header = memory.get(at)?;
    let body: &[AtomicU64] = memory.get_slice(at + HEADER, (bytes - HEADER) / 8)?;
    check_magic(header, kind)?;
    let creator = load64(&header.creator, Ordering::Acquire);
    let claim = InstanceId::from_word(creator);
    if load64(&header.seal, Ordering::Acquire) != 0 {
        return Err(CollectionError::Exists(kind.name));
    }
    if creator != 0 && claim != me && judge.is_alive(claim) {
        return Err(CollectionError::BeingCreated(claim));
    }
    if let Err(other) = cas64(&header.creator, creator, me.word(), Ordering::AcqRel) {
        return Err(CollectionError::BeingCreated(InstanceId::from_word(other)));
    }
    // The creator before may have sealed it between the two looks, and died after that.
    if load64(&header.seal, Ordering::Acquire) != 0 {
        return Err(CollectionError::Exists(kind.name));
    }
    fill64(&header.magic, kind.magic);
    fill64(&header.hint, 0);
    for (cell, field) in header.fields.iter().zip(fields) {
        fill64(cell, field);
    }
    for word in body {
        // Fresh memory is zero: a large body is read, not dirtied.
        if load64(word, Ordering::Relaxed) != 0 {
            fill64(word, 0);
        }
    }
    // Release: whoever reads the seal finds everything above.
    store64(
        &header.seal,
        checksum(kind.magic, fields),
        Ordering::Release,
    );
    Ok(())
}

/// The fields of the collection at `at`, once it is open; waits up to `patience` for a creator
/// that lives, or that has not begun.
pub(super) fn open<J: Liveness>(
    memory: &Mapping,
    at: u64,
    kind: &Kind,
    judge: &J,
    patience: Duration,
) -> Result<[u64; FIELDS], CollectionError> {
    let header: &Header = memory.get(at)?;
    let words = Seal {
        magic: &header.magic,
        creator: &header.creator,
        seal: &header.seal,
    };
    let deadline = deadline_after(patience);
    let seal = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match words.wait(kind.magic, judge, left) {
            Ok(seal) => break seal,
            // Nobody has begun: another collection may be created first.
            Err(Unsealed::Unfinished(creator)) if creator.is_none() && !left.is_zero() => {}
            Err(unsealed) => return Err(unsealed_as(unsealed, header, kind, at)),
        }
    };
    let mut fields = [0; FIELDS];
    for (field, cell) in fields.iter_mut().zip(&header.fields) {
        *field = load64(cell, Ordering::Relaxed);
    }
    if checksum(kind.magic, fields) != seal {
        return Err(damaged(kind, at, "its header and its seal disagree"));
    }
    Ok(fields)
}

fn unsealed_as(unsealed: Unsealed, header: &Header, kind: &Kind, at: u64) -> CollectionError {
    match unsealed {
        Unsealed::OtherData => match check_magic(header, kind) {
            Err(other) => other,
            Ok(()) => damaged(kind, at, "sealed without a kind"),
        },
        Unsealed::Unfinished(creator) | Unsealed::BeingCreated(creator) if creator.is_none() => {
            CollectionError::Absent(kind.name)
        }
        Unsealed::Unfinished(creator) => CollectionError::Unfinished(creator),
        Unsealed::BeingCreated(creator) => CollectionError::BeingCreated(creator),
    }
}

/// Refuses a collection that says it is larger than the mapping.
pub(super) fn check_size(memory: &Mapping, at: u64, needed: u64) -> Result<(), CollectionError> {
    let available = memory.len().saturating_sub(at);
    if needed > available {
        return Err(CollectionError::TooSmall { needed, available });
    }
    Ok(())
}

/// Refuses what cannot own anything.
pub(super) fn check_instance(me: InstanceId) -> Result<(), CollectionError> {
    if me.id() == 0 || me.generation() == 0 {
        return Err(CollectionError::NoInstance(me));
    }
    Ok(())
}

fn check_magic(header: &Header, kind: &Kind) -> Result<(), CollectionError> {
    match load64(&header.magic, Ordering::Relaxed) {
        0 => Ok(()),
        magic if magic == kind.magic => Ok(()),
        found => Err(CollectionError::NotThis {
            expected: kind.name,
            found,
        }),
    }
}

fn damaged(kind: &Kind, at: u64, detail: &'static str) -> CollectionError {
    CollectionError::Damaged {
        what: kind.name,
        at,
        detail,
    }
}

fn checksum(magic: u64, fields: [u64; FIELDS]) -> u64 {
    mix(core::iter::once(magic).chain(fields)) | 1
}

/// Mixes words into one. Not cryptographic: it finds accidents, and spreads keys.
pub(super) fn mix(words: impl IntoIterator<Item = u64>) -> u64 {
    let mut sum = 0x9e37_79b9_7f4a_7c15u64;
    for word in words {
        sum = (sum ^ word)
            .wrapping_mul(0xff51_afd7_ed55_8ccd)
            .rotate_left(29);
    }
    // The finaliser of MurmurHash3 (A. Appleby, public domain): every bit of the input reaches
    // every bit of the result.
    sum = (sum ^ sum >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    sum = (sum ^ sum >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    sum ^ sum >> 33
}

/// Mixes bytes, with their length.
pub(super) fn mix_bytes(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    mix(words.chain([bytes.len() as u64]))
}
