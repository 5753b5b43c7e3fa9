//! One atomic change of several words of pod memory: a redo log.
//!
//! A [`Log`] belongs to one owner at a time and holds one record. The owner says what it is about
//! to do, collects the new values of the words, and commits: from that one store on the change
//! has happened, whoever has to finish it. If the owner dies before it, nothing has.
//!
//! ```text
//!             begun = n                  committed = n            retired = n
//!  retired ---------------> open -----------------------> committed -----------> retired
//!  (n - 1)                   | dropped, or the owner dies     | the owner dies
//!                            v                                v
//!                        n never happens                  settle() applies the record (again)
//! ```
//!
//! * **Intent before action**: owner, kind and tag of a record, and which locks it wants and has,
//!   are in the log before anything is done, so that [`Log::last`] and [`Log::settle`] can say
//!   what a dead owner was doing and whether it happened (*detectability*).
//! * **After-images**: an entry is a word's offset and its new value, nothing relative; applying
//!   a record twice, or half and then whole, is the same as once.
//! * **Sequence numbers** never repeat in a log. The commit store carries the record's, so
//!   whatever an older commit left cannot validate a newer payload.
//! * **Sums** over all words of a record: a record is applied as a whole or refused by name.
//!
//! The words of a record are protected by recoverable locks that its owner holds from before it
//! reads them until [`Record::commit`] has returned. So whoever takes a dead owner's lock first
//! settles the dead owner's log and then declares the lock repaired; words that only the owner
//! uses need no lock. Readers without a lock see the words change one by one, in the order in
//! which they were first [`set`](Record::set).
//!
//! Sources: the redo log per node of the LUPIN paper (DIMES '24, section 3.6) with the usual
//! discipline of write-ahead logging; two alternating heads, so that not even the answer to "what
//! happened last" is ever half written, are this library's own.
//!
//! # Memory ordering
//! `begun`, `committed` and `retired` are stored with `Release`. Entries of a record are ordered
//! after `begun` of it and the words that it changes after `committed`, each by a `Release` fence:
//! on x86 all of this is what plain stores do, and only the compiler is bound.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::log::{Log, log_size};
//! use lupin::shm::{Access, Mapping};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! # file.set_len(4096)?;
//! let memory = Mapping::new(&file, 0, 4096, Access::ReadWrite)?;
//! let (me, log) = (InstanceId::new(1, 1), Log::new(&memory, 0, 4)?);
//! let (from, to) = (log_size(4), log_size(4) + 8);
//!
//! let mut record = log.begin(me, 1, 42)?;
//! record.set(from, record.get(from)?.wrapping_sub(10))?;
//! record.set(to, record.get(to)?.wrapping_add(10))?;
//! record.commit(0)?;
//!
//! let last = log.last()?;
//! assert!(last.happened && last.tag == 42 && last.owner == me);
//! # Ok(())
//! # }
//! ```

mod codec;
mod error;
mod outcome;

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use crate::mem::{fence, fill64, load64, store64};
use crate::shm::{Access, Mapping};
use codec::{
    BEGUN, COMMITTED, Intent, LENGTH, LOCK_NOTES, Mismatch, OWNER, PAYLOAD_SUM, RETIRED, Seal,
    State, entry, head_of, payload_sum,
};

pub(crate) use codec::checksum;
pub use codec::{MAX_ENTRIES, MAX_LOCKS, log_size};
pub use error::LogError;
pub use outcome::{LockNotes, Outcome};

/// The redo log of one owner, as a view of the memory in which it lies.
///
/// All-zero memory is an empty log. The view holds no state: any number of them may exist, but
/// only one instance at a time writes records, and only when that one is dead does somebody else
/// [`settle`](Self::settle) the log.
#[derive(Clone, Copy, Debug)]
pub struct Log<'m> {
    memory: &'m Mapping,
    words: &'m [AtomicU64],
    at: u64,
    entries: u32,
}

impl<'m> Log<'m> {
    /// The log at `at` (bytes from the start of the mapping, a multiple of 64) with room for
    /// `entries` words in a record. It takes [`log_size`]`(entries)` bytes.
    ///
    /// # Errors
    /// [`LogError::Entries`], [`LogError::Place`].
    pub fn new(memory: &'m Mapping, at: u64, entries: u32) -> Result<Self, LogError> {
        if entries == 0 || entries > MAX_ENTRIES {
            return Err(LogError::Entries(entries));
        }
        let size = log_size(entries);
        let place = LogError::Place {
            at,
            size,
            mapped: memory.len(),
        };
        if !at.is_multiple_of(64) {
            return Err(place);
        }
        let words = memory.get_slice(at, size / 8).map_err(|_| place)?;
        Ok(Self {
            memory,
            words,
            at,
            entries,
        })
    }

    /// Where the log begins, in bytes from the start of the mapping.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The most words that one record may change.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Begins a record of `owner`. `kind` says what is being done and `tag` which instance of it,
    /// in the caller's own numbers; both are told by the [`Outcome`].
    ///
    /// A record that was begun before and not committed never happens.
    ///
    /// # Errors
    /// [`LogError::Unsettled`] if a committed record is not applied yet, whosever it is;
    /// [`LogError::NoInstance`], [`LogError::ReadOnly`], [`LogError::Corrupt`].
    pub fn begin(self, owner: InstanceId, kind: u32, tag: u64) -> Result<Record<'m>, LogError> {
        if owner.id() == 0 || owner.generation() == 0 {
            return Err(LogError::NoInstance(owner));
        }
        self.writable()?;
        let state = self.state()?;
        if let State::Committed(seq) = state {
            let owner = self.intent(state)?.owner;
            return Err(LogError::Unsettled { owner, seq });
        }
        let seq = state.seq().checked_add(1).ok_or_else(|| {
            self.corrupt(Mismatch {
                word: BEGUN,
                field: "last sequence number",
            })
        })?;
        let intent = Intent {
            owner,
            seq,
            kind,
            tag,
            previous: load64(&self.words[RETIRED], Ordering::Relaxed),
        };
        // The head of the record before last, which nobody asks about any more.
        clear_locks(&self.words[head_of(seq)..]);
        let intent_sum = intent.write(self.words);
        // Release: whoever reads the number reads the head that goes with it.
        store64(&self.words[BEGUN], seq, Ordering::Release);
        // The entries that follow overwrite those of the record before: not until that one is
        // retired for everybody.
        fence(Ordering::Release);
        Ok(Record {
            log: self,
            intent,
            intent_sum,
            length: 0,
            filter: 0,
        })
    }

    /// Finishes what `owner` left: applies its record if it is committed, and otherwise says that
    /// it never happened. Idempotent; an owner that left nothing has the outcome of sequence
    /// number 0.
    ///
    /// Only for whoever may act in the place of `owner`: because it is dead and the caller holds
    /// the lock that it held as an orphan, or because it is the caller itself.
    ///
    /// # Errors
    /// [`LogError::Unsettled`] if the log holds a committed record of another owner that is not
    /// applied; [`LogError::Corrupt`], and then no word was changed; [`LogError::ReadOnly`].
    pub fn settle(self, owner: InstanceId) -> Result<Outcome, LogError> {
        let state = self.state()?;
        if state == State::Empty {
            return Ok(Outcome::nothing(owner));
        }
        let intent = self.intent(state)?;
        let is_committed = matches!(state, State::Committed(_));
        if intent.owner != owner {
            return match is_committed {
                true => Err(LogError::Unsettled {
                    owner: intent.owner,
                    seq: intent.seq,
                }),
                false => Ok(Outcome::nothing(owner)),
            };
        }
        if is_committed {
            self.writable()?;
            let seal = self.seal(&intent)?;
            let length = self.verify(&seal)?;
            self.apply(intent.seq, length)?;
        }
        self.last()
    }

    /// What became of the last record: of one that is not retired, what [`settle`](Self::settle)
    /// will make of it. The outcome of sequence number 0 if the log is empty.
    ///
    /// While the owner lives and writes this is a snapshot and may be [`LogError::Corrupt`].
    ///
    /// # Errors
    /// [`LogError::Corrupt`].
    pub fn last(self) -> Result<Outcome, LogError> {
        let state = self.state()?;
        let (happened, seq) = match state {
            State::Empty => return Ok(Outcome::nothing(InstanceId::NONE)),
            State::Open(seq) => (false, seq),
            State::Committed(seq) | State::Retired(seq) => (true, seq),
        };
        let intent = self.intent(state)?;
        let result = match happened {
            true => self.seal(&intent)?.result,
            false => 0,
        };
        Ok(Outcome {
            owner: intent.owner,
            seq,
            kind: intent.kind,
            tag: intent.tag,
            result,
            happened,
            locks: LockNotes::read(&self.words[head_of(seq) + LOCK_NOTES..]),
        })
    }

    /// Whose record was begun last; nobody's if none ever was. One load of a word that is not
    /// verified: for an owner that wants to know whether the log is still its own.
    ///
    /// # Errors
    /// [`LogError::Corrupt`].
    pub fn owner(self) -> Result<InstanceId, LogError> {
        Ok(match self.state()?.seq() {
            0 => InstanceId::NONE,
            seq => {
                let owner = &self.words[head_of(seq) + OWNER];
                InstanceId::from_word(load64(owner, Ordering::Relaxed))
            }
        })
    }

    fn state(&self) -> Result<State, LogError> {
        State::read(self.words).map_err(|mismatch| self.corrupt(mismatch))
    }

    fn intent(&self, state: State) -> Result<Intent, LogError> {
        Intent::read(self.words, state).map_err(|mismatch| self.corrupt(mismatch))
    }

    fn seal(&self, intent: &Intent) -> Result<Seal, LogError> {
        Seal::read(self.words, intent).map_err(|mismatch| self.corrupt(mismatch))
    }

    /// Checks the entries of a committed record, all of them before any is applied; returns how
    /// many there are.
    fn verify(&self, seal: &Seal) -> Result<usize, LogError> {
        let head = head_of(load64(&self.words[BEGUN], Ordering::Relaxed));
        let corrupt = |word, field| self.corrupt(Mismatch { word, field });
        if seal.length > self.entries.into() {
            return Err(corrupt(head + LENGTH, "length"));
        }
        let length = seal.length as usize;
        if payload_sum(self.words, length) != seal.payload_sum {
            return Err(corrupt(head + PAYLOAD_SUM, "payload sum"));
        }
        for n in 0..length {
            let at = load64(&self.words[entry(n)], Ordering::Relaxed);
            if self.target(at).is_err() {
                return Err(corrupt(entry(n), "entry's offset"));
            }
        }
        Ok(length)
    }

    /// Applies a committed record and retires it.
    fn apply(&self, seq: u64, length: usize) -> Result<(), LogError> {
        // No word changes before the commit that says so.
        fence(Ordering::Release);
        for pair in self.words[entry(0)..entry(length)].chunks_exact(2) {
            let at = load64(&pair[0], Ordering::Relaxed);
            let value = load64(&pair[1], Ordering::Relaxed);
            store64(self.target(at)?, value, Ordering::Relaxed);
        }
        // Release: once it is retired, the words have changed.
        store64(&self.words[RETIRED], seq, Ordering::Release);
        Ok(())
    }

    /// The word at `at`, if a record may hold it.
    #[inline]
    fn target(&self, at: u64) -> Result<&'m AtomicU64, LogError> {
        if at.wrapping_sub(self.at) < self.words.len() as u64 * 8 {
            return Err(not_a_target(at, "it lies in the log itself"));
        }
        match self.memory.get::<AtomicU64>(at) {
            Ok(word) => Ok(word),
            Err(_) => Err(not_a_target(at, "it is no aligned word inside the mapping")),
        }
    }

    fn writable(&self) -> Result<(), LogError> {
        match self.memory.access() {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(LogError::ReadOnly { at: self.at }),
        }
    }

    #[cold]
    fn corrupt(&self, mismatch: Mismatch) -> LogError {
        LogError::Corrupt {
            at: self.at + mismatch.word as u64 * 8,
            field: mismatch.field,
            found: load64(&self.words[mismatch.word], Ordering::Relaxed),
        }
    }
}

#[cold]
fn not_a_target(at: u64, why: &'static str) -> LogError {
    LogError::Target { at, why }
}

/// Forgets the locks that an earlier record noted in this head.
fn clear_locks(head: &[AtomicU64]) {
    let notes = &head[LOCK_NOTES..LOCK_NOTES + MAX_LOCKS];
    let used = notes
        .iter()
        .position(|note| load64(note, Ordering::Relaxed) == 0);
    // From the last to the first: a death in between leaves no note behind a gap, where the
    // next clearing would not look.
    for note in notes[..used.unwrap_or(MAX_LOCKS)].iter().rev() {
        fill64(note, 0);
    }
}

/// A record being written. Dropping it gives it up: nothing has happened then.
#[derive(Debug)]
#[must_use = "a record that is not committed never happens"]
pub struct Record<'m> {
    log: Log<'m>,
    intent: Intent,
    intent_sum: u64,
    length: usize,
    /// One bit for each offset that was set: most words are not in the record, and the bit says
    /// so without a search.
    filter: u64,
}

impl Record<'_> {
    /// Its sequence number, never used before in this log.
    pub fn seq(&self) -> u64 {
        self.intent.seq
    }

    /// Whose record it is.
    pub fn owner(&self) -> InstanceId {
        self.intent.owner
    }

    /// How many more words it can change.
    pub fn room(&self) -> u32 {
        self.log.entries - self.length as u32
    }

    /// Notes that the owner is about to acquire the lock at offset `lock`: before it does.
    ///
    /// Notes are for people and for tests; recovery goes by the lock's own words. Of more than
    /// [`MAX_LOCKS`] locks the last place says that there were more.
    pub fn intend(&mut self, lock: u64) {
        self.note(lock, lock & !1);
    }

    /// Notes that the owner has acquired the lock at offset `lock`.
    pub fn held(&mut self, lock: u64) {
        self.note(lock, lock | 1);
    }

    fn note(&self, lock: u64, note: u64) {
        let notes = &self.log.words[head_of(self.seq()) + LOCK_NOTES..][..MAX_LOCKS];
        let place = notes.iter().find(|place| {
            let found = load64(place, Ordering::Relaxed);
            found == 0 || found & !1 == lock & !1
        });
        match place {
            Some(place) => fill64(place, note),
            None => fill64(&notes[MAX_LOCKS - 1], LockNotes::MORE),
        }
        // The note before the acquisition that follows it.
        fence(Ordering::Release);
    }

    /// The word at offset `at`, as it will be once the record is applied.
    ///
    /// # Errors
    /// [`LogError::Target`].
    #[inline]
    pub fn get(&self, at: u64) -> Result<u64, LogError> {
        if let Some(entry) = self.find(at) {
            return Ok(load64(&entry[1], Ordering::Relaxed));
        }
        // Acquire: the word may be the offset of a block that somebody else filled.
        Ok(load64(self.log.target(at)?, Ordering::Acquire))
    }

    /// Changes the word at offset `at` to `value`, once the record is committed.
    ///
    /// # Errors
    /// [`LogError::Target`], [`LogError::Full`]. The record is as it was and may be used on.
    #[inline]
    pub fn set(&mut self, at: u64, value: u64) -> Result<(), LogError> {
        if let Some(entry) = self.find(at) {
            fill64(&entry[1], value);
            return Ok(());
        }
        self.log.target(at)?;
        let entries = self.log.entries;
        if self.length == entries as usize {
            return Err(LogError::Full { entries });
        }
        let words = &self.log.words[entry(self.length)..];
        fill64(&words[0], at);
        fill64(&words[1], value);
        self.length += 1;
        self.filter |= filter_bit(at);
        Ok(())
    }

    /// Commits the record: all its words change, or, if the owner dies in here, all or none of
    /// them once the log is settled. `result` is kept for the [`Outcome`].
    ///
    /// # Errors
    /// [`LogError::Corrupt`] if somebody else wrote into the log meanwhile.
    pub fn commit(self, result: u64) -> Result<(), LogError> {
        let log = self.log;
        let seal = Seal {
            result,
            length: self.length as u64,
            payload_sum: payload_sum(log.words, self.length),
        };
        seal.write(log.words, self.seq(), self.intent_sum);
        // The commit point. Release: whoever reads the number reads the whole record.
        store64(&log.words[COMMITTED], self.seq(), Ordering::Release);
        log.apply(self.seq(), self.length)
    }

    /// The entry for offset `at`.
    #[inline]
    fn find(&self, at: u64) -> Option<&[AtomicU64]> {
        if self.filter & filter_bit(at) == 0 {
            return None;
        }
        self.log.words[entry(0)..entry(self.length)]
            .chunks_exact(2)
            .find(|pair| load64(&pair[0], Ordering::Relaxed) == at)
    }
}

#[inline]
fn filter_bit(at: u64) -> u64 {
    1 << ((at >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

#[cfg(test)]
#[path = "log_test.rs"]
mod log_test;
