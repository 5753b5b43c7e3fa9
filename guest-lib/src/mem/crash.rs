//! Deaths on demand: an operation that ends before its n-th store, and a program without one of
//! its stores.

use core::cell::{Cell, RefCell};
use core::panic::Location;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::probe::Kind;
pub use super::probe::Site;

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Nobody counts.
    Lives,
    /// Dies before the store that finds 0.
    DiesAfter(u64),
    /// Counts stores from 0.
    Counts(u64),
    /// Died; its remaining stores, made by destructors during the unwinding, do not happen.
    Dead,
}

thread_local! {
    static FATE: Cell<Fate> = const { Cell::new(Fate::Lives) };
    static LEFT_OUT: Cell<Option<Site>> = const { Cell::new(None) };
    /// How often each site stored, while somebody asks.
    static SITES: RefCell<Option<BTreeMap<Site, u64>>> = const { RefCell::new(None) };
}

struct Died;

/// How an operation ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended<T> {
    /// It made fewer stores than it was allowed.
    Completed(T),
    /// It died.
    Died,
}

/// Whether an access happens: false only for a store of an operation that already died, or of
/// the site that is left out.
#[track_caller]
pub(super) fn may(kind: Kind) -> bool {
    if !kind.stores() {
        return true;
    }
    let here = Location::caller();
    let site = (here.file(), here.line(), here.column());
    SITES.with_borrow_mut(|sites| {
        if let Some(sites) = sites {
            *sites.entry(site).or_default() += 1;
        }
    });
    if LEFT_OUT.get() == Some(site) {
        return false;
    }
    match FATE.get() {
        Fate::Lives => true,
        Fate::Dead => false,
        Fate::Counts(n) => {
            FATE.set(Fate::Counts(n + 1));
            true
        }
        Fate::DiesAfter(0) => {
            FATE.set(Fate::Dead);
            resume_unwind(Box::new(Died));
        }
        Fate::DiesAfter(n) => {
            FATE.set(Fate::DiesAfter(n - 1));
            true
        }
    }
}

/// Runs `operation` on this thread and lets it die before its store number `stores` (from 0).
pub fn dies_after<T>(stores: u64, operation: impl FnOnce() -> T) -> Ended<T> {
    FATE.set(Fate::DiesAfter(stores));
    let result = catch_unwind(AssertUnwindSafe(operation));
    FATE.set(Fate::Lives);
    match result {
        Ok(value) => Ended::Completed(value),
        Err(payload) if payload.is::<Died>() => Ended::Died,
        Err(payload) => resume_unwind(payload),
    }
}

/// A store for a program with crash points of its own, which are counted with this crate's.
#[track_caller]
pub fn store(cell: &AtomicU64) {
    super::store64(cell, 0, Ordering::Relaxed);
}

/// Runs `operation` and returns how many stores it made.
pub fn count<T>(operation: impl FnOnce() -> T) -> (T, u64) {
    FATE.set(Fate::Counts(0));
    let value = operation();
    let stores = match FATE.replace(Fate::Lives) {
        Fate::Counts(n) => n,
        _ => 0,
    };
    (value, stores)
}

/// Runs `body` and returns the sites that stored in it, with how often they did.
pub fn sites<T>(body: impl FnOnce() -> T) -> (T, BTreeMap<Site, u64>) {
    SITES.set(Some(BTreeMap::new()));
    let value = body();
    (value, SITES.take().unwrap_or_default())
}

/// Runs `body` in a program that lacks the stores of one site: a mutant that tests must catch.
pub fn without<T>(site: Site, body: impl FnOnce() -> T) -> T {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            LEFT_OUT.set(None);
        }
    }
    LEFT_OUT.set(Some(site));
    let _restore = Restore;
    body()
}
