//! A disk: an image, or an image with a node's changes over it.

use std::fs::File;
use std::io;
use std::ops::Range;

use vm_memory::VolatileSlice;

use super::file::{Clear, clear, read_at, write_at};
use super::overlay::Overlay;

/// An open disk. Offsets and lengths are bytes within [`size`](Self::size); who calls has checked
/// them.
#[derive(Debug)]
pub struct Disk {
    image: File,
    size: u64,
    readonly: bool,
    overlay: Option<Overlay>,
}

impl Disk {
    pub(super) fn new(image: File, size: u64, readonly: bool, overlay: Option<Overlay>) -> Self {
        Self {
            image,
            size,
            readonly,
            overlay,
        }
    }

    /// Bytes, a multiple of the sector size.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the guest may not write.
    #[must_use]
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn read(&self, offset: u64, memory: &VolatileSlice) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.read(&self.image, offset, memory),
            None => read_at(&self.image, offset, memory),
        }
    }

    pub(super) fn write(&mut self, offset: u64, memory: &VolatileSlice) -> io::Result<()> {
        match &mut self.overlay {
            Some(overlay) => overlay.write(&self.image, offset, memory),
            None => write_at(&self.image, offset, memory),
        }
    }

    /// Makes all that was written before stable, as far as the disk is to last.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.overlay {
            Some(overlay) => overlay.flush(),
            None if self.readonly => Ok(()),
            None => self.image.sync_data(),
        }
    }

    /// Makes a range zero; with `unmap`, its space may go.
    pub(super) fn zero(&mut self, range: &Range<u64>, unmap: bool) -> io::Result<()> {
        let how = if unmap { Clear::Punch } else { Clear::Zero };
        match &mut self.overlay {
            Some(overlay) => overlay.zero(&self.image, range),
            None => clear(&self.image, range.start, range.end - range.start, how),
        }
    }

    /// The guest does not need the content of a range any more. What it reads there afterwards is
    /// undefined to it; here it is zero.
    pub(super) fn discard(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.zero(range, true)
    }
}
