//! How a log lies in memory, and which of its words vouch for which.
//!
//! ```text
//! 0x000  begun, committed, retired     sequence numbers
//! 0x040  head of even records          owner, kind, tag, previous, intent sum;
//!                                      result, length, payload sum, seal
//! 0x088      their locks               7 words: offset of the lock, bit 0 set once it is held
//! 0x0c0  head of odd records           likewise
//! 0x140  entries                       offset, value; offset, value; ...
//! ```
//!
//! There is one place for entries but two for heads: a new record's head is filled while the
//! head of the record before is still the answer to "what happened last?", and the one store of
//! `begun` changes the answer.
//!
//! The intent sum covers owner (id and generation), sequence, kind, tag, and the sequence number
//! of the last record that was committed before (`previous`): so that a record is not applied
//! again because `retired` fell back. The payload sum covers the entries. The seal covers the intent sum, the result, the length and the payload sum. So
//! every word of a record is covered by its seal, and what is left of a record after its entries
//! were overwritten by the next one can still be verified.

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use crate::mem::{fill64, load64};

/// Words before the heads.
pub(super) const BEGUN: usize = 0;
pub(super) const COMMITTED: usize = 1;
pub(super) const RETIRED: usize = 2;
const HEADS: usize = 8;
const HEAD_WORDS: usize = 16;

/// Words of a head, from its first.
pub(super) const OWNER: usize = 0;
pub(super) const KIND: usize = 1;
pub(super) const TAG: usize = 2;
pub(super) const PREVIOUS: usize = 3;
pub(super) const INTENT_SUM: usize = 4;
pub(super) const RESULT: usize = 5;
pub(super) const LENGTH: usize = 6;
pub(super) const PAYLOAD_SUM: usize = 7;
pub(super) const SEAL: usize = 8;
pub(super) const LOCK_NOTES: usize = 9;

/// The first word of the entries.
pub(super) const ENTRIES: usize = HEADS + 2 * HEAD_WORDS;

/// The most entries that a log may have.
pub const MAX_ENTRIES: u32 = 1 << 16;

/// The most locks that one record notes.
pub const MAX_LOCKS: usize = 7;

/// Bytes of a log for records of up to `entries` words; a multiple of 64.
pub const fn log_size(entries: u32) -> u64 {
    (ENTRIES as u64 * 8 + entries as u64 * 16).next_multiple_of(64)
}

const _: () = {
    assert!(log_size(1) == 0x180 && log_size(4) == 0x180 && log_size(5) == 0x1c0);
    assert!(HEAD_WORDS == LOCK_NOTES + MAX_LOCKS);
};

/// The first word of a record's head.
pub(super) const fn head_of(seq: u64) -> usize {
    HEADS + (seq & 1) as usize * HEAD_WORDS
}

/// A word that is not what the others say it must be: its index in the log, its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    pub(super) word: usize,
    pub(super) field: &'static str,
}

/// What the three sequence numbers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No record was ever begun.
    Empty,
    /// The record was begun and is not committed: it is being written, or was given up.
    Open(u64),
    /// The record is committed; some of it may be applied.
    Committed(u64),
    /// The record is applied.
    Retired(u64),
}

impl State {
    /// Reads the sequence numbers.
    ///
    /// `committed` follows `begun`, and `retired` follows `committed`, each by one store. Hence
    /// two of the three are always equal in one of two ways, and whatever else stands there was
    /// not written by this module.
    pub(super) fn read(words: &[AtomicU64]) -> Result<Self, Mismatch> {
        // Acquire: what a committed record says was stored before its sequence number.
        let begun = load64(&words[BEGUN], Ordering::Acquire);
        let committed = load64(&words[COMMITTED], Ordering::Acquire);
        let retired = load64(&words[RETIRED], Ordering::Acquire);
        if committed == retired && committed <= begun {
            return Ok(match begun {
                0 => Self::Empty,
                seq if seq == retired => Self::Retired(seq),
                seq => Self::Open(seq),
            });
        }
        if committed == begun && retired < committed {
            return Ok(Self::Committed(begun));
        }
        let word = COMMITTED;
        let field = "sequence numbers (begun, committed, retired)";
        Err(Mismatch { word, field })
    }

    /// The sequence number of the last record; 0 if there is none.
    pub(super) fn seq(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Open(seq) | Self::Committed(seq) | Self::Retired(seq) => seq,
        }
    }
}

/// Who wants what: the part of a record that is there before it is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Intent {
    pub(super) owner: InstanceId,
    pub(super) seq: u64,
    pub(super) kind: u32,
    pub(super) tag: u64,
    /// The last record before that was committed.
    pub(super) previous: u64,
}

impl Intent {
    pub(super) fn sum(&self) -> u64 {
        let mut sum = Sum::new(self.seq);
        sum.add(self.owner.word());
        sum.add(self.kind.into());
        sum.add(self.tag);
        sum.add(self.previous);
        sum.finish()
    }

    /// Writes the intent into the head of its record; returns its sum.
    pub(super) fn write(&self, words: &[AtomicU64]) -> u64 {
        let head = &words[head_of(self.seq)..][..HEAD_WORDS];
        let sum = self.sum();
        fill64(&head[OWNER], self.owner.word());
        fill64(&head[KIND], self.kind.into());
        fill64(&head[TAG], self.tag);
        fill64(&head[PREVIOUS], self.previous);
        fill64(&head[INTENT_SUM], sum);
        sum
    }

    /// Reads and verifies the intent of the last record.
    pub(super) fn read(words: &[AtomicU64], state: State) -> Result<Self, Mismatch> {
        let seq = state.seq();
        let head = head_of(seq);
        let word = |n| load64(&words[head + n], Ordering::Relaxed);
        let mismatch = |n, field| Mismatch {
            word: head + n,
            field,
        };
        let intent = Self {
            owner: InstanceId::from_word(word(OWNER)),
            seq,
            kind: u32::try_from(word(KIND)).map_err(|_| mismatch(KIND, "kind"))?,
            tag: word(TAG),
            previous: word(PREVIOUS),
        };
        if intent.sum() != word(INTENT_SUM) {
            return Err(mismatch(INTENT_SUM, "intent sum"));
        }
        let retired = load64(&words[RETIRED], Ordering::Relaxed);
        if !matches!(state, State::Retired(_)) && intent.previous != retired {
            return Err(Mismatch {
                word: RETIRED,
                field: "sequence number of the last retired record",
            });
        }
        Ok(intent)
    }
}

/// What a record comes to: the part of it that is written when it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seal {
    pub(super) result: u64,
    pub(super) length: u64,
    pub(super) payload_sum: u64,
}

impl Seal {
    pub(super) fn sum(&self, intent_sum: u64) -> u64 {
        let mut sum = Sum::new(intent_sum);
        sum.add(self.result);
        sum.add(self.length);
        sum.add(self.payload_sum);
        sum.finish()
    }

    /// Writes the seal of a record; what follows is the commit.
    pub(super) fn write(&self, words: &[AtomicU64], seq: u64, intent_sum: u64) {
        let head = &words[head_of(seq)..][..HEAD_WORDS];
        fill64(&head[RESULT], self.result);
        fill64(&head[LENGTH], self.length);
        fill64(&head[PAYLOAD_SUM], self.payload_sum);
        fill64(&head[SEAL], self.sum(intent_sum));
    }

    /// Reads and verifies the seal of a committed record.
    pub(super) fn read(words: &[AtomicU64], intent: &Intent) -> Result<Self, Mismatch> {
        let head = head_of(intent.seq);
        let word = |n| load64(&words[head + n], Ordering::Relaxed);
        let seal = Self {
            result: word(RESULT),
            length: word(LENGTH),
            payload_sum: word(PAYLOAD_SUM),
        };
        if seal.sum(intent.sum()) != word(SEAL) {
            return Err(Mismatch {
                word: head + SEAL,
                field: "seal",
            });
        }
        Ok(seal)
    }
}

/// The index of the first word of an entry.
pub(super) const fn entry(n: usize) -> usize {
    ENTRIES + 2 * n
}

/// The sum of the first `length` entries.
pub(super) fn payload_sum(words: &[AtomicU64], length: usize) -> u64 {
    // Two lanes, because one is as slow as its chain of multiplications.
    let (mut offsets, mut values) = (Sum::new(1), Sum::new(2));
    for pair in words[entry(0)..entry(length)].chunks_exact(2) {
        offsets.add(load64(&pair[0], Ordering::Relaxed));
        values.add(load64(&pair[1], Ordering::Relaxed));
    }
    offsets.add(values.finish());
    offsets.finish()
}

/// The sum of some words, for headers that are written once; never 0.
pub(crate) fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let mut sum = Sum::new(0);
    for word in words {
        sum.add(word);
    }
    sum.finish().max(1)
}

/// A 64-bit sum over words.
///
/// Every step is a bijection of the state for a given word, and of the word for a given state:
/// xor, multiplication by an odd constant, rotation. So two sequences that differ in one word
/// have different sums, always; others collide with probability 2^-64 unless somebody searches
/// for a collision, which is not what this is against.
struct Sum(u64);

impl Sum {
    /// A sum in which `seed` counts as the first word. No sequence of zeros has the sum 0.
    fn new(seed: u64) -> Self {
        let mut sum = Self(0x9e37_79b9_7f4a_7c15);
        sum.add(seed);
        sum
    }

    #[inline(always)]
    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word)
            .wrapping_mul(0xd6e8_feb8_6659_fd93)
            .rotate_left(32);
    }

    /// Spreads the last words over all bits.
    fn finish(self) -> u64 {
        let sum = (self.0 ^ self.0 >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        sum ^ sum >> 32
    }
}

#[cfg(test)]
#[path = "codec_test.rs"]
mod codec_test;
