//! A barrier that the dead do not block.
//!
//! A number of seats is fixed; each is taken by an instance, its *member*, before the first round
//! can end. A member arrives by storing the round into its seat, and any member that finds that
//! all have arrived ends the round, so the death of the last to arrive harms nobody. A member
//! that died before it arrived breaks the round: all others are released with an error that
//! names the dead, its seat no longer counts, and the barrier goes on with the survivors, or with
//! a new member in that seat.
//!
//! **Agreement.** Every round has one outcome, the same for all members: all were there, or it
//! was broken. One word decides, by compare and swap:
//!
//! ```text
//!   state = (round, breaking seat or none, outcomes of the last 8 rounds)
//!
//!   (r, none, h) -- all seats that count have arrived ------------------> (r+1, none, h.passed)
//!   (r, none, h) -- the member of seat s is dead and has not arrived ---> (r, s, h)
//!   (r, s, h)    -- seat s: broke := r, reported := its member ---------> (r+1, none, h.broken)
//! ```
//!
//! Everybody who meets `(r, s, h)` makes the steps to the next state, so that its author may die
//! as well. A seat stops to count when `reported` equals its member: instances never come back,
//! so neither a late helper nor a new member can confuse the two. A member that is late learns the
//! outcome of its own round from the history; so all see the same sequence of outcomes.
//!
//! The rounds are those of the sense-reversing barrier (Mellor-Crummey and Scott, *Algorithms for
//! Scalable Synchronization on Shared-Memory Multiprocessors*, section 3), with a number instead
//! of a sense, and flags a seat as in its dissemination barriers instead of a counter: a counter
//! cannot tell who is missing.
//!
//! ```
//! use lupin::InstanceId;
//! use lupin::sync::barrier::{Barrier, BarrierError, BarrierWords};
//!
//! # fn main() -> Result<(), BarrierError> {
//! // In a segment, as a field of a struct there; its users are threads of several nodes.
//! let words = BarrierWords::<2>::default();
//! let [one, two] = [1, 2].map(|id| InstanceId::new(id, 1));
//!
//! let all_live = |_: InstanceId| true;
//! let barrier = Barrier::new(&words)?;
//! let mut mine = barrier.join(one, &all_live)?;
//! let mut yours = barrier.join(two, &all_live)?;
//! std::thread::scope(|scope| {
//!     let other = scope.spawn(|| yours.wait(&all_live));
//!     assert_eq!(mine.wait(&all_live)?.round, 0);
//!     assert!(other.join().is_ok_and(|passed| passed.is_ok()));
//!     Ok::<_, BarrierError>(())
//! })?;
//!
//! let two_died = |instance| instance != two;
//! let error = mine.wait(&two_died).unwrap_err();
//! assert_eq!(error, BarrierError::Dead { dead: two, round: 1 });
//! // The others go on.
//! assert_eq!(mine.wait(&two_died)?.round, 2);
//! # Ok(())
//! # }
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

use lupin_abi::InstanceId;

use super::is_instance;
use crate::liveness::Liveness;
use crate::mem::{cas64, load64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::{Mapping, ShmError};
use crate::wait::Bell;

mod seat;
mod state;
pub use seat::{Passed, Seat};
use state::State;

/// The most seats that a barrier may have.
pub const MAX_SEATS: usize = state::MAX_SEATS;

/// Why a round did not end well, or a seat was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// A participant died before it arrived. All other members get this for the same round, and
    /// the next round goes on without the dead.
    #[error("{dead} died before it arrived at round {round} of the barrier")]
    Dead {
        /// Who died.
        dead: InstanceId,
        /// The round that it broke, from 0.
        round: u64,
    },
    /// Not all arrived in time. The caller has arrived; it may wait again for the same round.
    #[error("{missing} did not arrive at round {round} of the barrier in {waited:?}")]
    Timeout {
        /// One that had not arrived; [`InstanceId::NONE`] if a seat was never taken.
        missing: InstanceId,
        /// The round.
        round: u64,
        /// How long the caller waited.
        waited: Duration,
    },
    /// All seats are taken, by members that are alive or whose death has not broken a round yet.
    #[error("all {seats} seats of the barrier are taken, one of them by {member}")]
    Full {
        /// How many seats there are.
        seats: usize,
        /// One of the members.
        member: InstanceId,
    },
    /// The caller's seat is no longer its own: it was declared dead.
    #[error("{0} was declared dead and no longer has a seat at the barrier")]
    Lost(InstanceId),
    /// The instance that asks is no instance.
    #[error("{0} cannot have a seat at a barrier")]
    NoInstance(InstanceId),
    /// No barrier has so many seats.
    #[error("a barrier of {0} seats: there must be 1 to {MAX_SEATS}")]
    Seats(usize),
    /// Somebody stored something else over the state.
    #[error("the state of the barrier is corrupt: {word:#x}")]
    Corrupt {
        /// What was found.
        word: u64,
    },
    /// The mapping has no place for it there.
    #[error("a barrier of {seats} seats does not lie at offset {offset} of the mapping")]
    Place {
        /// Where it should be, in bytes.
        offset: u64,
        /// How many seats it should have.
        seats: usize,
    },
}

/// The part of a barrier in pod memory before its seats. All zero at first.
#[derive(Debug, Default)]
#[repr(C)]
pub struct BarrierHeader {
    /// See the module.
    state: AtomicU64,
    /// Futex word of sleepers; its value means nothing.
    wake: AtomicU32,
    /// Of which nodes somebody may sleep. A hint.
    sleepers: AtomicU32,
    _reserved: [AtomicU64; 6],
}

/// One seat of a barrier. All zero at first.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SeatWords {
    /// The [`InstanceId`] that has the seat, dead or alive; 0 if nobody ever had.
    member: AtomicU64,
    /// How many rounds it has arrived at: the number of the next.
    arrived: AtomicU64,
    /// The member that no longer counts: its death was reported, or it left.
    reported: AtomicU64,
    /// 1 + the last round that a member of this seat broke.
    broke: AtomicU64,
    /// Who did. Not `reported`: a member that leaves later is not to blame.
    breaker: AtomicU64,
}

/// A barrier of `SEATS` seats in pod memory. All zero bytes: nobody has come yet.
#[derive(Debug)]
#[repr(C)]
pub struct BarrierWords<const SEATS: usize> {
    header: BarrierHeader,
    seats: [SeatWords; SEATS],
}

impl BarrierHeader {
    fn bell(&self) -> Bell<'_> {
        Bell {
            classes: &self.sleepers,
            word: &self.wake,
        }
    }
}

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for BarrierHeader {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for BarrierHeader {}
// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for SeatWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for SeatWords {}
// SAFETY: `repr(C)`, two fields of atomics, both of alignment 8.
unsafe impl<const SEATS: usize> PodSafe for BarrierWords<SEATS> {}
// SAFETY: all its fields are atomics.
unsafe impl<const SEATS: usize> PodShared for BarrierWords<SEATS> {}

impl<const SEATS: usize> Default for BarrierWords<SEATS> {
    fn default() -> Self {
        Self {
            header: BarrierHeader::default(),
            seats: [const {
                SeatWords {
                    member: AtomicU64::new(0),
                    arrived: AtomicU64::new(0),
                    reported: AtomicU64::new(0),
                    broke: AtomicU64::new(0),
                    breaker: AtomicU64::new(0),
                }
            }; SEATS],
        }
    }
}

/// A barrier over words in pod memory.
#[derive(Clone, Copy, Debug)]
pub struct Barrier<'a> {
    header: &'a BarrierHeader,
    seats: &'a [SeatWords],
}

/// What a look at all seats finds.
enum Seen {
    /// All that count have arrived.
    All,
    /// The member of this seat is dead and will never arrive.
    Dead(usize),
    /// This one has not arrived yet; [`InstanceId::NONE`] is a seat without a member.
    Missing(InstanceId),
}

impl<'a> Barrier<'a> {
    /// The barrier in `words`.
    ///
    /// # Errors
    /// [`BarrierError::Seats`].
    pub const fn new<const SEATS: usize>(
        words: &'a BarrierWords<SEATS>,
    ) -> Result<Self, BarrierError> {
        if SEATS == 0 || SEATS > MAX_SEATS {
            return Err(BarrierError::Seats(SEATS));
        }
        Ok(Self {
            header: &words.header,
            seats: &words.seats,
        })
    }

    /// The barrier of `seats` seats at `offset` of `memory`, laid out as [`BarrierWords`]. All its
    /// users pass the same number.
    ///
    /// # Errors
    /// [`BarrierError::Seats`], [`BarrierError::Place`].
    pub fn at(memory: &'a Mapping, offset: u64, seats: u32) -> Result<Self, BarrierError> {
        if seats == 0 || seats as usize > MAX_SEATS {
            return Err(BarrierError::Seats(seats as usize));
        }
        let view = || -> Result<Self, ShmError> {
            let header: &BarrierHeader = memory.get(offset)?;
            // No overflow: the header was found inside of the mapping.
            let first = offset + size_of::<BarrierHeader>() as u64;
            let seats = memory.get_slice(first, seats.into())?;
            Ok(Self { header, seats })
        };
        let seats = seats as usize;
        view().map_err(|_| BarrierError::Place { offset, seats })
    }

    /// How many seats there are.
    pub const fn seats(&self) -> usize {
        self.seats.len()
    }

    /// The current round, from 0.
    pub fn round(&self) -> u64 {
        self.state().round()
    }

    /// Who takes part: the members that count, dead or alive. A snapshot for people.
    pub fn members(&self) -> impl Iterator<Item = InstanceId> + use<'a> {
        let member = |seat: &SeatWords| match load64(&seat.member, Ordering::Acquire) {
            0 => None,
            word if word == load64(&seat.reported, Ordering::Acquire) => None,
            word => Some(InstanceId::from_word(word)),
        };
        self.seats.iter().filter_map(member)
    }

    /// Takes a seat for `member`: one that it already has, one that nobody had yet, or that of a
    /// member that died and was reported, or left. From then on every round waits for it.
    ///
    /// One store decides. A member that already has a seat gets it back at the round whose end it
    /// has not seen. Whoever starts a number of participants may take the seats for all of
    /// them; then also one that dies before it does anything is missed and named.
    ///
    /// # Errors
    /// [`BarrierError::Full`], [`BarrierError::NoInstance`], [`BarrierError::Corrupt`].
    pub fn join<J: Liveness>(
        &self,
        member: InstanceId,
        judge: &J,
    ) -> Result<Seat<'a>, BarrierError> {
        if !is_instance(member) {
            return Err(BarrierError::NoInstance(member));
        }
        loop {
            if let Some(seat) = self.own_seat(member) {
                return Ok(seat);
            }
            // A member that died in the current round makes room.
            let state = self.settled(judge)?;
            match self.take_seat(member, state) {
                Some(seat) => return Ok(seat),
                None if self.state() == state => {
                    let word = load64(&self.seats[0].member, Ordering::Relaxed);
                    return Err(BarrierError::Full {
                        seats: self.seats.len(),
                        member: InstanceId::from_word(word),
                    });
                }
                // Something moved meanwhile.
                None => {}
            }
        }
    }

    /// The state, after what can be done about it without waiting: each member that died makes
    /// room once a round was broken by it, and if all have arrived and died, nobody else ends
    /// their round.
    fn settled<J: Liveness>(&self, judge: &J) -> Result<State, BarrierError> {
        loop {
            let state = self.valid_state()?;
            if let Some(seat) = state.breaking() {
                self.finish_break(state, seat);
                continue;
            }
            match self.look(state, judge) {
                Seen::All => {
                    self.pass(state);
                }
                Seen::Dead(seat) => self.begin_break(state, seat),
                Seen::Missing(_) => return Ok(state),
            }
        }
    }

    /// The seat that `member` has already.
    fn own_seat(&self, member: InstanceId) -> Option<Seat<'a>> {
        let word = member.word();
        let (index, seat) = (self.seats.iter().enumerate())
            .find(|(_, seat)| load64(&seat.member, Ordering::SeqCst) == word)?;
        if load64(&seat.reported, Ordering::SeqCst) == word {
            // It left, and comes back. If a new member has taken the seat since, this changes
            // nothing, for nobody asks for that name any more.
            let _ = cas64(&seat.reported, word, 0, Ordering::SeqCst);
            if load64(&seat.member, Ordering::SeqCst) != word {
                return None;
            }
            self.skip_to(seat, self.state().round());
        }
        Some(self.seat(index, member))
    }

    /// Takes a seat without a member, or whose member does not count.
    fn take_seat(&self, member: InstanceId, state: State) -> Option<Seat<'a>> {
        // Seats that nobody had yet first: no round can end without them.
        let all = || self.seats.iter().enumerate();
        let new = all().filter(|(_, seat)| load64(&seat.member, Ordering::Relaxed) == 0);
        for (index, seat) in new.chain(all()) {
            // In this order: who sees a death reported also sees, in the state after it, if the
            // break that reported it is still going on.
            let before = load64(&seat.member, Ordering::SeqCst);
            let reported = load64(&seat.reported, Ordering::SeqCst);
            if before != 0 && before != reported {
                continue;
            }
            if self.state() != state {
                // The round ended, or breaks: a helper in a break looks up the member of its
                // seat, so no seat changes hands in one.
                return None;
            }
            if cas64(&seat.member, before, member.word(), Ordering::SeqCst).is_ok() {
                // The rounds before are not the new member's. At this one its predecessor may
                // have arrived, which counts for the seat.
                self.skip_to(seat, self.state().round());
                return Some(self.seat(index, member));
            }
        }
        None
    }

    /// Counts the rounds before `round` as arrived at.
    fn skip_to(&self, seat: &SeatWords, round: u64) {
        let arrived = load64(&seat.arrived, Ordering::Relaxed);
        if arrived < round {
            // Fails if the member itself has arrived meanwhile.
            let _ = cas64(&seat.arrived, arrived, round, Ordering::AcqRel);
        }
    }

    fn seat(&self, index: usize, member: InstanceId) -> Seat<'a> {
        let words = &self.seats[index];
        // The first round whose end the seat has not seen: one that it has arrived at and that
        // is not over, or one that it has not arrived at, over or not.
        let arrived = load64(&words.arrived, Ordering::Relaxed);
        Seat {
            barrier: *self,
            words,
            member,
            round: arrived.min(self.state().round()),
        }
    }

    fn state(&self) -> State {
        // SeqCst: see `Seat::wait` and `take_seat`.
        State::from_word(load64(&self.header.state, Ordering::SeqCst))
    }

    /// The state, if it can be one.
    fn valid_state(&self) -> Result<State, BarrierError> {
        let state = self.state();
        let unknown = |seat| seat >= self.seats.len();
        if state.is_exhausted() || state.breaking().is_some_and(unknown) {
            return Err(BarrierError::Corrupt { word: state.word() });
        }
        Ok(state)
    }

    /// Looks at all seats in round `state.round()`.
    fn look<J: Liveness>(&self, state: State, judge: &J) -> Seen {
        let round = state.round();
        let mut missing = None;
        let mut arrived = false;
        for (index, seat) in self.seats.iter().enumerate() {
            let member = load64(&seat.member, Ordering::SeqCst);
            if member == 0 {
                missing = missing.or(Some(InstanceId::NONE));
                continue;
            }
            let out = || load64(&seat.reported, Ordering::SeqCst) == member;
            let here = || load64(&seat.arrived, Ordering::SeqCst) > round;
            if out() {
                continue;
            }
            if here() {
                arrived = true;
                continue;
            }
            let instance = InstanceId::from_word(member);
            if judge.is_alive(instance) {
                missing = Some(instance);
                continue;
            }
            // After the verdict all that it stored is visible: also that it arrived, or left and
            // was followed by another member, before it died.
            if !here() && !out() && load64(&seat.member, Ordering::SeqCst) == member {
                return Seen::Dead(index);
            }
            missing = missing.or(Some(instance));
        }
        match missing {
            None if arrived => Seen::All,
            // No seat counts: no round ends, for nobody waits for it.
            None => Seen::Missing(InstanceId::NONE),
            Some(instance) => Seen::Missing(instance),
        }
    }

    /// Ends the round of `state`, at which all have arrived; whether this call did.
    fn pass(&self, state: State) -> bool {
        // Release: what all did before they arrived happens before what all do after the round;
        // this thread has seen their arrivals. SeqCst: see `Seat::wait`.
        let next = state.passed();
        let passed = self.change(state, next);
        if passed {
            self.header.bell().ring();
        }
        passed
    }

    /// Declares the round of `state` broken by the member of `seat`.
    fn begin_break(&self, state: State, seat: usize) {
        self.change(state, state.breaking_at(seat));
    }

    /// Makes the steps from a declared break by the member of `seat` to the next round, whoever
    /// declared it.
    fn finish_break(&self, state: State, seat: usize) {
        let seat = &self.seats[seat];
        let broke = load64(&seat.broke, Ordering::SeqCst);
        let reported = load64(&seat.reported, Ordering::SeqCst);
        let breaker = load64(&seat.breaker, Ordering::SeqCst);
        let member = load64(&seat.member, Ordering::SeqCst);
        if self.state() != state {
            return;
        }
        // The words above are those of this break or of the time before it. The swaps fail where
        // another helper was faster: no word ever takes the same value again.
        if breaker != member {
            // Before the round: who finds that finds the name.
            let _ = cas64(&seat.breaker, breaker, member, Ordering::SeqCst);
        }
        if broke != state.round() + 1 {
            let _ = cas64(&seat.broke, broke, state.round() + 1, Ordering::SeqCst);
        }
        if reported != member {
            let _ = cas64(&seat.reported, reported, member, Ordering::SeqCst);
        }
        if self.change(state, state.broken()) {
            self.header.bell().ring();
        }
    }

    fn change(&self, from: State, to: State) -> bool {
        cas64(&self.header.state, from.word(), to.word(), Ordering::SeqCst).is_ok()
    }

    /// Who broke `round`, or, if a later member of that seat has broken a round since, that one.
    fn breaker_of(&self, round: u64) -> InstanceId {
        let breaks = self.seats.iter().filter_map(|seat| {
            let broke = load64(&seat.broke, Ordering::SeqCst);
            let breaker = load64(&seat.breaker, Ordering::SeqCst);
            (broke > round).then_some((broke, breaker))
        });
        breaks
            .min()
            .map_or(InstanceId::NONE, |(_, word)| InstanceId::from_word(word))
    }
}

#[cfg(test)]
#[path = "barrier_test.rs"]
mod barrier_test;
