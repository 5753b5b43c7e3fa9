//! A model, and its runs.

use crate::machine::Death;
use crate::on_loom::{self, Bounds, Found, Known, SeqCst, Sleep};
use crate::on_shuttle::{self, Schedules};
use crate::scene::Scene;

/// A model.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Its name: `structure.what`.
    pub name: &'static str,
    /// Builds one execution.
    pub scene: fn() -> Scene,
    /// How loom explores it; `None` where its states are too many.
    pub loom: Option<LoomRun>,
    /// Whether shuttle runs it.
    pub shuttle: bool,
    /// Whether its actors die.
    pub deaths: bool,
    /// What its sleepers need.
    pub sleep: Sleep,
    /// Whether it excludes by stores and loads of two words, each side its own first: that needs
    /// `SeqCst`, which loom has for fences only.
    pub is_dekker: bool,
    /// Whether an execution of it takes long, so that the short form makes fewer.
    pub is_heavy: bool,
}

/// How much loom explores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Some seconds for all models.
    Short,
    /// One more pre-emption than that, or as much as the model says.
    Orders,
    /// As much as each model says.
    Long,
}

/// How loom explores a model.
#[derive(Clone, Copy, Debug)]
pub struct LoomRun {
    short: Option<usize>,
    orders: Option<usize>,
    long: usize,
}

impl LoomRun {
    /// With so many pre-emptions of an execution in the short form, and in the long one.
    pub const fn new(short: usize, long: usize) -> Self {
        let one_more = if long > short { short + 1 } else { long };
        Self {
            short: Some(short),
            orders: Some(one_more),
            long,
        }
    }

    /// In the long form only.
    pub const fn long(long: usize) -> Self {
        Self {
            short: None,
            orders: None,
            long,
        }
    }

    /// With so many pre-emptions where orders are tried.
    pub const fn orders(mut self, orders: usize) -> Self {
        self.orders = Some(orders);
        self
    }
}

/// Executions of a model in the short form, and in the long form, before its search is given up.
const EXECUTIONS: [u64; 2] = [60_000, 400_000];
/// The same of a scene of which an execution takes long.
const HEAVY_EXECUTIONS: u64 = 60_000;

impl Model {
    /// What most models are: all actors die, sleepers wait to be woken, and shuttle only. Their
    /// name and scene are their own.
    pub(crate) const WITH_DEATHS: Self = Self {
        name: "",
        scene: || Scene::new(4096),
        loom: None,
        shuttle: true,
        deaths: true,
        sleep: Sleep::UntilWoken,
        is_dekker: false,
        is_heavy: false,
    };

    /// The structure that it is about: its name up to the dot.
    pub fn structure(&self) -> &'static str {
        self.name.split('.').next().unwrap_or(self.name)
    }

    /// Pre-emptions of an execution under loom; `None` if it does not run there.
    pub fn preemptions(&self, effort: Effort) -> Option<usize> {
        let run = self.loom?;
        match effort {
            Effort::Short => run.short,
            Effort::Orders => run.orders,
            Effort::Long => Some(run.long),
        }
    }

    /// Explores all executions without a death, then those with one, for every access of every
    /// mortal actor. Stops at the first failure.
    pub fn loom(&self, effort: Effort) -> Found {
        let mut sum = Found {
            is_complete: true,
            ..Found::default()
        };
        let Some(preemptions) = self.preemptions(effort) else {
            return sum;
        };
        let budget = match self.is_heavy {
            true => HEAVY_EXECUTIONS,
            false => EXECUTIONS[usize::from(effort == Effort::Long)],
        };
        let bounds = |sleep, executions| Bounds {
            preemptions: Some(preemptions),
            // Where SeqCst decides is whether somebody must be woken; everything else must be
            // right without it, but for those models that say so.
            seq_cst: match sleep {
                Sleep::Bounded if !self.is_dekker => SeqCst::AcqRel,
                _ => SeqCst::Fenced,
            },
            sleep,
            is_deep: self.loom.is_some_and(|run| run.short.is_none()),
            executions,
        };
        let known = Known::default();
        let mut add = |death, sleep| {
            if sum.executions >= budget {
                sum.is_complete = false;
                return (true, 0);
            }
            let left = bounds(sleep, budget - sum.executions);
            let found = on_loom::explore(self.scene, death, left, &known);
            sum.executions += found.executions;
            sum.deaths += found.deaths;
            sum.is_complete &= found.is_complete;
            sum.failure = found.failure.map(|failure| match death {
                None => failure,
                Some(Death { actor, after }) => {
                    format!("actor {actor} dies before its access {after}: {failure}")
                }
            });
            (sum.failure.is_none(), found.deaths)
        };
        let mut sleeps = vec![Sleep::Bounded];
        if self.sleep == Sleep::UntilWoken {
            sleeps.push(Sleep::UntilWoken);
        }
        for sleep in sleeps {
            if !add(None, sleep).0 {
                return sum;
            }
            if !self.deaths {
                continue;
            }
            for actor in crate::machine::under(|| (self.scene)().mortals()) {
                for after in 0.. {
                    match add(Some(Death { actor, after }), sleep) {
                        (true, 0) => break,
                        (true, _) => {}
                        (false, _) => return sum,
                    }
                }
            }
        }
        sum
    }

    /// Runs random schedules with random deaths.
    pub fn shuttle(&self, count: u64, seed: u64) -> Found {
        let schedules = Schedules {
            count,
            seed,
            sleep: self.sleep,
            deaths: self.deaths,
        };
        on_shuttle::run(self.scene, schedules)
    }
}
