//! What is measured: a module a suite.

mod detect;
mod failover;
mod false_kills;
mod hang;
mod notify;
mod scale;
mod segments;
mod wakeup;

use std::time::{Duration, Instant};

pub use detect::detect;
pub use failover::failover;
pub use false_kills::FalseKills;
pub use hang::hang;
use lupin_report::{Bar, Row};
pub use notify::Notify;
pub use scale::Scale;
pub use segments::Segments;
pub use wakeup::Wakeup;

/// Nodes that fail in turn: one that fails often is restarted ever later. Node 1 watches.
const VICTIMS: std::ops::RangeInclusive<u32> = 2..=11;
const NODES: u32 = 11;

/// The node that fails in a round, from 1.
fn victim(round: u32) -> u32 {
    VICTIMS.start() + (round - 1) % VICTIMS.count() as u32
}

/// Shows progress now and then.
struct Progress {
    what: &'static str,
    shown: Instant,
}

impl Progress {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            shown: Instant::now(),
        }
    }

    fn tell(&mut self, done: u32, all: u32) {
        if self.shown.elapsed() > Duration::from_secs(5) || done == all {
            self.shown = Instant::now();
            eprintln!("{}: {done} of {all}", self.what);
        }
    }
}

/// Times in microseconds.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    /// Adds a time between two readings of a clock in nanoseconds.
    fn push(&mut self, begin_ns: u64, end_ns: u64) {
        self.0.push(end_ns.saturating_sub(begin_ns) as f64 / 1e3);
    }

    /// A quantile; 0 of nothing.
    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        let found = sorted.get((last as f64 * share).round() as usize);
        found.copied().unwrap_or_default().round()
    }

    /// A quantile as a row, with the lowest and the highest.
    fn row(&self, name: &str, share: f64) -> Row {
        Row::new(name, self.at(share), "us")
            .n(self.0.len() as u64)
            .spread(self.at(0.0), self.at(1.0))
    }
}

/// Every failure was noticed, or the measurement would have ended with an error.
fn notice_row(rounds: u32, times: &Times) -> Row {
    let missed = f64::from(rounds) - times.0.len() as f64;
    Row::new("failures not noticed", missed, "failures")
        .proof(Bar::AtMost(0.0))
        .n(rounds.into())
}
