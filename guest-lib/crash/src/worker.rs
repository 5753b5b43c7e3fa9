//! Tasks in processes of their own, some at a time, with a limit for each step.
//!
//! A task says where it is before each step. If it hangs there, or its process ends there, that
//! is reported as the task's finding, and the task goes on behind it in a new process.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::SuiteError;
use crate::memory::Shared;
use crate::process::{Child, describe, stay_on_one_processor, wait_readable};

/// Where a task is: what it counts in two levels.
pub type Position = (u64, u64);

/// What a task counts, all in one shared page so that nothing is lost with its process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions, or stores, before which the operation was ended.
    pub points: u64,
    /// Distinct states of the shared memory.
    pub states: u64,
    /// Pairs of a death in the operation and a death in its recovery.
    pub pairs: u64,
}

const TICKS: usize = 0;
const FIRST: usize = 1;
const SECOND: usize = 2;
const COUNTS: usize = 3;

/// The process of a task, seen from inside.
#[derive(Debug)]
pub struct Worker<'t> {
    page: &'t Shared,
    pipe: &'t File,
}

impl Worker<'_> {
    /// Says where the task is from here on.
    pub fn at(&self, position: Position) {
        let words = self.page.words();
        words[FIRST].store(position.0, Ordering::Relaxed);
        words[SECOND].store(position.1, Ordering::Relaxed);
        self.tick();
    }

    /// Says that the task gets on.
    pub fn tick(&self) {
        self.page.words()[TICKS].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds to what is counted.
    pub fn count(&self, more: Counts) {
        let words = &self.page.words()[COUNTS..];
        for (word, more) in words.iter().zip([more.points, more.states, more.pairs]) {
            word.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// Reports something: one line.
    pub fn say(&self, line: &str) {
        let line = line.replace('\n', " | ") + "\n";
        // A supervisor that is gone takes this process with it.
        let _ = (&mut &*self.pipe).write_all(line.as_bytes());
    }
}

/// What to do in a process of its own.
pub struct Task<'a> {
    /// For people.
    pub name: String,
    /// How long it may be at one position.
    pub limit: Duration,
    /// How long it may take in all; what it has found by then is what it finds.
    pub most: Duration,
    /// The work, from a position on.
    #[allow(clippy::type_complexity, reason = "it is used once")]
    pub work: Box<dyn Fn(Position, &Worker<'_>) + 'a>,
    /// A position in words.
    pub place: fn(Position) -> String,
    /// Where to go on behind a position whose step hung or ended the process; `None` if that is
    /// all.
    pub behind: fn(Position) -> Option<Position>,
}

/// What came of a task.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// What it reported.
    pub lines: Vec<String>,
    /// What it counted.
    pub counts: Counts,
    /// Steps that hung or ended the process, in words.
    pub lost: Vec<String>,
    /// Whether it was cut short, after [`Task::most`].
    pub cut_short: bool,
}

/// After so many lost processes a task is given up: it would take for ever.
const MOST_LOST: usize = 8;

struct Running<'t, 'a> {
    index: usize,
    task: &'t Task<'a>,
    slot: usize,
    page: Shared,
    child: Child,
    unread: Vec<u8>,
    ticks: u64,
    since: Instant,
    start: Instant,
    findings: Findings,
}

impl<'t, 'a> Running<'t, 'a> {
    fn start(index: usize, task: &'t Task<'a>, slot: usize) -> Result<Self, SuiteError> {
        let page = Shared::new(1)?;
        let child = begin(task, (0, 0), slot, &page)?;
        Ok(Self {
            index,
            task,
            slot,
            page,
            child,
            unread: Vec::new(),
            ticks: 0,
            since: Instant::now(),
            start: Instant::now(),
            findings: Findings::default(),
        })
    }

    /// Takes what was written; true at the end.
    fn read(&mut self) -> Result<bool, SuiteError> {
        let mut buffer = [0; 1 << 16];
        let n = self.child.pipe.read(&mut buffer)?;
        self.unread.extend_from_slice(&buffer[..n]);
        while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            self.findings.lines.push(line);
        }
        Ok(n == 0)
    }

    /// Whether it makes no progress, or takes too long in all.
    fn is_stuck(&mut self) -> bool {
        self.findings.cut_short = self.start.elapsed() > self.task.most;
        let ticks = self.page.words()[TICKS].load(Ordering::Relaxed);
        if ticks != self.ticks {
            self.ticks = ticks;
            self.since = Instant::now();
        }
        self.findings.cut_short || self.since.elapsed() > self.task.limit
    }

    /// Ends the process that is stuck or ended; goes on behind its position if it was lost.
    fn reap(&mut self) -> Result<bool, SuiteError> {
        let stuck = self.is_stuck();
        let status = match stuck {
            true => nix::sys::signal::kill(self.child.pid, nix::sys::signal::Signal::SIGKILL)
                .and_then(|()| nix::sys::wait::waitpid(self.child.pid, None)),
            false => nix::sys::wait::waitpid(self.child.pid, None),
        }?;
        if !stuck && matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)) {
            return Ok(true);
        }
        while !self.read()? {}
        if self.findings.cut_short {
            return Ok(true);
        }
        let words = self.page.words();
        let [first, second] = [FIRST, SECOND].map(|at| words[at].load(Ordering::Relaxed));
        let position = (first, second);
        let place = (self.task.place)(position);
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.unread)).into_owned();
        self.findings.lost.push(match stuck {
            true => format!("{place}: hangs"),
            false => format!("{place}: process {} {rest}", describe(status)),
        });
        let behind = (self.task.behind)(position);
        let Some(position) = behind.filter(|_| self.findings.lost.len() < MOST_LOST) else {
            return Ok(true);
        };
        self.child = begin(self.task, position, self.slot, &self.page)?;
        self.since = Instant::now();
        Ok(false)
    }
}

/// Starts a process for a task, from a position on.
fn begin(task: &Task<'_>, from: Position, slot: usize, page: &Shared) -> Result<Child, SuiteError> {
    Child::start(|pipe| {
        stay_on_one_processor(slot);
        (task.work)(from, &Worker { page, pipe });
    })
}

/// Runs all tasks, `slots` at a time; tells `done` of each one, by its index, when it is over.
///
/// # Errors
/// [`SuiteError::System`] if there are no processes or pipes to be had.
pub fn run_all(
    tasks: &[Task<'_>],
    slots: usize,
    mut done: impl FnMut(usize, Findings),
) -> Result<(), SuiteError> {
    crate::process::keep_panics_quiet();
    let mut waiting = tasks.iter().enumerate();
    let mut free: Vec<usize> = (0..slots.max(1)).rev().collect();
    let mut running: Vec<Running<'_, '_>> = Vec::new();
    loop {
        while !free.is_empty()
            && let Some((index, task)) = waiting.next()
        {
            let slot = free.pop().unwrap_or(0);
            running.push(Running::start(index, task, slot)?);
        }
        if running.is_empty() {
            return Ok(());
        }
        let mut pipes: Vec<&File> = running.iter().map(|task| &task.child.pipe).collect();
        let ready = wait_readable(&mut pipes, Duration::from_millis(100))?;
        for index in (0..running.len()).rev() {
            let task = &mut running[index];
            let is_over = match ready.contains(&index) {
                true => task.read()? && task.reap()?,
                false => task.is_stuck() && task.reap()?,
            };
            if is_over {
                let mut task = running.swap_remove(index);
                let words = &task.page.words()[COUNTS..];
                let [points, states, pairs] = [0, 1, 2].map(|at| words[at].load(Ordering::Relaxed));
                task.findings.counts = Counts {
                    points,
                    states,
                    pairs,
                };
                free.push(task.slot);
                done(task.index, task.findings);
            }
        }
    }
}
