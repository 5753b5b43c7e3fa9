//! The suite: which models, how much of them, and the report.

use std::collections::BTreeSet;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use lupin_report::{Bar, Report, Row};

use crate::jobs;
use crate::model::{Effort, Model};
use crate::models;
use crate::on_loom::Found;
use crate::orders;

/// How much is run.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    effort: Effort,
    schedules: u64,
    seed: u64,
}

impl Form {
    /// Some seconds in all.
    pub const SHORT: Self = Self {
        effort: Effort::Short,
        schedules: 6_000,
        seed: 1,
    };

    /// `schedules` for each structure, from `seed` on.
    pub const fn long(schedules: u64, seed: u64) -> Self {
        Self {
            effort: Effort::Long,
            schedules,
            seed,
        }
    }
}

/// Schedules of one seed; the next begin with the next, on whatever thread has time for them.
const CHUNK: u64 = 50_000;

/// All models, the model of that name, or those of the structure of that name.
pub fn select(name: Option<&str>) -> Vec<&'static Model> {
    let is_meant = |model: &&Model| match name {
        None => true,
        Some(name) => model.name == name || model.structure() == name,
    };
    models::all().into_iter().filter(is_meant).collect()
}

/// A part of a run: what one thread does at a time.
struct Part<'m> {
    model: &'m Model,
    engine: Engine,
}

#[derive(Clone, Copy)]
enum Engine {
    Loom { preemptions: usize },
    Shuttle { count: u64, seed: u64 },
}

/// What is to be run, in the order of the report.
fn parts<'m>(models: &[&'m Model], form: Form) -> Vec<Part<'m>> {
    let mut parts = Vec::new();
    for &model in models {
        if let Some(preemptions) = model.preemptions(form.effort) {
            let engine = Engine::Loom { preemptions };
            parts.push(Part { model, engine });
        }
        if !model.shuttle {
            continue;
        }
        let of_structure =
            |other: &&&Model| other.shuttle && other.structure() == model.structure();
        let share = models.iter().filter(of_structure).count() as u64;
        let few = model.is_heavy && form.effort == Effort::Short;
        let schedules = (form.schedules / if few { 4 } else { 1 }).div_ceil(share);
        let chunks = (0..schedules.div_ceil(CHUNK)).map(|chunk| Engine::Shuttle {
            count: CHUNK.min(schedules - chunk * CHUNK),
            seed: form.seed + chunk,
        });
        parts.extend(chunks.map(|engine| Part { model, engine }));
    }
    parts
}

/// Runs models, on `jobs` threads; the report's rows are proofs that nothing failed, and that
/// what is broken on purpose was caught.
pub fn run(models: &[&Model], form: Form, jobs: NonZero<usize>) -> Report {
    let mut report = Report::new("lupin-models");
    push_controls(&mut report, jobs);
    let parts = parts(models, form);
    // Once one has failed, no more schedules of a model are needed.
    let failed = Mutex::new(BTreeSet::new());
    let results = jobs::each(jobs, &parts, |Part { model, engine }| {
        let failed = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed().contains(model.name) {
            return Found::default();
        }
        let start = Instant::now();
        let (name, found) = match *engine {
            Engine::Loom { .. } => ("loom", model.loom(form.effort)),
            Engine::Shuttle { count, seed } => ("shuttle", model.shuttle(count, seed)),
        };
        progress(model, name, &found, start);
        if found.failure.is_some() {
            failed().insert(model.name);
        }
        found
    });
    let mut results = parts.iter().zip(results).peekable();
    while let Some((part, mut found)) = results.next() {
        match part.engine {
            Engine::Loom { preemptions } => {
                let unit = match found.is_complete {
                    true => "failures",
                    false => "failures (search cut short)",
                };
                let what = format!("loom, at most {preemptions} pre-emptions");
                report.push(row(part.model, &what, unit, &found));
            }
            Engine::Shuttle { .. } => {
                let is_same = |next: &Part| {
                    next.model.name == part.model.name
                        && matches!(next.engine, Engine::Shuttle { .. })
                };
                while let Some((_, more)) = results.next_if(|(next, _)| is_same(next)) {
                    found.executions += more.executions;
                    found.deaths += more.deaths;
                    found.failure = found.failure.or(more.failure);
                }
                report.push(row(part.model, "schedules", "failures", &found));
            }
        }
    }
    report
}

/// Runs what is broken on purpose; the rows are proofs that it was caught, and for its reason.
pub fn controls(jobs: NonZero<usize>) -> Report {
    let mut report = Report::new("lupin-models controls");
    push_controls(&mut report, jobs);
    report
}

fn push_controls(report: &mut Report, jobs: NonZero<usize>) {
    let rows = jobs::each(jobs, models::controls(), |control| {
        let model = control.model;
        let start = Instant::now();
        let (engine, found) = match model.loom {
            Some(_) => ("loom", model.loom(Effort::Short)),
            None => ("shuttle", model.shuttle(2_000, 1)),
        };
        let caught = found
            .failure
            .as_deref()
            .is_some_and(|f| f.contains(control.because));
        let took = start.elapsed().as_secs_f64();
        let verdict = if caught { "caught" } else { "NOT CAUGHT" };
        eprintln!("{:24} {engine:8} {verdict}, {took:6.1} s", model.name);
        if let (false, Some(failure)) = (caught, &found.failure) {
            eprintln!("{failure}");
        }
        let name = format!("{}: {} sees it", model.name, control.oracle);
        let caught = f64::from(u8::from(caught));
        Row::new(name, caught, "caught")
            .n(found.executions)
            .proof(Bar::AtLeast(1.0))
    });
    rows.into_iter().for_each(|row| report.push(row));
}

fn progress(model: &Model, engine: &str, found: &Found, start: Instant) {
    let took = start.elapsed().as_secs_f64();
    eprintln!(
        "{:24} {engine:8} {:9} executions, {:9} with a death, {took:6.1} s",
        model.name, found.executions, found.deaths
    );
    if let Some(failure) = &found.failure {
        eprintln!("{failure}");
    }
}

fn row(model: &Model, what: &str, unit: &str, found: &Found) -> Row {
    let failures = f64::from(u8::from(found.failure.is_some()));
    let deaths = found.deaths;
    Row::new(
        format!("{}: {what}, {deaths} with a death", model.name),
        failures,
        unit,
    )
    .n(found.executions)
    .proof(Bar::AtMost(0.0))
}

/// Those models in which orders can be tried, and the others.
pub fn with_orders(models: &[&'static Model]) -> (Vec<&'static Model>, Vec<&'static Model>) {
    let can = |m: &&Model| m.preemptions(Effort::Orders).is_some();
    models.iter().copied().partition(can)
}

/// Tries all weaker orders. An order that nobody misses must be among those that are explained.
pub fn orders(models: &[&Model], jobs: NonZero<usize>) -> Report {
    let mut report = Report::new("lupin-models orders");
    let verdicts = orders::explore(models, jobs, |verdict| {
        let (has, tried) = (verdict.has, verdict.tried);
        let end = match (&verdict.caught, verdict.reason()) {
            (Some((model, _)), _) => format!("caught by {model}"),
            (None, Some(reason)) => format!("not caught: {reason}"),
            (None, None) => "NOT CAUGHT".into(),
        };
        eprintln!(
            "{:48} {has:?} -> {tried:?}: {end}",
            verdict.place.to_string()
        );
    });
    for verdict in &verdicts {
        let is_open = verdict.caught.is_none() && verdict.reason().is_none();
        let name = format!("{} {:?} -> {:?}", verdict.place, verdict.has, verdict.tried);
        let row = Row::new(name, f64::from(u8::from(is_open)), "unexplained");
        report.push(row.proof(Bar::AtMost(0.0)));
    }
    let caught = verdicts.iter().filter(|v| v.caught.is_some()).count();
    let share = 100.0 * caught as f64 / verdicts.len().max(1) as f64;
    report.push(Row::new("weaker orders caught", share, "%").n(verdicts.len() as u64));
    report
}
