//! Managers that are killed at every step, one after the other, and the one that goes on.

use std::sync::Arc;

use lupin_abi::event::EventKind;

use super::{FakeManager, World};
use crate::manager::crash::injection::kill_at;

/// What managers do while they are killed.
pub(in crate::manager) struct Play<'a> {
    /// A new world.
    pub world: &'a dyn Fn() -> Arc<World>,
    /// What the first manager does in it.
    pub day: &'a dyn Fn(&Arc<World>),
    /// From when on a kill is this test's business.
    pub begun: fn(&World) -> bool,
    /// What every manager does that takes over, until there is nothing left to do.
    pub evening: &'a dyn Fn(&mut FakeManager),
}

/// How managers ended.
pub(in crate::manager) struct Killed {
    /// The steps at which they were killed, one each.
    pub steps: Vec<&'static str>,
    /// The same for messages.
    pub at: String,
}

impl Killed {
    /// Lives whose process was on record and never ran, at most: their generations are given up.
    pub fn unused(&self) -> usize {
        self.steps.iter().filter(|step| **step == "release").count()
    }
}

/// Whether every node has joined once.
pub(in crate::manager) fn all_have_joined(world: &World) -> bool {
    (1..=3).all(|node| world.kinds(node).contains(&EventKind::NodeJoined))
}

impl Play<'_> {
    /// Kills the first manager at each of its steps; `check` sees what the next has made of it.
    /// Returns the steps.
    pub fn kill_one(&self, check: impl Fn(&World, &FakeManager, &Killed)) -> Vec<&'static str> {
        self.kill(false, check)
    }

    /// Kills the first manager at each of its steps, and for each of these the second one at each
    /// of its own, or not at all.
    pub fn kill_two(&self, check: impl Fn(&World, &FakeManager, &Killed)) -> Vec<&'static str> {
        self.kill(true, check)
    }

    fn kill(
        &self,
        twice: bool,
        check: impl Fn(&World, &FakeManager, &Killed),
    ) -> Vec<&'static str> {
        let mut steps = Vec::new();
        for first in 0.. {
            for second in 0.. {
                let world = (self.world)();
                let Some(step) = kill_at(first, || (self.day)(&world)) else {
                    return steps;
                };
                if !(self.begun)(&world) {
                    break;
                }
                let mut killed = Killed {
                    steps: vec![step],
                    at: format!("killed at step {first} ({step})"),
                };
                let mut survivor = None;
                let mut next = || {
                    let mut next = FakeManager::start(&world, true);
                    (self.evening)(&mut next);
                    survivor = Some(next);
                };
                if !twice {
                    next();
                } else if let Some(step) = kill_at(second, next) {
                    killed.at += &format!(", then at step {second} ({step})");
                    killed.steps.push(step);
                }
                let survivor = survivor.unwrap_or_else(|| {
                    let mut last = FakeManager::start(&world, true);
                    (self.evening)(&mut last);
                    last
                });
                check(&world, &survivor, &killed);
                if killed.steps.len() == 1 {
                    steps.push(step);
                    break;
                }
            }
        }
        steps
    }
}
