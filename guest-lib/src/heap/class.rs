//! Size classes.
//!
//! Four a doubling from 128 bytes on (as in jemalloc), so that rounding up wastes at most a
//! fifth. Blocks of a slab lie side by side, from its first byte on where the state words of the
//! blocks are kept in the span table (classes of [`OUTSIDE`] bytes and more, which have at most
//! [`TABLE_WORDS`] of them), else after the words. Powers of two from 1 KiB on are therefore
//! aligned to their size, and sizes that are multiples of 64 to cache lines.

/// Bytes of a span.
pub const SPAN: u64 = 64 << 10;

/// Blocks of classes from this size on have their words in the span table.
pub(super) const OUTSIDE: u32 = 1024;
/// Block words an entry of the span table has room for.
pub(super) const TABLE_WORDS: usize = 64;

const SIZES: [u32; 40] = [
    8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896,
    1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 9344, 10880,
    13056, 16384, 21824, 32768,
];

/// Number of size classes.
pub(super) const CLASSES: usize = SIZES.len();
/// Bytes of the largest block in a slab; larger ones are whole runs of spans.
pub const LARGEST_SMALL: u64 = SIZES[CLASSES - 1] as u64;

/// How blocks of a class lie in a slab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a block.
    pub(super) size: u32,
    /// Blocks of a slab.
    pub(super) count: u32,
    /// Where the first one lies, in bytes from the start of the span.
    pub(super) first: u32,
    /// 2^32 / size, rounded up: divides by a multiplication.
    pub(super) reciprocal: u32,
}

const GEOMETRY: [Geometry; CLASSES] = {
    let mut all = [Geometry {
        size: 0,
        count: 0,
        first: 0,
        reciprocal: 0,
    }; CLASSES];
    let mut class = 0;
    while class < CLASSES {
        let size = SIZES[class];
        let (mut count, mut first) = (SPAN as u32 / size, 0);
        if size < OUTSIDE {
            count = SPAN as u32 / (size + 8);
            first = (count * 8).next_multiple_of(64);
            while first + count * size > SPAN as u32 {
                count -= 1;
                first = (count * 8).next_multiple_of(64);
            }
        }
        assert!(first + count * size <= SPAN as u32);
        assert!(size < OUTSIDE || count as usize <= TABLE_WORDS);
        assert!(size < 16 || size.is_multiple_of(8));
        all[class] = Geometry {
            size,
            count,
            first,
            reciprocal: (1u64 << 32).div_ceil(size as u64) as u32,
        };
        class += 1;
    }
    all
};

/// The class of sizes up to 1 KiB, by the number of 8-byte words.
const SMALL: [u8; 129] = {
    let mut classes = [0; 129];
    let (mut words, mut class) = (0, 0);
    while words < classes.len() {
        while SIZES[class] < words as u32 * 8 {
            class += 1;
        }
        classes[words] = class as u8;
        words += 1;
    }
    classes
};

/// The class of a size; `None` if it is 0 or larger than [`LARGEST_SMALL`].
#[inline]
pub(super) fn class_of(bytes: u64) -> Option<usize> {
    match bytes {
        0 => None,
        1..=1024 => Some(SMALL[bytes.div_ceil(8) as usize].into()),
        _ if bytes > LARGEST_SMALL => None,
        _ => Some(SIZES.partition_point(|size| u64::from(*size) < bytes)),
    }
}

/// How blocks of a class lie; `None` if there is no such class.
#[inline]
pub(super) fn geometry(class: usize) -> Option<&'static Geometry> {
    GEOMETRY.get(class)
}

impl Geometry {
    /// The index of the block that begins `offset` bytes from the start of the span.
    #[inline]
    pub(super) fn index_of(&self, offset: u32) -> Option<u32> {
        let within = offset.checked_sub(self.first)?;
        // Exact for all offsets of a span: the error of the reciprocal is below `size`, times
        // 2^16 below 2^32 / size.
        let index = ((u64::from(within) * u64::from(self.reciprocal)) >> 32) as u32;
        (index * self.size == within && index < self.count).then_some(index)
    }

    /// Where a block lies, in bytes from the start of the span.
    #[inline]
    pub(super) fn offset_of(&self, index: u32) -> u64 {
        u64::from(self.first) + u64::from(index) * u64::from(self.size)
    }
}

#[cfg(test)]
#[path = "class_test.rs"]
mod class_test;
