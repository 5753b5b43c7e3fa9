//! A node's private changes to a disk image that many nodes share.
//!
//! The image is never written. What the guest writes goes to an overlay file, at the same offset
//! (shifted by the header of a kept one); a bitmap says for each block of 4 KiB whether it is
//! there. Blocks that are written in part are first copied from the image.
//!
//! An overlay is *fresh* or *kept*:
//!
//! * A fresh one has no name: its space comes back when the VMM ends, however it ends. It needs no
//!   header, its bitmap is in memory, and flushing it means nothing, since nobody reads it later.
//! * A kept one begins with a header and the bitmap:
//!
//! ```text
//!   0     header: magic, version, size and modification time of the image
//!   4096  bitmap, whole pages
//!   data  block n of the disk at data + 4096 n, where bit n is set
//! ```
//!
//! Bits only ever go from 0 to 1, and a bit is written after the data that it stands for is
//! stable. So a kept overlay is good after a crash at any point: what was flushed is there, and
//! what was not may or may not be, as with any disk that has a cache.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::VolatileSlice;

use super::file::{Clear, clear, read_at, write_at};

/// Bytes per bit: what Linux writes at a time.
pub(super) const BLOCK: u64 = 4096;
/// Size of the header and of the pages of the bitmap.
const PAGE: u64 = 4096;
const MAGIC: [u8; 8] = *b"LUPINOVL";
const VERSION: u32 = 1;
const HEADER: usize = 40;

/// Why a kept overlay cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is some other file.
    #[error("it is not an overlay")]
    Foreign,
    /// It was made by another version of this program.
    #[error("it has format {0}, this program knows format {VERSION}")]
    Version(u32),
    /// The image is not the one that it was made for.
    #[error(
        "the image has changed since the overlay was made; delete the overlay to begin anew, or \
         restore the image"
    )]
    OtherImage,
    /// It was cut short or overwritten.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// The changes.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    /// Bytes of the disk.
    size: u64,
    /// Where block 0 lies in the file.
    data: u64,
    bitmap: Vec<u64>,
    /// Pages of the bitmap that the file does not have yet; `None` for a fresh overlay.
    dirty: Option<Vec<bool>>,
}

impl Overlay {
    /// An empty overlay in `file`, which nobody else will ever read.
    ///
    /// # Errors
    /// If the file system cannot hold a sparse file of `size` bytes.
    pub(super) fn fresh(file: File, size: u64) -> io::Result<Self> {
        file.set_len(size)?;
        Ok(Self {
            file,
            size,
            data: 0,
            bitmap: vec![0; bitmap_pages(size) as usize * WORDS],
            dirty: None,
        })
    }

    /// The overlay that `file` holds; a new one if the file is empty, or if its creation was
    /// interrupted.
    pub(super) fn kept(file: File, image: &File, size: u64) -> Result<Self, OverlayError> {
        let pages = bitmap_pages(size);
        let data = PAGE * (1 + pages);
        let header = header(image, size)?;
        let mut found = [0; HEADER];
        if file.metadata()?.len() >= HEADER as u64 {
            file.read_exact_at(&mut found, 0)?;
        }
        if found == [0; HEADER] {
            // The header comes last and makes it an overlay.
            file.set_len(0)?;
            file.set_len(data + size)?;
            file.sync_all()?;
            file.write_all_at(&header, 0)?;
            file.sync_all()?;
        } else {
            check(&found, &header)?;
            if file.metadata()?.len() != data + size {
                return Err(OverlayError::Damaged("its size is wrong"));
            }
        }
        let mut bytes = vec![0; (pages * PAGE) as usize];
        file.read_exact_at(&mut bytes, PAGE)?;
        let mut word = [0; 8];
        let bitmap: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|chunk| {
                word.copy_from_slice(chunk);
                u64::from_le_bytes(word)
            })
            .collect();
        let blocks = size.div_ceil(BLOCK);
        let beyond = (blocks..pages * PAGE * 8).any(|n| bit(&bitmap, n));
        if beyond {
            return Err(OverlayError::Damaged("it holds blocks beyond its end"));
        }
        Ok(Self {
            file,
            size,
            data,
            bitmap,
            dirty: Some(vec![false; pages as usize]),
        })
    }

    /// Fills `memory` with the disk's bytes at `offset`.
    pub(super) fn read(&self, image: &File, offset: u64, memory: &VolatileSlice) -> io::Result<()> {
        let mut at = offset;
        let end = offset + memory.len() as u64;
        while at < end {
            let ours = bit(&self.bitmap, at / BLOCK);
            let mut next = (at / BLOCK + 1) * BLOCK;
            while next < end && bit(&self.bitmap, next / BLOCK) == ours {
                next += BLOCK;
            }
            let next = next.min(end);
            let piece = sub(memory, (at - offset) as usize, (next - at) as usize)?;
            if ours {
                read_at(&self.file, self.data + at, &piece)?;
            } else {
                read_at(image, at, &piece)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Writes `memory` to the disk at `offset`.
    pub(super) fn write(
        &mut self,
        image: &File,
        offset: u64,
        memory: &VolatileSlice,
    ) -> io::Result<()> {
        let range = offset..offset + memory.len() as u64;
        self.complete_edges(image, &range)?;
        write_at(&self.file, self.data + offset, memory)?;
        self.mark(&range);
        Ok(())
    }

    /// Makes `range` of the disk zero.
    pub(super) fn zero(&mut self, image: &File, range: &Range<u64>) -> io::Result<()> {
        self.complete_edges(image, range)?;
        let len = range.end - range.start;
        // A hole in the overlay is zero as well, and takes no space.
        clear(&self.file, self.data + range.start, len, Clear::Punch)?;
        self.mark(range);
        Ok(())
    }

    /// Makes what was written before this call outlast a crash of the host, if it is kept at all.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let Some(dirty) = &mut self.dirty else {
            return Ok(());
        };
        // Data first: a bit that is on disk must not tell of data that is not.
        self.file.sync_data()?;
        let mut wrote = false;
        for (n, page) in dirty.iter_mut().enumerate().filter(|(_, page)| **page) {
            let words = &self.bitmap[n * WORDS..(n + 1) * WORDS];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.file.write_all_at(&bytes, PAGE * (1 + n as u64))?;
            (*page, wrote) = (false, true);
        }
        if wrote {
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Copies those blocks from the image that `range` covers in part and the overlay lacks.
    fn complete_edges(&mut self, image: &File, range: &Range<u64>) -> io::Result<()> {
        for edge in [range.start, range.end] {
            if edge.is_multiple_of(BLOCK) || edge == self.size {
                continue;
            }
            let start = edge / BLOCK * BLOCK;
            if bit(&self.bitmap, start / BLOCK) {
                continue;
            }
            let mut block = [0; BLOCK as usize];
            let block = &mut block[..BLOCK.min(self.size - start) as usize];
            image.read_exact_at(block, start)?;
            self.file.write_all_at(block, self.data + start)?;
            self.mark(&(start..start + 1));
        }
        Ok(())
    }

    fn mark(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        for n in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let word = (n / 64) as usize;
            let mask = 1 << (n % 64);
            if self.bitmap[word] & mask != 0 {
                continue;
            }
            self.bitmap[word] |= mask;
            if let Some(dirty) = &mut self.dirty {
                dirty[word / WORDS] = true;
            }
        }
    }
}

/// 64-bit words in a page.
const WORDS: usize = PAGE as usize / 8;

fn bitmap_pages(size: u64) -> u64 {
    size.div_ceil(BLOCK).div_ceil(PAGE * 8)
}

fn bit(bitmap: &[u64], n: u64) -> bool {
    bitmap
        .get((n / 64) as usize)
        .is_some_and(|word| word >> (n % 64) & 1 != 0)
}

/// Part of a volatile slice.
fn sub<'a>(memory: &VolatileSlice<'a>, offset: usize, len: usize) -> io::Result<VolatileSlice<'a>> {
    memory.subslice(offset, len).map_err(io::Error::other)
}

fn header(image: &File, size: u64) -> io::Result<[u8; HEADER]> {
    let meta = image.metadata()?;
    // The times of a device's node say nothing of its content.
    let time = if meta.is_file() {
        (meta.mtime(), meta.mtime_nsec())
    } else {
        (0, 0)
    };
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&size.to_le_bytes());
    bytes[24..32].copy_from_slice(&time.0.to_le_bytes());
    bytes[32..40].copy_from_slice(&time.1.to_le_bytes());
    Ok(bytes)
}

fn check(found: &[u8; HEADER], expected: &[u8; HEADER]) -> Result<(), OverlayError> {
    if found[..8] != MAGIC {
        return Err(OverlayError::Foreign);
    }
    if found[8..12] != expected[8..12] {
        let version = [found[8], found[9], found[10], found[11]];
        return Err(OverlayError::Version(u32::from_le_bytes(version)));
    }
    if found[12..16] != expected[12..16] {
        return Err(OverlayError::Damaged("its block size is wrong"));
    }
    if found[16..] != expected[16..] {
        return Err(OverlayError::OtherImage);
    }
    Ok(())
}

#[cfg(test)]
#[path = "overlay_test.rs"]
mod overlay_test;
