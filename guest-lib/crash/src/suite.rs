//! The whole of it: which cases, how much of each, and the report.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lupin::crash::Site;
use lupin_report::{Bar, Report, Row};

use crate::SuiteError;
use crate::case::Case;
use crate::sites::{self, Place};
use crate::square::{self, Extent, Listener, Square, prepared};
use crate::steps::{self, Depth};
use crate::worker::{Counts, Findings, Position, Task, Worker, run_all};

/// What to try.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only this operation, or those of this module.
    pub op: Option<String>,
    /// A sample, for every day.
    pub short: bool,
    /// The broken case instead of the real ones.
    pub control: bool,
}

/// Processes at a time.
const SLOTS: usize = 2;
/// How long one pair, or one state, may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
/// Findings shown for each operation and state.
const SHOWN: usize = 5;
/// Findings after which a state is given up.
const MOST_BAD: u64 = 50;

impl Options {
    /// The cases that are meant.
    ///
    /// # Errors
    /// [`SuiteError::NoSuchOperation`].
    pub fn cases(&self) -> Result<Vec<&'static dyn Case>, SuiteError> {
        if self.control {
            return Ok(vec![&crate::control::CarelessRepair]);
        }
        let mut cases = crate::cases::all();
        if let Some(op) = &self.op {
            let is_meant = |name: &str| {
                let rest = name.strip_prefix(op.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            cases.retain(|case| is_meant(case.name()));
            if cases.is_empty() {
                return Err(SuiteError::NoSuchOperation(op.clone()));
            }
        }
        Ok(cases)
    }

    /// Whether all cases are meant, so that something missing is missing.
    pub(crate) fn is_whole(&self) -> bool {
        !self.control && self.op.is_none()
    }

    pub(crate) fn extent(&self) -> Extent {
        match self.short {
            true => Extent::Sample(12, 6),
            false => Extent::Full,
        }
    }

    fn depth(&self) -> Depth {
        match self.short {
            true => Depth::AtMost(1500),
            false => Depth::Full,
        }
    }
}

/// Passes what a square finds on to the supervisor.
pub(crate) struct Reporter<'a> {
    worker: &'a Worker<'a>,
    bad: Cell<u64>,
    sites: RefCell<BTreeSet<Site>>,
}

impl<'a> Reporter<'a> {
    pub(crate) fn new(worker: &'a Worker<'a>) -> Self {
        Self {
            worker,
            bad: Cell::new(0),
            sites: RefCell::default(),
        }
    }
}

impl Listener for Reporter<'_> {
    fn at(&self, position: Position) {
        self.worker.at(position);
    }

    fn count(&self, counts: Counts) {
        self.worker.count(counts);
    }

    fn bad(&self, what: &str) -> bool {
        self.worker.say(&format!("bad {what}"));
        self.bad.set(self.bad.get() + 1);
        self.bad.get() < MOST_BAD
    }

    fn sites(&self, sites: &BTreeMap<Site, u64>) {
        for site in sites.keys() {
            // Said at once: this process may not come to its end.
            if self.sites.borrow_mut().insert(*site) {
                self.worker
                    .say(&format!("site {} {} {}", site.0, site.1, site.2));
            }
        }
    }
}

/// The places that a task's lines name.
pub(crate) fn places(findings: &Findings) -> BTreeSet<Place> {
    let place = |line: &String| {
        let mut parts = line.strip_prefix("site ")?.rsplitn(3, ' ');
        let column = parts.next()?.parse().ok()?;
        let line = parts.next()?.parse().ok()?;
        Some((parts.next()?.to_owned(), line, column))
    };
    findings.lines.iter().filter_map(place).collect()
}

/// What is bad in a task's findings.
fn bad(findings: &Findings) -> Vec<String> {
    let said = findings.lines.iter();
    let said = said.filter_map(|line| line.strip_prefix("bad ").map(String::from));
    said.chain(findings.lost.iter().cloned()).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Instructions,
    Square,
}

/// A task that explores the square of a case in a state.
pub(crate) fn square_task<'a>(
    case: &'a dyn Case,
    state: &'a str,
    extent: Extent,
    limit: Duration,
) -> Task<'a> {
    Task {
        name: format!("{} [{state}] pairs of stores", case.name()),
        limit,
        most: Duration::MAX,
        work: Box::new(move |from, worker| {
            let square = Square {
                case,
                state,
                extent,
            };
            let to = Reporter::new(worker);
            let base = prepared(case, state).map(|memory| memory.image());
            let result = base.and_then(|base| square.explore(&base, from, &to));
            result.unwrap_or_else(|error| panic!("{error}"));
        }),
        place: square::place,
        behind: square::behind,
    }
}

/// A task that steps through a case in a state.
fn step_task<'a>(case: &'a dyn Case, state: &'a str, depth: Depth, limit: Duration) -> Task<'a> {
    Task {
        name: format!("{} [{state}] every instruction", case.name()),
        // Beyond the limit of the processes in which it recovers.
        limit: limit * 2,
        most: Duration::MAX,
        work: Box::new(move |_, worker| {
            let result = steps::explore(case, state, depth, limit, worker);
            result.unwrap_or_else(|error| panic!("{error}"));
        }),
        place: |_| "stepping".into(),
        behind: |_| None,
    }
}

/// Runs what `options` mean and reports.
///
/// # Errors
/// [`SuiteError`] if it cannot be run.
pub fn crash(options: &Options) -> Result<Report, SuiteError> {
    let cases = options.cases()?;
    let start = Instant::now();
    let mut tasks = Vec::new();
    let mut parts = Vec::new();
    for case in &cases {
        for state in case.states() {
            tasks.push(step_task(*case, state, options.depth(), LIMIT));
            parts.push(Part::Instructions);
            tasks.push(square_task(*case, state, options.extent(), LIMIT));
            parts.push(Part::Square);
        }
    }
    let mut all: Vec<Findings> = vec![Findings::default(); tasks.len()];
    let mut over = 0;
    run_all(&tasks, SLOTS, |index, findings| {
        over += 1;
        let bad = bad(&findings);
        eprintln!(
            "[{over}/{}] {}: {} bad",
            tasks.len(),
            tasks[index].name,
            bad.len()
        );
        for what in bad.iter().take(SHOWN) {
            eprintln!("    {what}");
        }
        if bad.len() > SHOWN {
            eprintln!("    and {} more", bad.len() - SHOWN);
        }
        all[index] = findings;
    })?;
    let mut report = Report::new("crash");
    let mut total = Counts::default();
    let mut all_bad = 0;
    let mut hit = BTreeSet::new();
    for ((task, findings), part) in tasks.iter().zip(&all).zip(&parts) {
        let n = match part {
            Part::Instructions => findings.counts.points,
            Part::Square => findings.counts.pairs,
        };
        let count = bad(findings).len();
        report.push(
            Row::new(&task.name, count as f64, "bad")
                .proof(Bar::AtMost(0.0))
                .n(n),
        );
        if *part == Part::Instructions {
            let name = format!("{}: distinct states", task.name);
            let states = findings.counts.states;
            report.push(Row::new(name, states as f64, "states").n(n));
            total.points += n;
            total.states += states;
        } else {
            total.pairs += n;
        }
        all_bad += count;
        hit.extend(places(findings));
    }
    let operations: BTreeSet<&str> = cases.iter().map(|case| case.name()).collect();
    let proof = |name: &str, bad: usize, n: u64| {
        Row::new(name, bad as f64, "bad")
            .proof(Bar::AtMost(0.0))
            .n(n)
    };
    report.push(Row::new("all: distinct states", total.states as f64, "states").n(total.points));
    report.push(proof(
        "all: instructions and pairs",
        all_bad,
        total.points + total.pairs,
    ));
    if options.is_whole() {
        let operations = operations.len() as f64;
        report.push(Row::new("operations", operations, "").proof(Bar::AtLeast(20.0)));
        let coverage = sites::coverage(&sites::in_source()?, &hit, sites::EXEMPT);
        for place in &coverage.missing {
            let text = sites::line_of(place);
            eprintln!(
                "no case reaches the store of {}:{}: {text}",
                place.0, place.1
            );
        }
        for exempt in &coverage.stale {
            eprintln!(
                "not needed: the exemption of {:?} in {}",
                exempt.text, exempt.file
            );
        }
        let missing = coverage.missing.len() + coverage.stale.len();
        report.push(proof(
            "stores of the library that no case reaches",
            missing,
            coverage.all as u64,
        ));
    }
    eprintln!(
        "{} operations, {} instructions, {} distinct states, {} pairs, {} stores reached, {all_bad} \
         bad, {:.1} s",
        operations.len(),
        total.points,
        total.states,
        total.pairs,
        hit.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(report)
}

#[cfg(test)]
#[path = "suite_test.rs"]
mod suite_test;
