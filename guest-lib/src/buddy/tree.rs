//! Which units are free: a binary tree in a bitset, a few levels in each word.
//!
//! A *leaf* word has one bit for each of 64 units, set if the unit is free. The seven lowest
//! levels of the binary tree are those bits: a block of order k (2^k units, aligned to its size)
//! is free if its 2^k bits are set, so that splitting and coalescing within 64 units is setting
//! and clearing bits. A *node* word has one byte for each of eight words below it: the largest
//! order that is free there plus one, or 0; three levels of the tree. Eight words below that are
//! all free are a free block of the node's own.
//!
//! ```text
//!  level 2       [ 12 | 0 | 4 | ..]                1 word    byte: largest free order below + 1
//!  level 1       [ 7 | 7 | .. ] [ 0 | .. ] ...     8 words
//!  level 0       [64 bits] [64 bits] ...          64 words   bit: the unit is free
//! ```
//!
//! So an operation reads and changes one word for three levels, whatever the size of the block,
//! and most often it changes only the lowest: a byte changes only with the largest free order.
//! What lies below a block that is taken as a whole is not touched: it keeps saying "all free",
//! and nobody looks there before the block is freed. Hence the words are a function of the set
//! of blocks that are taken, without history, and an audit can compute what they must be.
//!
//! Units beyond the last do not exist: they are taken and in no block.
//!
//! Sources: the allocator of the LUPIN paper (section 3.6), which keeps a buddy tree in a bitset
//! after `spaskalev/buddy_alloc`; the packing of a largest-free-order byte per eight subtrees,
//! which bounds the after-images of an operation, is this library's own.

/// Units of a leaf word are 2^6.
const LEAF_ORDER: u32 = 6;
/// Words below a node word are 2^3.
const NODE_ORDER: u32 = 3;
/// The most levels: of a tree of 2^32 - 1 units.
pub(super) const MAX_LEVELS: usize = 10;

/// The words of a tree: 0 is the first word of level 0.
pub(super) trait Words {
    type Error;
    fn get(&self, word: u64) -> Result<u64, Self::Error>;
    fn set(&mut self, word: u64, value: u64) -> Result<(), Self::Error>;
    /// The error for a word that contradicts the one above it, or what is asked of it.
    fn corrupt(&self, word: u64, found: u64) -> Self::Error;
}

/// How many levels a tree has, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tree {
    units: u32,
    levels: usize,
    /// The first word of each level, and behind the last the number of words.
    starts: [u64; MAX_LEVELS + 1],
}

/// A word's place.
#[derive(Clone, Copy, Debug)]
struct Place {
    level: usize,
    index: u64,
}

impl Place {
    fn parent(self) -> (Self, u32) {
        let parent = Self {
            level: self.level + 1,
            index: self.index >> NODE_ORDER,
        };
        (parent, (self.index & 7) as u32)
    }

    fn child(self, slot: u32) -> Self {
        Self {
            level: self.level - 1,
            index: self.index << NODE_ORDER | u64::from(slot),
        }
    }
}

impl Tree {
    /// A tree over `units` units, at least one.
    pub(super) const fn new(units: u32) -> Self {
        let mut starts = [0; MAX_LEVELS + 1];
        let mut words = (units as u64).div_ceil(1 << LEAF_ORDER);
        let mut levels = 0;
        loop {
            starts[levels + 1] = starts[levels] + words;
            levels += 1;
            if words <= 1 {
                break;
            }
            words = words.div_ceil(1 << NODE_ORDER);
        }
        Self {
            units,
            levels,
            starts,
        }
    }

    /// Words of the tree.
    pub(super) const fn words(&self) -> u64 {
        self.starts[self.levels]
    }

    /// Levels of words; no operation changes more words than that.
    pub(super) const fn levels(&self) -> u32 {
        self.levels as u32
    }

    const fn root(&self) -> Place {
        Place {
            level: self.levels - 1,
            index: 0,
        }
    }

    /// Whether there is such a word; a word above it that lies says so of any.
    fn has(&self, place: Place) -> bool {
        self.word_at(place) < self.starts[place.level + 1]
    }

    fn word_at(&self, place: Place) -> u64 {
        self.starts[place.level] + place.index
    }

    /// The largest free order plus one; 0 if nothing is free.
    pub(super) fn largest<W: Words>(&self, words: &W) -> Result<u32, W::Error> {
        Ok(self.top(words)?.1)
    }

    /// The word at the root and its value.
    fn top<W: Words>(&self, words: &W) -> Result<(u64, u32), W::Error> {
        let root = self.root();
        let word = words.get(self.word_at(root))?;
        let value = value_of(root.level, word);
        match value > order_of(root.level) + 1 {
            true => Err(words.corrupt(self.word_at(root), word)),
            false => Ok((word, value)),
        }
    }

    /// Takes a free block of `order` and returns its first unit; `None` if there is none.
    ///
    /// On the way down it turns to the word whose largest free block is the smallest that is large
    /// enough, and there it splits the smallest such block: what is large stays whole for long.
    pub(super) fn take<W: Words>(
        &self,
        words: &mut W,
        order: u32,
    ) -> Result<Option<u32>, W::Error> {
        let (mut word, value) = self.top(words)?;
        if value <= order {
            return Ok(None);
        }
        let mut place = self.root();
        while !holds(place.level, order) {
            let child = best_child(word, order).map(|slot| (slot, place.child(slot)));
            let Some((slot, child)) = child.filter(|(_, child)| self.has(*child)) else {
                return Err(words.corrupt(self.word_at(place), word));
            };
            let below = words.get(self.word_at(child))?;
            if value_of(child.level, below) != u32::from(byte(word, slot)) {
                return Err(words.corrupt(self.word_at(child), below));
            }
            (place, word) = (child, below);
        }
        let run = order - unit_order(place.level);
        let Some(slot) = best_run(free_slots(place.level, word), run) else {
            return Err(words.corrupt(self.word_at(place), word));
        };
        let first =
            place.index << order_of(place.level) | u64::from(slot) << unit_order(place.level);
        let changed = word & !slots(place.level, slot, run);
        self.update(words, place, word, changed)?;
        Ok(Some(first as u32))
    }

    /// Frees the block of `order` that begins at `first`, which is taken as a whole.
    pub(super) fn give<W: Words>(
        &self,
        words: &mut W,
        first: u32,
        order: u32,
    ) -> Result<(), W::Error> {
        self.turn(words, first, order, true)
    }

    /// Takes the block of `order` that begins at `first`, which is free as a whole.
    pub(super) fn take_at<W: Words>(
        &self,
        words: &mut W,
        first: u32,
        order: u32,
    ) -> Result<(), W::Error> {
        self.turn(words, first, order, false)
    }

    fn turn<W: Words>(
        &self,
        words: &mut W,
        first: u32,
        order: u32,
        free: bool,
    ) -> Result<(), W::Error> {
        let level = (0..self.levels).find(|level| holds(*level, order));
        let Some(level) = level else {
            return Err(words.corrupt(self.word_at(self.root()), u64::from(order)));
        };
        let index = u64::from(first) >> order_of(level);
        let place = Place { level, index };
        let slot = (first >> unit_order(level)) & (slots_of(level) - 1);
        let mask = slots(level, slot, order - unit_order(level));
        let all_free = full_slots(level) & mask;
        let word = words.get(self.word_at(place))?;
        let (expected, wanted) = if free { (0, all_free) } else { (all_free, 0) };
        if word & mask != expected {
            return Err(words.corrupt(self.word_at(place), word));
        }
        self.update(words, place, word, word & !mask | wanted)
    }

    /// Stores a changed word, and above it what changes with it.
    ///
    /// If a word above contradicts one below, some are stored already: the caller gives it all up.
    fn update<W: Words>(
        &self,
        words: &mut W,
        mut place: Place,
        mut word: u64,
        mut changed: u64,
    ) -> Result<(), W::Error> {
        loop {
            words.set(self.word_at(place), changed)?;
            let before = value_of(place.level, word);
            let after = value_of(place.level, changed);
            if before == after || place.level + 1 == self.levels {
                return Ok(());
            }
            let (above, slot) = place.parent();
            word = words.get(self.word_at(above))?;
            if u32::from(byte(word, slot)) != before {
                return Err(words.corrupt(self.word_at(above), word));
            }
            changed = word & !(0xff << (slot * 8)) | u64::from(after) << (slot * 8);
            place = above;
        }
    }

    /// Whether a unit is free.
    pub(super) fn is_free<W: Words>(&self, words: &W, unit: u32) -> Result<bool, W::Error> {
        let mut place = self.root();
        while place.level > 0 {
            let word = words.get(self.word_at(place))?;
            let slot = (unit >> unit_order(place.level)) & 7;
            match u32::from(byte(word, slot)) {
                0 => return Ok(false),
                value if value == unit_order(place.level) + 1 => return Ok(true),
                _ if !self.has(place.child(slot)) => {
                    return Err(words.corrupt(self.word_at(place), word));
                }
                _ => place = place.child(slot),
            }
        }
        let word = words.get(self.word_at(place))?;
        Ok(word >> (unit & 63) & 1 == 1)
    }

    /// What the words of a tree without any block taken are, in order.
    pub(super) fn all_free(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.levels).flat_map(move |level| {
            let words = self.starts[level + 1] - self.starts[level];
            (0..words).map(move |index| self.free_word(Place { level, index }))
        })
    }

    /// A word of the tree without any block taken.
    fn free_word(&self, place: Place) -> u64 {
        let order = order_of(place.level);
        let first = place.index << order;
        let units = u64::from(self.units).saturating_sub(first).min(1 << order);
        if place.level == 0 {
            return ones(units as u32);
        }
        let unit = unit_order(place.level);
        (0..8u32).fold(0, |word, slot| {
            let below = units.saturating_sub(u64::from(slot) << unit).min(1 << unit);
            // The largest aligned block of a prefix is its largest power of two.
            let value = below.checked_ilog2().map_or(0, |order| order + 1);
            word | u64::from(value) << (slot * 8)
        })
    }
}

/// The order of all that a word of a level covers.
const fn order_of(level: usize) -> u32 {
    LEAF_ORDER + NODE_ORDER * level as u32
}

/// The order of one slot (bit or byte) of a word.
const fn unit_order(level: usize) -> u32 {
    match level {
        0 => 0,
        _ => order_of(level - 1),
    }
}

/// Slots of a word.
const fn slots_of(level: usize) -> u32 {
    match level {
        0 => 64,
        _ => 8,
    }
}

/// Whether blocks of an order are taken and freed in the words of a level: they are at least one
/// slot and not more than a word; a block of one whole word is the word's, not the slot's above.
const fn holds(level: usize, order: u32) -> bool {
    match level {
        0 => order <= LEAF_ORDER,
        _ => order > unit_order(level) && order <= order_of(level),
    }
}

/// A word with all slots free.
const fn full_slots(level: usize) -> u64 {
    match level {
        0 => u64::MAX,
        _ => (unit_order(level) as u64 + 1) * LOW_BITS,
    }
}

/// The bits of the 2^run slots from `slot` on.
const fn slots(level: usize, slot: u32, run: u32) -> u64 {
    let width = if level == 0 { 1 } else { 8 };
    ones(width << run) << (slot * width)
}

/// The lowest `count` bits, up to 64.
const fn ones(count: u32) -> u64 {
    match count {
        0 => 0,
        _ => u64::MAX >> (64 - count),
    }
}

const LOW_BITS: u64 = 0x0101_0101_0101_0101;

const fn byte(word: u64, slot: u32) -> u8 {
    (word >> (slot * 8)) as u8
}

/// One bit for each slot that is free as a whole.
fn free_slots(level: usize, word: u64) -> u64 {
    if level == 0 {
        return word;
    }
    // Bytes that are equal to the full value become 0; a byte is 0 exactly if adding 0x7f to its
    // low bits and looking at the high bits gives nothing.
    let x = word ^ full_slots(level);
    let low = 0x7f * LOW_BITS;
    let zero = !(((x & low) + low) | x | low);
    // One bit a byte, gathered by a multiplication without carries.
    (zero >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// Where blocks of each order may begin among 64 slots.
const ALIGNED: [u64; 7] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    0x0000_0000_0000_0001,
];

/// The starts of the free blocks twice as large, of those of an order.
const fn doubled(starts: u64, order: u32) -> u64 {
    starts & (starts >> (1 << order)) & ALIGNED[order as usize + 1]
}

/// The largest order of blocks among free slots, plus one; 0 if there is none.
const fn largest_run(mut starts: u64) -> u32 {
    let mut value = 0;
    while starts != 0 && value < LEAF_ORDER {
        starts = doubled(starts, value);
        value += 1;
    }
    // With only the last order left there is nothing to double.
    value + (starts != 0) as u32
}

/// [`largest_run`] of all sets of eight slots.
const LARGEST_RUN: [u8; 256] = {
    let mut runs = [0; 256];
    let mut slots = 0;
    while slots < 256 {
        runs[slots] = largest_run(slots as u64) as u8;
        slots += 1;
    }
    runs
};

/// The largest free order of what a word covers, plus one; 0 if nothing is free.
#[inline]
fn value_of(level: usize, word: u64) -> u32 {
    if level == 0 {
        return largest_run(word);
    }
    match free_slots(level, word) {
        // Only blocks smaller than a slot, if any.
        0 => word.to_le_bytes().into_iter().fold(0, u8::max).into(),
        slots => unit_order(level) + u32::from(LARGEST_RUN[slots as usize]),
    }
}

/// The first of the smallest free blocks of at least 2^run slots.
fn best_run(free: u64, run: u32) -> Option<u32> {
    let mut starts = free;
    for order in 0..=LEAF_ORDER {
        let larger = match order {
            LEAF_ORDER => 0,
            _ => doubled(starts, order),
        };
        if order >= run {
            // Blocks of this order that are not half of a larger one.
            let exact = match order {
                LEAF_ORDER => starts,
                _ => starts & !(larger | larger << (1 << order)),
            };
            if exact != 0 {
                return Some(exact.trailing_zeros());
            }
        }
        starts = larger;
    }
    None
}

/// The child with the smallest largest block that is large enough.
#[inline]
fn best_child(word: u64, order: u32) -> Option<u32> {
    // The slot in the low bits, so that the smallest key is also the first of equals.
    let key = |slot: u32| match u32::from(byte(word, slot)) {
        value if value > order => value << NODE_ORDER | slot,
        _ => u32::MAX,
    };
    let best = (0..8).map(key).fold(u32::MAX, u32::min);
    (best != u32::MAX).then_some(best & 7)
}

#[cfg(test)]
#[path = "tree_test.rs"]
mod tree_test;
