//! The segment that holds a job: its name, and how it is opened.

use std::time::Duration;

use lupin::shm::Access;
use lupin::work::Job;
use lupin::{Pod, Segment};

use crate::error::Error;
use crate::plan::{KIND, Plan};

/// What the segments of word counts begin with.
const PREFIX: &str = "wc-";
/// Longest name of a job, in bytes.
pub const MAX_NAME: usize = 64 - PREFIX.len();
/// How long to wait for a job that is just being loaded.
const LOADING: Duration = Duration::from_secs(60);

/// The name of a job's segment.
pub fn name(job: &str) -> Result<String, Error> {
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if job.is_empty() || job.len() > MAX_NAME || !job.bytes().all(is_valid) {
        return Err(Error::Name {
            name: job.into(),
            max: MAX_NAME,
        });
    }
    Ok(format!("{PREFIX}{job}"))
}

/// Opens the segment of a job.
pub fn open(pod: &Pod, job: &str, access: Access) -> Result<Segment, Error> {
    pod.open_segment(&name(job)?, access)
        .map_err(|error| Error::opening(job, error))
}

/// Opens the job in a segment, and checks that its plan is one.
pub fn job<'s>(pod: &Pod, segment: &'s Segment) -> Result<(Job<'s>, Plan), Error> {
    let job = Job::open(segment, KIND, &pod.threads_alive(), LOADING)?;
    let plan = Plan::of(job.spec())?;
    Ok((job, plan))
}
