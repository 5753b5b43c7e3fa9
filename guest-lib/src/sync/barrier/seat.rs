//! A member's side of a barrier.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::{Barrier, BarrierError, SeatWords, Seen};
use crate::liveness::Liveness;
use crate::mem::{load64, store64};
use crate::sync::{Sleepers, wait_until};
use crate::wait::deadline_after;

/// What a member learns at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The round that ended, from 0.
    pub round: u64,
    /// Whether this member ended it. True for at most one member a round; for none if that one
    /// died at this moment.
    pub last: bool,
}

/// A seat at a barrier, for one thread of control.
///
/// Dropping it changes nothing: the barrier goes on waiting for its member, and reports it when
/// it has died. A member that is done [leaves](Self::leave).
#[derive(Debug)]
pub struct Seat<'a> {
    pub(super) barrier: Barrier<'a>,
    pub(super) words: &'a SeatWords,
    pub(super) member: InstanceId,
    /// The round that this member is at.
    pub(super) round: u64,
}

impl<'a> Seat<'a> {
    /// The barrier.
    pub const fn barrier(&self) -> Barrier<'a> {
        self.barrier
    }

    /// The round that this member is at: the one that its next wait is for.
    pub const fn round(&self) -> u64 {
        self.round
    }

    /// Arrives, and waits until all others have or one of them has died.
    ///
    /// What any member did before it arrived happens before what the others do after they return.
    ///
    /// # Errors
    /// [`BarrierError::Dead`]; the next call is for the next round. [`BarrierError::Lost`],
    /// [`BarrierError::Corrupt`].
    pub fn wait<J: Liveness>(&mut self, judge: &J) -> Result<Passed, BarrierError> {
        self.arrive(judge, None)
    }

    /// As [`wait`](Self::wait), for at most `timeout`.
    ///
    /// # Errors
    /// Also [`BarrierError::Timeout`]; the next call waits for the same round, at which this
    /// member has arrived.
    pub fn wait_timeout<J: Liveness>(
        &mut self,
        judge: &J,
        timeout: Duration,
    ) -> Result<Passed, BarrierError> {
        self.arrive(judge, Some(timeout))
    }

    /// Gives up the seat: no round waits for this member any more. The others are not told.
    ///
    /// # Errors
    /// [`BarrierError::Lost`].
    pub fn leave(self) -> Result<(), BarrierError> {
        self.check()?;
        // Only the member of the seat stores here while it lives. SeqCst, and before the wake:
        // whoever is woken finds that this seat does not count.
        store64(&self.words.reported, self.member.word(), Ordering::SeqCst);
        self.barrier.header.bell().ring();
        Ok(())
    }

    fn check(&self) -> Result<(), BarrierError> {
        let word = self.member.word();
        let own = load64(&self.words.member, Ordering::Acquire) == word
            && load64(&self.words.reported, Ordering::Acquire) != word;
        if own {
            Ok(())
        } else {
            Err(BarrierError::Lost(self.member))
        }
    }

    fn arrive<J: Liveness>(
        &mut self,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Passed, BarrierError> {
        self.check()?;
        let barrier = self.barrier;
        self.catch_up()?;
        if load64(&self.words.arrived, Ordering::Relaxed) <= self.round {
            // SeqCst, as the loads of `look`: of two that arrive last at the same time, at least
            // one sees both. Each stores its own word and loads the other's.
            store64(&self.words.arrived, self.round + 1, Ordering::SeqCst);
        }
        if let Some(end) = self.step(judge, true)? {
            return self.end(end);
        }
        let start = Instant::now();
        let found = match timeout {
            Some(timeout) if timeout.is_zero() => None,
            _ => wait_until(
                &Sleepers::Bell(barrier.header.bell()),
                timeout.map(deadline_after),
                |before_sleep| self.step(judge, before_sleep),
            )?,
        };
        match found {
            Some(end) => self.end(end),
            None => Err(BarrierError::Timeout {
                missing: match barrier.look(barrier.state(), judge) {
                    Seen::Missing(missing) => missing,
                    _ => InstanceId::NONE,
                },
                round: self.round,
                waited: start.elapsed(),
            }),
        }
    }

    /// Moves past rounds that ended without this member: those that were broken are told, one a
    /// call. One can have passed only while this member was taking its seat.
    fn catch_up(&mut self) -> Result<(), BarrierError> {
        let state = self.barrier.valid_state()?;
        let arrived = load64(&self.words.arrived, Ordering::Relaxed);
        while self.round < state.round() && arrived <= self.round {
            if state.was_broken(self.round) {
                return self.end(End::Broken).map(|_| ());
            }
            self.round += 1;
        }
        Ok(())
    }

    /// Makes a step towards the end of this member's round, and says if it has ended.
    fn step<J: Liveness>(&self, judge: &J, thorough: bool) -> Result<Option<End>, BarrierError> {
        let barrier = self.barrier;
        loop {
            let state = barrier.valid_state()?;
            if state.round() > self.round {
                return Ok(Some(match state.was_broken(self.round) {
                    true => End::Broken,
                    false => End::Passed { last: false },
                }));
            }
            if state.round() < self.round {
                // Rounds go up only.
                return Err(BarrierError::Corrupt { word: state.word() });
            }
            if let Some(seat) = state.breaking() {
                barrier.finish_break(state, seat);
            } else if !thorough {
                return Ok(None);
            } else {
                match barrier.look(state, judge) {
                    Seen::All if barrier.pass(state) => {
                        return Ok(Some(End::Passed { last: true }));
                    }
                    Seen::All => {}
                    Seen::Dead(seat) => barrier.begin_break(state, seat),
                    Seen::Missing(_) => return Ok(None),
                }
            }
        }
    }

    fn end(&mut self, end: End) -> Result<Passed, BarrierError> {
        let round = self.round;
        self.round += 1;
        match end {
            End::Passed { last } => Ok(Passed { round, last }),
            End::Broken => Err(BarrierError::Dead {
                dead: self.barrier.breaker_of(round),
                round,
            }),
        }
    }
}

/// How a round ended.
#[derive(Clone, Copy)]
enum End {
    Passed { last: bool },
    Broken,
}
