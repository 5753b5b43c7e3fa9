//! What the collections in a heap have in common: a block that a root slot owns, with the
//! collection's kind in its first word, and blocks that are filled before they are linked.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use super::region::Kind;
use super::{CollectionError, kind};
use crate::heap::{HOLDS, Participant};
use crate::liveness::Liveness;
use crate::mem::{fill64, load64};
use crate::shm::Mapping;
use crate::wait::{Pacer, deadline_after};

/// The hold in which a new block waits to be linked.
pub(super) const NEW: usize = HOLDS - 1;
/// The hold for the block that replaces a larger part of a structure.
pub(super) const SPARE: usize = HOLDS - 2;
/// The hold for a block that was taken out and that nobody else can see.
pub(super) const TAKEN: usize = HOLDS - 3;

/// Creates a collection in a root slot: a block of `bytes` bytes, all zero but for the kind and
/// the `fields` after it. Until the one record that links it, it is the caller's alone.
pub(super) fn create<J: Liveness>(
    participant: &mut Participant<'_, J>,
    root: u64,
    of: &Kind,
    bytes: u64,
    fields: &[u64],
) -> Result<u64, CollectionError> {
    let memory = participant.memory();
    refuse_if_there(memory, root, of)?;
    let block = fresh(participant, NEW, bytes)?;
    let words: &[AtomicU64] = memory.get_slice(block, bytes / 8)?;
    let begin = [of.magic].into_iter().chain(fields.iter().copied());
    for (word, value) in words.iter().zip(begin.chain(core::iter::repeat(0))) {
        fill64(word, value);
    }
    // Roots of collections change under the heap's own lock.
    let guard = participant
        .heap()
        .lock(participant.instance(), participant.judge())?;
    let linked = refuse_if_there(memory, root, of).and_then(|()| {
        let mut record = participant.begin(kind::CREATE)?;
        record.set(root, block)?;
        record.set(participant.hold(NEW), 0)?;
        Ok(record.commit(block)?)
    });
    guard.unlock()?;
    if linked.is_err() {
        participant.free_from(participant.hold(NEW))?;
    }
    linked.map(|()| block)
}

/// The block of the collection in a root slot; waits up to `patience` for one that is not there.
pub(super) fn open(
    memory: &Mapping,
    root: u64,
    of: &Kind,
    patience: Duration,
) -> Result<u64, CollectionError> {
    let mut pacer = Pacer::new(Some(deadline_after(patience)));
    loop {
        // Acquire: pairs with the record that linked it.
        let block = load64(memory.get(root)?, Ordering::Acquire);
        if block != 0 {
            return match load64(memory.get(block)?, Ordering::Relaxed) {
                magic if magic == of.magic => Ok(block),
                found => Err(CollectionError::NotThis {
                    expected: of.name,
                    found,
                }),
            };
        }
        if pacer.sleep().is_err() {
            return Err(CollectionError::Absent(of.name));
        }
    }
}

fn refuse_if_there(memory: &Mapping, root: u64, of: &Kind) -> Result<(), CollectionError> {
    match open(memory, root, of, Duration::ZERO) {
        Err(CollectionError::Absent(_)) => Ok(()),
        Ok(_) => Err(CollectionError::Exists(of.name)),
        Err(error) => Err(error),
    }
}

/// Allocates a block into one of the collections' holds; what an operation that failed left
/// there is freed.
pub(super) fn fresh<J: Liveness>(
    participant: &mut Participant<'_, J>,
    hold: usize,
    bytes: u64,
) -> Result<u64, CollectionError> {
    let slot = participant.hold(hold);
    drop_held(participant, hold)?;
    Ok(participant.alloc_into(slot, bytes)?)
}

/// Frees what is in one of the collections' holds.
pub(super) fn drop_held<J: Liveness>(
    participant: &mut Participant<'_, J>,
    hold: usize,
) -> Result<(), CollectionError> {
    let slot = participant.hold(hold);
    if load64(participant.memory().get(slot)?, Ordering::Acquire) != 0 {
        participant.free_from(slot)?;
    }
    Ok(())
}

/// Bytes that `len` bytes take, in whole words.
pub(super) const fn padded(len: usize) -> u64 {
    (len as u64).next_multiple_of(8)
}

/// Fills whole words at `at` (a multiple of 8) with bytes, and zeroes after them. The record that
/// links the block publishes them.
pub(super) fn put_bytes(memory: &Mapping, at: u64, bytes: &[u8]) -> Result<(), CollectionError> {
    let words: &[AtomicU64] = memory.get_slice(at, padded(bytes.len()) / 8)?;
    for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
        fill64(word, first_word(chunk));
    }
    Ok(())
}

/// Whether the bytes at `at` are these; both were padded by [`put_bytes`].
pub(super) fn bytes_are(memory: &Mapping, at: u64, bytes: &[u8]) -> Result<bool, CollectionError> {
    let words: &[AtomicU64] = memory.get_slice(at, padded(bytes.len()) / 8)?;
    let mut pairs = words.iter().zip(bytes.chunks(8));
    Ok(pairs.all(|(word, chunk)| load64(word, Ordering::Relaxed) == first_word(chunk)))
}

/// Copies `len` bytes at `at` out.
pub(super) fn take_bytes(memory: &Mapping, at: u64, len: u64) -> Result<Vec<u8>, CollectionError> {
    // Before the allocation: a damaged length must not exhaust this process.
    memory.get_slice::<core::sync::atomic::AtomicU8>(at, len)?;
    let mut bytes = vec![0; len as usize];
    memory.copy_out(at, &mut bytes)?;
    Ok(bytes)
}

/// The first eight bytes as a number, little endian, as if zeroes followed.
pub(super) fn first_word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}

/// The error for what cannot be in shared memory.
pub(super) fn damaged(what: &'static str, at: u64, detail: &'static str) -> CollectionError {
    CollectionError::Damaged { what, at, detail }
}
