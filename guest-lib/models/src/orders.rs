//! Which memory orders does the library need? Each access of the library is given every weaker
//! order in turn, and the models run again: an order that no model misses is either not needed, or
//! needed by something that the models do not see.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::sync::atomic::Ordering;

use lupin::crash::Site;
use lupin::probe::Kind;

use self::explained::Explained;
use crate::jobs;
use crate::machine;
use crate::model::{Effort, Model};

mod explained;

/// Whose models judge the accesses of a file. Other structures use them, too, with fewer scenes. What
/// is not here, all judge.
const JUDGES: [(&str, &str); 17] = [
    ("src/wait/", "tatas"),
    ("src/lock/tatas", "tatas"),
    ("src/lock/mcs", "mcs"),
    ("src/lock/rwlock", "rwlock"),
    ("src/sync/barrier", "barrier"),
    ("src/sync/condvar", "condvar"),
    ("src/sync/once", "once"),
    ("src/sync/semaphore", "semaphore"),
    ("src/log/", "log"),
    ("src/buddy/", "buddy"),
    ("src/heap/", "heap"),
    ("src/epoch", "epoch"),
    ("src/work/", "work"),
    ("src/collections/counters", "counters"),
    ("src/collections/journal", "journal"),
    ("src/collections/table", "table"),
    ("src/offset_ptr", "offset_ptr"),
];

/// Whether the models of some structures judge the accesses of a file.
fn judge(structures: &BTreeSet<&str>, file: &str) -> bool {
    let judge = JUDGES.iter().find(|(part, _)| file.contains(part));
    judge.is_none_or(|(_, structure)| structures.contains(structure))
}

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
        explained::all().find(is_it).map(|known| known.reason)
    }
}

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

/// Tries all weaker orders of all accesses that `models` make and judge, on `jobs` threads.
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
    let structures = models.iter().map(|model| model.structure()).collect();
    users.retain(|site, _| judge(&structures, site.0));
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
