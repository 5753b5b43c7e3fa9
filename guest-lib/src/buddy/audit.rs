//! Whether an allocator's words agree with each other.

use core::sync::atomic::{AtomicU64, Ordering};

use super::tree::Words;
use super::{Buddy, BuddyError, LIVE, ORDER};
use crate::mem::load64;

/// What an audit counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuddyAudit {
    /// All units.
    pub units: u64,
    /// Units that are free.
    pub free: u64,
    /// Units in chunks.
    pub live: u64,
    /// Chunks in use.
    pub chunks: u64,
    /// Units of the largest free block.
    pub largest: u64,
}

impl Buddy<'_> {
    /// Checks every word: each unit is free or in exactly one chunk, and the tree is the one that
    /// those chunks make. For a quiet allocator, or under its lock. Time and private memory grow
    /// with the number of units.
    ///
    /// # Errors
    /// [`BuddyError::Corrupt`] with the first word that is wrong.
    pub fn audit(&self) -> Result<BuddyAudit, BuddyError> {
        let mut expected = Expected {
            words: self.tree.all_free().collect(),
            at: self.tree_at(0),
        };
        let mut audit = BuddyAudit {
            units: self.spec.units.into(),
            free: 0,
            live: 0,
            chunks: 0,
            largest: 0,
        };
        let mut end = 0;
        for unit in 0..self.spec.units {
            let at = self.chunk_at(unit);
            let words = self.memory.get_slice::<AtomicU64>(at, 2)?;
            let state = load64(&words[1], Ordering::Acquire);
            let order = self.order_in(unit, state)?;
            if state & LIVE == 0 {
                continue;
            }
            if state != LIVE | u64::from(order) {
                return Err(self.corrupt(at + 8, "state of a chunk", state));
            }
            if u64::from(unit) < end {
                return Err(self.corrupt(at + 8, "state inside of another chunk", state));
            }
            if load64(&words[0], Ordering::Relaxed) == 0 {
                return Err(self.corrupt(at, "owner of a chunk", 0));
            }
            let units = 1 << (state & ORDER);
            end = u64::from(unit) + units;
            audit.chunks += 1;
            audit.live += units;
            self.tree.take_at(&mut expected, unit, order)?;
        }
        for (n, expected) in (0..).zip(&expected.words) {
            let at = self.tree_at(n);
            let found = load64(self.memory.get(at)?, Ordering::Acquire);
            if found != *expected {
                return Err(self.corrupt(at, "tree, which does not fit the chunks,", found));
            }
        }
        for unit in 0..self.spec.units {
            audit.free += u64::from(self.tree.is_free(&expected, unit)?);
        }
        audit.largest = match self.tree.largest(&expected)? {
            0 => 0,
            value => 1 << (value - 1),
        };
        if audit.free + audit.live != audit.units {
            return Err(self.corrupt(self.tree_at(0), "number of free units", audit.free));
        }
        Ok(audit)
    }
}

/// The tree that the chunks make.
struct Expected {
    words: Vec<u64>,
    at: u64,
}

impl Words for Expected {
    type Error = BuddyError;

    fn get(&self, word: u64) -> Result<u64, BuddyError> {
        let found = self.words.get(word as usize).copied();
        found.ok_or_else(|| self.corrupt(word, 0))
    }

    fn set(&mut self, word: u64, value: u64) -> Result<(), BuddyError> {
        match self.words.get_mut(word as usize) {
            Some(place) => {
                *place = value;
                Ok(())
            }
            None => Err(self.corrupt(word, value)),
        }
    }

    fn corrupt(&self, word: u64, found: u64) -> BuddyError {
        BuddyError::Corrupt {
            at: self.at + word * 8,
            field: "chunk table, whose chunks overlap: tree",
            found,
        }
    }
}
