//! An append log: records of any length, in one order that all readers see.
//!
//! A record begins with its *head*, one word that is written three times at most and never goes
//! back:
//!
//! ```text
//!   0 --CAS--> reserved(appender, length) --CAS--> committed       (the record is there)
//!                        |
//!                        +-- its appender died --CAS by anybody--> hole   (skipped for ever)
//! ```
//!
//! Since the head carries the length, whoever meets a record knows where the next one begins,
//! whatever became of its appender: nobody waits in order to append. Reading goes up to the first
//! record that a living appender still fills, so that all readers see the same sequence, and
//! never half a record.
//!
//! The head names an appender's *place*, and the place is a recoverable lock that its instance
//! holds for life. Before it reserves, an appender notes the position in its place; whoever takes
//! a dead one's place first makes a hole of what that one had reserved. So a reserved head belongs
//! to whoever holds the place, at any time.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::collections::{Journal, JournalSpec};
//! use lupin::shm::{Access, Mapping};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(1 << 16)?;
//! let memory = Mapping::new(&file, 0, 1 << 16, Access::ReadWrite)?;
//! let everybody_lives = |instance: InstanceId| !instance.is_none();
//! let me = InstanceId::new(1, 1);
//! let spec = JournalSpec { appenders: 4, bytes: 4096 };
//! let journal = Journal::create(&memory, 0, &spec, me, &everybody_lives)?;
//!
//! let mut appender = journal.join(me, &everybody_lives)?;
//! appender.append(1, b"first")?;
//! appender.append(2, b"and second")?;
//! for record in journal.records(&everybody_lives) {
//!     let record = record?;
//!     println!("{} {} {:?}", record.author, record.tag, record.bytes);
//! }
//! # assert_eq!(journal.records(&everybody_lives).count(), 2);
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use lupin_abi::InstanceId;
use lupin_abi::system::LockWords;

use super::CollectionError;
use super::region::{self, HEADER, Header, Kind};
use crate::liveness::Liveness;
use crate::lock::{Acquired, LockError, LockGuard, RecoverableLock};
use crate::mem::{cas64, fill64, load64};
use crate::shm::{Access, Mapping};

const KIND: Kind = Kind {
    magic: u64::from_le_bytes(*b"LUPINJNL"),
    name: "journal",
};
/// Bytes of an appender's place: its lock, and a line with the position that it reserves.
const PLACE: u64 = 128;
/// Bytes before a record's own: head, author, tag.
const RECORD: u64 = 24;

/// What a journal consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalSpec {
    /// Appenders at a time, `1..=65536`.
    pub appenders: u32,
    /// Bytes for records, each of which takes 24 more than its own and is rounded up to 8.
    pub bytes: u64,
}

impl JournalSpec {
    /// Bytes of shared memory that the journal takes.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] if a number is out of range.
    pub fn size(&self) -> Result<u64, CollectionError> {
        let error = |what, value, allowed| CollectionError::Spec {
            what,
            value,
            allowed,
        };
        if self.appenders == 0 || self.appenders > 1 << 16 {
            let value = self.appenders.into();
            return Err(error("number of appenders", value, "1..=65536"));
        }
        if self.bytes < RECORD || self.bytes > 1 << 46 || !self.bytes.is_multiple_of(8) {
            let allowed = "multiples of 8 in 24..=2^46";
            return Err(error("bytes for records", self.bytes, allowed));
        }
        Ok((self.data() + self.bytes).next_multiple_of(64))
    }

    fn data(&self) -> u64 {
        HEADER + u64::from(self.appenders) * PLACE
    }
}

/// A journal in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Journal<'m> {
    memory: &'m Mapping,
    at: u64,
    spec: JournalSpec,
}

/// The right to append. Dropping it gives the place back.
#[derive(Debug)]
pub struct Appender<'m> {
    journal: Journal<'m>,
    place: u32,
    me: InstanceId,
    /// Held for life; see the module documentation.
    _place: LockGuard<'m>,
}

/// A record that the caller fills. Dropping it without a commit leaves a hole.
#[derive(Debug)]
#[must_use = "dropping it leaves a hole"]
pub struct Reservation<'a, 'm> {
    appender: &'a mut Appender<'m>,
    head: Head,
    position: u64,
}

/// A record that was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalRecord {
    /// Where it lies, in bytes from the first record; its name for ever.
    pub position: u64,
    /// Who appended it.
    pub author: InstanceId,
    /// The author's number for it.
    pub tag: u64,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// What a journal holds, for people and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalAudit {
    /// Records that are committed.
    pub records: u64,
    /// Places that were reserved and will never be committed.
    pub holes: u64,
    /// Places that somebody alive fills.
    pub filling: u64,
    /// Bytes taken by all of them.
    pub used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reserved = 1,
    Committed = 2,
    Hole = 3,
}

/// The head of a record: length in bits 0..32, the appender's place in 32..48, state in 56..64.
#[derive(Clone, Copy, Debug)]
struct Head {
    state: State,
    place: u32,
    len: u32,
}

impl Head {
    fn word(self) -> u64 {
        (self.state as u64) << 56 | u64::from(self.place) << 32 | u64::from(self.len)
    }

    fn from_word(word: u64) -> Option<Self> {
        let state = match word >> 48 {
            0x100 => State::Reserved,
            0x200 => State::Committed,
            0x300 => State::Hole,
            _ => return None,
        };
        let (place, len) = ((word >> 32) as u32 & 0xffff, word as u32);
        Some(Self { state, place, len })
    }

    fn with(self, state: State) -> Self {
        Self { state, ..self }
    }

    /// Bytes from this record to the next.
    fn extent(self) -> u64 {
        RECORD + u64::from(self.len).next_multiple_of(8)
    }
}

impl<'m> Journal<'m> {
    /// Creates an empty journal at `at` (a multiple of 64) in all-zero memory, or takes over from
    /// a creator that died.
    ///
    /// # Errors
    /// [`CollectionError::Exists`], [`CollectionError::BeingCreated`] (by somebody alive),
    /// [`CollectionError::NotThis`], [`CollectionError::TooSmall`], [`CollectionError::Spec`].
    pub fn create<J: Liveness>(
        memory: &'m Mapping,
        at: u64,
        spec: &JournalSpec,
        me: InstanceId,
        judge: &J,
    ) -> Result<Self, CollectionError> {
        let fields = [spec.appenders.into(), spec.bytes, 0, 0];
        region::create(memory, (at, spec.size()?), &KIND, fields, (me, judge))?;
        let spec = *spec;
        Ok(Self { memory, at, spec })
    }

    /// Opens the journal at `at`; waits up to `patience` for one that is not there yet.
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
        let [appenders, bytes, ..] = region::open(memory, at, &KIND, judge, patience)?;
        let appenders = u32::try_from(appenders).unwrap_or(0);
        let spec = JournalSpec { appenders, bytes };
        region::check_size(memory, at, spec.size()?)?;
        Ok(Self { memory, at, spec })
    }

    /// What the journal consists of.
    pub fn spec(&self) -> JournalSpec {
        self.spec
    }

    /// Takes a place as appender: a free one, or a dead one's, whose unfinished record becomes a
    /// hole.
    ///
    /// # Errors
    /// [`CollectionError::Full`] if all places are held by others that live.
    pub fn join<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Appender<'m>, CollectionError> {
        for place in 0..self.spec.appenders {
            let guard = match RecoverableLock::new(self.lock(place)?).try_lock(me, judge) {
                Ok(Acquired::Clean(guard)) => guard,
                Ok(Acquired::Orphaned(orphan)) => {
                    self.abandon(place)?;
                    orphan.repaired()?
                }
                Err(LockError::Timeout { .. } | LockError::Deadlock(_)) => continue,
                Err(error) => return Err(error.into()),
            };
            return Ok(Appender {
                journal: *self,
                place,
                me,
                _place: guard,
            });
        }
        Err(CollectionError::Full {
            what: "appender",
            capacity: self.spec.appenders.into(),
        })
    }

    /// The records from the first on. See [`Records`].
    pub fn records<'j, J: Liveness>(&self, judge: &'j J) -> Records<'m, 'j, J> {
        self.records_from(0, judge)
    }

    /// The records from a position on, which is 0, that of a record, or
    /// [`Records::position`].
    pub fn records_from<'j, J: Liveness>(&self, position: u64, judge: &'j J) -> Records<'m, 'j, J> {
        Records {
            journal: *self,
            position,
            judge,
            is_broken: false,
        }
    }

    /// The position of the record that `author` appended with `tag`, if it was committed. For
    /// whoever has to know what a dead one got done; looks at every record.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`].
    pub fn find<J: Liveness>(
        &self,
        author: InstanceId,
        tag: u64,
        judge: &J,
    ) -> Result<Option<u64>, CollectionError> {
        for record in self.records(judge) {
            let record = record?;
            if (record.author, record.tag) == (author, tag) {
                return Ok(Some(record.position));
            }
        }
        Ok(None)
    }

    /// Counts what is in the journal, beyond what readers see as well.
    ///
    /// # Errors
    /// [`CollectionError::Damaged`].
    pub fn audit(&self) -> Result<JournalAudit, CollectionError> {
        let mut audit = JournalAudit::default();
        while let Some((head, _)) = self.head(audit.used)? {
            match head.state {
                State::Reserved => audit.filling += 1,
                State::Committed => audit.records += 1,
                State::Hole => audit.holes += 1,
            }
            audit.used += head.extent();
        }
        Ok(audit)
    }

    fn lock(&self, place: u32) -> Result<&'m LockWords, CollectionError> {
        let at = self.at + HEADER + u64::from(place) * PLACE;
        Ok(self.memory.get(at)?)
    }

    /// One more than the position that the holder of a place reserves or did; 0 if it never did.
    fn pending(&self, place: u32) -> Result<&'m AtomicU64, CollectionError> {
        let at = self.at + HEADER + u64::from(place) * PLACE + size_of::<LockWords>() as u64;
        Ok(self.memory.get(at)?)
    }

    fn word(&self, position: u64) -> Result<&'m AtomicU64, CollectionError> {
        Ok(self.memory.get(self.at + self.spec.data() + position)?)
    }

    /// The record at a position; `None` where none was reserved yet.
    fn head(&self, position: u64) -> Result<Option<(Head, &'m AtomicU64)>, CollectionError> {
        let damaged = |detail| CollectionError::Damaged {
            what: "journal record",
            at: self.at + self.spec.data() + position,
            detail,
        };
        match self.spec.bytes.checked_sub(position) {
            None => return Err(damaged("it begins beyond the end of the journal")),
            Some(left) if left < RECORD => return Ok(None),
            Some(_) => {}
        }
        let cell = self.word(position)?;
        // Acquire: pairs with the commit, and with the reservation for who holds the place.
        let word = load64(cell, Ordering::Acquire);
        if word == 0 {
            return Ok(None);
        }
        let head = Head::from_word(word).ok_or_else(|| damaged("its head is no head"))?;
        if head.place >= self.spec.appenders {
            return Err(damaged("its appender's place does not exist"));
        }
        if head.extent() > self.spec.bytes - position {
            return Err(damaged("it ends beyond the end of the journal"));
        }
        Ok(Some((head, cell)))
    }

    /// Makes a hole of what the holder of a place has reserved and not committed. For whoever
    /// holds the place, or repairs it.
    fn abandon(&self, place: u32) -> Result<(), CollectionError> {
        let pending = load64(self.pending(place)?, Ordering::Acquire);
        let Some(position) = pending.checked_sub(1) else {
            return Ok(());
        };
        // The position was noted before the attempt, so another may have won it.
        if let Some((head, cell)) = self.head(position)?
            && head.place == place
            && head.state == State::Reserved
        {
            let _ = cas64(
                cell,
                head.word(),
                head.with(State::Hole).word(),
                Ordering::AcqRel,
            );
        }
        Ok(())
    }
}

impl<'m> Appender<'m> {
    /// Who appends.
    pub fn instance(&self) -> InstanceId {
        self.me
    }

    /// Appends a record; `tag` is the author's number for it, if it wants one. Returns its
    /// position.
    ///
    /// # Errors
    /// Those of [`reserve`](Self::reserve).
    pub fn append(&mut self, tag: u64, bytes: &[u8]) -> Result<u64, CollectionError> {
        let mut reservation = self.reserve(tag, bytes.len())?;
        reservation.write(0, bytes)?;
        reservation.commit()
    }

    /// Takes the next `len` bytes of the journal for a record.
    ///
    /// # Errors
    /// [`CollectionError::Full`], [`CollectionError::Spec`] above 2^32 - 1 bytes,
    /// [`CollectionError::Damaged`].
    pub fn reserve(
        &mut self,
        tag: u64,
        len: usize,
    ) -> Result<Reservation<'_, 'm>, CollectionError> {
        let len = u32::try_from(len).map_err(|_| CollectionError::Spec {
            what: "the length of a record",
            value: len as u64,
            allowed: "0..2^32",
        })?;
        let journal = self.journal;
        // A reservation that was leaked.
        journal.abandon(self.place)?;
        let head = Head {
            state: State::Reserved,
            place: self.place,
            len,
        };
        let header: &Header = journal.memory.get(journal.at)?;
        let hint = load64(&header.hint, Ordering::Acquire);
        let mut position = hint;
        loop {
            if let Some((other, _)) = journal.head(position)? {
                position += other.extent();
                continue;
            }
            if position + head.extent() > journal.spec.bytes {
                return Err(CollectionError::Full {
                    what: "journal record",
                    capacity: journal.spec.bytes,
                });
            }
            // Before the swap, which orders it: a reservation is never without its note.
            fill64(journal.pending(self.place)?, position + 1);
            let cell = journal.word(position)?;
            if cas64(cell, 0, head.word(), Ordering::AcqRel).is_ok() {
                break;
            }
        }
        // A hint: from here on there is a head wherever the next appender looks first.
        let _ = cas64(
            &header.hint,
            hint,
            position + head.extent(),
            Ordering::AcqRel,
        );
        fill64(journal.word(position + 8)?, self.me.word());
        fill64(journal.word(position + 16)?, tag);
        Ok(Reservation {
            appender: self,
            head,
            position,
        })
    }
}

impl Drop for Appender<'_> {
    fn drop(&mut self) {
        // Before the place is given back, right after this.
        let _ = self.journal.abandon(self.place);
    }
}

impl Reservation<'_, '_> {
    /// Copies bytes into the record, from `offset` on.
    ///
    /// # Errors
    /// [`CollectionError::Spec`] beyond the end of the record; nothing is copied then.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), CollectionError> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.head.len.into()) {
            return Err(CollectionError::Spec {
                what: "the end of a copy into a record",
                value: end.unwrap_or(u64::MAX),
                allowed: "up to the length of the record",
            });
        }
        let journal = &self.appender.journal;
        let at = journal.at + journal.spec.data() + self.position + RECORD + offset;
        Ok(journal.memory.copy_in(at, bytes)?)
    }

    /// Shows the record to readers. Returns its position.
    ///
    /// # Errors
    /// [`CollectionError::Lost`] if the caller was declared dead and the record is a hole.
    pub fn commit(self) -> Result<u64, CollectionError> {
        let cell = self.appender.journal.word(self.position)?;
        let committed = self.head.with(State::Committed).word();
        // The commit. AcqRel: publishes the bytes.
        cas64(cell, self.head.word(), committed, Ordering::AcqRel)
            .map_err(|_| CollectionError::Lost(self.appender.me))?;
        Ok(self.position)
    }
}

impl Drop for Reservation<'_, '_> {
    fn drop(&mut self) {
        // Does nothing to a record that is committed.
        let _ = self.appender.journal.abandon(self.appender.place);
    }
}

/// Reads a journal in order.
///
/// It ends before the first record that a living appender fills, and at the end of the journal;
/// asked again later it goes on from there. It makes a hole of each record whose appender died
/// (over a read-only mapping it just skips it: nobody can commit such a record any more).
#[derive(Debug)]
pub struct Records<'m, 'j, J> {
    journal: Journal<'m>,
    position: u64,
    judge: &'j J,
    is_broken: bool,
}

impl<J: Liveness> Records<'_, '_, J> {
    /// Where it goes on.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn advance(&mut self) -> Result<Option<JournalRecord>, CollectionError> {
        while let Some((head, cell)) = self.journal.head(self.position)? {
            match head.state {
                State::Committed => return Ok(Some(self.read(head)?)),
                State::Hole => self.position += head.extent(),
                State::Reserved => {
                    // Read after the head: whoever reserved it had the place before, and a
                    // successor in the place makes a hole of it before it gets the place.
                    let owner = load64(&self.journal.lock(head.place)?.owner, Ordering::Acquire);
                    let owner = InstanceId::from_word(owner);
                    if !owner.is_none() && self.judge.is_alive(owner) {
                        // Unless it was finished, and the place changed hands, in between.
                        if load64(cell, Ordering::Acquire) == head.word() {
                            return Ok(None);
                        }
                        continue;
                    }
                    if self.journal.memory.access() == Access::ReadWrite {
                        let hole = head.with(State::Hole).word();
                        let _ = cas64(cell, head.word(), hole, Ordering::AcqRel);
                    } else if load64(cell, Ordering::Acquire) == head.word() {
                        self.position += head.extent();
                    }
                }
            }
        }
        Ok(None)
    }

    fn read(&mut self, head: Head) -> Result<JournalRecord, CollectionError> {
        let (journal, position) = (&self.journal, self.position);
        let author = load64(journal.word(position + 8)?, Ordering::Relaxed);
        let tag = load64(journal.word(position + 16)?, Ordering::Relaxed);
        let mut bytes = vec![0; head.len as usize];
        let at = journal.at + journal.spec.data() + position + RECORD;
        journal.memory.copy_out(at, &mut bytes)?;
        self.position += head.extent();
        Ok(JournalRecord {
            position,
            author: InstanceId::from_word(author),
            tag,
            bytes,
        })
    }
}

impl<J: Liveness> Iterator for Records<'_, '_, J> {
    type Item = Result<JournalRecord, CollectionError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_broken {
            return None;
        }
        let result = self.advance().transpose();
        self.is_broken = matches!(result, Some(Err(_)));
        result
    }
}

#[cfg(test)]
#[path = "journal_test.rs"]
mod journal_test;
