//! What can go wrong, in words for the operator, and the exit code that says it to programs.

use std::io;
use std::process::ExitCode;

use lupin::ClientError;
use lupin::client::RefusalCode;
use lupin::supervise::SuperviseError;
use lupin::work::WorkError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such job.
    #[error("no job `{0}` in this pod: load one with `lupin-wordcount load --job {0} < TEXT`")]
    NoSuchJob(String),
    /// The job is there already.
    #[error(
        "job `{0}` exists: remove it with `lupin-wordcount remove --job {0}`, or choose another name"
    )]
    JobExists(String),
    /// The job's name is not a name.
    #[error("`{name}` is not a job name: 1 to {max} of A-Z a-z 0-9 . _ -")]
    Name {
        /// What was given.
        name: String,
        /// Longest name, in bytes.
        max: usize,
    },
    /// The pool has no room.
    #[error(
        "job `{job}` needs a segment of {needed_mib} MiB and the pod has no room for it \
         ({reason}): remove other segments, or give the pod a larger pool"
    )]
    NoSpace {
        /// Job.
        job: String,
        /// MiB needed.
        needed_mib: u64,
        /// The agent's words.
        reason: String,
    },
    /// The job's results are not all there.
    #[error(
        "job `{job}` is not complete: {percent} % done; run `lupin-wordcount work --job {job}`"
    )]
    Incomplete {
        /// Job.
        job: String,
        /// Percent of units done.
        percent: u32,
    },
    /// The wait for a job's progress was longer than allowed.
    #[error("job `{job}` is at {percent} % after {waited:?}")]
    StillWorking {
        /// Job.
        job: String,
        /// Percent of units done.
        percent: u32,
        /// How long this command waited.
        waited: std::time::Duration,
    },
    /// A word that does not fit the tables.
    #[error("the text has a word of {0} bytes; words may have at most {max}", max = crate::text::MAX_WORD)]
    LongWord(usize),
    /// The text does not fit.
    #[error("a text of {0} bytes is too large for one job")]
    LargeText(u64),
    /// The job's header makes no sense.
    #[error("the job is damaged or of another version: {0}")]
    BadJob(&'static str),
    /// The audit found something.
    #[error("the audit failed: {0}")]
    Audit(String),
    /// The agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The team.
    #[error(transparent)]
    Team(#[from] SuperviseError),
    /// The job.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// Reading the text or writing the result.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// 2 for a mistake on the command line, 3 for a job that is not there, 1 for all else.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Name { .. } => ExitCode::from(2),
            Self::NoSuchJob(_) => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }

    /// The error for a segment that could not be opened.
    pub fn opening(job: &str, error: ClientError) -> Self {
        match error.refusal() {
            Some(RefusalCode::NotFound) => Self::NoSuchJob(job.into()),
            _ => error.into(),
        }
    }
}
