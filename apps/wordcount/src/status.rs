//! `status`, `result`, `remove`: looking at a job from outside.

use std::io::Write;
use std::time::{Duration, Instant};

use lupin::Pod;
use lupin::client::RefusalCode;
use lupin::shm::Access;
use lupin::work::{Job, Progress, WorkError};

use crate::error::Error;
use crate::{plain, reduce, segment};

/// How often `status --until` looks. A look reads one word a unit.
const LOOK: Duration = Duration::from_millis(5);

/// How long `remove` waits for nodes to let go of the segment.
const LETTING_GO: Duration = Duration::from_secs(5);

/// How far a job is.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// The map phase.
    pub map: Progress,
    /// The reduce phase.
    pub reduce: Progress,
}

impl Status {
    /// Reads the job's units.
    pub fn of(job: &Job<'_>) -> Result<Self, Error> {
        let phase = |number| match job.phase(number) {
            Some(phase) => Ok(phase.progress()?),
            None => Err(Error::BadJob("it does not have two phases")),
        };
        Ok(Self {
            map: phase(0)?,
            reduce: phase(1)?,
        })
    }

    /// Percent of all units that have their result; 100 only when all have.
    pub fn percent(&self) -> u32 {
        let done = u64::from(self.map.done) + u64::from(self.reduce.done);
        let units = u64::from(self.map.units) + u64::from(self.reduce.units);
        (done * 100 / units.max(1)) as u32
    }

    fn describe(&self, job: &str) -> String {
        format!(
            "job {job}: {} % done ({} of {} map units, {} of {} reduce units)",
            self.percent(),
            self.map.done,
            self.map.units,
            self.reduce.done,
            self.reduce.units
        )
    }

    fn json(&self, job: &str) -> String {
        format!(
            "{{\"job\":\"{job}\",\"percent\":{},\"map\":{{\"done\":{},\"units\":{}}},\
             \"reduce\":{{\"done\":{},\"units\":{}}}}}",
            self.percent(),
            self.map.done,
            self.map.units,
            self.reduce.done,
            self.reduce.units
        )
    }
}

/// Says how far a job is; with `until`, waits for that percentage first.
pub fn status(
    name: &str,
    until: Option<u32>,
    timeout: Option<Duration>,
    json: bool,
) -> Result<String, Error> {
    segment::name(name)?;
    let pod = Pod::attach()?;
    let segment = segment::open(&pod, name, Access::ReadOnly)?;
    let (job, _) = segment::job(&pod, &segment)?;
    let start = Instant::now();
    loop {
        let status = Status::of(&job)?;
        if status.percent() >= until.unwrap_or(0) {
            return Ok(match json {
                true => status.json(name),
                false => status.describe(name),
            });
        }
        let waited = start.elapsed();
        if timeout.is_some_and(|timeout| waited >= timeout) {
            return Err(Error::StillWorking {
                job: name.into(),
                percent: status.percent(),
                waited,
            });
        }
        std::thread::sleep(LOOK);
    }
}

/// The words of a complete job with their counts, in no order.
pub fn counts(name: &str, job: &Job<'_>) -> Result<Vec<(Vec<u8>, u64)>, Error> {
    let status = Status::of(job)?;
    let phase = job
        .phase(1)
        .ok_or(Error::BadJob("it has no reduce phase"))?;
    if !status.map.is_complete() || !status.reduce.is_complete() {
        return Err(Error::Incomplete {
            job: name.into(),
            percent: status.percent(),
        });
    }
    let mut counts = Vec::new();
    for partition in 0..phase.units() {
        let block = phase.result(partition)?.ok_or(WorkError::Damaged {
            unit: partition,
            detail: "it is gone",
        })?;
        counts.append(&mut reduce::read_words(job, &block)?);
    }
    Ok(counts)
}

/// Writes the result of a complete job in its canonical form.
pub fn result(name: &str, out: impl Write) -> Result<(), Error> {
    segment::name(name)?;
    let pod = Pod::attach()?;
    let segment = segment::open(&pod, name, Access::ReadOnly)?;
    let (job, _) = segment::job(&pod, &segment)?;
    let what = "cannot write the result";
    plain::write_sorted(counts(name, &job)?, out).map_err(|source| Error::Io { what, source })
}

/// Removes a job and its segment. Nodes let go of a segment a moment after their processes have
/// ended, so one that is in use is tried again for a while.
pub fn remove(name: &str) -> Result<(), Error> {
    let segment = segment::name(name)?;
    let pod = Pod::attach()?;
    let start = Instant::now();
    loop {
        match pod.remove_segment(&segment) {
            Ok(()) => break,
            Err(error)
                if error.refusal() == Some(RefusalCode::Busy) && start.elapsed() < LETTING_GO =>
            {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(Error::opening(name, error)),
        }
    }
    // The group of its team, if it was worked on by one.
    match pod.remove_group(&segment) {
        Err(error) if error.refusal() != Some(RefusalCode::NotFound) => Err(error.into()),
        _ => Ok(()),
    }
}
