//! What became of a record.

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use super::codec::MAX_LOCKS;
use crate::mem::load64;

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whose record it is.
    pub owner: InstanceId,
    /// Its sequence number; 0 if there is no record.
    pub seq: u64,
    /// What its owner was doing.
    pub kind: u32,
    /// The owner's number for it.
    pub tag: u64,
    /// What it was committed with; 0 if it did not happen.
    pub result: u64,
    /// Whether it was committed. If not, none of its words changed, and none ever will.
    pub happened: bool,
    /// Which locks it wanted and had.
    pub locks: LockNotes,
}

impl Outcome {
    /// The outcome of an owner that has no record.
    pub const fn nothing(owner: InstanceId) -> Self {
        Self {
            owner,
            seq: 0,
            kind: 0,
            tag: 0,
            result: 0,
            happened: false,
            locks: LockNotes([0; MAX_LOCKS]),
        }
    }
}

/// The locks that a record noted, in the order of their first note.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LockNotes([u64; MAX_LOCKS]);

impl LockNotes {
    /// Stands in the last place if there were more locks than places.
    pub(super) const MORE: u64 = u64::MAX;

    pub(super) fn read(words: &[AtomicU64]) -> Self {
        let mut notes = [0; MAX_LOCKS];
        for (note, word) in notes.iter_mut().zip(words) {
            *note = load64(word, Ordering::Relaxed);
        }
        Self(notes)
    }

    /// The noted locks: the offset of each, and whether it was acquired.
    pub fn iter(&self) -> impl Iterator<Item = (u64, bool)> + '_ {
        let notes = self.0.iter().take_while(|note| **note != 0);
        notes
            .filter(|note| **note != Self::MORE)
            .map(|note| (note & !1, note & 1 == 1))
    }

    /// Whether there were more than could be noted.
    pub fn are_cut(&self) -> bool {
        self.0[MAX_LOCKS - 1] == Self::MORE
    }
}

impl core::fmt::Debug for LockNotes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}
