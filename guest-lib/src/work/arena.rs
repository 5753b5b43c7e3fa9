//! Where results lie.
//!
//! One word holds the arena's last allocation: the unit, its blocks, and the end. Allocating is a
//! compare-and-swap of that word, after the allocation before was written down in its unit's
//! line; see the module documentation of [`crate::work`].

use core::sync::atomic::Ordering;

use super::error::WorkError;
use super::job::Job;
use super::layout::{BLOCK, checksum};
use crate::mem::{cas64, load64};

const END_BITS: u32 = 26;
const BLOCKS_BITS: u32 = 18;
const END_MASK: u64 = (1 << END_BITS) - 1;
const BLOCKS_MASK: u64 = (1 << BLOCKS_BITS) - 1;

/// Bytes before a result: its length and checksum.
const RESULT_HEADER: u64 = 16;

/// A run of blocks: how many, and where it ends, counted in blocks from the arena's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) blocks: u64,
    pub(super) end: u64,
}

impl Place {
    /// Unpacks the word of a unit's line; `None` for 0 and for what cannot be.
    pub(super) fn from_word(word: u64) -> Option<Self> {
        let place = Self {
            blocks: word >> END_BITS & BLOCKS_MASK,
            end: word & END_MASK,
        };
        let is_valid = place.blocks > 0 && place.blocks <= place.end;
        (is_valid && word >> (END_BITS + BLOCKS_BITS) == 0).then_some(place)
    }

    pub(super) fn word(self) -> u64 {
        self.blocks << END_BITS | self.end
    }

    pub(super) fn start(self) -> u64 {
        self.end - self.blocks
    }
}

/// The arena word: the last allocation.
struct Last {
    unit: u32,
    place: Option<Place>,
    end: u64,
}

impl Last {
    fn from_word(word: u64) -> Self {
        Self {
            unit: (word >> (END_BITS + BLOCKS_BITS)) as u32,
            place: Place::from_word(word & ((1 << (END_BITS + BLOCKS_BITS)) - 1)),
            end: word & END_MASK,
        }
    }

    fn word(unit: u32, place: Place) -> u64 {
        u64::from(unit) << (END_BITS + BLOCKS_BITS) | place.word()
    }
}

impl Job<'_> {
    /// Bytes handed out so far, and the last allocation with its unit. Stores nothing.
    pub(super) fn arena_used(&self) -> Result<(u64, Option<(u32, Place)>), WorkError> {
        let last = Last::from_word(load64(&self.header()?.arena.word, Ordering::Acquire));
        Ok((last.end * BLOCK, last.place.map(|place| (last.unit, place))))
    }

    /// Writes the last allocation down in its unit's line, if that was not done.
    fn help_last(&self) -> Result<u64, WorkError> {
        let word = load64(&self.header()?.arena.word, Ordering::Acquire);
        let last = Last::from_word(word);
        if let (Some(place), Some(line)) = (last.place, self.units()?.get(last.unit as usize))
            && load64(&line.place, Ordering::Acquire) == 0
        {
            // Whoever comes first; they all write the same.
            let _ = cas64(&line.place, 0, place.word(), Ordering::AcqRel);
        }
        Ok(word)
    }

    /// The place for a unit's result of `bytes` bytes: the one that an earlier attempt got, or a
    /// new one.
    pub(super) fn place_for(&self, unit: u32, bytes: u64) -> Result<Place, WorkError> {
        let blocks = (RESULT_HEADER + bytes).div_ceil(BLOCK);
        if blocks > BLOCKS_MASK {
            return Err(WorkError::ResultTooLarge(bytes));
        }
        let units = self.units()?;
        let line = units.get(unit as usize).ok_or(WorkError::Damaged {
            unit,
            detail: "there is no such unit",
        })?;
        loop {
            // First the last allocation, which may be this unit's own.
            let word = self.help_last()?;
            let placed = load64(&line.place, Ordering::Acquire);
            if placed != 0 {
                return self.same_place(unit, placed, blocks);
            }
            let place = Place {
                blocks,
                end: Last::from_word(word).end + blocks,
            };
            if place.end * BLOCK > self.spec.arena {
                return Err(WorkError::ArenaFull {
                    capacity: self.spec.arena,
                    wanted: blocks * BLOCK,
                });
            }
            // The end only grows, so a word that is still the same was the last one all the
            // time, and this unit has not got a place meanwhile.
            let arena = &self.header()?.arena.word;
            if cas64(arena, word, Last::word(unit, place), Ordering::AcqRel).is_ok() {
                let _ = cas64(&line.place, 0, place.word(), Ordering::AcqRel);
                return Ok(place);
            }
        }
    }

    fn same_place(&self, unit: u32, word: u64, blocks: u64) -> Result<Place, WorkError> {
        let place = self.place_in_bounds(unit, word)?;
        if place.blocks != blocks {
            return Err(WorkError::NotPure {
                unit,
                placed: place.blocks * BLOCK,
                found: blocks * BLOCK,
            });
        }
        Ok(place)
    }

    fn place_in_bounds(&self, unit: u32, word: u64) -> Result<Place, WorkError> {
        Place::from_word(word)
            .filter(|place| place.end * BLOCK <= self.spec.arena)
            .ok_or(WorkError::Damaged {
                unit,
                detail: "its place is not inside the arena",
            })
    }

    /// Fills a place. `Relaxed` stores: the caller's commit publishes them.
    pub(super) fn fill(&self, place: Place, result: &[u8]) -> Result<(), WorkError> {
        let at = self.places.arena + place.start() * BLOCK;
        let mut header = [0; RESULT_HEADER as usize];
        header[..8].copy_from_slice(&(result.len() as u64).to_le_bytes());
        header[8..].copy_from_slice(&sum(result).to_le_bytes());
        self.memory.copy_in(at, &header)?;
        Ok(self.memory.copy_in(at + RESULT_HEADER, result)?)
    }

    /// The result of a unit, if it is committed.
    pub(super) fn result(&self, unit: u32) -> Result<Option<ResultBlock<'_>>, WorkError> {
        let Some(line) = self.units()?.get(unit as usize) else {
            return Ok(None);
        };
        // Acquire: pairs with the commit; the result's bytes are visible.
        let word = load64(&line.result, Ordering::Acquire);
        if word == 0 {
            return Ok(None);
        }
        let place = self.place_in_bounds(unit, word)?;
        let at = self.places.arena + place.start() * BLOCK;
        let mut header = [0; RESULT_HEADER as usize];
        self.memory.copy_out(at, &mut header)?;
        let (len, sum) = header.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        let len = word(len);
        if len > place.blocks * BLOCK - RESULT_HEADER {
            let detail = "it is longer than its place";
            return Err(WorkError::Damaged { unit, detail });
        }
        Ok(Some(ResultBlock {
            job: self,
            unit,
            at: at + RESULT_HEADER,
            len,
            sum: word(sum),
        }))
    }
}

/// A committed result: it never changes.
#[derive(Debug)]
pub struct ResultBlock<'j> {
    job: &'j Job<'j>,
    unit: u32,
    at: u64,
    len: u64,
    sum: u64,
}

impl ResultBlock<'_> {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the result has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `out.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// [`WorkError::Damaged`] beyond the end.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), WorkError> {
        match offset.checked_add(out.len() as u64) {
            Some(end) if end <= self.len => Ok(self.job.memory.copy_out(self.at + offset, out)?),
            _ => Err(WorkError::Damaged {
                unit: self.unit,
                detail: "it is shorter than its contents say",
            }),
        }
    }

    /// Copies the whole result and checks it against its checksum.
    ///
    /// # Errors
    /// [`WorkError::Damaged`].
    pub fn read_all(&self) -> Result<Vec<u8>, WorkError> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes)?;
        if sum(&bytes) != self.sum {
            return Err(WorkError::Damaged {
                unit: self.unit,
                detail: "its checksum is wrong",
            });
        }
        Ok(bytes)
    }
}

fn sum(bytes: &[u8]) -> u64 {
    checksum(bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    }))
}
