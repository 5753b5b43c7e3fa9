//! A recoverable queue lock: first come, first served, also across failures.
//!
//! # Sources
//!
//! A queue of nodes with one word, the tail, as in the MCS lock (Mellor-Crummey and Scott,
//! "Algorithms for scalable synchronization on shared-memory multiprocessors", ACM TOCS 9(1),
//! 1991). Each node names the one *in front*, as in the CLH lock (Craig 1993; Magnusson, Landin
//! and Hagersten 1994), and the waiter watches that one: what a dead waiter knew is then where
//! the one behind it looks, and no link is missing, whenever it died. (In MCS the link to the next is
//! stored after the tail has moved, so a death between the two cuts the queue.) That giving up
//! is a mark in one's node which the one behind acts on is from Scott and Scherer, "Scalable
//! queue-based spin locks with timeout" (PPoPP 2001). The problem is recoverable mutual exclusion
//! (Golab and Ramaraju, PODC 2016), where the dead come back and finish; here a survivor acts in
//! their place, as in section 3.5 of the LUPIN paper.
//!
//! # How it works
//!
//! ```text
//!   tail ---> [c: ahead b] ---> [b: ahead a] ---> [a: ahead none]
//!               waits             waits             holds the lock
//! ```
//!
//! A place is a node in one of its versions. To come in, store the place found in the tail
//! into the own node and then swap the tail from it to the own place: so the queue behind a node
//! is never without what is in front. To leave, raise the own node's version: the one behind sees
//! that the place in front is over, stores "none in front", and holds the lock. The tail may
//! go on to name a place that is over: that is a free lock.
//!
//! The one behind a node is the only one to act on it when its owner is dead:
//!
//! * it was waiting: copy its place in front to the own node, and wait for that;
//! * it held the lock: the lock is [`Orphaned`](Acquired::Orphaned). Nothing is stored: the dead
//!   holder stays at the head under its name, and whoever stands behind it is the recoverer. If that one
//!   dies too, the next comes to stand there by the rule for the waiting. Once the
//!   repair is declared, the recoverer ends the dead holder's place for it.
//!
//! So two never recover at once, and the order of the queue is kept. Whoever gives up while it
//! waits, or lets an orphan go unrepaired, goes back from the tail if nobody is behind it, and
//! else marks its node as left and never touches it again: to the others it is a dead waiter.
//!
//! Nodes of the dead that no queue knows any more (their owner died before it came in, after it left,
//! or the one that went past them died before it could free them) are found by walking
//! the queue of the lock for which they were used last, when somebody needs a node and none is free.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::sealed::Hold;
use super::{Acquired, LockError, LockGuard, LockState, OrphanGuard};
use crate::liveness::Liveness;
use crate::mem::{cas64, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::ShmError;
use crate::wait::{Pacer, deadline_after};

mod nodes;

pub use nodes::{McsNodeWords, McsNodes, McsWaiter};
use nodes::{NoPlace, Place, Seen};

/// Sleeps, more than a millisecond in all, before a waiter looks whether it waits for itself. All
/// of them are short ones.
const SLEEPS_BEFORE_WALK: u32 = 5;

/// The words of an MCS lock. All zero is a free lock.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct McsWords {
    /// The last place of the queue; if that is over, or 0, the lock is free.
    tail: AtomicU64,
    _reserved: [AtomicU64; 7],
}

// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for McsWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for McsWords {}

/// A recoverable queue lock in pod memory.
///
/// Fair and, among many waiters, calm: each watches a line of its own, and a release wakes one.
/// The price is that the lock passes from one to the next in order, also where the next is
/// asleep; where order does not matter, [`RecoverableLock`](super::RecoverableLock) does more
/// work on few processors.
#[derive(Clone, Copy, Debug)]
pub struct McsLock<'m> {
    nodes: McsNodes<'m>,
    words: &'m McsWords,
    at: u64,
}

/// A place at the head of a queue, for guards.
///
/// Two words: it is passed in registers, and finds the lock through its node when it needs it.
#[derive(Clone, Copy, Debug)]
pub struct McsHold<'w, 'm> {
    waiter: &'w McsWaiter<'m>,
    here: Place,
}

impl<'m> McsLock<'m> {
    /// The lock at the offset `at` of the mapping of `nodes`, with 64 bytes and aligned to them.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`].
    pub fn new(nodes: McsNodes<'m>, at: u64) -> Result<Self, ShmError> {
        let words = nodes.memory.get(at)?;
        Ok(Self { nodes, words, at })
    }

    /// Waits for the lock without limit; the dead in front are noticed as [`wait`](crate::wait)
    /// says.
    ///
    /// # Errors
    /// [`LockError::Deadlock`] if the caller's instance is in the queue already,
    /// [`LockError::NoNode`], [`LockError::Corrupt`].
    #[inline]
    pub fn lock<'w, J: Liveness>(
        &self,
        waiter: &'w mut McsWaiter<'m>,
        judge: &J,
    ) -> Result<Acquired<'w, McsHold<'w, 'm>>, LockError> {
        self.acquire(waiter, judge, None)
    }

    /// Waits for the lock at most `timeout`, and then leaves the queue without harm to it.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`lock`](Self::lock).
    #[inline]
    pub fn lock_timeout<'w, J: Liveness>(
        &self,
        waiter: &'w mut McsWaiter<'m>,
        judge: &J,
        timeout: Duration,
    ) -> Result<Acquired<'w, McsHold<'w, 'm>>, LockError> {
        self.acquire(waiter, judge, Some(timeout))
    }

    /// Takes the lock if nobody alive holds it or waits for it.
    ///
    /// # Errors
    /// [`LockError::Timeout`], and those of [`lock`](Self::lock).
    #[inline]
    pub fn try_lock<'w, J: Liveness>(
        &self,
        waiter: &'w mut McsWaiter<'m>,
        judge: &J,
    ) -> Result<Acquired<'w, McsHold<'w, 'm>>, LockError> {
        self.acquire(waiter, judge, Some(Duration::ZERO))
    }

    /// Who holds the lock, which dead holder waits for repair, and who is there to repair it. A
    /// snapshot for people; `None` if the queue changed too often to take one, or holds garbage.
    pub fn inspect<J: Liveness>(&self, judge: &J) -> Option<LockState> {
        let (mut head, mut next) = (None, None);
        self.nodes.walk(self.words, |place, _| {
            (head, next) = (Some(place), head);
            false
        })?;
        let owner = |place| match self.nodes.look(place, judge) {
            Ok(Seen::Alive(owner)) => Some(owner),
            _ => None,
        };
        let Some(head) = head else {
            return Some(LockState::Free);
        };
        match self.nodes.look(head, judge).ok()? {
            Seen::Alive(owner) => Some(LockState::Held(owner)),
            Seen::DeadHolder(previous) => Some(LockState::Orphaned {
                previous,
                recoverer: next.and_then(owner),
            }),
            Seen::Over | Seen::DeadWaiter { .. } => Some(LockState::Free),
        }
    }

    #[inline(always)]
    fn acquire<'w, J: Liveness>(
        &self,
        waiter: &'w McsWaiter<'m>,
        judge: &J,
        timeout: Option<Duration>,
    ) -> Result<Acquired<'w, McsHold<'w, 'm>>, LockError> {
        if !waiter.is_ready() {
            waiter.renew(judge)?;
        }
        let (here, node) = (waiter.next.get(), waiter.node.get());
        let hold = McsHold { waiter, here };
        // A lock that is taken again and again ends with the last place of the own node, and
        // that one is over. So that is tried without a look, which would fetch the line once to
        // read it and once to write it.
        let end = match self.enter(node, here, here.previous(), Place::NONE) {
            Ok(()) => End::Clean,
            Err(tail) => {
                if self.nodes.is_over(tail)? && self.enter(node, here, tail, Place::NONE).is_ok() {
                    End::Clean
                } else {
                    self.wait(waiter, judge, timeout)
                }
            }
        };
        let me = waiter.me;
        match end {
            End::Clean => {
                waiter.next.set(here.next());
                Ok(Acquired::Clean(LockGuard::new(hold, me)))
            }
            End::Orphaned(previous) => {
                waiter.next.set(here.next());
                Ok(Acquired::Orphaned(OrphanGuard::new(hold, me, previous)))
            }
            End::Deadlock => Err(LockError::Deadlock(me)),
            End::TimedOut(nanos) => Err(self.timed_out(Duration::from_nanos(nanos), judge)),
            End::Corrupt(word) => Err(NoPlace(word).into()),
        }
    }

    /// Puts a place behind `tail`, unless that is not the end of the queue; the error is what is.
    /// `ahead` is `tail`, or none if that is over.
    #[inline(always)]
    fn enter(
        &self,
        node: &McsNodeWords,
        here: Place,
        tail: Place,
        ahead: Place,
    ) -> Result<(), Place> {
        // Relaxed: published by the swap of the tail. The loads spare a lock that is taken again
        // and again two stores.
        if load64(&node.lock, Ordering::Relaxed) != self.at {
            store64(&node.lock, self.at, Ordering::Relaxed);
        }
        if load64(&node.pred, Ordering::Relaxed) != ahead.word() {
            store64(&node.pred, ahead.word(), Ordering::Relaxed);
        }
        // Release: publishes the node. Acquire: who is behind a free lock's last place sees what
        // its holder did, and a place that is found leads to its node.
        let swapped = cas64(&self.words.tail, tail.word(), here.word(), Ordering::AcqRel);
        swapped.map(drop).map_err(Place::from_word)
    }

    /// The path of everybody who must wait, or succeed the dead. Its result fits registers.
    #[cold]
    #[inline(never)]
    fn wait<J: Liveness>(
        &self,
        waiter: &McsWaiter<'_>,
        judge: &J,
        timeout: Option<Duration>,
    ) -> End {
        let start = timeout.map(|_| Instant::now());
        if timeout.is_some_and(|timeout| timeout.is_zero()) && self.is_somebody_there(judge) {
            return End::TimedOut(0);
        }
        let mut ahead = Place::NONE;
        let mut pacer = Pacer::new(timeout.map(deadline_after));
        let end = match self.enter_behind(waiter, &mut ahead) {
            Ok(()) => self.advance(waiter, &mut ahead, judge, &mut pacer),
            // Garbage at the tail: the place is in no queue.
            Err(NoPlace(word)) => return End::Corrupt(word),
        };
        let end = end.unwrap_or_else(|NoPlace(word)| End::Corrupt(word));
        match end {
            End::Clean | End::Orphaned(_) => end,
            End::Deadlock | End::TimedOut(_) | End::Corrupt(_) => {
                self.leave(waiter, waiter.next.get(), ahead);
                match (end, start) {
                    (End::TimedOut(_), Some(start)) => {
                        End::TimedOut(start.elapsed().as_nanos() as u64)
                    }
                    _ => end,
                }
            }
        }
    }

    fn enter_behind(&self, waiter: &McsWaiter<'_>, ahead: &mut Place) -> Result<(), NoPlace> {
        let (node, here) = (waiter.node.get(), waiter.next.get());
        loop {
            let tail = Place::from_word(load64(&self.words.tail, Ordering::Acquire));
            *ahead = if self.nodes.is_over(tail)? {
                Place::NONE
            } else {
                tail
            };
            if self.enter(node, here, tail, *ahead).is_ok() {
                return Ok(());
            }
            core::hint::spin_loop();
        }
    }

    /// Waits in the queue until nobody is in front, or a dead holder.
    fn advance<J: Liveness>(
        &self,
        waiter: &McsWaiter<'_>,
        ahead: &mut Place,
        judge: &J,
        pacer: &mut Pacer,
    ) -> Result<End, NoPlace> {
        let nodes = &self.nodes;
        let (node, here) = (waiter.node.get(), waiter.next.get());
        let (mut looked, mut sleeps) = (false, 0u32);
        loop {
            if nodes.is_over(*ahead)? {
                if !ahead.is_none() {
                    // Release: whoever finds this hold after the caller's death is behind it.
                    store64(&node.pred, 0, Ordering::Release);
                }
                return Ok(End::Clean);
            }
            if looked && pacer.spin() {
                continue;
            }
            looked = true;
            let owner = match nodes.look(*ahead, judge)? {
                Seen::Over => continue,
                Seen::Alive(owner) => owner,
                Seen::DeadHolder(previous) => return Ok(End::Orphaned(previous)),
                Seen::DeadWaiter { owner, ahead: next } => {
                    // Release: whoever goes past this one in turn sees what it read. The dead
                    // one's place ends after this: see `walk`.
                    store64(&node.pred, next.word(), Ordering::Release);
                    nodes.discard(*ahead, owner)?;
                    *ahead = next;
                    continue;
                }
            };
            if pacer.spin() {
                continue;
            }
            // Not before the first sleep: the walk costs a line for each waiter in front, which
            // a wait of the usual length would pay for nothing.
            if sleeps == SLEEPS_BEFORE_WALK && self.is_in_own_way(here, waiter.me) {
                return Ok(End::Deadlock);
            }
            sleeps = sleeps.saturating_add(1);
            let parking = nodes.node(*ahead)?.parking();
            let seen = parking.announce();
            // Both that end this wait: the place is over, or its owner gave it up.
            if nodes.look(*ahead, judge)? != Seen::Alive(owner) {
                continue;
            }
            if pacer.sleep_on(parking.word, seen).is_err() && !nodes.is_over(*ahead)? {
                return Ok(End::TimedOut(0));
            }
        }
    }

    /// Takes a place out of the queue. Its owner holds nothing.
    fn leave(&self, waiter: &McsWaiter<'_>, here: Place, ahead: Place) {
        let node = waiter.node.get();
        // Nobody behind: the queue is what it was before. Release: whoever comes next looks at
        // the place in front.
        let tail = &self.words.tail;
        if cas64(tail, here.word(), ahead.word(), Ordering::AcqRel).is_ok() {
            // So that a walk that is just here learns that it is not in this queue any more.
            node.end(here);
            waiter.next.set(here.next());
            return;
        }
        // The one behind goes past as if the caller were dead, and frees the node.
        waiter.next.set(Place::NONE);
        store64(&node.owner, here.gone(), Ordering::Release);
        node.parking().wake(1);
    }

    /// Whether somebody alive holds the lock or waits for it.
    fn is_somebody_there<J: Liveness>(&self, judge: &J) -> bool {
        let alive = |place, _| matches!(self.nodes.look(place, judge), Ok(Seen::Alive(_)));
        self.nodes.walk(self.words, alive).unwrap_or(true)
    }

    /// Whether an instance stands in front of its own place.
    fn is_in_own_way(&self, here: Place, me: InstanceId) -> bool {
        let mut passed = false;
        let found = self.nodes.walk(self.words, |place, owner| {
            if place == here {
                passed = true;
                return false;
            }
            passed && owner == me.word()
        });
        found == Some(true)
    }

    #[cold]
    #[inline(never)]
    fn timed_out<J: Liveness>(&self, waited: Duration, judge: &J) -> LockError {
        let holder = match self.inspect(judge) {
            Some(LockState::Held(holder)) => holder,
            Some(LockState::Orphaned { recoverer, .. }) => recoverer.unwrap_or(InstanceId::NONE),
            _ => InstanceId::NONE,
        };
        LockError::Timeout { holder, waited }
    }
}

/// How a wait ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Clean,
    /// In this dead holder's place.
    Orphaned(InstanceId),
    Deadlock,
    /// After so many nanoseconds.
    TimedOut(u64),
    /// With this word in a place's stead.
    Corrupt(u64),
}

impl McsHold<'_, '_> {
    /// Lets go of a dead holder's lock: leaves the queue from behind it.
    fn leave(&self) -> Result<(), LockError> {
        let waiter = self.waiter;
        let node = waiter.node.get();
        let dead = Place::from_word(load64(&node.pred, Ordering::Relaxed));
        let at = load64(&node.lock, Ordering::Relaxed);
        let lock = McsLock::new(waiter.nodes, at).map_err(|_| LockError::Corrupt {
            what: "the lock of a queue node",
            word: at,
        })?;
        lock.leave(waiter, self.here, dead);
        Ok(())
    }
}

impl Hold for McsHold<'_, '_> {
    #[inline(always)]
    fn is_held(&self, _me: InstanceId) -> bool {
        // The node is another's by now, or will be, if a judge was wrong.
        let version = &self.waiter.node.get().version;
        load64(version, Ordering::Relaxed) == self.here.lasting()
    }

    #[inline(always)]
    fn release(&self, _me: InstanceId) {
        self.waiter.node.get().end(self.here);
    }

    fn adopt(&self, me: InstanceId, previous: InstanceId) -> Result<(), LockError> {
        let nodes = &self.waiter.nodes;
        let node = self.waiter.node.get();
        let dead = Place::from_word(load64(&node.pred, Ordering::Relaxed));
        let dead_node = nodes.node(dead)?;
        // This is the moment of the repair: if the caller dies after it, whoever is behind finds
        // the dead holder's place over and the lock consistent.
        if !nodes.end_for_dead(dead, dead_node) {
            self.leave()?;
            return Err(LockError::Lost(me));
        }
        store64(&node.pred, 0, Ordering::Release);
        // Release: pairs with the Acquire of the next claim. Fails if a claim found it first.
        let _ = cas64(&dead_node.owner, previous.word(), 0, Ordering::AcqRel);
        Ok(())
    }

    fn let_go(&self, _me: InstanceId) {
        // Fails on garbage only, which the next to come will name.
        let _ = self.leave();
    }
}

#[cfg(test)]
#[path = "mcs_test.rs"]
mod mcs_test;
