//! A program that lacks one of its stores: does anybody notice?
//!
//! For each store that the operations or their recoveries make, the cases that make it are run
//! once more in a program without it: to completion, and through a sample of the square. The
//! mutant is caught if anything is then bad, panics, ends its process or hangs. A store without
//! which nothing changes but speed makes no mutant; those are listed, with reasons. Orders and fences
//! are none of this suite's business: x86 processors hardly show a wrong one, and the model
//! checkers try them all.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lupin::crash::{self, Site};
use lupin_report::{Bar, Report, Row};

use crate::SuiteError;
use crate::case::Case;
use crate::sites::{Place, code_at, line_of};
use crate::square::{self, Extent, Listener, Square, prepared};
use crate::suite::{self, Options, places, square_task};
use crate::worker::{Counts, Position, Task, Worker, run_all};

/// A mutant that may survive, and why that is right.
#[derive(Debug)]
pub struct Explained {
    /// How its file's path ends.
    pub file: &'static str,
    /// What its line and those after it contain, without indentation.
    pub text: &'static str,
    /// Whether no program can observe that the store is missing, but by its speed: a hint, a
    /// statistic, the second of two that do the same. Such a mutant is none.
    pub changes_nothing: bool,
    /// Why.
    pub why: &'static str,
}

/// All explanations.
pub const EXPLAINED: &[Explained] = &[
    Explained {
        file: "wait/parking.rs",
        text: "or32(self.flag, class::own(), Ordering::Relaxed);",
        changes_nothing: false,
        why: "matters to a second sleeper only, which takes more than the one thread of a case; \
              sleeps are bounded in any case",
    },
    Explained {
        file: "wait/parking.rs",
        text: "or32(self.classes, own, Ordering::Relaxed);",
        changes_nothing: false,
        why: "says that somebody sleeps to whoever wakes, which takes two threads; sleeps are \
              bounded in a case, and without a bound in the models",
    },
    Explained {
        file: "collections/journal.rs",
        text: "let _ = cas64( &header.hint,",
        changes_nothing: true,
        why: "a hint where the end is: without it an appender looks from the start",
    },
    Explained {
        file: "heap/mod.rs",
        text: "store64(hint, 1, Ordering::SeqCst);",
        changes_nothing: true,
        why: "a hint that others freed blocks: without it they are found when memory runs out",
    },
    Explained {
        file: "heap/slab.rs",
        text: "load64(hint, Ordering::Relaxed) != 0 && crate::mem::swap64(hint, 0",
        changes_nothing: true,
        why: "takes a hint back: without it all slabs are looked at again whenever blocks run out",
    },
    Explained {
        file: "heap/settle.rs",
        text: "add64(&self.header.vacated.word",
        changes_nothing: true,
        why: "a hint that there are slabs to adopt: without it they are adopted when memory runs \
              out",
    },
    Explained {
        file: "heap/settle.rs",
        text: "store64(&self.owner, 0, Ordering::Release);",
        changes_nothing: false,
        why: "a line is used again after eight lives of a place, which no case lives through; \
              a unit test does",
    },
    Explained {
        file: "heap/participant.rs",
        text: "store64(&place.epoch.word, 0, Ordering::Relaxed);",
        changes_nothing: false,
        why: "a pin that a dead one left matters to epochs, which these operations do not use; a \
              unit test does",
    },
    Explained {
        file: "work/job.rs",
        text: "store64(&cursor.word, 0, Ordering::Relaxed);",
        changes_nothing: true,
        why: "a cursor only hands units out early; those that it passes by are swept up",
    },
    Explained {
        file: "work/job.rs",
        text: "store64(&unit.claim, 0, Ordering::Relaxed);",
        changes_nothing: true,
        why: "as the claim itself: without it a unit is computed later",
    },
    Explained {
        file: "wait/parking.rs",
        text: "let _ = cas32(self.flag, flag, flag | known",
        changes_nothing: true,
        why: "a flag that is raised and not known to be costs the next sleeper one more barrier",
    },
    Explained {
        file: "lock/tatas.rs",
        text: "if cas64(&self.words.owner, 0, me.word(), Ordering::Acquire).is_ok() {",
        changes_nothing: true,
        why: "one of two attempts at the same swap, of which the other then serves for both",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        text: "&& cas64(&node.owner, 0, me.word(), Ordering::Acquire).is_ok()",
        changes_nothing: true,
        why: "without it the second look, at nodes that the dead left, takes the free ones too",
    },
    Explained {
        file: "work/phase.rs",
        text: "match cas64( &line.claim,",
        changes_nothing: true,
        why: "a claim saves double work and is not needed for a right result: without one, \
              whoever has nothing left to do computes the unit after a while",
    },
    Explained {
        file: "work/phase.rs",
        text: "add32(&line.commits",
        changes_nothing: true,
        why: "a statistic by which an audit would see a unit that is committed twice; it never is",
    },
];

/// How long a mutant may be at one pair: far beyond what the longest wait of the library takes.
const LIMIT: Duration = Duration::from_secs(3);
/// How long a mutant is tried in all. One that is only slow survives.
const MOST: Duration = Duration::from_secs(20);
/// Deaths tried of an operation, and of the recovery after each.
const EXTENT: Extent = Extent::Sample(16, 6);
/// Processes at a time.
const SLOTS: usize = 2;

/// Listens for the first bad thing.
struct Watch<'a> {
    worker: &'a Worker<'a>,
    caught: Cell<bool>,
    what: RefCell<String>,
}

impl Listener for Watch<'_> {
    fn at(&self, position: Position) {
        self.worker.at(position);
    }

    fn count(&self, _: Counts) {}

    fn bad(&self, what: &str) -> bool {
        self.caught.set(true);
        self.what.replace(what.to_owned());
        false
    }

    fn sites(&self, _: &BTreeMap<Site, u64>) {}
}

type CaseAndState = (&'static dyn Case, &'static str);

/// Tries the cases in a program without the store of `site`.
fn try_mutant(site: Site, cases: &[CaseAndState], worker: &Worker<'_>) -> Result<(), SuiteError> {
    for (case, state) in cases {
        let base = prepared(*case, state)?.image();
        let watch = Watch {
            worker,
            caught: Cell::new(false),
            what: RefCell::default(),
        };
        let square = Square {
            case: *case,
            state,
            extent: EXTENT,
        };
        crash::without(site, || square.explore(&base, (0, 0), &watch))?;
        if watch.caught.get() {
            let what = watch.what.borrow();
            worker.say(&format!("caught by {} [{}]: {what}", case.name(), state));
            return Ok(());
        }
    }
    Ok(())
}

/// Which cases make which stores.
fn stores_of(cases: &[CaseAndState]) -> Result<BTreeMap<Place, Vec<CaseAndState>>, SuiteError> {
    let task = |(case, state): &CaseAndState| square_task(*case, state, EXTENT, suite::LIMIT);
    let tasks: Vec<Task<'_>> = cases.iter().map(task).collect();
    let mut stores: BTreeMap<Place, Vec<CaseAndState>> = BTreeMap::new();
    run_all(&tasks, SLOTS, |index, findings| {
        for place in places(&findings) {
            stores.entry(place).or_default().push(cases[index]);
        }
    })?;
    Ok(stores)
}

/// Tries all mutants that `options` mean and reports.
///
/// # Errors
/// [`SuiteError`] if it cannot be run.
pub fn mutants(options: &Options) -> Result<Report, SuiteError> {
    let cases: Vec<CaseAndState> = options
        .cases()?
        .into_iter()
        .flat_map(|case| case.states().iter().map(move |state| (case, *state)))
        .collect();
    eprintln!("looking for the stores of {} cases", cases.len());
    let mut stores: Vec<(Place, Vec<CaseAndState>)> = stores_of(&cases)?.into_iter().collect();
    // The cases' own stores are not the library's.
    stores.retain(|(place, _)| place.0.starts_with("guest-lib/src/"));
    if options.short {
        // Every fourth store.
        let mut index = 0;
        stores.retain(|_| {
            index += 1;
            index % 4 == 0
        });
    }
    let task = |(place, cases): &'_ (Place, Vec<CaseAndState>)| {
        // A site's file is a static string; here it outlives the program's work all the same.
        let file: &'static str = place.0.clone().leak();
        let site = (file, place.1, place.2);
        let cases = cases.clone();
        Task {
            name: format!("{}:{}:{}", place.0, place.1, place.2),
            limit: LIMIT,
            most: MOST,
            work: Box::new(move |_, worker| {
                let result = try_mutant(site, &cases, worker);
                result.unwrap_or_else(|error| panic!("{error}"));
            }),
            place: square::place,
            behind: |_| None,
        }
    };
    let tasks: Vec<Task<'static>> = stores.iter().map(task).collect();
    let mut survivors = BTreeSet::new();
    let mut over = 0;
    run_all(&tasks, SLOTS, |index, findings| {
        over += 1;
        let lost = findings.lost.first();
        let caught = findings.lines.first().or(lost);
        let survives = match findings.cut_short {
            true => "SURVIVES, slowly",
            false => "SURVIVES",
        };
        let verdict = caught.map_or(survives, String::as_str);
        eprintln!(
            "[{over}/{}] without {}: {verdict}",
            tasks.len(),
            tasks[index].name
        );
        if caught.is_none() {
            survivors.insert(index);
        }
    })?;
    Ok(judge(
        &stores,
        &survivors,
        options.is_whole() && !options.short,
    ))
}

fn judge(
    stores: &[(Place, Vec<CaseAndState>)],
    survivors: &BTreeSet<usize>,
    is_whole: bool,
) -> Report {
    let fits = |place: &Place, explained: &Explained| {
        place.0.ends_with(explained.file) && code_at(place).starts_with(explained.text)
    };
    let mut report = Report::new("mutants");
    let (mut unexplained, mut equivalent) = (0, 0);
    for index in survivors {
        let (place, cases) = &stores[*index];
        let why = EXPLAINED.iter().find(|explained| fits(place, explained));
        unexplained += usize::from(why.is_none());
        equivalent += usize::from(why.is_some_and(|explained| explained.changes_nothing));
        let why = why.map_or("not explained", |explained| explained.why);
        let by = cases.first().map_or("", |(case, _)| case.name());
        eprintln!(
            "survivor {}:{} ({by} and others): {}\n    {why}",
            place.0,
            place.1,
            line_of(place)
        );
    }
    let all = stores.len();
    let mutants = all - equivalent;
    let share = 100.0 * (all - survivors.len()) as f64 / mutants.max(1) as f64;
    let caught = Row::new("caught", share, "%").proof(Bar::AtLeast(95.0));
    report.push(caught.n(mutants as u64));
    let survived = (survivors.len() - equivalent) as f64;
    report.push(Row::new("survivors", survived, "mutants").n(mutants as u64));
    let nothing = "stores without which nothing changes but speed";
    report.push(Row::new(nothing, equivalent as f64, "stores").n(all as u64));
    if is_whole {
        let left = Row::new(
            "survivors without an explanation",
            unexplained as f64,
            "mutants",
        );
        report.push(left.proof(Bar::AtMost(0.0)).n(survivors.len() as u64));
        let is_stale = |explained: &&Explained| {
            !survivors
                .iter()
                .any(|index| fits(&stores[*index].0, explained))
        };
        let stale: Vec<_> = EXPLAINED.iter().filter(is_stale).collect();
        for explained in &stale {
            eprintln!(
                "stale: {:?} in {} is caught",
                explained.text, explained.file
            );
        }
        let stale = Row::new("explanations without a survivor", stale.len() as f64, "");
        report.push(stale.proof(Bar::AtMost(0.0)).n(EXPLAINED.len() as u64));
    }
    report
}
