//! The nested test host: a whole emulated machine with KVM, for machines without.
//!
//! QEMU (TCG, which emulates AMD's SVM) boots a stock Debian kernel with kvm-amd
//! from an initramfs made for the occasion. In it this very binary is PID 1: it
//! loads the modules, starts the given program and sends its output and its end
//! through a virtio-serial port. Nothing is written to disk, and QEMU dies with
//! us, however we end.
//!
//! Emulation is slow and, once in a while, a boot hangs or the emulated kernel
//! crashes in the midst of KVM. So booting has a time limit of its own, and a lost
//! host one retry from the beginning, which is counted and reported. A failure of the
//! program is none of that, with one exception that a job may name: a symptom in its output
//! (for tests, the triple fault of a guest that boots and runs thousands of times without one)
//! which says that the emulated processor went wrong.

mod image;
pub(crate) mod init;
mod machine;
pub(crate) mod runner;
mod wire;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use lupin_images::ImageError;

use crate::host::{self, RunError, say};
use crate::setup::{self, Component, Series, SetupError};
use machine::{Event, Machine};
use wire::Frame;

/// Booting usually takes five seconds; on a busy machine several times that.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What the nested host itself runs, unless another is asked for.
pub(crate) const HOST_KERNEL: Series = Series::V6_1;

/// What guests of the nested host get on their command line. An emulator has no use for
/// mitigations, which make a quarter of a guest's boot, and every character on a console is an exit.
pub(crate) const GUEST_WORDS: &str = "quiet mitigations=off";

/// The status with which `timeout(1)` reports a time limit.
pub(crate) const STATUS_TIME_LIMIT: u8 = 124;

/// What to run in the nested host.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// A static program of this machine, or the name of one in there (`sh`).
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Files to put in there: here, there.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Symbolic links to make in there: link, target.
    pub(crate) links: Vec<(String, String)>,
    /// Files of this machine that are its disks, read-only: what is too large for its memory.
    pub(crate) disks: Vec<PathBuf>,
    pub(crate) timeout: Duration,
    pub(crate) cpus: u32,
    /// In QEMU's notation, such as `4G`.
    pub(crate) memory: String,
    pub(crate) kernel: Series,
    /// Where to copy the host's console; it is shown anyway when the host fails.
    pub(crate) console: Option<PathBuf>,
    /// A file that the program writes in there, and where it goes here.
    pub(crate) result: Option<(String, PathBuf)>,
    /// Words in the program's output which say, if the program fails, that the emulator did.
    pub(crate) symptom: Option<&'static str>,
}

impl Job {
    /// A job with the usual machine.
    pub(crate) fn new(program: impl Into<PathBuf>, args: Vec<String>) -> Self {
        Self {
            program: program.into(),
            args,
            env: Vec::new(),
            files: Vec::new(),
            links: Vec::new(),
            disks: Vec::new(),
            timeout: Duration::from_secs(900),
            cpus: default_cpus(),
            memory: "4G".into(),
            kernel: HOST_KERNEL,
            console: None,
            result: None,
            symptom: None,
        }
    }
}

/// As many as the machine has, but two at least (races want company) and eight at most.
pub(crate) fn default_cpus() -> u32 {
    let here = std::thread::available_parallelism().map_or(2, usize::from);
    u32::try_from(here.clamp(2, 8)).unwrap_or(8)
}

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Exited(i32),
    Killed(i32),
}

impl Ending {
    /// The exit status that says the same in a shell.
    pub(crate) fn status(self) -> u8 {
        let status = match self {
            Ending::Exited(code) => code,
            Ending::Killed(signal) => 128 + signal,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

/// Why there is no ending to report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NestedError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("cannot prepare QEMU ({what}): {source}")]
    Prepare {
        what: &'static str,
        source: io::Error,
    },
    #[error("time limit: the program had not ended after {} s and was stopped with its host", .0.as_secs())]
    TimeLimit(Duration),
    #[error("the nested host was lost, twice: {reason}; its console said last:\n{console}")]
    Lost { reason: String, console: String },
    #[error(
        "the nested host ended before the program did ({reason}); its console said last:\n{console}"
    )]
    HostDied { reason: String, console: String },
    #[error("the nested host could not run the program: {0}")]
    Failed(String),
    #[error("cannot pass on the program's output: {0}")]
    Output(io::Error),
    #[error("cannot write the program's result to {}: {source}", path.display())]
    Result { path: PathBuf, source: io::Error },
}

impl NestedError {
    /// The exit status for this error: as `timeout(1)` and `env(1)` have it.
    pub(crate) fn status(&self) -> u8 {
        match self {
            NestedError::TimeLimit(_) => STATUS_TIME_LIMIT,
            NestedError::Run(RunError::Interrupted)
            | NestedError::Setup(SetupError::Run(RunError::Interrupted)) => 130,
            _ => 125,
        }
    }
}

/// Runs a job to its end. Its output appears on our stdout and stderr as it is written.
pub(crate) fn run(job: &Job) -> Result<Ending, NestedError> {
    let cache = setup::ensure(&[
        Component::Kernel(job.kernel),
        Component::Busybox,
        Component::Qemu,
    ])?;
    let image = image::build(&cache, job)?;
    let mut retries = 0;
    loop {
        let (reason, console) = match attempt(&cache, &image, job, retries)? {
            Attempt::Ended(ending) => return Ok(ending),
            Attempt::Lost { reason, console } => (reason, console),
        };
        if retries > 0 {
            return Err(NestedError::Lost { reason, console });
        }
        retries += 1;
        report_retry();
        say!("nested host lost: {reason}; its console said last:");
        for line in console.lines() {
            say!("  | {line}");
        }
        say!("starting again from the beginning: retry {retries} of 1 (counted)");
    }
}

/// Names a file that gets a line for each retry, so that a run of many tests can count them.
pub(crate) const RETRY_REPORT: &str = "LUPIN_NESTED_RETRY_REPORT";

fn report_retry() {
    let Some(path) = std::env::var_os(RETRY_REPORT) else {
        return;
    };
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&path);
    if let Err(error) = file.and_then(|mut file| file.write_all(b"retry\n")) {
        say!("cannot count the retry in {}: {error}", path.display());
    }
}

enum Attempt {
    Ended(Ending),
    /// The emulated machine did not come up, or its kernel or QEMU crashed.
    Lost {
        reason: String,
        console: String,
    },
}

fn attempt(
    cache: &setup::Cache,
    image: &image::Image,
    job: &Job,
    retries: u32,
) -> Result<Attempt, NestedError> {
    let started = Instant::now();
    let mut machine = Machine::start(cache, image, job)?;
    let mut tail = Tail::new(job)?;
    let mut symptom = Symptom::new(job);
    let mut result = Vec::new();
    let mut up: Option<Instant> = None;
    loop {
        let event = match machine.events.recv_timeout(host::POLL) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            // Both ends of QEMU are closed and everything it sent was seen.
            Err(RecvTimeoutError::Disconnected) => {
                let (mut reason, console) = (machine.stop(), tail.text());
                if let Some(crash) = &tail.crash {
                    reason = format!("its kernel crashed: {crash}");
                }
                // A program may power its host off; that is no crash.
                let lost = up.is_none() || machine.crashed() || tail.crash.is_some();
                return if lost {
                    Ok(Attempt::Lost { reason, console })
                } else {
                    Err(NestedError::HostDied { reason, console })
                };
            }
        };
        match event {
            None => {}
            Some(Event::Console(bytes)) => tail.push(&bytes),
            Some(Event::Broken(error)) => {
                let reason = format!("its port sent nonsense: {error}");
                return Err(NestedError::HostDied {
                    reason,
                    console: tail.text(),
                });
            }
            Some(Event::Frame(Frame::Ready)) => {
                say!("nested host up in {:.1} s", started.elapsed().as_secs_f32());
                up = Some(Instant::now());
            }
            Some(Event::Frame(Frame::Stdout(data))) => {
                symptom.look(&data);
                pass_on(io::stdout(), &data)?;
            }
            Some(Event::Frame(Frame::Stderr(data))) => {
                symptom.look(&data);
                pass_on(io::stderr(), &data)?;
            }
            Some(Event::Frame(Frame::Result(data))) => result.extend(data),
            Some(Event::Frame(Frame::Failed(reason))) => return Err(NestedError::Failed(reason)),
            Some(Event::Frame(Frame::Exited(code))) if code != 0 && symptom.is_seen => {
                return Ok(Attempt::Lost {
                    reason: format!(
                        "the program failed (exit status {code}), and its output tells of a {}",
                        symptom.words
                    ),
                    console: tail.text(),
                });
            }
            Some(Event::Frame(Frame::Exited(code))) => {
                keep_result(job, &result)?;
                return Ok(Attempt::Ended(ended(Ending::Exited(code), up, retries)));
            }
            Some(Event::Frame(Frame::Killed(signal))) => {
                return Ok(Attempt::Ended(ended(Ending::Killed(signal), up, retries)));
            }
        }
        if host::interrupted() {
            return Err(RunError::Interrupted.into());
        }
        match up {
            Some(since) if since.elapsed() > job.timeout => {
                return Err(NestedError::TimeLimit(job.timeout));
            }
            None if started.elapsed() > BOOT_LIMIT => {
                let reason = format!("it was not up after {} s", BOOT_LIMIT.as_secs());
                return Ok(Attempt::Lost {
                    reason,
                    console: tail.text(),
                });
            }
            _ => {}
        }
    }
}

fn ended(ending: Ending, up: Option<Instant>, retries: u32) -> Ending {
    let seconds = up.map_or(0.0, |since| since.elapsed().as_secs_f32());
    let how = match ending {
        Ending::Exited(code) => format!("exit status {code}"),
        Ending::Killed(signal) => format!("killed by signal {signal}"),
    };
    say!("nested host: {how} after {seconds:.1} s, {retries} retries");
    ending
}

/// Writes what the program left as its result, if it left anything.
fn keep_result(job: &Job, bytes: &[u8]) -> Result<(), NestedError> {
    match &job.result {
        Some((_, here)) if !bytes.is_empty() => {
            std::fs::write(here, bytes).map_err(|source| NestedError::Result {
                path: here.clone(),
                source,
            })
        }
        _ => Ok(()),
    }
}

fn pass_on(mut out: impl Write, data: &[u8]) -> Result<(), NestedError> {
    out.write_all(data)
        .and_then(|()| out.flush())
        .map_err(NestedError::Output)
}

/// Looks for a job's symptom in a stream that comes in pieces.
struct Symptom {
    words: &'static str,
    is_seen: bool,
    /// The end of the last piece, in which the words may have begun.
    rest: Vec<u8>,
}

impl Symptom {
    fn new(job: &Job) -> Self {
        Self {
            words: job.symptom.unwrap_or_default(),
            is_seen: false,
            rest: Vec::new(),
        }
    }

    fn look(&mut self, data: &[u8]) {
        let length = self.words.len();
        if length == 0 || self.is_seen {
            return;
        }
        self.rest.extend_from_slice(data);
        self.is_seen = self
            .rest
            .windows(length)
            .any(|window| window == self.words.as_bytes());
        self.rest
            .drain(..self.rest.len().saturating_sub(length - 1));
    }
}

/// The last lines of the console.
struct Tail {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    /// The first line that tells of a crash of the host's own kernel. Consoles of guests do not
    /// come out here.
    crash: Option<String>,
    copy: Option<std::fs::File>,
}

impl Tail {
    const LINES: usize = 40;
    const CRASHES: [&str; 3] = ["Kernel panic", "BUG:", "Oops"];

    fn new(job: &Job) -> Result<Self, NestedError> {
        let create = |path| {
            std::fs::File::create(path).map_err(|source| NestedError::Prepare {
                what: "the console's file",
                source,
            })
        };
        let copy = job.console.as_ref().map(create).transpose()?;
        Ok(Self {
            lines: VecDeque::new(),
            partial: Vec::new(),
            crash: None,
            copy,
        })
    }

    fn push(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.copy {
            // The copy is a convenience; the program's result does not depend on it.
            let _ = file.write_all(bytes);
        }
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
            self.partial.clear();
            if self.crash.is_none() && Self::CRASHES.iter().any(|sign| line.contains(sign)) {
                self.crash = Some(line.clone());
            }
            self.lines.push_back(line);
            if self.lines.len() > Self::LINES {
                self.lines.pop_front();
            }
        }
    }

    fn text(&self) -> String {
        let mut lines: Vec<String> = self.lines.iter().cloned().collect();
        if !self.partial.is_empty() {
            lines.push(String::from_utf8_lossy(&self.partial).into_owned());
        }
        if lines.is_empty() {
            "(nothing)".into()
        } else {
            lines.join("\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symptom_is_seen_across_pieces_and_only_if_it_is_there() {
        let mut job = Job::new("x", Vec::new());
        job.symptom = Some("triple fault");
        for pieces in [&["a triple fault!"][..], &["trip", "le", " fau", "lt"]] {
            let mut symptom = Symptom::new(&job);
            for piece in pieces {
                assert!(!symptom.is_seen);
                symptom.look(piece.as_bytes());
            }
            assert!(symptom.is_seen);
        }
        let mut symptom = Symptom::new(&job);
        symptom.look(b"triple");
        symptom.look(b"fault");
        assert!(!symptom.is_seen);
        job.symptom = None;
        let mut symptom = Symptom::new(&job);
        symptom.look(b"anything");
        assert!(!symptom.is_seen);
    }
}
