//! `load`: a text becomes a job.

use std::io::Read;
use std::time::Duration;

use lupin::client::RefusalCode;
use lupin::shm::Access;
use lupin::work::{Creation, Job, JobSpec, WorkError};
use lupin::{ClientError, Pod, Segment, Thread};

use crate::error::Error;
use crate::plan::{Calibration, Plan};
use crate::segment;

/// Permissions of a job's segment: its owner's group may work on it.
const MODE: u32 = 0o660;

/// Reads a text, cuts it, and puts it into the pod. Returns a line about what was chosen.
pub fn load(job: &str, unit_time: Duration, mut text: impl Read) -> Result<String, Error> {
    let name = segment::name(job)?;
    let mut bytes = Vec::new();
    let what = "cannot read the text";
    text.read_to_end(&mut bytes)
        .map_err(|source| Error::Io { what, source })?;
    let pod = Pod::attach()?;
    let calibration = Calibration::run(&bytes);
    let plan = Plan::new(&bytes, unit_time, calibration)?;
    let spec = plan.spec(bytes.len() as u64)?;
    let me = pod.register_thread(None)?;
    let segment = make_segment(&pod, job, &name, &spec, &me)?;
    let creation = begin(&pod, job, &segment, &spec, &me)?;
    creation.write_input(0, &bytes)?;
    creation.publish()?;
    Ok(format!(
        "job {job}: {} bytes, {} words, {} units of {} bytes (about {:.2} ms each), \
         {} partitions, {:.1} MiB of the pool",
        bytes.len(),
        plan.words,
        plan.units,
        plan.unit_bytes,
        plan.unit_bytes as f64 * calibration.nanos_per_byte / 1e6,
        plan.partitions,
        segment.len() as f64 / f64::from(1 << 20),
    ))
}

fn begin<'s>(
    pod: &Pod,
    job: &str,
    segment: &'s Segment,
    spec: &JobSpec,
    me: &Thread,
) -> Result<Creation<'s>, Error> {
    match Job::create(segment, spec, me.instance(), &pod.threads_alive()) {
        Err(WorkError::Exists) => Err(Error::JobExists(job.into())),
        other => Ok(other?),
    }
}

/// Creates the segment, or takes over that of a `load` that died.
fn make_segment(
    pod: &Pod,
    job: &str,
    name: &str,
    spec: &JobSpec,
    me: &Thread,
) -> Result<Segment, Error> {
    let size = spec.segment_size()?;
    match create(pod, job, name, size) {
        Err(Error::Client(e)) if e.refusal() == Some(RefusalCode::Exists) => {}
        other => return other,
    }
    let old = segment::open(pod, job, Access::ReadWrite)?;
    match Job::create(&old, spec, me.instance(), &pod.threads_alive()) {
        // An unfinished job that is as large: its creator is dead, and `begin` goes on with it.
        Ok(_) => Ok(old),
        Err(WorkError::Exists) => Err(Error::JobExists(job.into())),
        Err(WorkError::TooSmall { .. }) => {
            // Perhaps a whole job, only smaller than this one would be.
            match segment::job(pod, &old) {
                Err(Error::Work(WorkError::Unfinished(_))) => {}
                Err(other) => return Err(other),
                Ok(_) => return Err(Error::JobExists(job.into())),
            }
            drop(old);
            pod.remove_segment(name)?;
            create(pod, job, name, size)
        }
        Err(other) => Err(other.into()),
    }
}

fn create(pod: &Pod, job: &str, name: &str, size: u64) -> Result<Segment, Error> {
    pod.create_segment(name, size, MODE)
        .map_err(|error| match error {
            ClientError::Refused {
                code: RefusalCode::NoSpace,
                message,
                ..
            } => Error::NoSpace {
                job: job.into(),
                needed_mib: size.div_ceil(2 << 20) * 2,
                reason: message,
            },
            other => other.into(),
        })
}
