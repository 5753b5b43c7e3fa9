//! Is everything there, once, and nothing lost? For tests, demonstrations and doubtful people.

use core::sync::atomic::Ordering;

use super::arena::Place;
use super::error::WorkError;
use super::job::Job;
use super::layout::BLOCK;
use super::phase::Phase;
use crate::mem::{load32, load64};

/// What a phase's units look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseAudit {
    /// Units in all.
    pub units: u32,
    /// Units with a result whose checksum is right.
    pub done: u32,
    /// Units with more than one attempt that says it committed: always 0, or exactly-once is
    /// broken.
    pub committed_twice: u32,
    /// Units whose result is not where their attempts were to put it: always 0.
    pub misplaced: u32,
    /// How often a unit was begun, all units together.
    pub attempts: u64,
    /// Units begun more than once.
    pub redone: u32,
}

/// Where the arena's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaAudit {
    /// Bytes in all.
    pub capacity: u64,
    /// Bytes handed out.
    pub allocated: u64,
    /// Bytes of committed results.
    pub reachable: u64,
    /// Bytes that wait for the result of a unit that was begun.
    pub pending: u64,
    /// Bytes that belong to no unit: lost to crashes.
    pub lost: u64,
    /// Bytes that belong to more than one unit: always 0.
    pub overlapping: u64,
}

/// The state of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobAudit {
    /// Its phases.
    pub phases: Vec<PhaseAudit>,
    /// Its arena.
    pub arena: ArenaAudit,
}

impl JobAudit {
    /// Whether every unit has exactly one result, and no byte is lost or used twice.
    pub fn is_clean(&self) -> bool {
        let phases = self.phases.iter().all(|phase| {
            phase.done == phase.units && phase.committed_twice == 0 && phase.misplaced == 0
        });
        phases && self.arena.lost == 0 && self.arena.overlapping == 0 && self.arena.pending == 0
    }
}

impl Job<'_> {
    /// Looks at every unit and every block, and stores nothing: a read-only mapping will do.
    /// Exact when nobody works on the job.
    ///
    /// # Errors
    /// [`WorkError::Damaged`] names the first unit whose result is damaged.
    pub fn audit(&self) -> Result<JobAudit, WorkError> {
        let mut audit = JobAudit::default();
        let (allocated, last) = self.arena_used()?;
        let mut places: Vec<Place> = Vec::new();
        for number in 0..self.spec.phases.len() {
            let Some(phase) = Phase::new(self, number) else {
                break;
            };
            audit.phases.push(self.audit_phase(&phase)?);
            for (index, line) in phase.lines()?.iter().enumerate() {
                let written = Place::from_word(load64(&line.place, Ordering::Acquire));
                // The last allocation may not be written down yet.
                let unit = phase.first() + index as u32;
                let place = written.or(last.filter(|(u, _)| *u == unit).map(|(_, place)| place));
                let Some(place) = place else { continue };
                places.push(place);
                match load64(&line.result, Ordering::Acquire) {
                    0 => audit.arena.pending += place.blocks * BLOCK,
                    _ => audit.arena.reachable += place.blocks * BLOCK,
                }
            }
        }
        places.sort_by_key(|place| place.start());
        let (mut covered, mut end) = (0, 0);
        for place in places {
            let fresh = place.end.saturating_sub(place.start().max(end));
            covered += fresh * BLOCK;
            audit.arena.overlapping += (place.blocks - fresh) * BLOCK;
            end = end.max(place.end);
        }
        audit.arena.capacity = self.spec.arena;
        audit.arena.allocated = allocated;
        audit.arena.lost = allocated.saturating_sub(covered);
        Ok(audit)
    }

    fn audit_phase(&self, phase: &Phase<'_>) -> Result<PhaseAudit, WorkError> {
        let mut audit = PhaseAudit {
            units: phase.units(),
            ..PhaseAudit::default()
        };
        for (unit, line) in phase.lines()?.iter().enumerate() {
            let attempts = load32(&line.attempts, Ordering::Relaxed);
            audit.attempts += u64::from(attempts);
            audit.redone += u32::from(attempts > 1);
            audit.committed_twice += u32::from(load32(&line.commits, Ordering::Relaxed) > 1);
            if let Some(result) = phase.result(unit as u32)? {
                result.read_all()?;
                audit.done += 1;
                let (result, place) = (&line.result, &line.place);
                let (result, place) = (
                    load64(result, Ordering::Acquire),
                    load64(place, Ordering::Acquire),
                );
                audit.misplaced += u32::from(result != place);
            }
        }
        Ok(audit)
    }
}
