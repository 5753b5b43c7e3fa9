//! A death before the n-th store of the operation, then one before the m-th of its recovery.
//!
//! A thread's death is modelled by unwinding: the store at which it dies does not happen, and
//! neither do those of the destructors that run on the way out (`lupin::crash::dies_after`).

use std::collections::BTreeMap;

use lupin::crash::{self, Ended, Site};

use crate::SuiteError;
use crate::case::{Case, SUCCESSOR, SURVIVOR, World};
use crate::memory::{Image, Shared, difference, hash};
use crate::process::guarded;
use crate::worker::{Counts, Position};

/// How much of the square is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Full,
    /// About so many deaths of the operation, and so many of the recovery after each.
    Sample(u64, u64),
}

impl Extent {
    /// The deaths to try among `0..=stores`.
    fn points(limit: Option<u64>, stores: u64) -> Vec<u64> {
        match limit {
            Some(limit) if stores > limit => {
                // Both ends and what lies evenly between them.
                let between = |n| n * stores / limit.max(1);
                let mut points: Vec<u64> = (0..=limit).map(between).collect();
                points.dedup();
                points
            }
            _ => (0..=stores).collect(),
        }
    }

    fn of_operation(self) -> Option<u64> {
        match self {
            Self::Full => None,
            Self::Sample(operation, _) => Some(operation),
        }
    }

    fn of_recovery(self) -> Option<u64> {
        match self {
            Self::Full => None,
            Self::Sample(_, recovery) => Some(recovery),
        }
    }
}

/// A memory in the state in which the operation finds it.
pub(crate) fn prepared(case: &dyn Case, state: &str) -> Result<Shared, SuiteError> {
    let memory = Shared::new(case.bytes())?;
    case.prepare(memory.mapping(), state);
    Ok(memory)
}

/// What must hold after the recovery.
pub(crate) fn aftermath(
    case: &dyn Case,
    memory: &Shared,
    state: &str,
    world: &World,
) -> Result<(), String> {
    let memory = memory.mapping();
    let checked = guarded(|| case.check(memory, state, world));
    checked
        .and_then(|ok| ok)
        .map_err(|e| format!("check: {e}"))?;
    let went_on = guarded(|| case.go_on(memory, state, world));
    went_on.and_then(|ok| ok).map_err(|e| format!("go on: {e}"))
}

/// Recovers without a further death, and says what is wrong after that.
pub(crate) fn recovered(
    case: &dyn Case,
    memory: &Shared,
    state: &str,
    world: &World,
) -> Result<(), String> {
    guarded(|| case.recover(memory.mapping(), state, world.survivor(), world))
        .map_err(|e| format!("recover: {e}"))?;
    aftermath(case, memory, state, world)
}

/// The first part of a square, in which nobody dies. The parts behind it are its rows: the deaths
/// of the operation, each one further than its number of stores.
const NOBODY_DIES: u64 = 0;
/// The start of a row, before its first pair.
const ROW: u64 = u64::MAX;

/// A position in words.
pub(crate) fn place(position: Position) -> String {
    match position {
        (NOBODY_DIES, _) => "without a death".into(),
        (row, ROW) => format!("death before store {}", row - 1),
        (row, second) => format!("death before store {}, then before {second}", row - 1),
    }
}

/// Where to go on if a position was the end of its process: at the next row, since what hangs
/// after one death of the recovery mostly hangs after all.
pub(crate) fn behind(position: Position) -> Option<Position> {
    Some((position.0 + 1, 0))
}

/// What a square is told of.
pub(crate) trait Listener {
    /// A pair is about to be tried.
    fn at(&self, position: Position);
    /// Pairs were tried.
    fn count(&self, counts: Counts);
    /// Something is wrong; whether to go on all the same.
    fn bad(&self, what: &str) -> bool;
    /// Sites that stored in an operation or its recovery.
    fn sites(&self, sites: &BTreeMap<Site, u64>);
}

/// One case in one state.
pub(crate) struct Square<'a> {
    pub(crate) case: &'a dyn Case,
    pub(crate) state: &'a str,
    pub(crate) extent: Extent,
}

/// Ends the square early.
struct Stop;

impl Square<'_> {
    /// Tries all pairs from `from` on, starting from the memory `base`.
    pub(crate) fn explore(
        &self,
        base: &[u64],
        from: Position,
        to: &impl Listener,
    ) -> Result<(), SuiteError> {
        let memory = Shared::new(self.case.bytes())?;
        if from.0 == NOBODY_DIES && self.lives_on(&memory, base, to).is_err() {
            return Ok(());
        }
        to.at((NOBODY_DIES, 0));
        memory.restore(base);
        let counted = guarded(|| crash::count(|| self.run(&memory)));
        let stores = match counted {
            Ok(((), stores)) => stores,
            Err(what) => {
                to.bad(&format!("{}: run: {what}", self.state));
                return Ok(());
            }
        };
        for first in Extent::points(self.extent.of_operation(), stores) {
            if first + 1 >= from.0 && self.row(&memory, base, first, to).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn run(&self, memory: &Shared) {
        self.case.run(memory.mapping(), self.state);
    }

    /// The operation returns, and everybody lives.
    fn lives_on(&self, memory: &Shared, base: &[u64], to: &impl Listener) -> Result<(), Stop> {
        if !self.case.lives_on(self.state) {
            return Ok(());
        }
        memory.restore(base);
        to.at((NOBODY_DIES, 0));
        let world = World {
            dead: Vec::new(),
            returned: true,
        };
        guarded(|| self.run(memory))
            .map_err(|e| format!("run: {e}"))
            .and_then(|()| aftermath(self.case, memory, self.state, &world))
            .or_else(|what| self.bad(to, (NOBODY_DIES, 0), what))
    }

    fn bad(&self, to: &impl Listener, at: Position, what: String) -> Result<(), Stop> {
        let text = format!("{}: {}: {what}", self.state, place(at));
        to.bad(&text).then_some(()).ok_or(Stop)
    }

    /// All deaths of the recovery after one death of the operation.
    fn row(
        &self,
        memory: &Shared,
        base: &[u64],
        first: u64,
        to: &impl Listener,
    ) -> Result<(), Stop> {
        memory.restore(base);
        to.at((first + 1, ROW));
        let (ended, sites) =
            crash::sites(|| guarded(|| crash::dies_after(first, || self.run(memory))));
        to.sites(&sites);
        to.count(Counts {
            points: 1,
            ..Counts::default()
        });
        let returned = match ended {
            Ok(ended) => ended == Ended::Completed(()),
            Err(what) => return self.bad(to, (first + 1, ROW), format!("run: {what}")),
        };
        let world = World::after_victim(returned);
        let left = memory.image();
        let points: Box<dyn Iterator<Item = u64>> = match self.extent.of_recovery() {
            // Until it completes.
            None => Box::new(0..),
            limit => {
                let counted = guarded(|| crash::count(|| self.recover(memory, SURVIVOR, &world)));
                match counted {
                    Ok(((), stores)) => Box::new(Extent::points(limit, stores).into_iter()),
                    Err(what) => {
                        return self.bad(to, (first + 1, ROW), format!("recover: {what}"));
                    }
                }
            }
        };
        for second in points {
            let position = (first + 1, second);
            to.at(position);
            memory.restore(&left);
            to.count(Counts {
                pairs: 1,
                ..Counts::default()
            });
            let (survived, result) = self.pair(memory, second, &world, to);
            if let Err(what) = result {
                let changed = difference(base, &left);
                self.bad(to, position, format!("{what} (after the first: {changed})"))?;
            }
            if survived {
                break;
            }
        }
        Ok(())
    }

    /// One pair: whether the recovery came to its end without a death, and what is wrong.
    fn pair(
        &self,
        memory: &Shared,
        second: u64,
        world: &World,
        to: &impl Listener,
    ) -> (bool, Result<(), String>) {
        let (ended, sites) = crash::sites(|| {
            guarded(|| crash::dies_after(second, || self.recover(memory, SURVIVOR, world)))
        });
        to.sites(&sites);
        let ended = match ended {
            Ok(ended) => ended,
            Err(what) => return (true, Err(format!("recover: {what}"))),
        };
        if ended == Ended::Completed(()) {
            return (true, aftermath(self.case, memory, self.state, world));
        }
        let world = world.clone().after_survivor();
        let again = guarded(|| self.recover(memory, SUCCESSOR, &world))
            .map_err(|e| format!("recover again: {e}"))
            .and_then(|()| aftermath(self.case, memory, self.state, &world));
        (false, again)
    }

    fn recover(&self, memory: &Shared, me: lupin::InstanceId, world: &World) {
        self.case.recover(memory.mapping(), self.state, me, world);
    }

    /// Which site's store comes next, by the [`hash`] of the memory that it finds.
    pub(crate) fn next_sites(&self, base: &[u64]) -> Result<BTreeMap<u64, Site>, SuiteError> {
        let memory = Shared::new(self.case.bytes())?;
        let mut next = BTreeMap::new();
        let mut before: BTreeMap<Site, u64> = BTreeMap::new();
        for store in 0.. {
            memory.restore(base);
            let (ended, sites) =
                crash::sites(|| guarded(|| crash::dies_after(store, || self.run(&memory))));
            if !matches!(ended, Ok(Ended::Died)) {
                break;
            }
            // The store that did not happen is the one that the shorter run did not come to.
            let new = sites.iter().find(|(site, n)| before.get(*site) != Some(*n));
            if let Some((site, _)) = new {
                let image: Image = memory.image();
                next.entry(hash(&image)).or_insert(*site);
            }
            before = sites;
        }
        Ok(next)
    }
}
