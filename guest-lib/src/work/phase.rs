//! Working on a phase: claim, compute, commit; then sweep up what the dead left.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::arena::ResultBlock;
use super::error::WorkError;
use super::job::Job;
use super::layout::UnitLine;
use crate::liveness::Liveness;
use crate::mem::{add32, add64, cas64, load64};
use crate::wait::Pacer;

/// How long a worker that has nothing else left to do waits for somebody alive before it
/// computes that one's unit as well.
const STRAGGLER: Duration = Duration::from_millis(500);

/// Who works.
#[derive(Debug)]
pub struct Worker<J> {
    /// The instance under which units are claimed.
    pub me: InstanceId,
    /// Judges the owners of claims.
    pub judge: J,
    /// What was done so far.
    pub stats: WorkerStats,
}

/// What a worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerStats {
    /// Units whose result this worker committed.
    pub done: u64,
    /// Units taken from dead owners.
    pub stolen: u64,
    /// Units begun that somebody had begun before: the dead one's work done again, or a slow
    /// one's done a second time.
    pub redone: u64,
    /// Units computed whose result somebody else committed first.
    pub lost: u64,
    /// The most processor time that one unit took. Not the time on the clock, which on a busy
    /// machine says more of the neighbours than of the unit.
    pub slowest: Duration,
}

impl<J> Worker<J> {
    /// A worker that has done nothing yet.
    pub fn new(me: InstanceId, judge: J) -> Self {
        let stats = WorkerStats::default();
        Self { me, judge, stats }
    }
}

/// How far a phase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Units with a result.
    pub done: u32,
    /// Units in all.
    pub units: u32,
}

impl Progress {
    /// Whether every unit has its result.
    pub fn is_complete(self) -> bool {
        self.done == self.units
    }
}

/// One phase of a job.
#[derive(Debug)]
pub struct Phase<'j> {
    job: &'j Job<'j>,
    number: usize,
    first: u32,
    units: u32,
}

impl<'j> Phase<'j> {
    pub(super) fn new(job: &'j Job<'_>, number: usize) -> Option<Self> {
        let units = *job.spec.phases.get(number)?;
        let first = job.spec.phases[..number].iter().sum();
        Some(Self {
            job,
            number,
            first,
            units,
        })
    }

    /// Units of the phase.
    pub fn units(&self) -> u32 {
        self.units
    }

    pub(super) fn first(&self) -> u32 {
        self.first
    }

    /// How far the phase is. Counted from the results, the only truth there is.
    ///
    /// # Errors
    /// [`WorkError::Memory`].
    pub fn progress(&self) -> Result<Progress, WorkError> {
        let lines = self.lines()?;
        let done = lines.iter().filter(|line| is_done(line)).count() as u32;
        let units = self.units;
        Ok(Progress { done, units })
    }

    /// The result of a unit of this phase, if it is committed.
    ///
    /// # Errors
    /// [`WorkError::Damaged`].
    pub fn result(&self, unit: u32) -> Result<Option<ResultBlock<'j>>, WorkError> {
        if unit >= self.units {
            return Ok(None);
        }
        self.job.result(self.first + unit)
    }

    /// Works until every unit of the phase has its result, whoever computed it.
    ///
    /// `compute` is given a unit's number in the phase and an empty buffer for its result; it
    /// must be a pure function of the job's input and of earlier phases.
    ///
    /// # Errors
    /// Those of `compute` (the unit stays claimed by this worker, to be taken over when it is
    /// dead), and [`WorkError`].
    pub fn run<J, E>(
        &self,
        worker: &mut Worker<J>,
        mut compute: impl FnMut(u32, &mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E>
    where
        J: Liveness,
        E: From<WorkError>,
    {
        let mut buffer = Vec::new();
        let mut attempt = |worker: &mut Worker<J>, unit: u32| {
            let start = processor_time();
            let line = self.line(unit)?;
            // Relaxed: a statistic.
            if add32(&line.attempts, 1, Ordering::Relaxed) > 0 {
                worker.stats.redone += 1;
            }
            buffer.clear();
            compute(unit, &mut buffer)?;
            if self.commit(unit, &buffer)? {
                worker.stats.done += 1;
            } else {
                worker.stats.lost += 1;
            }
            let took = processor_time().saturating_sub(start);
            worker.stats.slowest = worker.stats.slowest.max(took);
            Ok::<_, E>(())
        };
        // Each unit is handed out once by the cursor. A unit whose worker dies is not handed
        // out again: that is what the sweep is for.
        while let Some(unit) = self.next_of_cursor()? {
            if self.claim(worker, unit)? == Claim::Mine {
                attempt(worker, unit)?;
            }
        }
        let mut pacer = Pacer::new(None);
        let mut waiting_since = Instant::now();
        let mut open = self.open_units(0..self.units)?;
        while !open.is_empty() {
            let before = open.len();
            let mut worked = false;
            for unit in open.iter().copied() {
                if self.claim(worker, unit)? == Claim::Mine {
                    attempt(worker, unit)?;
                    worked = true;
                }
            }
            if waiting_since.elapsed() >= STRAGGLER
                && let Some(unit) = self.open_units(open.iter().copied())?.first()
            {
                attempt(worker, *unit)?;
                worked = true;
            }
            open = self.open_units(open)?;
            if worked || open.len() < before {
                pacer = Pacer::new(None);
                waiting_since = Instant::now();
            } else if !open.is_empty() {
                // Without a deadline it never times out.
                let _ = pacer.sleep();
            }
        }
        Ok(())
    }

    fn next_of_cursor(&self) -> Result<Option<u32>, WorkError> {
        let cursor = &self.job.header()?.cursors[self.number].word;
        // Tested first: a phase that is swept for hours must not wrap the cursor.
        if load64(cursor, Ordering::Relaxed) >= self.units.into() {
            return Ok(None);
        }
        let unit = add64(cursor, 1, Ordering::Relaxed);
        Ok((unit < self.units.into()).then_some(unit as u32))
    }

    /// Claims a unit that has no result: nobody's, or a dead owner's.
    fn claim<J: Liveness>(&self, worker: &mut Worker<J>, unit: u32) -> Result<Claim, WorkError> {
        let line = self.line(unit)?;
        if is_done(line) {
            return Ok(Claim::Taken);
        }
        let owner = InstanceId::from_word(load64(&line.claim, Ordering::Acquire));
        if owner == worker.me {
            // Claimed by an attempt of this worker that failed.
            return Ok(Claim::Mine);
        }
        if !owner.is_none() && worker.judge.is_alive(owner) {
            return Ok(Claim::Taken);
        }
        match cas64(
            &line.claim,
            owner.word(),
            worker.me.word(),
            Ordering::AcqRel,
        ) {
            Ok(_) => {
                worker.stats.stolen += u64::from(!owner.is_none());
                Ok(Claim::Mine)
            }
            Err(_) => Ok(Claim::Taken),
        }
    }

    /// Stores a result and commits it; false if the unit had its result already.
    fn commit(&self, unit: u32, result: &[u8]) -> Result<bool, WorkError> {
        let line = self.line(unit)?;
        if is_done(line) {
            return Ok(false);
        }
        let place = self.job.place_for(self.first + unit, result.len() as u64)?;
        self.job.fill(place, result)?;
        // The commit point. Release: whoever reads the word reads the result. All candidates
        // are the same word.
        if cas64(&line.result, 0, place.word(), Ordering::AcqRel).is_err() {
            return Ok(false);
        }
        add32(&line.commits, 1, Ordering::Relaxed);
        Ok(true)
    }

    fn open_units(&self, units: impl IntoIterator<Item = u32>) -> Result<Vec<u32>, WorkError> {
        let lines = self.lines()?;
        let is_open = |unit: &u32| lines.get(*unit as usize).is_some_and(|line| !is_done(line));
        Ok(units.into_iter().filter(is_open).collect())
    }

    pub(super) fn lines(&self) -> Result<&'j [UnitLine], WorkError> {
        let first = self.first as usize;
        Ok(&self.job.units()?[first..first + self.units as usize])
    }

    fn line(&self, unit: u32) -> Result<&'j UnitLine, WorkError> {
        Ok(&self.lines()?[unit as usize])
    }
}

#[derive(PartialEq, Eq)]
enum Claim {
    Mine,
    Taken,
}

fn is_done(line: &UnitLine) -> bool {
    load64(&line.result, Ordering::Acquire) != 0
}

/// Processor time of this thread; zero if the kernel does not say.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
