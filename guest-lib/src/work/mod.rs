//! Work units: a job that any number of nodes work on, and that any of them may leave by dying.
//!
//! A job is a table of units in a segment, with its input and an arena for results. A unit is a
//! **pure function** of the input and of earlier phases' results; that alone makes redoing one
//! harmless. Everything else follows from one word a unit:
//!
//! * `result` is 0 until somebody's compare-and-swap makes it the place of a complete result,
//!   and never changes again. That is the only commit point; a unit counts once, however often
//!   it was computed, by whomever, also by somebody who was thought dead.
//! * `claim` names who computes. It saves double work and is never needed for a right result:
//!   a dead owner's claim is stolen, a slow owner's unit is computed a second time by those who
//!   have nothing else left to do.
//! * `place` is where the result goes. All attempts at a unit use the same place, and being pure
//!   they store the same bytes, so a dead attempt leaks nothing and a late one does no harm.
//!
//! The arena hands out places from one word that holds the last allocation: *which unit* got
//! *how much* up to *where*. Whoever allocates next first writes that down in the unit's line,
//! so that a death between the two stores loses nothing (the next one helps the dead one).
//!
//! A job's creation follows the same discipline: it is open to workers only when its `seal` is
//! stored, and the creator's instance says who is at it; a dead creator is succeeded by whoever
//! creates the job next, and nobody waits for the dead.

mod arena;
mod audit;
mod error;
mod job;
mod layout;
mod phase;

pub use arena::ResultBlock;
pub use audit::{ArenaAudit, JobAudit, PhaseAudit};
pub use error::WorkError;
pub use job::{Creation, Job};
pub use layout::{BLOCK, JobSpec, MAX_ARENA, MAX_PHASES, MAX_UNITS, PARAMS};
pub use phase::{Phase, Progress, Worker, WorkerStats};

#[cfg(test)]
#[path = "work_test.rs"]
mod work_test;
