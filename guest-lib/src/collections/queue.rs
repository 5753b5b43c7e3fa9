//! A queue for any number of pushers and poppers: unbounded, first in first out, values of bytes.
//!
//! A push is one record that links a node, a pop one record that takes the first node out into
//! the popper's own hold. Whatever dies in between, a value is in the queue or in one popper's
//! hands; it is never popped twice and never lost in the queue. What a dead popper had in its
//! hands is told by its [outcome](crate::heap::Heap::outcome_of): the kind says that it popped,
//! the result is the first eight bytes of the value. So values of up to eight bytes are told
//! whole; put an identity there if yours are longer and must not be lost with their popper.
//!
//! All changes happen under one recoverable lock, of which a push or a pop holds some dozens of
//! stores; nodes are filled before and freed after it. (Two locks, as in M. Michael and M. Scott,
//! *Simple, Fast, and Practical Non-Blocking and Blocking Concurrent Queue Algorithms*, PODC 1996,
//! section 2, do not do here: a dead pusher's record may be applied again, and would store into
//! the node before it, which a popper under another lock might have freed.)
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::Queue;
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
//! let queue = Queue::create_in(&mut participant, heap.root(0)?)?;
//! queue.push(&mut participant, b"hello")?;
//! queue.push_u64(&mut participant, 42)?;
//! assert_eq!(queue.pop(&mut participant)?.unwrap(), b"hello");
//! assert_eq!(queue.pop_u64(&mut participant)?, Some(42));
//! assert_eq!(queue.pop(&mut participant)?, None);
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use super::region::Kind;
use super::rooted::{self, NEW, TAKEN, damaged, first_word, put_bytes, take_bytes};
use super::{CollectionError, kind};
use crate::heap::Participant;
use crate::liveness::Liveness;
use crate::mem::{fill64, load64};
use crate::shm::Mapping;
use crate::wait::{Pacer, Parking, deadline_after};

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINQUE"),
    name: "queue",
};
/// The queue's block: kind, lock, then a line for pushers and poppers, then one for sleepers.
const LOCK: u64 = 64;
const HEAD: u64 = 128;
const TAIL: u64 = 136;
const PUSHED: u64 = 144;
const POPPED: u64 = 152;
const SLEEPERS: u64 = 192;
const WAKE: u64 = 196;
const SIZE: u64 = 256;
/// A node: link, length, value.
const LEN: u64 = 8;
const VALUE: u64 = 16;

/// A queue in a heap.
#[derive(Clone, Copy, Debug)]
pub struct Queue<'m> {
    memory: &'m Mapping,
    at: u64,
}

impl<'m> Queue<'m> {
    /// Creates an empty queue in a root slot.
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

    /// Opens the queue in a root slot, or creates it there as [`create_in`](Self::create_in) does:
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

    /// Opens the queue in a root slot; waits up to `patience` for one that is not there yet.
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

    /// Appends a value, and wakes those who wait for one.
    ///
    /// One record of [`kind::QUEUE_PUSH`]; its result is the value's first eight bytes.
    ///
    /// # Errors
    /// [`CollectionError::Heap`] without memory.
    pub fn push<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        value: &[u8],
    ) -> Result<(), CollectionError> {
        let node = rooted::fresh(participant, NEW, VALUE + rooted::padded(value.len()))?;
        fill64(self.memory.get(node)?, 0);
        fill64(self.memory.get(node + LEN)?, value.len() as u64);
        put_bytes(self.memory, node + VALUE, value)?;
        let guard = participant.lock(self.at + LOCK)?;
        let mut record = participant.begin(kind::QUEUE_PUSH)?;
        record.held(self.at + LOCK);
        let last = record.get(self.at + TAIL)?;
        // The link of the last node, or the head if there is none.
        record.set(if last == 0 { self.at + HEAD } else { last }, node)?;
        record.set(self.at + TAIL, node)?;
        let pushed = record.get(self.at + PUSHED)?.wrapping_add(1);
        record.set(self.at + PUSHED, pushed)?;
        record.set(participant.hold(NEW), 0)?;
        record.commit(first_word(value))?;
        guard.unlock()?;
        // Everybody: whoever comes too late sleeps again, and nobody is forgotten if a woken one
        // dies before it pops.
        self.parking()?.wake(i32::MAX);
        Ok(())
    }

    /// Appends a number: its eight bytes, little endian.
    ///
    /// # Errors
    /// Those of [`push`](Self::push).
    pub fn push_u64<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        value: u64,
    ) -> Result<(), CollectionError> {
        self.push(participant, &value.to_le_bytes())
    }

    /// Takes the first value out, if there is one. A value that a dead pusher has committed is
    /// there, also if nobody has settled its work yet.
    ///
    /// One record of [`kind::QUEUE_POP`]; its result is the value's first eight bytes.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`].
    pub fn pop<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        // The node of the pop before. Not at the end of that one: the record of a pop is the
        // last thing it does, so that its outcome is that of the pop and of nothing after it.
        rooted::drop_held(participant, TAKEN)?;
        let guard = participant.lock(self.at + LOCK)?;
        let node = load64(self.memory.get(self.at + HEAD)?, Ordering::Acquire);
        if node == 0 {
            guard.unlock()?;
            return Ok(None);
        }
        // Saturating: a damaged link is an error of the access, not an overflow.
        let len = load64(
            self.memory.get(node.saturating_add(LEN))?,
            Ordering::Relaxed,
        );
        let value = take_bytes(self.memory, node + VALUE, len)?;
        let mut record = participant.begin(kind::QUEUE_POP)?;
        record.held(self.at + LOCK);
        let next = record.get(node)?;
        record.set(self.at + HEAD, next)?;
        if next == 0 {
            record.set(self.at + TAIL, 0)?;
        }
        let popped = record.get(self.at + POPPED)?.wrapping_add(1);
        record.set(self.at + POPPED, popped)?;
        record.set(participant.hold(TAKEN), node)?;
        record.commit(first_word(&value))?;
        guard.unlock()?;
        Ok(Some(value))
    }

    /// Takes the first value out as a number.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`] if the value is not eight bytes long; it is taken out then.
    pub fn pop_u64<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
    ) -> Result<Option<u64>, CollectionError> {
        let Some(value) = self.pop(participant)? else {
            return Ok(None);
        };
        match <[u8; 8]>::try_from(value) {
            Ok(bytes) => Ok(Some(u64::from_le_bytes(bytes))),
            Err(_) => Err(damaged("queue", self.at, "its first value is no number")),
        }
    }

    /// Takes the first value out; waits for one at most `timeout`. `None` if none came.
    ///
    /// A value that was pushed on another node ends the wait as one of this node does, and so
    /// does the death of a pusher on the way.
    ///
    /// # Errors
    /// Those of [`pop`](Self::pop).
    pub fn pop_timeout<J: Liveness>(
        &self,
        participant: &mut Participant<'m, J>,
        timeout: Duration,
    ) -> Result<Option<Vec<u8>>, CollectionError> {
        let head: &AtomicU64 = self.memory.get(self.at + HEAD)?;
        let parking = self.parking()?;
        let deadline = deadline_after(timeout);
        let mut pacer = Pacer::new(Some(deadline));
        loop {
            // With the lock, and not a look at the head: the lock of a pusher that died brings
            // out what it had committed.
            let value = self.pop(participant)?;
            if value.is_some() || Instant::now() >= deadline {
                return Ok(value);
            }
            while load64(head, Ordering::Relaxed) == 0 && pacer.spin() {}
            let seen = parking.announce();
            if load64(head, Ordering::Acquire) == 0 {
                // Past the deadline it looks once more, above.
                let _ = pacer.sleep_on(parking.word, seen);
            }
        }
    }

    /// Values in the queue, at some moment during the call.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn len(&self) -> Result<u64, CollectionError> {
        // The pops first: what was popped was pushed before.
        let popped = load64(self.memory.get(self.at + POPPED)?, Ordering::Acquire);
        let pushed = load64(self.memory.get(self.at + PUSHED)?, Ordering::Acquire);
        Ok(pushed.wrapping_sub(popped))
    }

    /// Whether no value is in the queue.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn is_empty(&self) -> Result<bool, CollectionError> {
        Ok(load64(self.memory.get(self.at + HEAD)?, Ordering::Acquire) == 0)
    }

    /// All blocks of the queue but the one that the root owns, for
    /// [`Heap::audit_with`](crate::heap::Heap::audit_with). Nobody may change the queue meanwhile.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`] if chain, tail and counts disagree.
    pub fn blocks(&self) -> Result<Vec<u64>, CollectionError> {
        let (len, mut blocks) = (self.len()?, Vec::new());
        let mut node = load64(self.memory.get(self.at + HEAD)?, Ordering::Acquire);
        while node != 0 {
            if blocks.len() as u64 == len {
                return Err(damaged(
                    "queue",
                    self.at,
                    "its chain is longer than its counts",
                ));
            }
            blocks.push(node);
            node = load64(self.memory.get(node)?, Ordering::Acquire);
        }
        let tail = load64(self.memory.get(self.at + TAIL)?, Ordering::Acquire);
        if blocks.len() as u64 != len || blocks.last().copied().unwrap_or(0) != tail {
            return Err(damaged(
                "queue",
                self.at,
                "its chain, tail and counts disagree",
            ));
        }
        Ok(blocks)
    }

    fn parking(&self) -> Result<Parking<'m>, CollectionError> {
        let (flag, word): (&AtomicU32, &AtomicU32) = (
            self.memory.get(self.at + SLEEPERS)?,
            self.memory.get(self.at + WAKE)?,
        );
        Ok(Parking { flag, word })
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod queue_test;
