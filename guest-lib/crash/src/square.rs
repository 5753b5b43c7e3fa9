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
        if from == (0, 0) && self.lives_on(&memory, base, to).is_err() {
            return Ok(());
        }
        memory.restore(base);
        to.at((0, 0));
        let counted = guarded(|| crash::count(|| self.run(&memory)));
        let stores = match counted {
            Ok(((), stores)) => stores,
            Err(what) => {
                to.bad(&format!("{}: run: {what}", self.state));
                return Ok(());
            }
        };
        for first in Extent::points(self.extent.of_operation(), stores) {
            if first >= from.0 && self.row(&memory, base, first, from, to).is_err() {
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
        to.at((0, 0));
        let world = World {
            dead: Vec::new(),
            returned: true,
        };
        guarded(|| self.run(memory))
            .map_err(|e| format!("run: {e}"))
            .and_then(|()| aftermath(self.case, memory, self.state, &world))
            .or_else(|what| self.bad(to, "without a death", what))
    }

    fn bad(&self, to: &impl Listener, place: &str, what: String) -> Result<(), Stop> {
        let text = format!("{}: {place}: {what}", self.state);
        to.bad(&text).then_some(()).ok_or(Stop)
    }

    /// All deaths of the recovery after one death of the operation.
    fn row(
        &self,
        memory: &Shared,
        base: &[u64],
        first: u64,
        from: Position,
        to: &impl Listener,
    ) -> Result<(), Stop> {
        memory.restore(base);
        to.at((first, 0));
        let (ended, sites) =
            crash::sites(|| guarded(|| crash::dies_after(first, || self.run(memory))));
        to.sites(&sites);
        to.count(Counts {
            points: 1,
            ..Counts::default()
        });
        let returned = match ended {
            Ok(ended) => ended == Ended::Completed(()),
            Err(what) => return self.bad(to, &format!("{first}"), format!("run: {what}")),
        };
        let world = World::after_victim(returned);
        let left = memory.image();
        let counted = guarded(|| crash::count(|| self.recover(memory, SURVIVOR, &world)));
        let stores = match counted {
            Ok(((), stores)) => stores,
            Err(what) => return self.bad(to, &format!("{first}"), format!("recover: {what}")),
        };
        let start = if first == from.0 { from.1 } else { 0 };
        for second in Extent::points(self.extent.of_recovery(), stores) {
            if second < start {
                continue;
            }
            to.at((first, second));
            memory.restore(&left);
            to.count(Counts {
                pairs: 1,
                ..Counts::default()
            });
            if let Err(what) = self.pair(memory, second, &world, to) {
                let changed = difference(base, &left);
                let place = format!("death before store {first}, then before {second}");
                self.bad(to, &place, format!("{what} (after the first: {changed})"))?;
            }
        }
        Ok(())
    }

    fn pair(
        &self,
        memory: &Shared,
        second: u64,
        world: &World,
        to: &impl Listener,
    ) -> Result<(), String> {
        let (ended, sites) = crash::sites(|| {
            guarded(|| crash::dies_after(second, || self.recover(memory, SURVIVOR, world)))
        });
        to.sites(&sites);
        match ended.map_err(|e| format!("recover: {e}"))? {
            Ended::Completed(()) => aftermath(self.case, memory, self.state, world),
            Ended::Died => {
                let world = world.clone().after_survivor();
                guarded(|| self.recover(memory, SUCCESSOR, &world))
                    .map_err(|e| format!("recover again: {e}"))?;
                aftermath(self.case, memory, self.state, &world)
            }
        }
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
