//! Is a history linearizable? What actors saw of a structure, checked against a sequential
//! specification: J. M. Wing and C. Gong, "Testing and verifying concurrent objects", JPDC 17,
//! 1993, section 4; with the pruning of states already met of G. Lowe, "Testing for
//! linearizability", 2017.
//!
//! An operation that its actor did not live to end may have happened, at any time after it
//! began, or not at all. What is recovered later counts as done by the dead one.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use crate::scene::Actor;

/// A sequential object.
pub trait Spec: Clone + Debug + Eq + Hash {
    /// An operation with its arguments.
    type Op: Clone + Debug;
    /// What it returns.
    type Answer: Clone + Debug + PartialEq;

    /// Applies an operation.
    fn apply(&mut self, op: &Self::Op) -> Self::Answer;
}

/// Which operations come before which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// Those that ended before others began: linearizability.
    Real,
    /// Those of one actor: sequential consistency. Under a weak memory model "ended before" means
    /// nothing between actors that do not synchronise.
    Program,
}

#[derive(Clone, Debug)]
struct Entry<S: Spec> {
    actor: u64,
    op: S::Op,
    began: usize,
    /// When it ended, and with what; `None` if its actor died in it.
    ended: Option<(usize, S::Answer)>,
}

/// What actors did, in the order of the execution. Clones are the same history.
#[derive(Debug)]
pub struct History<S: Spec> {
    entries: Arc<Mutex<(usize, Vec<Entry<S>>)>>,
}

impl<S: Spec> Clone for History<S> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
        }
    }
}

impl<S: Spec> Default for History<S> {
    fn default() -> Self {
        Self {
            entries: Arc::default(),
        }
    }
}

impl<S: Spec> History<S> {
    /// Runs an operation and notes it.
    pub fn run(&self, actor: Actor, op: S::Op, body: impl FnOnce() -> S::Answer) -> S::Answer {
        let index = self.with(|now, entries| {
            entries.push(Entry {
                actor: actor.me.word(),
                op,
                began: *now,
                ended: None,
            });
            entries.len() - 1
        });
        let answer = body();
        self.with(|now, entries| entries[index].ended = Some((*now, answer.clone())));
        answer
    }

    fn with<T>(&self, body: impl FnOnce(&mut usize, &mut Vec<Entry<S>>) -> T) -> T {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, entries) = &mut *entries;
        *now += 1;
        body(now, entries)
    }

    /// Ends the execution as a failure unless the history is one that `first` allows.
    ///
    /// # Panics
    /// That is how.
    pub fn check(&self, first: S, time: Time) {
        let entries = self.with(|_, entries| entries.clone());
        assert!(entries.len() <= 64, "the search is exponential");
        let mut met = HashSet::new();
        assert!(
            is_linearizable(&entries, 0, &first, time, &mut met),
            "no order explains this history: {entries:#?}"
        );
    }
}

/// Whether the entries that are not in the set `done` can follow in some order.
fn is_linearizable<S: Spec>(
    entries: &[Entry<S>],
    done: u64,
    state: &S,
    time: Time,
    met: &mut HashSet<(u64, S)>,
) -> bool {
    let is_open = |index: usize| done & 1 << index == 0;
    let open = || (0..entries.len()).filter(|index| is_open(*index));
    if open().all(|index| entries[index].ended.is_none()) {
        return true;
    }
    if !met.insert((done, state.clone())) {
        return false;
    }
    for next in open() {
        let entry = &entries[next];
        let is_first = open().all(|other| {
            let other = &entries[other];
            match (&other.ended, time) {
                (Some((ended, _)), Time::Real) => *ended >= entry.began,
                (Some((ended, _)), Time::Program) => {
                    *ended >= entry.began || other.actor != entry.actor
                }
                (None, _) => true,
            }
        });
        if !is_first {
            continue;
        }
        let mut after = state.clone();
        let answer = after.apply(&entry.op);
        let fits = match &entry.ended {
            Some((_, seen)) => *seen == answer,
            None => true,
        };
        if fits && is_linearizable(entries, done | 1 << next, &after, time, met) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use lupin::InstanceId;

    /// A register.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Register(u64);

    impl Spec for Register {
        type Op = Option<u64>;
        type Answer = u64;

        fn apply(&mut self, op: &Option<u64>) -> u64 {
            if let Some(value) = op {
                self.0 = *value;
            }
            self.0
        }
    }

    type Event = (u64, Option<u64>, usize, Option<(usize, u64)>);

    fn check(events: &[Event], time: Time) -> bool {
        let entries: Vec<_> = events
            .iter()
            .map(|(actor, op, began, ended)| Entry {
                actor: InstanceId::new(*actor as u32, 1).word(),
                op: *op,
                began: *began,
                ended: *ended,
            })
            .collect();
        is_linearizable(&entries, 0, &Register(0), time, &mut HashSet::new())
    }

    #[test]
    fn a_read_may_not_go_back_in_time() {
        let write = (1, Some(7), 1, Some((2, 7)));
        assert!(check(&[write, (2, None, 3, Some((4, 7)))], Time::Real));
        assert!(!check(&[write, (2, None, 3, Some((4, 0)))], Time::Real));
        assert!(check(&[write, (2, None, 3, Some((4, 0)))], Time::Program));
        let back = [(2, None, 3, Some((4, 7))), (2, None, 5, Some((6, 0)))];
        assert!(!check(&[write, back[0], back[1]], Time::Program));
    }

    #[test]
    fn the_last_operation_of_the_dead_may_have_happened_or_not() {
        let dead = (1, Some(7), 1, None);
        for seen in [0, 7] {
            assert!(check(&[dead, (2, None, 3, Some((4, seen)))], Time::Real));
        }
        assert!(!check(&[dead, (2, None, 3, Some((4, 8)))], Time::Real));
        let back = [(2, None, 3, Some((4, 7))), (2, None, 5, Some((6, 0)))];
        assert!(!check(&[dead, back[0], back[1]], Time::Real));
    }
}
