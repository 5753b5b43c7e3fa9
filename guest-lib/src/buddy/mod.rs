//! Large chunks, from a buddy allocator that any survivor can finish for a dead owner.
//!
//! Two layers:
//!
//! * [`Buddy`] hands out runs of *units* and keeps its words in pod memory, apart from what it
//!   hands out. It changes them through a caller's [`Record`], so that a chunk can be taken and
//!   linked somewhere in one atomic step, under a lock of the caller.
//! * [`PodAllocator`] is the allocator of a whole pod: a `Buddy`, one global recoverable lock,
//!   and a redo log for each node.
//!
//! ```text
//! 0x00   header                  magic, creator, seal; version, units, unit
//! 0x40   tree                    which units are free: see `tree.rs`
//!        chunk table             owner and state of the chunk that begins at each unit, 16 B each
//! ```
//!
//! The chunks of an owner are found in the chunk table, by its owner words: there is no second
//! structure to keep in step, and the list of a dead owner is as good as that of a living one.
//!
//! Sources: LUPIN paper (DIMES '24), section 3.6; Knowlton's buddy system (CACM 1965).

mod audit;
mod error;
mod header;
mod pod;
mod tree;

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use crate::liveness::Liveness;
use crate::log::{LogError, Record};
use crate::mem::{fill64, load64};
use crate::shm::{Access, Mapping};
use header::{Claimed, FIELDS, Header};
use tree::{Tree, Words};

pub use audit::BuddyAudit;
pub use error::BuddyError;
pub use pod::{PodAllocator, PodAllocatorSpec, PodChunk, PodOperation};

const MAGIC: u64 = u64::from_le_bytes(*b"LUPINBUD");
const VERSION: u64 = 1;
/// Bits of a state: a chunk begins here.
const LIVE: u64 = 1 << 8;
/// A chunk began here and was freed.
const FREED: u64 = 1 << 9;
const ORDER: u64 = 0xff;

/// What a buddy allocator hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuddySpec {
    /// How many units there are: any number from 1 on.
    pub units: u32,
    /// Bytes of a unit, a power of two.
    pub unit: u64,
}

impl BuddySpec {
    fn check(&self) -> Result<Tree, BuddyError> {
        let error = |what, value, allowed| BuddyError::Spec {
            what,
            value,
            allowed,
        };
        if self.units == 0 {
            return Err(error("the number of units", 0, "1 to 2^32 - 1"));
        }
        if !self.unit.is_power_of_two() || self.unit > 1 << 31 {
            return Err(error(
                "the size of a unit",
                self.unit,
                "a power of two up to 2^31",
            ));
        }
        Ok(Tree::new(self.units))
    }

    fn fields(&self) -> [u64; FIELDS] {
        [VERSION, self.units.into(), self.unit, 0, 0]
    }

    /// The most entries that one operation adds to a record.
    pub const fn entries(&self) -> u32 {
        Tree::new(self.units).levels() + 2
    }
}

/// Bytes of the words that a [`Buddy`] keeps; a multiple of 64.
pub const fn metadata_size(spec: &BuddySpec) -> u64 {
    let words = Tree::new(spec.units).words() + spec.units as u64 * 2;
    (size_of::<Header>() as u64 + words * 8).next_multiple_of(64)
}

/// A buddy allocator, as a view of the memory in which its words lie.
///
/// Methods that change it want the caller to hold the lock that protects it, from before the
/// record was begun or at least before it is given to them, until it is committed.
#[derive(Clone, Copy, Debug)]
pub struct Buddy<'m> {
    memory: &'m Mapping,
    at: u64,
    spec: BuddySpec,
    tree: Tree,
}

/// A chunk that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its first unit.
    pub first: u32,
    /// It has 2^order units.
    pub order: u32,
    /// Whose it is.
    pub owner: u64,
}

impl Chunk {
    /// How many units it has.
    pub const fn units(&self) -> u64 {
        1 << self.order
    }
}

impl<'m> Buddy<'m> {
    /// Creates an allocator with all units free at `at` (bytes from the start of the mapping, a
    /// multiple of 64), in all-zero memory or where its creator died. One that is there already
    /// with the same `spec` is opened.
    ///
    /// # Errors
    /// [`BuddyError::BeingCreated`] by somebody alive, [`BuddyError::NotThis`],
    /// [`BuddyError::Spec`], [`BuddyError::Memory`] if it does not fit, [`BuddyError::Log`] if the
    /// mapping is read-only, [`BuddyError::Lock`] if `me` is nobody.
    pub fn create(
        memory: &'m Mapping,
        at: u64,
        spec: &BuddySpec,
        me: InstanceId,
        judge: &impl Liveness,
    ) -> Result<Self, BuddyError> {
        let tree = spec.check()?;
        let words = memory.get_slice::<AtomicU64>(at, metadata_size(spec) / 8)?;
        writable(memory, at)?;
        let header: &Header = memory.get(at)?;
        if header.claim(at, MAGIC, spec.fields(), me, judge)? == Claimed::Fresh {
            let words = words[size_of::<Header>() / 8..].iter();
            let chunks = core::iter::repeat(0);
            for (word, value) in words.zip(tree.all_free().chain(chunks)) {
                fill64(word, value);
            }
            header.seal(spec.fields(), me)?;
        }
        Ok(Self {
            memory,
            at,
            spec: *spec,
            tree,
        })
    }

    /// Opens an allocator that is complete.
    ///
    /// # Errors
    /// [`BuddyError::Unfinished`], [`BuddyError::NotThis`], [`BuddyError::Memory`].
    pub fn open(memory: &'m Mapping, at: u64) -> Result<Self, BuddyError> {
        let header: &Header = memory.get(at)?;
        let [version, units, unit, ..] = header.read(at, MAGIC)?;
        let Ok(units) = u32::try_from(units) else {
            let why = "its header is damaged";
            return Err(BuddyError::NotThis { at, why });
        };
        if version != VERSION {
            let why = "it is of another version";
            return Err(BuddyError::NotThis { at, why });
        }
        let spec = BuddySpec { units, unit };
        let tree = spec.check()?;
        memory.get_slice::<AtomicU64>(at, metadata_size(&spec) / 8)?;
        Ok(Self {
            memory,
            at,
            spec,
            tree,
        })
    }

    /// What it hands out.
    pub fn spec(&self) -> BuddySpec {
        self.spec
    }

    /// Takes a chunk of `units` units, rounded up to a power of two, for `owner` (not 0); returns
    /// its first unit, a multiple of its size. The chunk is taken when `record` is committed.
    ///
    /// Adds at most [`BuddySpec::entries`] entries to the record. Of the free blocks that are
    /// large enough, one of the smallest is split.
    ///
    /// # Errors
    /// [`BuddyError::NoRoom`], [`BuddyError::Nothing`], [`BuddyError::Corrupt`],
    /// [`BuddyError::Log`]. The record may then hold half of the change and must be dropped,
    /// except after the first two.
    pub fn alloc_in(
        &self,
        record: &mut Record<'_>,
        units: u32,
        owner: u64,
    ) -> Result<u32, BuddyError> {
        if units == 0 || owner == 0 {
            return Err(BuddyError::Nothing);
        }
        let order = order_for(units.into());
        let mut words = self.words(record);
        let Some(first) = self.tree.take(&mut words, order)? else {
            let largest = match self.tree.largest(&words)? {
                0 => 0,
                value => 1 << (value - 1),
            };
            let units = 1 << order;
            return Err(BuddyError::NoRoom { units, largest });
        };
        if first >= self.spec.units {
            return Err(self.corrupt(self.tree_at(0), "tree (unit)", first.into()));
        }
        let at = self.chunk_at(first);
        let state = record.get(at + 8)?;
        if state & LIVE != 0 {
            return Err(self.corrupt(at + 8, "state of a free chunk", state));
        }
        record.set(at, owner)?;
        record.set(at + 8, LIVE | u64::from(order))?;
        Ok(first)
    }

    /// Frees the chunk of `owner` that begins at unit `first`, when `record` is committed.
    ///
    /// # Errors
    /// [`BuddyError::DoubleFree`], [`BuddyError::Foreign`], [`BuddyError::NotAChunk`];
    /// [`BuddyError::Corrupt`] and [`BuddyError::Log`], and then the record must be dropped.
    pub fn free_in(
        &self,
        record: &mut Record<'_>,
        first: u32,
        owner: u64,
    ) -> Result<(), BuddyError> {
        let not_a_chunk = BuddyError::NotAChunk {
            first: first.into(),
        };
        if first >= self.spec.units {
            return Err(not_a_chunk);
        }
        let at = self.chunk_at(first);
        let (found, state) = (record.get(at)?, record.get(at + 8)?);
        let mut words = self.words(record);
        if state & LIVE == 0 {
            return Err(
                match state & FREED != 0 && self.tree.is_free(&words, first)? {
                    true => BuddyError::DoubleFree {
                        first: first.into(),
                        owner: found,
                    },
                    false => not_a_chunk,
                },
            );
        }
        if found != owner {
            return Err(BuddyError::Foreign {
                first: first.into(),
                owner: found,
            });
        }
        let order = self.order_in(first, state)?;
        self.tree.give(&mut words, first, order)?;
        // The owner's name stays, for the error of a second free.
        record.set(at + 8, FREED | u64::from(order))?;
        Ok(())
    }

    /// Gives the chunk of `from` that begins at unit `first` to `to` (not 0), when `record` is
    /// committed: one entry.
    ///
    /// # Errors
    /// [`BuddyError::Foreign`], [`BuddyError::NotAChunk`], [`BuddyError::Nothing`],
    /// [`BuddyError::Log`].
    pub fn give_in(
        &self,
        record: &mut Record<'_>,
        first: u32,
        from: u64,
        to: u64,
    ) -> Result<(), BuddyError> {
        if to == 0 {
            return Err(BuddyError::Nothing);
        }
        if first >= self.spec.units || record.get(self.chunk_at(first) + 8)? & LIVE == 0 {
            return Err(BuddyError::NotAChunk {
                first: first.into(),
            });
        }
        let owner = record.get(self.chunk_at(first))?;
        if owner != from {
            return Err(BuddyError::Foreign {
                first: first.into(),
                owner,
            });
        }
        Ok(record.set(self.chunk_at(first), to)?)
    }

    /// The chunk that begins at unit `first`, if one does.
    pub fn chunk(&self, first: u32) -> Option<Chunk> {
        if first >= self.spec.units {
            return None;
        }
        let words = self.memory.get_slice::<AtomicU64>(self.chunk_at(first), 2);
        let words = words.ok()?;
        let state = load64(&words[1], Ordering::Acquire);
        let chunk = Chunk {
            first,
            order: (state & ORDER) as u32,
            owner: load64(&words[0], Ordering::Relaxed),
        };
        let is_chunk = state & LIVE != 0 && self.order_in(first, state).is_ok();
        is_chunk.then_some(chunk)
    }

    /// The chunk that a unit is part of, if it is.
    pub fn chunk_around(&self, unit: u32) -> Option<Chunk> {
        (0..u32::BITS)
            .filter_map(|order| self.chunk(unit >> order << order))
            .find(|chunk| u64::from(unit - chunk.first) < chunk.units())
    }

    /// All chunks in use, by their first unit. Exact under the allocator's lock, otherwise a
    /// snapshot of each.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + 'm {
        let (buddy, mut unit) = (*self, 0u64);
        core::iter::from_fn(move || {
            while unit < buddy.spec.units.into() {
                match buddy.chunk(unit as u32) {
                    Some(chunk) => {
                        unit += chunk.units();
                        return Some(chunk);
                    }
                    None => unit += 1,
                }
            }
            None
        })
    }

    /// The chunks of one owner.
    pub fn chunks_of(&self, owner: u64) -> impl Iterator<Item = Chunk> + 'm {
        self.chunks().filter(move |chunk| chunk.owner == owner)
    }

    fn tree_at(&self, word: u64) -> u64 {
        self.at + size_of::<Header>() as u64 + word * 8
    }

    fn chunk_at(&self, first: u32) -> u64 {
        self.tree_at(self.tree.words() + u64::from(first) * 2)
    }

    /// The order of the chunk at `first` whose state is `state`.
    fn order_in(&self, first: u32, state: u64) -> Result<u32, BuddyError> {
        let order = (state & ORDER) as u32;
        let fits = order < u32::BITS
            && first.trailing_zeros() >= order
            && u64::from(first) + (1 << order) <= self.spec.units.into();
        match fits && state & !(LIVE | FREED | ORDER) == 0 {
            true => Ok(order),
            false => Err(self.corrupt(self.chunk_at(first) + 8, "state of a chunk", state)),
        }
    }

    fn words<'a, 'r>(&self, record: &'a mut Record<'r>) -> TreeWords<'a, 'r> {
        TreeWords {
            record,
            at: self.tree_at(0),
        }
    }

    fn corrupt(&self, at: u64, field: &'static str, found: u64) -> BuddyError {
        BuddyError::Corrupt { at, field, found }
    }
}

/// Refuses a mapping that allows no stores.
fn writable(memory: &Mapping, at: u64) -> Result<(), BuddyError> {
    match memory.access() {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(LogError::ReadOnly { at }.into()),
    }
}

/// The smallest order of blocks of at least `units` units.
fn order_for(units: u64) -> u32 {
    units.next_power_of_two().ilog2()
}

/// The words of a tree, changed through a record.
struct TreeWords<'a, 'r> {
    record: &'a mut Record<'r>,
    at: u64,
}

impl Words for TreeWords<'_, '_> {
    type Error = BuddyError;

    #[inline]
    fn get(&self, word: u64) -> Result<u64, BuddyError> {
        Ok(self.record.get(self.at + word * 8)?)
    }

    #[inline]
    fn set(&mut self, word: u64, value: u64) -> Result<(), BuddyError> {
        Ok(self.record.set(self.at + word * 8, value)?)
    }

    #[cold]
    fn corrupt(&self, word: u64, found: u64) -> BuddyError {
        BuddyError::Corrupt {
            at: self.at + word * 8,
            field: "tree",
            found,
        }
    }
}

#[cfg(test)]
#[path = "buddy_test.rs"]
mod buddy_test;
