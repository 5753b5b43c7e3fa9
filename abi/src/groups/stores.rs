//! Stores that are collected, and then written down: what a change consists of.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::GroupSection;

/// Most stores of one change.
pub const MAX_STORES: usize = 120;

/// The stores of the change that is under way, as they lie in memory.
#[repr(C)]
#[derive(Debug)]
pub struct Intent {
    /// How many stores are committed; 0 if no change is under way.
    count: AtomicU64,
    _pad: AtomicU64,
    stores: [[AtomicU64; 2]; MAX_STORES],
    _gap: [AtomicU64; (0x1000 - 0x40 - 16 - MAX_STORES * 16) / 8],
}

impl Intent {
    pub(super) fn write(&self, stores: &[(usize, u64)], step: &mut impl FnMut()) {
        for (cells, (word, value)) in self.stores.iter().zip(stores) {
            step();
            cells[0].store(*word as u64, Ordering::Relaxed);
            cells[1].store(*value, Ordering::Relaxed);
        }
        step();
        // Release: whoever finds the number finds the stores. This is the commit.
        self.count.store(stores.len() as u64, Ordering::Release);
        step();
    }

    /// The number of committed stores, if any; one that no program wrote counts as none.
    pub(super) fn count(&self) -> Option<usize> {
        // Acquire: pairs with the commit.
        let count = self.count.load(Ordering::Acquire) as usize;
        (1..=MAX_STORES).contains(&count).then_some(count)
    }

    pub(super) fn store(&self, index: usize) -> (usize, u64) {
        let cells = &self.stores[index];
        let word = cells[0].load(Ordering::Relaxed) as usize;
        (word, cells[1].load(Ordering::Relaxed))
    }

    pub(super) fn clear(&self) {
        // Release: the stores are done before nobody does them again.
        self.count.store(0, Ordering::Release);
    }
}

/// The stores of a change that is being put together.
#[derive(Debug)]
pub(super) struct Stores<'a> {
    section: &'a GroupSection,
    list: Vec<(usize, u64)>,
}

impl<'a> Stores<'a> {
    pub(super) fn new(section: &'a GroupSection) -> Self {
        let list = Vec::with_capacity(MAX_STORES);
        Self { section, list }
    }

    pub(super) fn section(&self) -> &'a GroupSection {
        self.section
    }

    pub(super) fn list(&self) -> &[(usize, u64)] {
        // By construction no change is longer; the intent has no room for more.
        &self.list[..self.list.len().min(MAX_STORES)]
    }

    pub(super) fn put(&mut self, cell: &AtomicU64, value: u64) {
        self.list.push((self.section.number(cell), value));
    }
}
