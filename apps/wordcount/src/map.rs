//! The map phase: the words of one unit of the text, counted and sorted into partitions.
//!
//! The result of a unit, little-endian:
//!
//! ```text
//! u16 x (partitions + 1)    where each partition's entries begin; the last one is their number
//! padding to 8
//! u64 x entries             offset from the unit's start : 24 | length : 16 | count : 24
//! ```
//!
//! A word is named by its first occurrence in the text, so entries have one size and no word is
//! copied. The limits of the plan (units of at most 64 KiB, words of less than 64 KiB) keep all
//! numbers within their bits.

use lupin::work::{ResultBlock, WorkError};

use crate::table::Table;
use crate::text::{Piece, Text};

/// Largest unit, in bytes. Larger ones leave too few to share among the nodes.
pub const MAX_UNIT: u64 = 64 << 10;

/// Reusable memory of one worker.
#[derive(Debug, Default)]
pub struct Mapper {
    piece: Piece,
    table: Table<u32>,
    starts: Vec<u16>,
}

impl Mapper {
    /// Counts the words that start in `[start, end)` and appends the result to `out`.
    pub fn map<T: Text + ?Sized>(
        &mut self,
        text: &T,
        start: u64,
        end: u64,
        partitions: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), T::Error> {
        self.piece.read(text, start, end)?;
        self.table.clear();
        for (offset, word) in self.piece.words() {
            self.table.add(word, 1, offset as u32);
        }
        self.write(partitions, out);
        Ok(())
    }

    /// Distinct words of the last unit.
    pub fn distinct(&self) -> usize {
        self.table.len()
    }

    fn write(&mut self, partitions: u32, out: &mut Vec<u8>) {
        // A counting sort, stable: the order of first occurrence within each partition.
        self.starts.clear();
        self.starts.resize(partitions as usize + 1, 0);
        for (_, entry) in self.table.iter() {
            self.starts[partition_of(entry.hash, partitions) as usize + 1] += 1;
        }
        for index in 1..self.starts.len() {
            self.starts[index] += self.starts[index - 1];
        }
        for start in &self.starts {
            out.extend_from_slice(&start.to_le_bytes());
        }
        let entries_at = entries_at(partitions) as usize;
        out.resize(entries_at + self.table.len() * 8, 0);
        for (word, entry) in self.table.iter() {
            let next = &mut self.starts[partition_of(entry.hash, partitions) as usize];
            let at = entries_at + usize::from(*next) * 8;
            *next += 1;
            let packed = u64::from(entry.first) << 40 | (word.len() as u64) << 24 | entry.count;
            out[at..at + 8].copy_from_slice(&packed.to_le_bytes());
        }
    }
}

/// The partition of a hash; `partitions` is a power of two of at most 2^15.
pub fn partition_of(hash: u64, partitions: u32) -> u32 {
    ((hash >> 48) as u32 * partitions) >> 16
}

/// Where the entries begin in a unit's result.
pub fn entries_at(partitions: u32) -> u64 {
    ((u64::from(partitions) + 1) * 2).next_multiple_of(8)
}

/// One word of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitWord {
    /// Offset from the unit's start.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
    /// How often it occurs in the unit.
    pub count: u64,
}

impl UnitWord {
    fn unpack(bytes: &[u8]) -> Self {
        let packed = bytes
            .iter()
            .rev()
            .fold(0, |word, b| word << 8 | u64::from(*b));
        Self {
            offset: packed >> 40,
            len: (packed >> 24 & 0xffff) as usize,
            count: packed & 0xff_ffff,
        }
    }
}

/// Reads the entries of one partition out of a unit's result.
pub fn read_partition(
    block: &ResultBlock<'_>,
    partition: u32,
    partitions: u32,
    buffer: &mut Vec<u8>,
) -> Result<Vec<UnitWord>, WorkError> {
    let mut range = [0; 4];
    block.read(u64::from(partition) * 2, &mut range)?;
    let first = u16::from_le_bytes([range[0], range[1]]);
    let end = u16::from_le_bytes([range[2], range[3]]);
    buffer.clear();
    buffer.resize(usize::from(end.saturating_sub(first)) * 8, 0);
    block.read(entries_at(partitions) + u64::from(first) * 8, buffer)?;
    Ok(buffer.chunks_exact(8).map(UnitWord::unpack).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_a_pure_function_of_the_text() {
        let text: &[u8] = b"The cat and the dog and THE bird isn't here, the end";
        let (mut one, mut two) = (Vec::new(), Vec::new());
        let mut used = Mapper::default();
        let Ok(()) = used.map(text, 0, 1000, 16, &mut Vec::new());
        let Ok(()) = used.map(text, 4, 30, 16, &mut one);
        let Ok(()) = Mapper::default().map(text, 4, 30, 16, &mut two);
        assert_eq!(one, two);
        let entries = &one[entries_at(16) as usize..];
        let mut found: Vec<_> = entries
            .chunks_exact(8)
            .map(UnitWord::unpack)
            .map(|w| {
                let at = 4 + w.offset as usize;
                let word = text[at..at + w.len].to_ascii_uppercase();
                (String::from_utf8(word).unwrap(), w.count)
            })
            .collect();
        found.sort();
        let expected = [("AND", 2), ("BIRD", 1), ("CAT", 1), ("DOG", 1), ("THE", 2)];
        assert_eq!(found, expected.map(|(w, n)| (w.to_owned(), n)));
    }

    #[test]
    fn partitions_stay_in_range() {
        for partitions in [1, 16, 1024] {
            for hash in [0, 1, u64::MAX, 1 << 63, 0xffff << 48] {
                assert!(partition_of(hash, partitions) < partitions);
            }
        }
    }
}
