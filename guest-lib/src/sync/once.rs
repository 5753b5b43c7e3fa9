//! A value that one instance computes and all others use, also if the one dies while computing.
//!
//! One word decides:
//!
//! ```text
//!             CAS 0 -> a                    CAS a -> ready (Release)
//!    empty ----------------> a computes -------------------------------> ready, for ever
//!      ^                       |    | a dies
//!      |  a's computation      |    v
//!      +---------- fails ------+   CAS a -> b: b computes
//! ```
//!
//! The value is a range of words that only the computing instance fills; the `Release` of the
//! last step publishes them, and an `Acquire` load of the state finds them. Whoever comes while
//! another computes sleeps, asks the judge, and takes over from a dead one: there is no state in
//! which a death leaves the others waiting.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::sync::once::{OnceCell, OnceError, OnceWords};
//!
//! # fn main() -> Result<(), OnceError> {
//! // In a segment, as a field of a struct there; its users are threads of several nodes.
//! let words = OnceWords::<2>::default();
//! let (me, all_live) = (InstanceId::new(1, 1), |_: InstanceId| true);
//!
//! let bounds = OnceCell::new(&words);
//! assert!(bounds.get().is_none());
//! let value = bounds.get_or_init(me, &all_live, |filler| {
//!     filler.set(0, 17);
//!     filler.set(1, 42);
//!     Ok::<_, OnceError>(())
//! })?;
//! assert!(value.iter().eq([17, 42]));
//! assert_eq!(bounds.get().map(|value| value.get(1)), Some(42));
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::{Sleepers, is_instance, wait_until};
use crate::liveness::Liveness;
use crate::mem::{cas64, fill64, load64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::{Mapping, ShmError};
use crate::wait::{Bell, deadline_after};

/// The state of a published value. No instance: its id is 0.
const READY: u64 = 1;

/// Why there is no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OnceError {
    /// Somebody alive was computing it all the time.
    #[error("{computing} was computing the value for all of {waited:?}")]
    Timeout {
        /// Who computes.
        computing: InstanceId,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The caller is computing it already.
    #[error(
        "{0} is computing this value already: either its computation asks for its own result, or \
         an earlier process of the same instance left it, which resolve_own() clears"
    )]
    Deadlock(InstanceId),
    /// The instance that asks is no instance.
    #[error("{0} cannot compute a value for others")]
    NoInstance(InstanceId),
    /// The caller was declared dead while it computed, and somebody took over.
    #[error("the computation was taken over from {0}, which had been declared dead")]
    Lost(InstanceId),
}

/// The part of a once-cell in pod memory before its value. All zero at first.
#[derive(Debug, Default)]
#[repr(C)]
pub struct OnceHeader {
    /// 0, the [`InstanceId`] that computes, or [`READY`].
    state: AtomicU64,
    /// Futex word of sleepers; its value means nothing.
    wake: AtomicU32,
    /// Of which nodes somebody may sleep. A hint.
    sleepers: AtomicU32,
}

/// A once-cell with a value of `WORDS` words in pod memory. All zero bytes: empty.
#[derive(Debug)]
#[repr(C)]
pub struct OnceWords<const WORDS: usize> {
    header: OnceHeader,
    value: [AtomicU64; WORDS],
}

impl OnceHeader {
    fn bell(&self) -> Bell<'_> {
        Bell {
            classes: &self.sleepers,
            word: &self.wake,
        }
    }
}

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for OnceHeader {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for OnceHeader {}
// SAFETY: `repr(C)`, two fields of atomics, both of alignment 8.
unsafe impl<const WORDS: usize> PodSafe for OnceWords<WORDS> {}
// SAFETY: all its fields are atomics.
unsafe impl<const WORDS: usize> PodShared for OnceWords<WORDS> {}

impl<const WORDS: usize> Default for OnceWords<WORDS> {
    fn default() -> Self {
        Self {
            header: OnceHeader::default(),
            value: [const { AtomicU64::new(0) }; WORDS],
        }
    }
}

/// A once-cell over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct OnceCell<'a> {
    header: &'a OnceHeader,
    value: &'a [AtomicU64],
}

impl<'a> OnceCell<'a> {
    /// The once-cell in `words`.
    pub const fn new<const WORDS: usize>(words: &'a OnceWords<WORDS>) -> Self {
        Self {
            header: &words.header,
            value: &words.value,
        }
    }

    /// The once-cell with a value of `words` words at `offset` of `memory`, laid out as
    /// [`OnceWords`]. All its users pass the same number.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`] (to 8 bytes).
    pub fn at(memory: &'a Mapping, offset: u64, words: u32) -> Result<Self, ShmError> {
        let header: &OnceHeader = memory.get(offset)?;
        // No overflow: the header was found inside of the mapping.
        let value = offset + size_of::<OnceHeader>() as u64;
        Ok(Self {
            header,
            value: memory.get_slice(value, words.into())?,
        })
    }

    /// The value, if it is there. One load.
    pub fn get(&self) -> Option<OnceValue<'a>> {
        // Acquire: pairs with the Release that published the words.
        (load64(&self.header.state, Ordering::Acquire) == READY)
            .then_some(OnceValue { words: self.value })
    }

    /// The value; computed by `init` if it is not there and nobody alive computes it, else waited
    /// for.
    ///
    /// `init` fills the words. It may run although another began before: that one died, or its
    /// `init` failed. So it must be right to run it again.
    ///
    /// # Errors
    /// Those of `init`, after which the cell is empty again; [`OnceError::Deadlock`],
    /// [`OnceError::NoInstance`], [`OnceError::Lost`].
    pub fn get_or_init<J: Liveness, E: From<OnceError>>(
        &self,
        me: InstanceId,
        judge: &J,
        init: impl FnOnce(&mut Filler<'a>) -> Result<(), E>,
    ) -> Result<OnceValue<'a>, E> {
        self.wait(me, judge, None, init)
    }

    /// As [`get_or_init`](Self::get_or_init); waits for another's computation at most `timeout`.
    ///
    /// # Errors
    /// Also [`OnceError::Timeout`].
    pub fn get_or_init_timeout<J: Liveness, E: From<OnceError>>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Duration,
        init: impl FnOnce(&mut Filler<'a>) -> Result<(), E>,
    ) -> Result<OnceValue<'a>, E> {
        self.wait(me, judge, Some(timeout), init)
    }

    /// Clears a computation that an earlier process of this same instance began; whether there
    /// was one.
    ///
    /// For a singleton (the agent of a node) that was started again within one life of its
    /// instance: everybody else takes the instance for alive and waits.
    pub fn resolve_own(&self, me: InstanceId) -> bool {
        let cleared =
            is_instance(me) && cas64(&self.header.state, me.word(), 0, Ordering::AcqRel).is_ok();
        if cleared {
            self.header.bell().ring();
        }
        cleared
    }

    /// Who computes the value, dead or alive. A snapshot for people.
    pub fn computing(&self) -> Option<InstanceId> {
        match load64(&self.header.state, Ordering::Acquire) {
            0 | READY => None,
            word => Some(InstanceId::from_word(word)),
        }
    }

    fn wait<J: Liveness, E: From<OnceError>>(
        &self,
        me: InstanceId,
        judge: &J,
        timeout: Option<Duration>,
        init: impl FnOnce(&mut Filler<'a>) -> Result<(), E>,
    ) -> Result<OnceValue<'a>, E> {
        if let Some(value) = self.get() {
            return Ok(value);
        }
        if !is_instance(me) {
            return Err(OnceError::NoInstance(me).into());
        }
        let start = Instant::now();
        let found = match self.look(me, judge)? {
            None if timeout.is_some_and(|timeout| timeout.is_zero()) => None,
            None => wait_until(
                &Sleepers::Bell(self.header.bell()),
                timeout.map(deadline_after),
                |_| self.look(me, judge),
            )?,
            found => found,
        };
        match found {
            Some(Found::Ready(value)) => Ok(value),
            Some(Found::Mine(computation)) => computation.run(init),
            None => Err(OnceError::Timeout {
                computing: self.computing().unwrap_or(InstanceId::NONE),
                waited: start.elapsed(),
            }
            .into()),
        }
    }

    /// The value, or the right to compute it.
    fn look<J: Liveness>(&self, me: InstanceId, judge: &J) -> Result<Option<Found<'a>>, OnceError> {
        // Acquire: the words of the value, or the tables by which its computer is judged.
        let state = load64(&self.header.state, Ordering::Acquire);
        if state == READY {
            return Ok(Some(Found::Ready(OnceValue { words: self.value })));
        }
        let computing = InstanceId::from_word(state);
        if computing == me {
            return Err(OnceError::Deadlock(me));
        }
        if state != 0 && judge.is_alive(computing) {
            return Ok(None);
        }
        // Acquire: what those before stored to the words does not come after what this one does.
        let mine = cas64(&self.header.state, state, me.word(), Ordering::AcqRel);
        Ok(mine.ok().map(|_| {
            Found::Mine(Computation {
                cell: *self,
                me,
                previous: (state != 0).then_some(computing),
            })
        }))
    }
}

enum Found<'a> {
    Ready(OnceValue<'a>),
    Mine(Computation<'a>),
}

/// The caller is the one that computes. Dropped, by an error or a panic of the computation, the
/// cell is empty again.
struct Computation<'a> {
    cell: OnceCell<'a>,
    me: InstanceId,
    previous: Option<InstanceId>,
}

impl<'a> Computation<'a> {
    fn run<E: From<OnceError>>(
        self,
        init: impl FnOnce(&mut Filler<'a>) -> Result<(), E>,
    ) -> Result<OnceValue<'a>, E> {
        let words = self.cell.value;
        init(&mut Filler {
            words,
            previous: self.previous,
        })?;
        let header = self.cell.header;
        // Release: publishes the words. A swap: an instance declared dead must not publish what
        // another is filling.
        let published = cas64(&header.state, self.me.word(), READY, Ordering::AcqRel);
        let me = self.me;
        // The destructor finds that the state is no longer this instance's, and wakes all.
        drop(self);
        match published {
            Ok(_) => Ok(OnceValue { words }),
            Err(_) => Err(OnceError::Lost(me).into()),
        }
    }
}

impl Drop for Computation<'_> {
    fn drop(&mut self) {
        let header = self.cell.header;
        // Release: the next computation comes after what this one stored.
        let _ = cas64(&header.state, self.me.word(), 0, Ordering::AcqRel);
        header.bell().ring();
    }
}

/// The words of a value that is being computed.
#[derive(Debug)]
pub struct Filler<'a> {
    words: &'a [AtomicU64],
    previous: Option<InstanceId>,
}

impl Filler<'_> {
    /// The dead instance from which the computation was taken over.
    pub const fn previous(&self) -> Option<InstanceId> {
        self.previous
    }

    /// How many words the value has.
    pub const fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether the value has no words: it only says that something was done.
    pub const fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Word `index`: 0, or what an earlier computation left that died or failed.
    ///
    /// # Panics
    /// If there is no such word: a mistake of the program and not of its input.
    pub fn get(&self, index: usize) -> u64 {
        load64(&self.words[index], Ordering::Relaxed)
    }

    /// Fills word `index`.
    ///
    /// # Panics
    /// If there is no such word: a mistake of the program and not of its input.
    pub fn set(&mut self, index: usize, value: u64) {
        fill64(&self.words[index], value);
    }
}

/// A published value, which never changes again.
#[derive(Clone, Copy, Debug)]
pub struct OnceValue<'a> {
    words: &'a [AtomicU64],
}

impl OnceValue<'_> {
    /// How many words it has.
    pub const fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether it has no words.
    pub const fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Word `index`.
    ///
    /// # Panics
    /// If there is no such word: a mistake of the program and not of its input.
    pub fn get(&self, index: usize) -> u64 {
        // Relaxed: the load that found the value ready was an Acquire.
        load64(&self.words[index], Ordering::Relaxed)
    }

    /// All words.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.words.len()).map(|index| self.get(index))
    }
}

#[cfg(test)]
#[path = "once_test.rs"]
mod once_test;
