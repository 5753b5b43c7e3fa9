//! The reduce phase: one partition of the words over all units.
//!
//! The result of a partition, in the order of the words' bytes, little-endian:
//!
//! ```text
//! u64 count, u64 (offset of the first occurrence : 48 | length : 16)    for each word
//! ```
//!
//! Units are merged in their order, whoever merges them, so the first occurrence is the text's.

use lupin::work::{Job, ResultBlock, WorkError};

use crate::map::read_partition;
use crate::table::Table;

/// Bytes of an entry.
pub const ENTRY: usize = 16;

/// Merges one partition of all units and appends the result to `out`.
pub fn reduce(
    job: &Job<'_>,
    unit_bytes: u64,
    partition: u32,
    partitions: u32,
    units: &[ResultBlock<'_>],
    out: &mut Vec<u8>,
) -> Result<(), WorkError> {
    let mut table: Table<(u64, usize)> = Table::default();
    let (mut buffer, mut word) = (Vec::new(), Vec::new());
    for (unit, block) in units.iter().enumerate() {
        let start = unit as u64 * unit_bytes;
        for entry in read_partition(block, partition, partitions, &mut buffer)? {
            let offset = start + entry.offset;
            read_word(job, offset, entry.len, &mut word)?;
            table.add(&word, entry.count, (offset, entry.len));
        }
    }
    let mut words: Vec<_> = table.iter().collect();
    words.sort_unstable_by_key(|(word, _)| *word);
    for (_, entry) in words {
        let (offset, len) = entry.first;
        out.extend_from_slice(&entry.count.to_le_bytes());
        out.extend_from_slice(&(offset << 16 | len as u64).to_le_bytes());
    }
    Ok(())
}

/// The words of a partition's result, with their counts.
pub fn read_words(
    job: &Job<'_>,
    block: &ResultBlock<'_>,
) -> Result<Vec<(Vec<u8>, u64)>, WorkError> {
    let bytes = block.read_all()?;
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    bytes
        .chunks_exact(ENTRY)
        .map(|entry| {
            let (count, place) = (number(&entry[..8]), number(&entry[8..]));
            let mut word = Vec::new();
            read_word(job, place >> 16, (place & 0xffff) as usize, &mut word)?;
            Ok((word, count))
        })
        .collect()
}

fn read_word(job: &Job<'_>, offset: u64, len: usize, word: &mut Vec<u8>) -> Result<(), WorkError> {
    word.clear();
    word.resize(len, 0);
    job.read_input(offset, word)?;
    word.make_ascii_uppercase();
    Ok(())
}
