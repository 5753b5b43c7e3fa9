//! A sorted list: keys in ascending order, each with a value of bytes.
//!
//! Writers change the list one at a time, under one recoverable lock; readers take no lock. Each
//! change is one record that stores one link (and the length), so a reader finds the list before
//! it or after it. A node that is unlinked keeps its own link until nobody can see it, and links
//! always lead to larger keys, so a reader that stands on a node which is removed under it walks
//! on to what is still there, and never in a circle.
//!
//! The readers' rule is that of lazy lists (S. Heller et al., *A Lazy Concurrent List-Based Set
//! Algorithm*, OPODIS 2005, section 3), with [epochs](crate::epoch) where that paper has a
//! garbage collector.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::List;
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
//! let list = List::create_in(&mut participant, heap.root(0)?)?;
//! list.insert(&mut participant, 20, b"second")?;
//! list.insert(&mut participant, 10, b"first")?;
//! assert_eq!(list.get(&mut participant, 10)?.unwrap(), b"first");
//! let keys: Vec<u64> = list.iter(&mut participant)?.map(|entry| entry.unwrap().0).collect();
//! assert_eq!(keys, [10, 20]);
//! assert_eq!(list.remove(&mut participant, 10)?.unwrap(), b"first");
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::Ordering;
use core::time::Duration;

use super::region::Kind;
use super::rooted::{self, NEW, damaged, put_bytes, take_bytes};
use super::{CollectionError, kind};
use crate::epoch::Pin;
use crate::heap::Participant;
use crate::liveness::Liveness;
use crate::mem::{fill64, load64};
use crate::shm::Mapping;

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINLST"),
    name: "list",
};
/// The list's block: kind, lock, first link and length.
const LOCK: u64 = 64;
const FIRST: u64 = 128;
const LEN: u64 = 136;
const SIZE: u64 = 192;
/// A node: link, key, length of the value, value.
const KEY: u64 = 8;
const VALUE_LEN: u64 = 16;
const VALUE: u64 = 24;

/// A sorted list in a heap.
#[derive(Clone, Copy, Debug)]
pub struct List<'m> {
    memory: &'m Mapping,
    at: u64,
}

/// Where a key is, or would be: the link that leads there, and the node if it is there.
struct Position {
    link: u64,
    next: u64,
    found: bool,
}

impl<'m> List<'m> {
    /// Creates an empty list in a root slot.
    ///
    /// # Errors
    /// [`CollectionError::Exists`], [`CollectionError::NotThis`], [`CollectionError::Heap`].
    pub fn create_in<J: Liveness>(
        participant: &mut Participant<'m, J>,
        root: u64,
    ) -> Result<Self, CollectionError> {
        let at = rooted::create(participant, root, &KIND, SIZE, &[])?;
        let memory = participant.memory();
        Ok(Self { memory, at })
    }

    /// Opens the list in a root slot, or creates it there as [`create_in`](Self::create_in) does:
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

    /// Opens the list in a root slot; waits up to `patience` for one that is not there yet.
    ///
    /// # Errors
    /// [`CollectionError::Absent`], [`CollectionError::NotThis`].
    pub fn open(
        memory: &'m Mapping,
        root: u64,
        patience: Duration,
    ) -> Result<Self, CollectionError> {
        let at = rooted::open(memory, root, &KIND, patience)?;
        Ok(Self { memory, at })
    }

    /// Inserts a key with its value, unless the key is there; says whether it did.
    ///
    /// One record of [`kind::LIST_INSERT`]; its result is the key.
    ///
    /// # Errors
    /// [`CollectionError::Heap`] without memory; [`CollectionError::Damaged`].
    pub fn insert<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: u64,
        value: &[u8],
    ) -> Result<bool, CollectionError> {
        let node = rooted::fresh(participant, NEW, VALUE + rooted::padded(value.len()))?;
        fill64(self.memory.get(node + KEY)?, key);
        fill64(self.memory.get(node + VALUE_LEN)?, value.len() as u64);
        put_bytes(self.memory, node + VALUE, value)?;
        let guard = participant.lock(self.at + LOCK)?;
        let position = self.find(key)?;
        if position.found {
            guard.unlock()?;
            rooted::drop_held(participant, NEW)?;
            return Ok(false);
        }
        fill64(self.memory.get(node)?, position.next);
        let mut record = participant.begin(kind::LIST_INSERT)?;
        record.held(self.at + LOCK);
        record.set(position.link, node)?;
        record.set(self.at + LEN, record.get(self.at + LEN)?.wrapping_add(1))?;
        record.set(participant.hold(NEW), 0)?;
        record.commit(key)?;
        guard.unlock()?;
        Ok(true)
    }

    /// Removes a key; returns its value if it was there.
    ///
    /// One record of [`kind::LIST_REMOVE`]; its result is the key.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`]; [`CollectionError::Heap`] if a living reader keeps all that
    /// the participant removed before.
    pub fn remove<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: u64,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        participant.make_room()?;
        let guard = participant.lock(self.at + LOCK)?;
        let position = self.find(key)?;
        if !position.found {
            guard.unlock()?;
            return Ok(None);
        }
        let node = position.next;
        let value = self.value(node)?;
        let mut record = participant.begin(kind::LIST_REMOVE)?;
        record.held(self.at + LOCK);
        record.set(position.link, record.get(node)?)?;
        record.set(self.at + LEN, record.get(self.at + LEN)?.wrapping_sub(1))?;
        participant.retire_in(&mut record, node)?;
        record.commit(key)?;
        guard.unlock()?;
        Ok(Some(value))
    }

    /// The value of a key. Takes no lock.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`].
    pub fn get<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        key: u64,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        let _pin = participant.pin();
        let position = self.find(key)?;
        match position.found {
            true => Ok(Some(self.value(position.next)?)),
            false => Ok(None),
        }
    }

    /// The keys with their values in ascending order, as they are found: an entry that is there
    /// all the time comes once, one that comes or goes meanwhile may come or not.
    ///
    /// Nothing that anybody removes meanwhile is freed before the iterator is dropped.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn iter<'p, J: Liveness>(
        &self,
        participant: &'p mut Participant<'m, J>,
    ) -> Result<Iter<'p, 'm>, CollectionError> {
        let pin = participant.pin();
        Ok(Iter {
            list: *self,
            next: load64(self.memory.get(self.at + FIRST)?, Ordering::Acquire),
            last: None,
            _pin: pin,
        })
    }

    /// Entries, at some moment during the call.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn len(&self) -> Result<u64, CollectionError> {
        Ok(load64(self.memory.get(self.at + LEN)?, Ordering::Acquire))
    }

    /// Whether there is no entry.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn is_empty(&self) -> Result<bool, CollectionError> {
        Ok(self.len()? == 0)
    }

    /// All blocks of the list but the one that the root owns, for
    /// [`Heap::audit_with`](crate::heap::Heap::audit_with). Nobody may change the list meanwhile.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`], also if the length is not the number of nodes.
    pub fn blocks(&self) -> Result<Vec<u64>, CollectionError> {
        let (mut blocks, mut last) = (Vec::new(), None);
        let mut node = load64(self.memory.get(self.at + FIRST)?, Ordering::Acquire);
        while node != 0 {
            last = Some(self.key_after(node, last)?);
            blocks.push(node);
            node = self.link(node)?;
        }
        if self.len()? != blocks.len() as u64 {
            return Err(damaged(
                "list",
                self.at,
                "its length is not that of its chain",
            ));
        }
        Ok(blocks)
    }

    /// Where a key is or would be. For readers with a pin, and for holders of the lock.
    fn find(&self, key: u64) -> Result<Position, CollectionError> {
        let (mut link, mut last) = (self.at + FIRST, None);
        loop {
            let next = self.link(link)?;
            let found = match next {
                0 => None,
                node => Some(self.key_after(node, last)?),
            };
            match found {
                Some(smaller) if smaller < key => (link, last) = (next, found),
                _ => {
                    let found = found == Some(key);
                    return Ok(Position { link, next, found });
                }
            }
        }
    }

    fn link(&self, at: u64) -> Result<u64, CollectionError> {
        // Acquire: pairs with the record that linked the node; what it holds is visible.
        Ok(load64(self.memory.get(at)?, Ordering::Acquire))
    }

    /// The key of a node that was found behind another; refuses one that is not larger, and with
    /// it any circle.
    fn key_after(&self, node: u64, last: Option<u64>) -> Result<u64, CollectionError> {
        // Saturating: a damaged link is an error of the access, not an overflow.
        let key = load64(
            self.memory.get(node.saturating_add(KEY))?,
            Ordering::Relaxed,
        );
        match last {
            Some(last) if last >= key => Err(damaged("list node", node, "its key is out of order")),
            _ => Ok(key),
        }
    }

    fn value(&self, node: u64) -> Result<Vec<u8>, CollectionError> {
        let len = load64(self.memory.get(node + VALUE_LEN)?, Ordering::Relaxed);
        take_bytes(self.memory, node + VALUE, len)
    }
}

/// Walks over a list. See [`List::iter`].
#[derive(Debug)]
pub struct Iter<'p, 'm> {
    list: List<'m>,
    next: u64,
    last: Option<u64>,
    _pin: Pin<'p>,
}

impl Iter<'_, '_> {
    fn step(&mut self) -> Result<(u64, Vec<u8>), CollectionError> {
        let node = self.next;
        let key = self.list.key_after(node, self.last)?;
        let value = self.list.value(node)?;
        (self.next, self.last) = (self.list.link(node)?, Some(key));
        Ok((key, value))
    }
}

impl Iterator for Iter<'_, '_> {
    type Item = Result<(u64, Vec<u8>), CollectionError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == 0 {
            return None;
        }
        let entry = self.step();
        if entry.is_err() {
            self.next = 0;
        }
        Some(entry)
    }
}

#[cfg(test)]
#[path = "list_test.rs"]
mod list_test;
