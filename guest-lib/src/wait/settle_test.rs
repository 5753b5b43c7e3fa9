//! All interleavings of one waiter and one releaser on two nodes, with a store buffer.
//!
//! The releaser stores its release, which its processor keeps in a buffer for up to a time *D*,
//! and loads the flag without a barrier between. The waiter raises its flag, looks, sleeps for at
//! least *D*, looks again, and sleeps without a bound. What the module promises: there is no end
//! in which the waiter sleeps for ever although the lock is free. What it needs: the second look.

use std::collections::BTreeSet;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
struct State {
    /// As the memory has it.
    released: bool,
    raised: bool,
    /// Changed by whoever lowers the flag; the kernel compares it before a sleep.
    word: bool,
    /// The releaser's next instruction; its release, while that is in the buffer only.
    releaser: u8,
    buffered: bool,
    /// The value of `word` that the releaser has buffered no store for: it is a locked access.
    saw_flag: bool,
    /// The waiter's next step, and whether it was woken.
    waiter: u8,
    woken: bool,
    /// The release was in the buffer when the settling sleep began, and that sleep is not over.
    due: bool,
}

const DONE: u8 = 9;
const SETTLING: u8 = 2;
const LONG: u8 = 5;

impl State {
    /// Every state that one step leads to.
    fn next(self, second_look: bool) -> Vec<Self> {
        let mut next = Vec::new();
        // The memory takes the store.
        if self.buffered {
            next.push(Self {
                buffered: false,
                released: true,
                due: false,
                ..self
            });
        }
        next.extend(self.release());
        next.extend(self.wait(second_look));
        next
    }

    fn release(self) -> Option<Self> {
        Some(match self.releaser {
            0 => Self {
                buffered: true,
                releaser: 1,
                ..self
            },
            // A load that passes the store before it.
            1 => Self {
                saw_flag: self.raised,
                releaser: if self.raised { 2 } else { DONE },
                ..self
            },
            // A locked access: it empties the buffer. It lowers the flag, then changes the word.
            2 if self.buffered => return None,
            2 => Self {
                raised: false,
                releaser: 3,
                ..self
            },
            3 => Self {
                word: true,
                releaser: 4,
                ..self
            },
            // The wake-up arrives; a waiter that does not sleep is not woken.
            4 => Self {
                woken: self.woken || matches!(self.waiter, SETTLING | LONG),
                releaser: DONE,
                ..self
            },
            _ => return None,
        })
    }

    fn wait(self, second_look: bool) -> Option<Self> {
        let look = |after: u8| Self {
            waiter: if self.released { DONE } else { after },
            ..self
        };
        Some(match self.waiter {
            // Locked.
            0 => Self {
                raised: true,
                waiter: 1,
                ..self
            },
            1 => Self {
                due: self.buffered,
                ..look(if second_look { SETTLING } else { 4 })
            },
            // Woken, or the word has changed: looks again from the start, as after any wake-up,
            // and finds the release, which was visible before the flag was lowered.
            SETTLING | LONG if self.woken || self.word => look(DONE),
            // Not over before what was in the buffer when it began is in the memory.
            SETTLING if self.due => return None,
            SETTLING => Self { waiter: 3, ..self },
            3 => look(4),
            4 => Self {
                waiter: LONG,
                ..self
            },
            _ => return None,
        })
    }
}

/// The states in which nothing can happen any more and the waiter sleeps beside a free lock.
fn lost(second_look: bool) -> (usize, Vec<State>) {
    let (mut seen, mut todo) = (BTreeSet::new(), vec![State::default()]);
    let mut lost = Vec::new();
    while let Some(state) = todo.pop() {
        if !seen.insert(state) {
            continue;
        }
        let next = state.next(second_look);
        if next.is_empty() && state.waiter != DONE {
            assert!(state.released, "the releaser is stuck: {state:?}");
            lost.push(state);
        }
        todo.extend(next);
    }
    (seen.len(), lost)
}

#[test]
fn the_look_after_the_settling_sleep_loses_no_wake_up() {
    let (states, lost) = lost(true);
    assert!(states > 50, "{states}");
    assert_eq!(lost, []);
}

#[test]
fn without_that_look_a_wake_up_is_lost() {
    let (_, lost) = lost(false);
    assert!(lost.iter().any(|state| !state.saw_flag && state.raised));
}
