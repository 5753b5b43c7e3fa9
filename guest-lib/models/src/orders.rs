//! Which memory orders does the library need? Each access of the library is given every weaker
//! order in turn, and the models run again: an order that no model misses is either not needed, or
//! needed by something that the models do not see.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::Ordering;

use lupin::crash::Site;
use lupin::probe::Kind;

use crate::jobs;
use crate::machine;
use crate::model::{Effort, Model};

/// One access with another order than the source says.
#[derive(Clone, Copy, Debug)]
pub struct Weakened {
    /// Where.
    pub site: Site,
    /// Its order for now.
    pub order: Ordering,
}

/// The accesses that were seen, by their place in the source.
#[derive(Debug, Default)]
pub struct Sites(BTreeMap<Site, (Class, Ordering)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Load,
    Store,
    Swap,
    Fence,
}

impl Sites {
    /// Notes an access of the library (those of the models themselves are not its concern).
    pub(crate) fn add(&mut self, site: Site, kind: Kind, order: Ordering) {
        if site.0.is_empty() || order == Ordering::Relaxed {
            return;
        }
        let class = match kind {
            Kind::Load => Class::Load,
            Kind::Store(_) => Class::Store,
            Kind::Fence => Class::Fence,
            _ => Class::Swap,
        };
        self.0.insert(site, (class, order));
    }
}

/// Weaker orders of an access, weakest first.
fn weaker(class: Class, order: Ordering) -> &'static [Ordering] {
    use Ordering::{AcqRel, Acquire, Relaxed, Release};
    match (class, order) {
        (_, Relaxed) => &[],
        (_, Acquire | Release) => &[Relaxed],
        (_, AcqRel) => &[Relaxed, Acquire, Release],
        (Class::Load, _) => &[Relaxed, Acquire],
        (Class::Store, _) => &[Relaxed, Release],
        (Class::Swap | Class::Fence, _) => &[Relaxed, Acquire, Release, AcqRel],
    }
}

/// What the models say of one weaker order.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The access.
    pub place: Place,
    /// The order that the source gives it.
    pub has: Ordering,
    /// The order that was tried.
    pub tried: Ordering,
    /// The model that failed, and how; `None` if none did.
    pub caught: Option<(&'static str, String)>,
}

impl Verdict {
    /// Why nobody need miss that order; `None` if that is not known.
    pub fn reason(&self) -> Option<&'static str> {
        let file = self.place.site.0;
        let is_it = |known: &&Explained| {
            file.ends_with(known.file)
                && known.function == self.place.function
                && (known.numbers.is_empty() || known.numbers.contains(&self.place.number))
        };
        EXPLAINED.iter().find(is_it).map(|known| known.reason)
    }
}

/// Accesses whose order is stronger than the models can tell, by file, function, and place in the
/// function; no places are all.
struct Explained {
    file: &'static str,
    function: &'static str,
    numbers: &'static [usize],
    reason: &'static str,
}

const EXPLAINED: &[Explained] = &[
    Explained {
        file: "lock/tatas.rs",
        function: "wait",
        numbers: &[],
        reason: "a look: the swap that takes the lock acquires, or the judge's verdict does",
    },
    Explained {
        file: "lock/tatas.rs",
        function: "recover",
        numbers: &[],
        reason: "redundant beside the verdict, which shows all that the dead one stored",
    },
    Explained {
        file: "lock/tatas.rs",
        function: "adopt",
        numbers: &[],
        reason: "redundant beside the release that ends the hold, and the verdict if none does",
    },
    Explained {
        file: "lock/tatas.rs",
        function: "let_go_to",
        numbers: &[],
        reason: "redundant where the owner word moved before: its own order is seen",
    },
    Explained {
        file: "lock/mcs/mod.rs",
        function: "enter",
        numbers: &[],
        reason: "its Acquire: redundant beside the version of the place in front, which is acquired",
    },
    Explained {
        file: "lock/mcs/mod.rs",
        function: "enter_behind",
        numbers: &[],
        reason: "redundant beside the version of the place in front, which is acquired",
    },
    Explained {
        file: "lock/mcs/mod.rs",
        function: "advance",
        numbers: &[],
        reason: "what it stores is looked at after the caller's death, beside the verdict",
    },
    Explained {
        file: "lock/mcs/mod.rs",
        function: "adopt",
        numbers: &[],
        reason: "redundant beside the release that ends the hold, and the verdict if none does",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "end_for_dead",
        numbers: &[],
        reason: "redundant beside the release that ends the hold, and the verdict if none does",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "look",
        numbers: &[2, 3],
        reason: "redundant beside the verdict",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "claim",
        numbers: &[],
        reason: "needed where a node changes hands between the living, which no model does",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "discard",
        numbers: &[],
        reason: "needed where a node changes hands between the living, which no model does",
    },
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "drop",
        numbers: &[],
        reason: "needed where a node changes hands between the living, which no model does",
    },
    Explained {
        file: "src/epoch.rs",
        function: "pin",
        numbers: &[1],
        reason: "needed by who pins right after coming into its place; here all came before",
    },
    Explained {
        file: "src/epoch.rs",
        function: "advance",
        numbers: &[3],
        reason: "needed where a place changes hands, which no model does",
    },
    Explained {
        file: "src/epoch.rs",
        function: "advance",
        numbers: &[4],
        reason: "its Acquire: redundant beside the lines, which are acquired",
    },
    Explained {
        file: "sync/semaphore.rs",
        function: "take_free",
        numbers: &[1],
        reason: "a look: the swap that takes the permit acquires",
    },
    Explained {
        file: "sync/semaphore.rs",
        function: "take_dead",
        numbers: &[],
        reason: "redundant beside the verdict",
    },
    Explained {
        file: "sync/semaphore.rs",
        function: "pass_on",
        numbers: &[],
        reason: "a look: whoever is woken looks for itself",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "drain",
        numbers: &[3],
        reason: "redundant beside the verdict",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "drain",
        numbers: &[4],
        reason: "redundant beside the barrier between the flag and the look",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "acquire_read",
        numbers: &[1, 3, 4, 5],
        reason: "a look: the one with the slot taken acquires, or the verdict does",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "acquire_read",
        numbers: &[2],
        reason: "its SeqCst: loom's fence at the swap of the slot before it is enough",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "take_slot",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the load after it is enough",
    },
    Explained {
        file: "sync/mod.rs",
        function: "wait_until",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the flag before it is enough",
    },
    Explained {
        file: "sync/once.rs",
        function: "look",
        numbers: &[2],
        reason: "redundant beside the verdict: only a dead one's claim is swapped",
    },
    Explained {
        file: "sync/once.rs",
        function: "run",
        numbers: &[1],
        reason: "its Acquire: who publishes a value has read nothing of others'",
    },
    Explained {
        file: "sync/once.rs",
        function: "drop",
        numbers: &[1],
        reason: "what a computation leaves that gave up is not looked at",
    },
    Explained {
        file: "collections/counters.rs",
        function: "sum",
        numbers: &[1],
        reason: "needed by who sums right after somebody joined; here all joined before",
    },
    Explained {
        file: "collections/counters.rs",
        function: "last",
        numbers: &[1],
        reason: "needed by who asks right after somebody joined; here all joined before",
    },
    Explained {
        file: "collections/counters.rs",
        function: "read",
        numbers: &[3],
        reason: "redundant beside the value before it, which is acquired and stored after the ticket",
    },
    Explained {
        file: "collections/table.rs",
        function: "claim",
        numbers: &[1],
        reason: "redundant beside the load by which a result is looked at",
    },
    Explained {
        file: "collections/table.rs",
        function: "claim",
        numbers: &[2, 3],
        reason: "needed where a claim is given back, which no model does; beside the verdict redundant",
    },
    Explained {
        file: "collections/table.rs",
        function: "commit",
        numbers: &[1, 2],
        reason: "a look: the swap that commits decides",
    },
    Explained {
        file: "collections/table.rs",
        function: "commit",
        numbers: &[3],
        reason: "its Acquire: who commits reads nothing of others' afterwards",
    },
    Explained {
        file: "src/offset_ptr.rs",
        function: "compare_exchange",
        numbers: &[],
        reason: "its Acquire: who pushes does not look at what is below",
    },
    Explained {
        file: "collections/journal.rs",
        function: "abandon",
        numbers: &[1],
        reason: "redundant beside the lock of the place, and the verdict",
    },
    Explained {
        file: "collections/journal.rs",
        function: "reserve",
        numbers: &[2],
        reason: "redundant beside the lock of the place, and the verdict: a reservation shows nothing else",
    },
    Explained {
        file: "collections/journal.rs",
        function: "reserve",
        numbers: &[1, 3],
        reason: "a hint: heads are looked at from there on",
    },
    Explained {
        file: "collections/journal.rs",
        function: "commit",
        numbers: &[1],
        reason: "its Acquire: who commits reads nothing of others' afterwards",
    },
    Explained {
        file: "collections/journal.rs",
        function: "advance",
        numbers: &[1],
        reason: "needed where a place changes hands between the living, which no model does",
    },
    Explained {
        file: "collections/journal.rs",
        function: "advance",
        numbers: &[2, 3],
        reason: "a look: whoever goes on loads the head again, which acquires",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "state",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the arrival before it is enough",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "look",
        numbers: &[1, 2, 3],
        reason: "redundant beside the barriers at the arrival before it and in the wake-up after it, \
                 as long as seats do not change hands, which they do in no scene of this sweep",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "look",
        numbers: &[4],
        reason: "redundant beside the verdict",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "finish_break",
        numbers: &[],
        reason: "needed by two who end the same break; these models leave one survivor",
    },
    Explained {
        file: "wait/futex.rs",
        function: "wake",
        numbers: &[],
        reason: "the system call that follows is a full barrier",
    },
    Explained {
        file: "wait/parking.rs",
        function: "announce",
        numbers: &[],
        reason: "redundant beside the barrier between the flag and the look",
    },
    Explained {
        file: "wait/parking.rs",
        function: "wake_now",
        numbers: &[],
        reason: "redundant beside the barrier before it and the one in the system call",
    },
    Explained {
        file: "wait/parking.rs",
        function: "barrier_for_both",
        numbers: &[],
        reason: "redundant under the SeqCst store of the flag before it; in products it is \
                 membarrier(2), which the models take for a fence on both sides",
    },
];

/// A place in the source, told so that it survives edits elsewhere in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File, line and column.
    pub site: Site,
    /// The function around it.
    pub function: String,
    /// Which access of the function it is, from 1.
    pub number: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let file = self
            .site
            .0
            .rsplit_once("src/")
            .map_or(self.site.0, |(_, file)| file);
        write!(
            f,
            "{file}:{} {}#{}",
            self.site.1, self.function, self.number
        )
    }
}

/// Tries all weaker orders of all accesses that `models` make, on `jobs` threads.
pub fn explore(
    models: &[&Model],
    jobs: NonZero<usize>,
    progress: impl Fn(&Verdict) + Sync,
) -> Vec<Verdict> {
    let seen = jobs::each(jobs, models, |model| {
        let ((), sites) = machine::sites(|| {
            let _ = model.loom(Effort::Orders);
        });
        sites.0
    });
    let mut users: BTreeMap<Site, (Class, Ordering, Vec<&Model>)> = BTreeMap::new();
    for (model, sites) in models.iter().zip(seen) {
        for (site, (class, order)) in sites {
            let entry = users.entry(site).or_insert((class, order, Vec::new()));
            entry.2.push(model);
        }
    }
    let places = places(users.keys().copied());
    let trials: Vec<_> = users
        .iter()
        .flat_map(|(site, (class, has, models))| {
            let weaker = weaker(*class, *has).iter();
            weaker.map(move |tried| (*site, *has, *tried, models))
        })
        .collect();
    jobs::each(jobs, &trials, |(site, has, order, models)| {
        let (site, order) = (*site, *order);
        machine::weaken(Some(Weakened { site, order }));
        let caught = models
            .iter()
            .find_map(|model| Some((model.name, model.loom(Effort::Orders).failure?)));
        machine::weaken(None);
        let verdict = Verdict {
            place: places[&site].clone(),
            has: *has,
            tried: order,
            caught,
        };
        progress(&verdict);
        verdict
    })
}

/// Names the functions around sites, by reading the sources where the compiler found them.
fn places(sites: impl Iterator<Item = Site>) -> BTreeMap<Site, Place> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
    let mut counts: BTreeMap<(&str, String), usize> = BTreeMap::new();
    sites
        .map(|site| {
            let source = std::fs::read_to_string(format!("{root}{}", site.0)).unwrap_or_default();
            let function = source
                .lines()
                .take(site.1 as usize)
                .filter_map(|line| line.split_once("fn ")?.1.split(['(', '<']).next())
                .last()
                .unwrap_or("?")
                .to_owned();
            let number = counts.entry((site.0, function.clone())).or_default();
            *number += 1;
            let number = *number;
            (
                site,
                Place {
                    site,
                    function,
                    number,
                },
            )
        })
        .collect()
}
