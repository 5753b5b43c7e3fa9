//! All cases, by the library's modules.

use std::sync::atomic::{AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::crash::{self, Ended};
use lupin::liveness::Liveness;
use lupin::lock::{LockError, RecoverableLock};
use lupin::shm::Mapping;

use crate::case::Case;

pub mod again;
pub mod barrier;
pub mod buddy;
pub mod counters;
pub mod creation;
pub mod epoch;
pub mod heap;
pub mod journal;
pub mod log;
pub mod mcs;
pub mod offset_ptr;
pub mod rooted;
pub mod rwlock;
pub mod sync;
pub mod table;
pub mod tatas;
pub mod work;

/// Every case there is.
pub fn all() -> Vec<&'static dyn Case> {
    [
        tatas::CASES,
        mcs::CASES,
        rwlock::CASES,
        log::CASES,
        buddy::CASES,
        heap::CASES,
        rooted::CASES,
        epoch::CASES,
        work::CASES,
        counters::CASES,
        table::CASES,
        journal::CASES,
        offset_ptr::CASES,
        barrier::CASES,
        sync::CASES,
        again::CASES,
    ]
    .concat()
}

/// Loads a word of memory that belongs to the case and not to the library.
///
/// # Panics
/// If it lies outside of the memory.
pub fn load(memory: &Mapping, at: u64) -> u64 {
    let word: &AtomicU64 = memory
        .get(at)
        .expect("the case's own word lies in its memory");
    word.load(Ordering::Acquire)
}

/// Stores a word, and is a crash point like any store of the library.
///
/// # Panics
/// If it lies outside of the memory.
pub fn store(memory: &Mapping, at: u64, value: u64) {
    let bytes = value.to_ne_bytes();
    memory
        .copy_in(at, &bytes)
        .expect("the case's own word lies in its memory");
}

/// Runs `operation` and lets whoever runs it die before the last `stores` stores of it.
///
/// # Panics
/// If it makes fewer, or `operation` panics.
pub fn die_before_end<T>(memory: &Mapping, stores: u64, operation: impl Fn() -> T) {
    let mut before = vec![0; memory.len() as usize];
    memory.copy_out(0, &mut before).expect("all of it");
    let (_, all) = crash::count(&operation);
    memory.copy_in(0, &before).expect("all of it");
    assert!(stores > 0 && all >= stores, "{all} stores");
    let ended = crash::dies_after(all - stores, operation);
    assert!(matches!(ended, Ended::Died), "it must be repeatable");
}

/// An error of the library as what a check returns.
pub fn text(error: impl core::fmt::Display) -> String {
    error.to_string()
}

/// `Ok` if they are equal.
///
/// # Errors
/// Both, and what they are.
pub fn equal<T: PartialEq + core::fmt::Debug>(
    what: &str,
    found: T,
    expected: T,
) -> Result<(), String> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what} is {found:?}, not {expected:?}")),
    }
}

/// Two words that are equal outside of a lock's critical sections.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'m>(pub &'m Mapping);

impl<'m> Pair<'m> {
    /// Where the lock lies.
    pub const LOCK: u64 = 64;
    /// The word that is changed first, and is right where they differ.
    pub const LEFT: u64 = 128;
    /// The word that is changed second.
    pub const RIGHT: u64 = 192;

    /// Their lock.
    ///
    /// # Panics
    /// If the memory is too small.
    pub fn lock(self) -> RecoverableLock<'m> {
        let words: &LockWords = self.0.get(Self::LOCK).expect("in bounds");
        RecoverableLock::new(words)
    }

    /// Adds one to both.
    pub fn add_one(self) {
        let next = load(self.0, Self::LEFT) + 1;
        store(self.0, Self::LEFT, next);
        store(self.0, Self::RIGHT, next);
    }

    /// Makes them equal after a death between the two stores.
    pub fn repair(self) {
        store(self.0, Self::RIGHT, load(self.0, Self::LEFT));
    }

    /// Adds one to both in the lock; repairs first what a dead holder left.
    ///
    /// # Panics
    /// If the lock refuses.
    pub fn change(self, me: InstanceId, judge: &impl Liveness) {
        let acquired = self.lock().lock(me, judge).expect("its holder lives not");
        let repaired = acquired.or_repair(|_| {
            self.repair();
            Ok::<_, LockError>(())
        });
        let guard = repaired.expect("nobody declared the repairer dead");
        self.add_one();
        guard.unlock().expect("nobody declared the holder dead");
    }

    /// Whether they are equal, and the value.
    ///
    /// # Errors
    /// Both, if they differ.
    pub fn value(self) -> Result<u64, String> {
        let (left, right) = (load(self.0, Self::LEFT), load(self.0, Self::RIGHT));
        equal("the right half", right, left)?;
        Ok(left)
    }
}
