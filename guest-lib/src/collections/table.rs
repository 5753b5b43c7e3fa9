//! A results table: a fixed number of cells, each committed once.
//!
//! A cell is *claimed* by whoever computes its result, *filled*, and *committed* by one
//! compare-and-swap; a committed result never changes. A claim names its instance in full, so a
//! dead claimer's cell is claimed by the next one and computed again; a verdict "dead" is final,
//! so nobody still fills the cell that another has taken over. (The owner's name swapped straight
//! into the cell needs no log; compare the robust index sets of iceoryx2.)
//!
//! ```text
//!   free --CAS claim 0 -> a--> claimed by a --fill, CAS commit 0 -> a--> committed by a
//!     ^                         |        | dies
//!     +-------- drop -----------+        +--CAS claim a -> b--> claimed by b ...
//! ```
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::{Table, TableSpec};
//! use lupin::shm::{Access, Mapping};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(1 << 16)?;
//! let memory = Mapping::new(&file, 0, 1 << 16, Access::ReadWrite)?;
//! let everybody_lives = |instance: InstanceId| !instance.is_none();
//! let me = InstanceId::new(1, 1);
//! let spec = TableSpec { cells: 10, bytes: 8 };
//! let table = Table::create(&memory, 0, &spec, me, &everybody_lives)?;
//!
//! // Every node does this; each square is computed by one, or again if that one dies.
//! for claim in table.claims(me, &everybody_lives) {
//!     let claim = claim?;
//!     let square = u64::from(claim.cell()).pow(2);
//!     claim.commit(&square.to_le_bytes())?;
//! }
//! assert_eq!(table.get(7)?.unwrap(), 49u64.to_le_bytes());
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use lupin_abi::InstanceId;

use super::CollectionError;
use super::region::{self, HEADER, Kind, mix_bytes};
use crate::liveness::Liveness;
use crate::mem::{cas64, fill64, load64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::Mapping;

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINTAB"),
    name: "results table",
};

/// What a results table consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSpec {
    /// Cells, at least 1.
    pub cells: u32,
    /// Bytes of the longest result, at most 2^30.
    pub bytes: u32,
}

impl TableSpec {
    /// Bytes of shared memory that the table takes.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if a number is out of range.
    pub fn size(&self) -> Result<u64, CollectionError> {
        let error = |what, value: u32, allowed| CollectionError::Spec {
            what,
            value: value.into(),
            allowed,
        };
        if self.cells == 0 {
            return Err(error("number of cells", 0, "1..=2^32-1"));
        }
        if self.bytes > 1 << 30 {
            return Err(error("longest result", self.bytes, "0..=2^30"));
        }
        Ok((HEADER + u64::from(self.cells) * self.stride()).next_multiple_of(64))
    }

    fn stride(&self) -> u64 {
        size_of::<CellLine>() as u64 + u64::from(self.bytes).next_multiple_of(32)
    }
}

/// The start of a cell; the result's bytes follow.
#[repr(C, align(32))]
struct CellLine {
    /// Who computes.
    claim: AtomicU64,
    /// Who committed; 0 until then.
    commit: AtomicU64,
    len: AtomicU64,
    sum: AtomicU64,
}

// SAFETY: `repr(C)` of atomics without padding; any bits are valid; nothing to drop.
unsafe impl PodSafe for CellLine {}
// SAFETY: it consists of atomics.
unsafe impl PodShared for CellLine {}

/// A results table in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Table<'m> {
    memory: &'m Mapping,
    at: u64,
    spec: TableSpec,
}

/// What became of the wish to claim a cell.
#[derive(Debug)]
pub enum Claim<'m> {
    /// The caller computes it.
    Mine(Claimed<'m>),
    /// Somebody alive computes it.
    Theirs(InstanceId),
    /// It was committed, by this one.
    Done(InstanceId),
}

/// A cell that the caller computes. Dropping it without a commit gives it back.
#[derive(Debug)]
#[must_use = "dropping it gives the cell back"]
pub struct Claimed<'m> {
    table: Table<'m>,
    cell: u32,
    me: InstanceId,
}

/// How far a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableProgress {
    /// Cells committed.
    pub done: u32,
    /// Cells in all.
    pub cells: u32,
}

impl TableProgress {
    /// Whether all cells are committed.
    pub fn is_complete(&self) -> bool {
        self.done == self.cells
    }
}

impl<'m> Table<'m> {
    /// Creates a table at `at` (a multiple of 64) in all-zero memory, or takes over from a
    /// creator that died.
    ///
    /// # Errors
    /// [`CollectionError::Exists`], [`CollectionError::BeingCreated`] (by somebody alive),
    /// [`CollectionError::NotThis`], [`CollectionError::TooSmall`], [`CollectionError::Spec`].
    pub fn create<J: Liveness>(
        memory: &'m Mapping,
        at: u64,
        spec: &TableSpec,
        me: InstanceId,
        judge: &J,
    ) -> Result<Self, CollectionError> {
        let fields = [spec.cells.into(), spec.bytes.into(), 0, 0];
        region::create(memory, (at, spec.size()?), &KIND, fields, (me, judge))?;
        let spec = *spec;
        Ok(Self { memory, at, spec })
    }

    /// Opens the table at `at`; waits up to `patience` for one that is not there yet.
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
        let [cells, bytes, ..] = region::open(memory, at, &KIND, judge, patience)?;
        let spec = TableSpec {
            cells: u32::try_from(cells).unwrap_or(0),
            bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
        };
        region::check_size(memory, at, spec.size()?)?;
        Ok(Self { memory, at, spec })
    }

    /// What the table consists of.
    pub fn spec(&self) -> TableSpec {
        self.spec
    }

    /// Claims one cell, if it is free or its claimer died.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if there is no such cell.
    pub fn claim<J: Liveness>(
        &self,
        cell: u32,
        me: InstanceId,
        judge: &J,
    ) -> Result<Claim<'m>, CollectionError> {
        region::check_instance(me)?;
        let (_, line) = self.line(cell)?;
        let done = || {
            let committer = load64(&line.commit, Ordering::Acquire);
            (committer != 0).then(|| Claim::Done(InstanceId::from_word(committer)))
        };
        if let Some(done) = done() {
            return Ok(done);
        }
        let found = load64(&line.claim, Ordering::Acquire);
        let claimer = InstanceId::from_word(found);
        if found != 0 && claimer != me && judge.is_alive(claimer) {
            return Ok(Claim::Theirs(claimer));
        }
        if let Err(other) = cas64(&line.claim, found, me.word(), Ordering::AcqRel) {
            return Ok(Claim::Theirs(InstanceId::from_word(other)));
        }
        // The claimer before may have committed between the two looks, and died after it. From
        // here on nobody but the caller can.
        if let Some(done) = done() {
            return Ok(done);
        }
        let (table, me) = (*self, me);
        Ok(Claim::Mine(Claimed { table, cell, me }))
    }

    /// Claims one cell after the other until all are committed or claimed by others that live.
    /// Cells of those that die meanwhile are claimed in a later round.
    pub fn claims<'j, J: Liveness>(
        &self,
        me: InstanceId,
        judge: &'j J,
    ) -> impl Iterator<Item = Result<Claimed<'m>, CollectionError>> + use<'m, 'j, J> {
        let table = *self;
        let (mut next, mut passed) = (0, 0);
        core::iter::from_fn(move || {
            while passed < table.spec.cells {
                let claim = table.claim(next, me, judge);
                next = (next + 1) % table.spec.cells;
                passed += 1;
                match claim {
                    Ok(Claim::Mine(claimed)) => {
                        passed = 0;
                        return Some(Ok(claimed));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        passed = table.spec.cells;
                        return Some(Err(error));
                    }
                }
            }
            None
        })
    }

    /// The result of a cell, if it is committed.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if there is no such cell, [`CollectionError::Damaged`] if its
    /// bytes are not those that were committed.
    pub fn get(&self, cell: u32) -> Result<Option<Vec<u8>>, CollectionError> {
        let (at, line) = self.line(cell)?;
        // Acquire: pairs with the commit; the bytes are visible.
        if load64(&line.commit, Ordering::Acquire) == 0 {
            return Ok(None);
        }
        let damaged = |detail| CollectionError::Damaged {
            what: "committed result",
            at,
            detail,
        };
        let len = load64(&line.len, Ordering::Relaxed);
        if len > self.spec.bytes.into() {
            return Err(damaged("it is longer than its cell"));
        }
        let mut bytes = vec![0; len as usize];
        self.memory.copy_out(at + BYTES_AT, &mut bytes)?;
        if mix_bytes(&bytes) != load64(&line.sum, Ordering::Relaxed) {
            return Err(damaged("its checksum is wrong"));
        }
        Ok(Some(bytes))
    }

    /// The committed results with the numbers of their cells.
    pub fn iter(&self) -> impl Iterator<Item = Result<(u32, Vec<u8>), CollectionError>> + use<'m> {
        let table = *self;
        (0..self.spec.cells)
            .filter_map(move |cell| Some(table.get(cell).transpose()?.map(|bytes| (cell, bytes))))
    }

    /// How far the table is.
    ///
    /// # Errors
    /// [`CollectionError::Memory`].
    pub fn progress(&self) -> Result<TableProgress, CollectionError> {
        let mut done = 0;
        for cell in 0..self.spec.cells {
            done += u32::from(load64(&self.line(cell)?.1.commit, Ordering::Acquire) != 0);
        }
        let cells = self.spec.cells;
        Ok(TableProgress { done, cells })
    }

    fn line(&self, cell: u32) -> Result<(u64, &'m CellLine), CollectionError> {
        if cell >= self.spec.cells {
            return Err(CollectionError::Spec {
                what: "the number of a cell",
                value: cell.into(),
                allowed: "below the number of cells",
            });
        }
        let at = self.at + HEADER + u64::from(cell) * self.spec.stride();
        Ok((at, self.memory.get(at)?))
    }
}

const BYTES_AT: u64 = size_of::<CellLine>() as u64;

impl Claimed<'_> {
    /// The number of the cell.
    pub fn cell(&self) -> u32 {
        self.cell
    }

    /// Commits the result; it never changes again.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if it is too long (the cell is given back);
    /// [`CollectionError::Lost`] if the caller was declared dead and another claimed the cell.
    pub fn commit(self, result: &[u8]) -> Result<(), CollectionError> {
        let (at, line) = self.table.line(self.cell)?;
        if result.len() as u64 > self.table.spec.bytes.into() {
            return Err(CollectionError::Spec {
                what: "the length of a result",
                value: result.len() as u64,
                allowed: "what the table was created for",
            });
        }
        // An instance that is declared dead although it runs is a mistake of whoever judges.
        // This finds most of them, before they write over another's bytes.
        if load64(&line.claim, Ordering::Acquire) != self.me.word()
            || load64(&line.commit, Ordering::Acquire) != 0
        {
            return Err(CollectionError::Lost(self.me));
        }
        self.table.memory.copy_in(at + BYTES_AT, result)?;
        fill64(&line.len, result.len() as u64);
        fill64(&line.sum, mix_bytes(result));
        // The commit. AcqRel: publishes the bytes.
        cas64(&line.commit, 0, self.me.word(), Ordering::AcqRel)
            .map_err(|_| CollectionError::Lost(self.me))?;
        Ok(())
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if let Ok((_, line)) = self.table.line(self.cell)
            && load64(&line.commit, Ordering::Relaxed) == 0
        {
            // AcqRel: the next claimer's stores come after the caller's.
            let _ = cas64(&line.claim, self.me.word(), 0, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
#[path = "table_test.rs"]
mod table_test;
