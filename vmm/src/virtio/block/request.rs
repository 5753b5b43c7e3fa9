//! What a driver asks of a disk: `struct virtio_blk_req`, and the ranges of a discard.

use std::ops::Range;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::SECTOR;

/// Bytes of a request before its data.
pub(super) const HEADER: usize = 16;
/// Bytes of one range of a discard or of a write of zeros.
pub(super) const RANGE: usize = 16;
/// Flag of a range: its space may go.
const UNMAP: u32 = 1 << 0;

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown(u32),
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// First sector of a read or write.
    pub(super) sector: u64,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let kind = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&bytes[8..]);
        Self {
            kind: match kind {
                VIRTIO_BLK_T_IN => Kind::Read,
                VIRTIO_BLK_T_OUT => Kind::Write,
                VIRTIO_BLK_T_FLUSH => Kind::Flush,
                VIRTIO_BLK_T_GET_ID => Kind::GetId,
                VIRTIO_BLK_T_DISCARD => Kind::Discard,
                VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
                other => Kind::Unknown(other),
            },
            sector: u64::from_le_bytes(sector),
        }
    }
}

/// One range of a discard or of a write of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cleared {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    flags: u32,
}

impl Cleared {
    pub(super) fn parse(bytes: &[u8; RANGE]) -> Self {
        let mut sector = [0; 8];
        sector.copy_from_slice(&bytes[..8]);
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Self {
            sector: u64::from_le_bytes(sector),
            sectors: word(8),
            flags: word(12),
        }
    }

    /// Whether the space may go; `None` if there are flags that this device does not know.
    pub(super) fn unmap(self) -> Option<bool> {
        (self.flags & !UNMAP == 0).then_some(self.flags & UNMAP != 0)
    }
}

/// The bytes from `sector` on, if all of them lie on a disk of `size` bytes.
pub(super) fn within(size: u64, sector: u64, bytes: u64) -> Option<Range<u64>> {
    let start = sector.checked_mul(SECTOR)?;
    let end = start.checked_add(bytes)?;
    (bytes.is_multiple_of(SECTOR) && end <= size).then_some(start..end)
}
