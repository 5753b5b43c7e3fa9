//! A hash map: keys and values of bytes, readers without locks, growth without a pause.
//!
//! ```text
//!   map block                     table (of one stripe)           entries
//!   kind, stripes                 mask
//!   stripe 0: lock, table ------> [0][tag|entry][removed][tag|entry][0] ...
//!             entries, used              |
//!   stripe 1: lock, table ...            +-----> hash, lengths, key, value
//! ```
//!
//! The low bits of a key's hash choose a *stripe*: a recoverable lock for writers, and a table of
//! its own with linear probing (D. Knuth, *The Art of Computer Programming* 3, section 6.4,
//! algorithm L, with marks for removed entries). A slot holds the entry's offset and sixteen bits
//! of its hash, so that a probe touches hardly any entry but the right one. Entries never change:
//! an update puts a new one into the slot.
//!
//! Every change is one record under the stripe's lock that stores one slot. When a stripe's table
//! is full, the writer fills a larger one in private and puts it into its place by the same record
//! that inserts the entry; the others' stripes do not notice. So a death leaves either the old
//! state or the new one, and recovery moves no entry.
//!
//! Readers pin the [epoch](crate::epoch) and probe without a lock. What they find was there at
//! some moment during the call: a key stays in its slot as long as it is in the map, and a table
//! that was replaced stays as it was at that moment.
//!
//! The hash is not keyed. Who can choose keys can slow the map down; the programs of a group
//! trust each other with the segment itself.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::Map;
//! use lupin::heap::{Heap, HeapSpec};
//! use lupin::shm::{Access, Mapping};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(4 << 20)?;
//! let memory = Mapping::new(&file, 0, 4 << 20, Access::ReadWrite)?;
//! let me = InstanceId::new(1, 1);
//! let judge = |instance: InstanceId| instance == me;
//! let heap = Heap::create(&memory, &HeapSpec::default(), me, &judge)?;
//! let mut participant = heap.join(me, judge)?;
//!
//! let map = Map::create_in(&mut participant, heap.root(0)?)?;
//! map.insert(&mut participant, "answer", b"42")?;
//! map.insert(&mut participant, 7u64, b"seven")?;
//! assert_eq!(map.get(&mut participant, "answer")?.unwrap(), b"42");
//! assert!(map.update(&mut participant, 7u64, b"VII")?);
//! assert_eq!(map.remove(&mut participant, 7u64)?.unwrap(), b"VII");
//! assert_eq!(map.len()?, 1);
//! # Ok(())
//! # }
//! ```

mod iter;
mod table;

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use super::region::{Kind, mix, mix_bytes};
use super::rooted::{self, NEW, SPARE, damaged, first_word};
use super::{CollectionError, kind};
use crate::heap::Participant;
use crate::liveness::Liveness;
use crate::mem::{fill64, load64};
use crate::shm::Mapping;
use table::{Entry, Found, REMOVED, Table, slot_word};

pub use iter::Iter;

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINMAP"),
    name: "map",
};
/// Stripes of a map that is created without saying how many.
const STRIPES: u32 = 16;
/// Most stripes.
pub const MAX_STRIPES: u32 = 4096;
/// The map's block: kind, number of stripes; then the stripes.
const HEADER: u64 = 64;
/// A stripe: its lock, and a line with its table, its entries, and its slots that are not empty.
const STRIPE: u64 = 128;
const TABLE: u64 = 64;
const ENTRIES: u64 = 72;
const USED: u64 = 80;

/// A key: a number, which is its eight bytes in little endian, or bytes.
#[derive(Clone, Copy, Debug)]
pub struct Key<'k>(KeyBytes<'k>);

#[derive(Clone, Copy, Debug)]
enum KeyBytes<'k> {
    Number([u8; 8]),
    Bytes(&'k [u8]),
}

impl Key<'_> {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            KeyBytes::Number(bytes) => bytes,
            KeyBytes::Bytes(bytes) => bytes,
        }
    }

    fn hash(&self) -> u64 {
        match &self.0 {
            // The same as of its bytes.
            KeyBytes::Number(bytes) => mix([u64::from_le_bytes(*bytes), 8]),
            KeyBytes::Bytes(bytes) => mix_bytes(bytes),
        }
    }
}

impl From<u64> for Key<'_> {
    fn from(number: u64) -> Self {
        Self(KeyBytes::Number(number.to_le_bytes()))
    }
}

impl<'k> From<&'k [u8]> for Key<'k> {
    fn from(bytes: &'k [u8]) -> Self {
        Self(KeyBytes::Bytes(bytes))
    }
}

impl<'k, const N: usize> From<&'k [u8; N]> for Key<'k> {
    fn from(bytes: &'k [u8; N]) -> Self {
        Self(KeyBytes::Bytes(bytes))
    }
}

impl<'k> From<&'k str> for Key<'k> {
    fn from(text: &'k str) -> Self {
        Self(KeyBytes::Bytes(text.as_bytes()))
    }
}

/// A hash map in a heap.
#[derive(Clone, Copy, Debug)]
pub struct Map<'m> {
    memory: &'m Mapping,
    at: u64,
    stripes: u32,
}

/// What a write does with a key that is there, or is not.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Nothing if it is there.
    Insert,
    /// Nothing if it is not there.
    Update,
    /// Always writes.
    Put,
}

impl<'m> Map<'m> {
    /// Creates an empty map with 16 stripes in a root slot.
    ///
    /// # Errors
    /// [`CollectionError::Exists`], [`CollectionError::NotThis`], [`CollectionError::Heap`].
    pub fn create_in<J: Liveness>(
        participant: &mut Participant<'m, J>,
        root: u64,
    ) -> Result<Self, CollectionError> {
        Self::create_with(participant, root, STRIPES)
    }

    /// Creates an empty map in a root slot. `stripes`, a power of two up to [`MAX_STRIPES`], is
    /// how many writers can change the map at the same time, and never changes.
    ///
    /// # Errors
    /// Those of [`create_in`](Self::create_in), [`CollectionError::Spec`].
    pub fn create_with<J: Liveness>(
        participant: &mut Participant<'m, J>,
        root: u64,
        stripes: u32,
    ) -> Result<Self, CollectionError> {
        if !stripes.is_power_of_two() || stripes > MAX_STRIPES {
            return Err(CollectionError::Spec {
                what: "number of stripes",
                value: stripes.into(),
                allowed: "powers of two in 1..=4096",
            });
        }
        let bytes = HEADER + u64::from(stripes) * STRIPE;
        let at = rooted::create(participant, root, &KIND, bytes, &[stripes.into()])?;
        let memory = participant.memory();
        Ok(Self {
            memory,
            at,
            stripes,
        })
    }

    /// Opens the map in a root slot, or creates it there as [`create_in`](Self::create_in) does:
    /// for programs of which any may come first.
    ///
    /// # Errors
    /// [`CollectionError::NotThis`], [`CollectionError::Heap`].
    pub fn open_or_create_in<J: Liveness>(
        participant: &mut Participant<'m, J>,
        root: u64,
    ) -> Result<Self, CollectionError> {
        match Self::create_in(participant, root) {
            Err(CollectionError::Exists(_)) => {
                Self::open(participant.memory(), root, Duration::ZERO)
            }
            created => created,
        }
    }

    /// Opens the map in a root slot; waits up to `patience` for one that is not there yet.
    ///
    /// # Errors
    /// [`CollectionError::Absent`], [`CollectionError::NotThis`], [`CollectionError::Damaged`].
    pub fn open(
        memory: &'m Mapping,
        root: u64,
        patience: Duration,
    ) -> Result<Self, CollectionError> {
        let at = rooted::open(memory, root, &KIND, patience)?;
        let stripes = load64(memory.get(at + 8)?, Ordering::Relaxed);
        match u32::try_from(stripes) {
            Ok(stripes) if stripes.is_power_of_two() && stripes <= MAX_STRIPES => Ok(Self {
                memory,
                at,
                stripes,
            }),
            _ => Err(damaged("map", at, "it cannot have that many stripes")),
        }
    }

    /// Inserts a key with its value, unless the key is there; says whether it did.
    ///
    /// One record of [`kind::MAP_INSERT`]; its result is the key's first eight bytes.
    ///
    /// # Errors
    /// [`CollectionError::Heap`] without memory, or if a living reader keeps all that the
    /// participant removed before; [`CollectionError::Damaged`].
    pub fn insert<'k, J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: impl Into<Key<'k>>,
        value: &[u8],
    ) -> Result<bool, CollectionError> {
        self.write(participant, key.into(), value, Mode::Insert)
    }

    /// Gives a key that is there another value; says whether it was.
    ///
    /// One record of [`kind::MAP_UPDATE`]; its result is the key's first eight bytes.
    ///
    /// # Errors
    /// Those of [`insert`](Self::insert).
    pub fn update<'k, J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: impl Into<Key<'k>>,
        value: &[u8],
    ) -> Result<bool, CollectionError> {
        self.write(participant, key.into(), value, Mode::Update)
    }

    /// Gives a key a value, whether or not it is there.
    ///
    /// One record of [`kind::MAP_INSERT`] or [`kind::MAP_UPDATE`]; its result is the key's first
    /// eight bytes.
    ///
    /// # Errors
    /// Those of [`insert`](Self::insert).
    pub fn put<'k, J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: impl Into<Key<'k>>,
        value: &[u8],
    ) -> Result<(), CollectionError> {
        self.write(participant, key.into(), value, Mode::Put)?;
        Ok(())
    }

    /// Removes a key; returns its value if it was there.
    ///
    /// One record of [`kind::MAP_REMOVE`]; its result is the key's first eight bytes.
    ///
    /// # Errors
    /// Those of [`insert`](Self::insert).
    pub fn remove<'k, J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: impl Into<Key<'k>>,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        let key = key.into();
        participant.make_room()?;
        let hash = key.hash();
        let stripe = self.stripe_of(hash);
        let guard = participant.lock(stripe)?;
        let found = match self.table(stripe)? {
            Some(table) => table.find(self.memory, hash, key.bytes())?.found,
            None => None,
        };
        let Some(Found { slot, entry }) = found else {
            guard.unlock()?;
            return Ok(None);
        };
        let value = Entry::at_block(self.memory, entry).value()?;
        let mut record = participant.begin(kind::MAP_REMOVE)?;
        record.held(stripe);
        record.set(slot, REMOVED)?;
        let entries = record.get(stripe + ENTRIES)?.wrapping_sub(1);
        record.set(stripe + ENTRIES, entries)?;
        participant.retire_in(&mut record, entry)?;
        record.commit(first_word(key.bytes()))?;
        guard.unlock()?;
        Ok(Some(value))
    }

    /// The value of a key. Takes no lock.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`].
    pub fn get<'k, J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: impl Into<Key<'k>>,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        let key = key.into();
        let hash = key.hash();
        let _pin = participant.pin();
        let Some(table) = self.table(self.stripe_of(hash))? else {
            return Ok(None);
        };
        match table.find(self.memory, hash, key.bytes())?.found {
            Some(found) => Ok(Some(Entry::at_block(self.memory, found.entry).value()?)),
            None => Ok(None),
        }
    }

    /// The keys with their values, in no order: an entry that is there all the time comes once,
    /// one that comes, goes or changes meanwhile may come, and not or twice if it goes and comes
    /// again.
    ///
    /// Nothing that anybody removes meanwhile is freed before the iterator is dropped.
    pub fn iter<'p, J: Liveness>(&self, participant: &'p mut Participant<'m, J>) -> Iter<'p, 'm> {
        Iter::new(*self, participant.pin())
    }

    /// Entries: the sum over the stripes, each at some moment during the call.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn len(&self) -> Result<u64, CollectionError> {
        let mut entries = 0;
        for stripe in 0..self.stripes {
            let at = self.stripe(stripe) + ENTRIES;
            entries += load64(self.memory.get(at)?, Ordering::Acquire);
        }
        Ok(entries)
    }

    /// Whether there is no entry; see [`len`](Self::len).
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn is_empty(&self) -> Result<bool, CollectionError> {
        Ok(self.len()? == 0)
    }

    /// All blocks of the map but the one that the root owns, for
    /// [`Heap::audit_with`](crate::heap::Heap::audit_with). Nobody may change the map meanwhile.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`], also if a stripe's counts are not those of its table, or an
    /// entry cannot be found by its key.
    pub fn blocks(&self) -> Result<Vec<u64>, CollectionError> {
        let mut blocks = Vec::new();
        for stripe in (0..self.stripes).map(|stripe| self.stripe(stripe)) {
            let [entries, used] = [ENTRIES, USED].map(|at| {
                self.memory
                    .get(stripe + at)
                    .map(|word: &AtomicU64| load64(word, Ordering::Acquire))
            });
            let (entries, used) = (entries?, used?);
            let (mut live, mut taken) = (0, 0);
            if let Some(table) = self.table(stripe)? {
                blocks.push(table.at());
                for index in 0..table.slots() {
                    let word = table.load(index);
                    taken += u64::from(word != 0);
                    let Some(entry) = Entry::in_slot(self.memory, word) else {
                        continue;
                    };
                    live += 1;
                    blocks.push(entry.at());
                    let found = table.find(self.memory, entry.hash()?, &entry.key()?)?.found;
                    if found.is_none_or(|found| found.slot != table.slot(index)) {
                        return Err(damaged("map entry", entry.at(), "its key leads elsewhere"));
                    }
                }
            }
            if (live, taken) != (entries, used) {
                return Err(damaged(
                    "stripe",
                    stripe,
                    "its counts are not those of its table",
                ));
            }
        }
        Ok(blocks)
    }

    fn write<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: Key<'_>,
        value: &[u8],
        mode: Mode,
    ) -> Result<bool, CollectionError> {
        participant.make_room()?;
        let hash = key.hash();
        let stripe = self.stripe_of(hash);
        let size = Entry::size(key.bytes(), value)?;
        let entry = rooted::fresh(participant, NEW, size)?;
        Entry::fill(self.memory, entry, hash, key.bytes(), value)?;
        let guard = participant.lock(stripe)?;
        let table = self.table(stripe)?;
        let place = table
            .map(|table| table.find(self.memory, hash, key.bytes()))
            .transpose()?;
        let found = place.as_ref().and_then(|place| place.found);
        let is_refused = match mode {
            Mode::Insert => found.is_some(),
            Mode::Update => found.is_none(),
            Mode::Put => false,
        };
        if is_refused {
            guard.unlock()?;
            rooted::drop_held(participant, NEW)?;
            return Ok(false);
        }
        // A free slot that keeps the table at most three quarters full. With marks for removed
        // entries counted: they lengthen probes as well.
        let used = load64(self.memory.get(stripe + USED)?, Ordering::Relaxed);
        let free = place.and_then(|place| place.free).filter(|free| {
            let slots = table.map_or(0, |table| table.slots());
            free.was_removed || (used + 1) * 4 <= slots * 3
        });
        let grown = match (found, free) {
            (None, None) => Some(self.grow(participant, stripe, table)?),
            _ => None,
        };
        let what = match found {
            Some(_) => kind::MAP_UPDATE,
            None => kind::MAP_INSERT,
        };
        let mut record = participant.begin(what)?;
        record.held(stripe);
        let word = slot_word(hash, entry);
        if let Some(found) = found {
            record.set(found.slot, word)?;
            participant.retire_in(&mut record, found.entry)?;
        } else {
            let entries = record.get(stripe + ENTRIES)?.wrapping_add(1);
            if let Some(grown) = grown {
                // Nobody has seen the new table yet: the entry is put there directly.
                grown.put(hash, word)?;
                record.set(stripe + TABLE, grown.at())?;
                record.set(stripe + USED, entries)?;
                record.set(participant.hold(SPARE), 0)?;
                if let Some(table) = table {
                    participant.retire_in(&mut record, table.at())?;
                }
            } else if let Some(free) = free {
                record.set(free.slot, word)?;
                if !free.was_removed {
                    record.set(stripe + USED, used + 1)?;
                }
            }
            record.set(stripe + ENTRIES, entries)?;
        }
        record.set(participant.hold(NEW), 0)?;
        record.commit(first_word(key.bytes()))?;
        guard.unlock()?;
        Ok(true)
    }

    /// A table for a stripe with room for as many entries again, filled with those of the old
    /// one; in the caller's hold.
    fn grow<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        stripe: u64,
        old: Option<Table<'m>>,
    ) -> Result<Table<'m>, CollectionError> {
        let entries = load64(self.memory.get(stripe + ENTRIES)?, Ordering::Relaxed);
        let slots = (entries + 1).saturating_mul(2).next_power_of_two().max(8);
        let block = rooted::fresh(participant, SPARE, Table::size(slots))?;
        let table = Table::fill(self.memory, block, slots)?;
        let Some(old) = old else {
            return Ok(table);
        };
        for index in 0..old.slots() {
            let word = old.load(index);
            if let Some(entry) = Entry::in_slot(self.memory, word) {
                table.put(entry.hash()?, word)?;
            }
        }
        Ok(table)
    }

    fn stripe_of(&self, hash: u64) -> u64 {
        self.stripe(hash as u32 & (self.stripes - 1))
    }

    fn stripe(&self, stripe: u32) -> u64 {
        self.at + HEADER + u64::from(stripe) * STRIPE
    }

    fn table(&self, stripe: u64) -> Result<Option<Table<'m>>, CollectionError> {
        // Acquire: pairs with the record that put it there.
        match load64(self.memory.get(stripe + TABLE)?, Ordering::Acquire) {
            0 => Ok(None),
            table => Ok(Some(Table::at_block(self.memory, table)?)),
        }
    }
}

#[cfg(test)]
#[path = "map_test.rs"]
mod map_test;
