//! Where a node stands, and what is under way with it.

use std::sync::Arc;

use lupin_abi::{Cause, Generation};

use super::backoff::Ending;
use super::judge::Judge;
use crate::power::Instance;

/// Where a node stands.
pub(super) enum Phase {
    /// Fenced or never started; to be started at a time.
    Waiting { until_ns: u64 },
    /// Its process runs; its agent has not reported.
    Starting,
    /// It uses pod memory.
    Joined(Judge),
    /// It stands still, or is about to, or is about to run again.
    Paused(Pause),
    /// It was asked to end.
    Ordered(Order),
    /// Its agent says that it is ending the node; so many nanoseconds of the clock are left to it.
    Stopping { until_ns: u64 },
    /// Being fenced.
    Failing(Failure),
    /// Stays down.
    Down,
}

/// A failure under way.
pub(super) struct Failure {
    pub cause: Cause,
    pub ending: Ending,
    /// Another manager began it: do not tell again what it told.
    pub resumed: bool,
    /// Fences that were not confirmed.
    pub attempts: u32,
    /// When the next one is due; `None` while one is under way.
    pub again_ns: Option<u64>,
}

/// A pause under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pause {
    pub step: Step,
    /// When it was asked for.
    pub since_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It is being stopped.
    Going,
    /// It stands.
    Stands,
    /// It is being let run.
    Coming,
    /// It could not be let run, and is tried again at that time.
    Stuck { until_ns: u64 },
}

/// A node that was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub asked_ns: u64,
    pub until_ns: u64,
}

/// A drain under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drain {
    pub asked_ns: u64,
    pub until_ns: u64,
    pub grace_ms: u64,
}

/// One life of a node.
pub(super) struct Life {
    pub instance: Arc<dyn Instance>,
    pub generation: Generation,
    pub started_ns: u64,
}
