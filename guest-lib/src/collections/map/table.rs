//! The table of one stripe, and entries.

use core::sync::atomic::{AtomicU64, Ordering};

use super::super::CollectionError;
use super::super::rooted::{bytes_are, damaged, padded, put_bytes, take_bytes};
use super::{fill64, load64};
use crate::shm::Mapping;

/// In a slot: an entry was here, and probes go on.
pub(super) const REMOVED: u64 = 1;
/// Bits of a slot that are the entry's offset; above them are the highest bits of its hash.
const OFFSET: u64 = (1 << 48) - 1;
/// An entry: hash, lengths of key and value, key, value.
const LENGTHS: u64 = 8;
const KEY: u64 = 16;

/// The word of a slot.
pub(super) fn slot_word(hash: u64, entry: u64) -> u64 {
    hash & !OFFSET | entry
}

/// A table: its first word is the number of slots less one, the slots follow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'m> {
    at: u64,
    slots: &'m [AtomicU64],
}

/// An entry that was found: the offset of its slot, and its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) slot: u64,
    pub(super) entry: u64,
}

/// A slot that can take an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Free {
    pub(super) slot: u64,
    pub(super) was_removed: bool,
}

/// What a probe for a key comes upon.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) found: Option<Found>,
    pub(super) free: Option<Free>,
}

impl<'m> Table<'m> {
    /// Bytes of a table.
    pub(super) const fn size(slots: u64) -> u64 {
        8 + slots * 8
    }

    /// The table in a block.
    pub(super) fn at_block(memory: &'m Mapping, at: u64) -> Result<Self, CollectionError> {
        // Relaxed: the caller's load of `at` was Acquire.
        let mask = load64(memory.get(at)?, Ordering::Relaxed);
        match mask.checked_add(1) {
            Some(slots) if slots.is_power_of_two() => {
                let slots = memory.get_slice(at + 8, slots)?;
                Ok(Self { at, slots })
            }
            _ => Err(damaged(
                "table of a map",
                at,
                "it cannot have that many slots",
            )),
        }
    }

    /// Fills a block that is the caller's alone with an empty table.
    pub(super) fn fill(memory: &'m Mapping, at: u64, slots: u64) -> Result<Self, CollectionError> {
        fill64(memory.get(at)?, slots - 1);
        let table = Self::at_block(memory, at)?;
        for slot in table.slots {
            fill64(slot, 0);
        }
        Ok(table)
    }

    /// The offset of its block.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// How many slots it has.
    pub(super) fn slots(&self) -> u64 {
        self.slots.len() as u64
    }

    /// The offset of a slot.
    pub(super) fn slot(&self, index: u64) -> u64 {
        self.at + 8 + index * 8
    }

    /// The word of a slot; 0 beyond the last.
    pub(super) fn load(&self, index: u64) -> u64 {
        // Acquire: pairs with the record that stored it; the entry is visible.
        let slot = self.slots.get(index as usize);
        slot.map_or(0, |slot| load64(slot, Ordering::Acquire))
    }

    /// Looks for a key, and on the way for the first slot that could take it.
    ///
    /// For readers with a pin, and for holders of the stripe's lock.
    pub(super) fn find(
        &self,
        memory: &Mapping,
        hash: u64,
        key: &[u8],
    ) -> Result<Probe, CollectionError> {
        let mut free = None;
        for index in self.probe(hash) {
            let word = self.load(index);
            let slot = self.slot(index);
            if word == 0 {
                let free = free.or(Some(Free {
                    slot,
                    was_removed: false,
                }));
                return Ok(Probe { found: None, free });
            }
            if word == REMOVED {
                let was_removed = true;
                free = free.or(Some(Free { slot, was_removed }));
                continue;
            }
            if (word ^ hash) & !OFFSET != 0 {
                continue;
            }
            let entry = word & OFFSET;
            if Entry::at_block(memory, entry).is(hash, key)? {
                let found = Some(Found { slot, entry });
                return Ok(Probe { found, free });
            }
        }
        Ok(Probe { found: None, free })
    }

    /// Puts an entry that is not there into a table that nobody else can see yet.
    pub(super) fn put(&self, hash: u64, word: u64) -> Result<(), CollectionError> {
        for index in self.probe(hash) {
            let slot = &self.slots[index as usize];
            if load64(slot, Ordering::Relaxed) == 0 {
                fill64(slot, word);
                return Ok(());
            }
        }
        Err(damaged("table of a map", self.at, "it is full of entries"))
    }

    /// The slots of a key, one after the other; every slot once.
    fn probe(&self, hash: u64) -> impl Iterator<Item = u64> + use<> {
        // Not the bits that chose the stripe, nor those that are in the slot.
        let (first, mask) = (hash >> 12, self.slots.len() as u64 - 1);
        (0..=mask).map(move |step| first.wrapping_add(step) & mask)
    }
}

/// An entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'m> {
    memory: &'m Mapping,
    at: u64,
}

impl<'m> Entry<'m> {
    /// Bytes of an entry.
    pub(super) fn size(key: &[u8], value: &[u8]) -> Result<u64, CollectionError> {
        for (what, bytes) in [
            ("the length of a key", key),
            ("the length of a value", value),
        ] {
            if u32::try_from(bytes.len()).is_err() {
                return Err(CollectionError::Spec {
                    what,
                    value: bytes.len() as u64,
                    allowed: "0..2^32",
                });
            }
        }
        Ok(KEY + padded(key.len()) + padded(value.len()))
    }

    /// Fills a block that is the caller's alone.
    pub(super) fn fill(
        memory: &Mapping,
        at: u64,
        hash: u64,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), CollectionError> {
        fill64(memory.get(at)?, hash);
        let lengths = (value.len() as u64) << 32 | key.len() as u64;
        fill64(memory.get(at + LENGTHS)?, lengths);
        put_bytes(memory, at + KEY, key)?;
        put_bytes(memory, at + KEY + padded(key.len()), value)
    }

    /// The entry in a block.
    pub(super) fn at_block(memory: &'m Mapping, at: u64) -> Self {
        Self { memory, at }
    }

    /// The entry of a slot's word, if there is one.
    pub(super) fn in_slot(memory: &'m Mapping, word: u64) -> Option<Self> {
        match word {
            0 | REMOVED => None,
            word => Some(Self::at_block(memory, word & OFFSET)),
        }
    }

    /// The offset of its block.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The hash of its key.
    pub(super) fn hash(&self) -> Result<u64, CollectionError> {
        Ok(load64(self.memory.get(self.at)?, Ordering::Relaxed))
    }

    /// Its key.
    pub(super) fn key(&self) -> Result<Vec<u8>, CollectionError> {
        let (key, _) = self.lengths()?;
        take_bytes(self.memory, self.at + KEY, key)
    }

    /// Its value.
    pub(super) fn value(&self) -> Result<Vec<u8>, CollectionError> {
        let (key, value) = self.lengths()?;
        take_bytes(self.memory, self.at + KEY + padded(key as usize), value)
    }

    fn is(&self, hash: u64, key: &[u8]) -> Result<bool, CollectionError> {
        Ok(self.hash()? == hash
            && self.lengths()?.0 == key.len() as u64
            && bytes_are(self.memory, self.at + KEY, key)?)
    }

    fn lengths(&self) -> Result<(u64, u64), CollectionError> {
        let lengths = load64(self.memory.get(self.at + LENGTHS)?, Ordering::Relaxed);
        Ok((lengths & 0xffff_ffff, lengths >> 32))
    }
}
