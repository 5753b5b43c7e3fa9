//! Waiting for somebody who may be on another node: a short spin, then sleep until woken.
//!
//! # Spin, then sleep
//!
//! A waiter looks a few times, with pauses that double: so the line that it waits for is left to
//! whoever holds it, and what is short is over before a sleep would have begun. Then it sleeps in
//! a futex. A holder that is itself descheduled thus costs its waiters some microseconds once,
//! and not a processor. A waiter that was woken spins again before it sleeps again: it was woken
//! because its turn is near.
//!
//! # No wake-up is lost within a node
//!
//! Before it sleeps, a waiter raises a flag and looks again; whoever ends the wait stores its
//! end and looks at the flag. Each side stores one word and loads the other, which needs a full
//! barrier between the two on both sides, and the one that ends a wait is the fast path of every
//! lock. So the barrier is made by the waiter for both, with `membarrier(2)`
//! (`MEMBARRIER_CMD_GLOBAL_EXPEDITED`, for all processes of the node that are registered, as this
//! library does before it first relies on that). Where the kernel has no such thing, both sides
//! make their own.
//!
//! # Across nodes
//!
//! A futex wakes sleepers of one kernel. So the flag is a set: of which *classes* of nodes
//! somebody may sleep ([`NodeId::wake_class`](lupin_abi::NodeId::wake_class)). Whoever ends the
//! wait wakes its own node's sleepers by futex, and asks for those of the other classes, and of its
//! own class where that has further nodes. That is one packet without an answer, sent without
//! blocking, to its agent or where it can to theirs; agents and manager pass it on, and the last
//! agent makes the futex call. Any of them may drop it: a wake-up is a
//! hint, and its loss costs no more than [`BACKSTOP`].
//!
//! # No wake-up is lost between nodes, either
//!
//! `membarrier` does not reach the processors of another kernel, so the pair of barriers above is
//! half a pair between nodes. Let a waiter raise its flag at the time *t*, with a locked
//! instruction after which it looks at what it waits for, and call *D* a time within which a
//! store that a processor has retired becomes visible to all others.
//!
//! * A releaser that loads the flag after *t* finds it raised, and sends a wake-up: loads of one
//!   coherent memory do not go back behind a store that is visible.
//! * A releaser that loaded the flag before *t* has its store, which comes first in its program,
//!   retired by then and perhaps still in its processor's store buffer. By *t* + *D* it is visible.
//!
//! So a waiter may sleep without a bound once it has looked at *t* + *D* or later and the flag has
//! stayed raised since *t*. Its sleeps before that are short ones and end with a look: first
//! [`FIRST_SLEEP`], then twice as long each, and only one that lasted [`SETTLE`] without a wake-up
//! is followed by a long one. That the flag has not been lowered in between shows in the futex
//! word: whoever lowers the flag changes the word after that, the long sleep begins only if the
//! word holds the same value as before the settling sleep, and the kernel compares it once more.
//!
//! *D* has no bound in the manuals, but C++ and Rust ask for a finite time, and a store buffer is
//! written back as fast as the memory takes it: within microseconds, and at the latest at the
//! processor's next interrupt, exit to the hypervisor or switch of threads, all of which
//! serialise it. [`SETTLE`] is a thousand times that. Were a store ever later, [`BACKSTOP`]
//! bounds what that costs. What sleeps on a [`Bell`](parking::Bell) needs none of this: both its
//! sides make a whole barrier, which orders them between nodes as within one.
//!
//! # The dead wake nobody
//!
//! A process that sleeps long is told of deaths: each of its agent's watchers gets a packet when
//! a node failed or a thread died anywhere in the pod, and all long sleepers look again and ask
//! their judge. One thread of the process waits for these packets. It is started when the first
//! wait lasts longer than the settling sleep, or has to wake another node, and not before.
//!
//! # Who has no way to other nodes
//!
//! Nobody sleeps longer than [`MAX_SLEEP`] on a word that lies in no segment of an attached pod,
//! in a process without an agent (it is being restarted, or the process was forked off), or on a
//! kernel that has no futex for that memory. A process whose *agent or manager* hangs without
//! breaking its connection does not know it: [`BACKSTOP`] is for that, and for whoever releases
//! a lock while it cannot reach its own agent.

use core::sync::atomic::AtomicU32;
use core::time::Duration;
use std::time::Instant;

pub(crate) mod class;
mod futex;
mod parking;
pub(crate) mod sleepers;

#[cfg(test)]
mod settle_test;

use futex::Slept;
pub(crate) use parking::Bell;
#[doc(hidden)]
pub use parking::Parking;

/// The longest sleep between two looks of a waiter whom other nodes cannot wake. Thirty waiters
/// that all sleep so long use some percent of one processor for their looks.
pub const MAX_SLEEP: Duration = Duration::from_millis(8);
/// The longest sleep between two looks of a waiter whom other nodes can wake: four looks a second
/// are no load, and a wake-up that was lost, because an agent or the manager hung or was replaced
/// at that moment, is rarer than the pod's failures, which take as long to be got over.
pub const BACKSTOP: Duration = Duration::from_millis(250);
/// The first sleep; each further one is twice as long.
pub const FIRST_SLEEP: Duration = Duration::from_micros(50);
/// After a sleep of this length without a wake-up, what was released before the waiter's flag was
/// seen is visible.
pub const SETTLE: Duration = Duration::from_micros(800);
/// Looks before a sleep. The pauses between them double, which is some ten microseconds in all:
/// about what a short critical section on another node takes.
const SPINS: u32 = 5;
/// Pauses before the first of these looks: some tenths of a microsecond. Every look takes the
/// line away from the holder and costs it several times what a lock and unlock without company
/// costs, so looks are few.
const FIRST_PAUSE: u32 = 16;

/// The moment `timeout` from now. A timeout beyond the range of the clock is a century.
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + CENTURY)
}

/// Paces one wait.
// Hidden and not private, as all of it: the peers of the benchmarks wait by the same policy.
#[doc(hidden)]
#[derive(Debug)]
pub struct Pacer {
    spins: u32,
    sleep: Duration,
    deadline: Option<Instant>,
    /// The futex word, and its value over a whole sleep of [`SETTLE`] or longer.
    settled: Option<(usize, u32)>,
    /// Interruptions that the waiter knew of when it last asked its judge.
    interruptions: u32,
}

/// The deadline has passed.
#[doc(hidden)]
#[derive(Debug, PartialEq, Eq)]
pub struct TimedOut;

impl Pacer {
    /// A wait that ends at `deadline`, or never.
    pub fn new(deadline: Option<Instant>) -> Self {
        Self {
            spins: 0,
            sleep: FIRST_SLEEP,
            deadline,
            settled: None,
            interruptions: sleepers::interruptions(),
        }
    }

    /// Pauses a moment on the processor; false once the time for that is used up.
    pub fn spin(&mut self) -> bool {
        if self.spins >= SPINS || crate::mem::is_modelled() {
            return false;
        }
        for _ in 0..FIRST_PAUSE << self.spins {
            core::hint::spin_loop();
        }
        self.spins += 1;
        true
    }

    /// Sleeps until `word` is woken, or no longer holds `seen`, or this sleep's bound is over.
    pub fn sleep_on(&mut self, word: &AtomicU32, seen: u32) -> Result<(), TimedOut> {
        let long = self.is_settled(word, seen) && crate::client::wake::reaches(word);
        let whole = if long { BACKSTOP } else { self.sleep };
        let mut bound = whole;
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut);
            }
            bound = bound.min(left);
        }
        let sleep = || futex::wait(word, seen, bound);
        let slept = if long {
            sleepers::interruptible(word, self.interruptions, sleep)
        } else {
            sleep()
        };
        self.interruptions = sleepers::interruptions();
        if !long {
            self.sleep = (self.sleep * 2).min(MAX_SLEEP);
        }
        match slept {
            Slept::Woken => {
                self.spins = 0;
                self.settled = None;
                // Short again, but not through all the steps: the one that settles is next.
                self.sleep = self.sleep.min(SETTLE);
            }
            Slept::Whole if whole >= SETTLE && bound == whole => {
                self.settled = Some((word.as_ptr().addr(), seen));
            }
            Slept::Whole | Slept::Disturbed => {}
        }
        Ok(())
    }

    /// Whether the waiter has looked after a sleep of [`SETTLE`], over which `word` held `seen`.
    fn is_settled(&self, word: &AtomicU32, seen: u32) -> bool {
        self.settled == Some((word.as_ptr().addr(), seen))
    }

    /// Sleeps this sleep's bound.
    pub fn sleep(&mut self) -> Result<(), TimedOut> {
        let nobody_wakes = AtomicU32::new(0);
        self.sleep_on(&nobody_wakes, 0)
    }
}
