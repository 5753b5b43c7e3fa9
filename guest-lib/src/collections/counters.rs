//! Counters whose sum survives every death.
//!
//! Each thread id has a *shard* of its own, so that adding contends with nobody; the value of a
//! counter is the sum over the shards. A shard belongs to its id for ever: what a dead life added
//! stays in the sum, and the next life of the id goes on with it.
//!
//! An addition changes two words, the sum and the *ticket* of the last addition, and must not
//! happen half. So each cell has two slots of (value, ticket); the one with the higher ticket is
//! valid. Adding fills the other slot, the value first; storing its ticket is the commit. A death
//! before that store leaves a slot that nobody looks at, and one after it an addition that is
//! done. (The technique of a double-buffered superblock, as in ZFS and LMDB, a cell at a time.)
//!
//! With [`Shard::add_once`] the ticket is the application's number of its work: whoever redoes
//! the work of a dead life under the same thread id adds with the same ticket, and counts once.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::{Counters, CountersSpec};
//! use lupin::shm::{Access, Mapping};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(1 << 16)?;
//! // Any shared memory: on a pod, a segment's.
//! let memory = Mapping::new(&file, 0, 1 << 16, Access::ReadWrite)?;
//! let everybody_lives = |instance: InstanceId| !instance.is_none();
//! let me = InstanceId::new(1, 1);
//! let spec = CountersSpec { counters: 2, shards: 8 };
//! Counters::create(&memory, 0, &spec, me, &everybody_lives)?;
//!
//! let counters = Counters::open(&memory, 0, &everybody_lives, Duration::from_secs(1))?;
//! let mut shard = counters.join(me, &everybody_lives)?;
//! shard.add(0, 5)?;
//! assert!(shard.add_once(1, 17, 100)?);
//! assert!(!shard.add_once(1, 17, 100)?, "work unit 17 counted before");
//! assert_eq!((counters.sum(0)?, counters.sum(1)?), (5, 100));
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use lupin_abi::InstanceId;

use super::CollectionError;
use super::region::{self, HEADER, Kind};
use crate::liveness::Liveness;
use crate::mem::{cas64, load64, store64};
use crate::shm::Mapping;

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINCNT"),
    name: "set of counters",
};
/// Bytes before the first cell of a shard: its owner, alone on a line.
const OWNER: u64 = 64;
/// Bytes of a cell: two slots of value and ticket.
const CELL: u64 = 32;

/// What a set of counters consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountersSpec {
    /// Counters, `1..=65536`.
    pub counters: u32,
    /// Thread ids that can ever add, `1..=65536`.
    pub shards: u32,
}

impl CountersSpec {
    /// Bytes of shared memory that the set takes.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if a number is out of range.
    pub fn size(&self) -> Result<u64, CollectionError> {
        for (what, value) in [
            ("number of counters", self.counters),
            ("number of shards", self.shards),
        ] {
            if value == 0 || value > 1 << 16 {
                let value = value.into();
                let allowed = "1..=65536";
                return Err(CollectionError::Spec {
                    what,
                    value,
                    allowed,
                });
            }
        }
        Ok(HEADER + u64::from(self.shards) * self.stride())
    }

    fn stride(&self) -> u64 {
        OWNER + (u64::from(self.counters) * CELL).next_multiple_of(64)
    }
}

/// A set of counters in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Counters<'m> {
    memory: &'m Mapping,
    at: u64,
    spec: CountersSpec,
}

/// One thread id's part of a set of counters, for the life that holds it.
#[derive(Debug)]
pub struct Shard<'m> {
    counters: Counters<'m>,
    base: u64,
    me: InstanceId,
}

/// The two slots of a cell: value and ticket each.
type Cell = [[AtomicU64; 2]; 2];

/// What a cell says.
#[derive(Clone, Copy)]
struct State {
    /// The slot that is valid.
    active: usize,
    value: u64,
    ticket: u64,
}

impl<'m> Counters<'m> {
    /// Creates a set at `at` (a multiple of 64) in all-zero memory, or takes over from a creator
    /// that died. All counters are 0.
    ///
    /// # Errors
    /// [`CollectionError::Exists`], [`CollectionError::BeingCreated`] (by somebody alive),
    /// [`CollectionError::NotThis`], [`CollectionError::TooSmall`], [`CollectionError::Spec`].
    pub fn create<J: Liveness>(
        memory: &'m Mapping,
        at: u64,
        spec: &CountersSpec,
        me: InstanceId,
        judge: &J,
    ) -> Result<Self, CollectionError> {
        let fields = [spec.counters.into(), spec.shards.into(), 0, 0];
        region::create(memory, (at, spec.size()?), &KIND, fields, (me, judge))?;
        let spec = *spec;
        Ok(Self { memory, at, spec })
    }

    /// Opens the set at `at`; waits up to `patience` for one that is not there yet.
    ///
    /// # Errors
    /// [`CollectionError::Absent`], [`CollectionError::BeingCreated`],
    /// [`CollectionError::Unfinished`], [`CollectionError::NotThis`],
    /// [`CollectionError::Damaged`].
    pub fn open<J: Liveness>(
        memory: &'m Mapping,
        at: u64,
        judge: &J,
        patience: Duration,
    ) -> Result<Self, CollectionError> {
        let [counters, shards, ..] = region::open(memory, at, &KIND, judge, patience)?;
        let spec = CountersSpec {
            counters: u32::try_from(counters).unwrap_or(u32::MAX),
            shards: u32::try_from(shards).unwrap_or(u32::MAX),
        };
        region::check_size(memory, at, spec.size()?)?;
        Ok(Self { memory, at, spec })
    }

    /// What the set consists of.
    pub fn spec(&self) -> CountersSpec {
        self.spec
    }

    /// Takes the shard of the caller's thread id, or a new one.
    ///
    /// # Errors
    /// [`CollectionError::Full`] if more thread ids came than there are shards;
    /// [`CollectionError::InUse`] if another life of the id has it and lives.
    pub fn join<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Shard<'m>, CollectionError> {
        region::check_instance(me)?;
        for base in self.shards() {
            let word: &AtomicU64 = self.memory.get(base)?;
            let mut found = load64(word, Ordering::Acquire);
            if found == 0 {
                // The first shard without an owner is taken by exactly one id, so an id that has
                // a shard finds it before any free one.
                match cas64(word, 0, me.word(), Ordering::AcqRel) {
                    Ok(_) => found = me.word(),
                    Err(other) => found = other,
                }
            }
            let holder = InstanceId::from_word(found);
            if holder.id() != me.id() {
                continue;
            }
            let in_use = |holder| CollectionError::InUse {
                id: me.id(),
                holder,
            };
            if holder != me {
                if judge.is_alive(holder) {
                    return Err(in_use(holder));
                }
                cas64(word, found, me.word(), Ordering::AcqRel)
                    .map_err(|other| in_use(InstanceId::from_word(other)))?;
            }
            return Ok(Shard {
                counters: *self,
                base,
                me,
            });
        }
        Err(CollectionError::Full {
            what: "thread id",
            capacity: self.spec.shards.into(),
        })
    }

    /// The value of a counter, wrapping: at least all additions that ended before the call, and
    /// none that begins after it. Not a snapshot across shards: additions during the call may
    /// count or not, each for itself.
    ///
    /// # Errors
    /// [`CollectionError::Spec`], [`CollectionError::Damaged`].
    pub fn sum(&self, counter: u32) -> Result<u64, CollectionError> {
        let mut sum = 0u64;
        for base in self.shards() {
            // Owners come in order: behind the first free shard there is nothing to add.
            if load64(self.memory.get(base)?, Ordering::Acquire) == 0 {
                break;
            }
            sum = sum.wrapping_add(self.read(base, counter)?.value);
        }
        Ok(sum)
    }

    /// The ticket of the last addition that thread id `id` made to a counter, in whichever life;
    /// 0 if it made none. For whoever has to know what a dead one got done.
    ///
    /// # Errors
    /// [`CollectionError::Spec`], [`CollectionError::Damaged`].
    pub fn last(&self, counter: u32, id: u32) -> Result<u64, CollectionError> {
        for base in self.shards() {
            let holder = load64(self.memory.get(base)?, Ordering::Acquire);
            if InstanceId::from_word(holder).id() == id {
                return Ok(self.read(base, counter)?.ticket);
            }
        }
        self.check(counter)?;
        Ok(0)
    }

    fn shards(&self) -> impl Iterator<Item = u64> + use<> {
        let (at, stride) = (self.at + HEADER, self.spec.stride());
        (0..u64::from(self.spec.shards)).map(move |shard| at + shard * stride)
    }

    fn check(&self, counter: u32) -> Result<(), CollectionError> {
        if counter >= self.spec.counters {
            return Err(CollectionError::Spec {
                what: "the number of a counter",
                value: counter.into(),
                allowed: "below the number of counters",
            });
        }
        Ok(())
    }

    fn cell(&self, base: u64, counter: u32) -> Result<(u64, &'m Cell), CollectionError> {
        self.check(counter)?;
        let at = base + OWNER + u64::from(counter) * CELL;
        Ok((at, self.memory.get(at)?))
    }

    fn read(&self, base: u64, counter: u32) -> Result<State, CollectionError> {
        let (at, cell) = self.cell(base, counter)?;
        loop {
            // Acquire, all of them, in this order: a value that was stored after the other
            // slot's ticket is only seen together with that ticket, by the last look.
            let tickets = [0, 1].map(|slot| load64(&cell[slot][1], Ordering::Acquire));
            if tickets[0] == tickets[1] && tickets[0] != 0 {
                return Err(CollectionError::Damaged {
                    what: "counter cell",
                    at,
                    detail: "both slots have the same ticket",
                });
            }
            let active = usize::from(tickets[1] > tickets[0]);
            let value = load64(&cell[active][0], Ordering::Acquire);
            // The owner fills a slot only while the other one is valid. Each round here means
            // that it added meanwhile; a dead owner causes none.
            if load64(&cell[1 - active][1], Ordering::Acquire) == tickets[1 - active] {
                return Ok(State {
                    active,
                    value,
                    ticket: tickets[active],
                });
            }
        }
    }
}

impl Shard<'_> {
    /// Who adds.
    pub fn instance(&self) -> InstanceId {
        self.me
    }

    /// Adds to a counter, wrapping, under the next ticket. Returns the ticket.
    ///
    /// # Errors
    /// [`CollectionError::Spec`], [`CollectionError::Damaged`],
    /// [`CollectionError::Full`] after `u64::MAX` tickets.
    pub fn add(&mut self, counter: u32, delta: u64) -> Result<u64, CollectionError> {
        let state = self.counters.read(self.base, counter)?;
        let ticket = state.ticket.checked_add(1).ok_or(CollectionError::Full {
            what: "ticket",
            capacity: u64::MAX,
        })?;
        self.write(counter, state, ticket, delta)?;
        Ok(ticket)
    }

    /// Adds to a counter, wrapping, unless an addition of this thread id with this ticket or a
    /// later one was made before, by whichever life. Says whether it added.
    ///
    /// Tickets of one counter and one thread id go up; 0 is never added.
    ///
    /// # Errors
    /// [`CollectionError::Spec`], [`CollectionError::Damaged`].
    pub fn add_once(
        &mut self,
        counter: u32,
        ticket: u64,
        delta: u64,
    ) -> Result<bool, CollectionError> {
        let state = self.counters.read(self.base, counter)?;
        if ticket <= state.ticket {
            return Ok(false);
        }
        self.write(counter, state, ticket, delta)?;
        Ok(true)
    }

    /// The ticket of this thread id's last addition to a counter; 0 if there is none.
    ///
    /// # Errors
    /// [`CollectionError::Spec`], [`CollectionError::Damaged`].
    pub fn last(&self, counter: u32) -> Result<u64, CollectionError> {
        Ok(self.counters.read(self.base, counter)?.ticket)
    }

    fn write(
        &mut self,
        counter: u32,
        state: State,
        ticket: u64,
        delta: u64,
    ) -> Result<(), CollectionError> {
        let (_, cell) = self.counters.cell(self.base, counter)?;
        let [value, tag] = &cell[1 - state.active];
        // Release: who sees this value also sees, on its second look, the ticket that made the
        // other slot the valid one. See `read`.
        store64(value, state.value.wrapping_add(delta), Ordering::Release);
        // The commit. Release: with its value.
        store64(tag, ticket, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
#[path = "counters_test.rs"]
mod counters_test;
