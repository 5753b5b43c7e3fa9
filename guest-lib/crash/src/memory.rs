//! Shared memory that the framework can copy, restore and compare.
//!
//! The framework plays the machine here: its own loads and stores are no accesses of the library,
//! and so they are not counted.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin::shm::{Access, Mapping};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::SuiteError;

const PAGE: u64 = 4096;
const NAME: &CStr = c"lupin-crash";

/// The contents of a memory.
pub type Image = Vec<u64>;

/// A mapped memory of its own, shared with all processes that are forked from here on.
#[derive(Debug)]
pub struct Shared {
    mapping: Mapping,
}

impl Shared {
    /// All-zero memory of at least `bytes` bytes.
    ///
    /// # Errors
    /// [`SuiteError::System`], [`SuiteError::Memory`].
    pub fn new(bytes: u64) -> Result<Self, SuiteError> {
        let bytes = bytes.max(1).next_multiple_of(PAGE);
        let file = memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, bytes as i64)?;
        let mapping = Mapping::new(&file, 0, bytes, Access::ReadWrite)?;
        Ok(Self { mapping })
    }

    /// The mapping.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// All of it, word by word.
    pub fn words(&self) -> &[AtomicU64] {
        let count = self.mapping.len() / 8;
        // In bounds and aligned by construction.
        self.mapping.get_slice(0, count).unwrap_or_default()
    }

    /// Copies all of it.
    pub fn image(&self) -> Image {
        let words = self.words().iter();
        words.map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Makes it equal to `image`.
    pub fn restore(&self, image: &[u64]) {
        for (word, value) in self.words().iter().zip(image) {
            // Unchanged pages stay clean.
            if word.load(Ordering::Relaxed) != *value {
                word.store(*value, Ordering::Relaxed);
            }
        }
    }

    /// Makes `image` equal to it, and keeps `sum` the [`hash`] of `image`. Whether anything
    /// differed.
    pub fn follow(&self, image: &mut [u64], sum: &mut u64) -> bool {
        let mut changed = false;
        for (index, (word, old)) in self.words().iter().zip(image).enumerate() {
            let new = word.load(Ordering::Relaxed);
            if new != *old {
                *sum ^= mix(index, *old) ^ mix(index, new);
                *old = new;
                changed = true;
            }
        }
        changed
    }
}

/// A hash that can be kept up word by word.
pub fn hash(image: &[u64]) -> u64 {
    let words = image.iter().enumerate();
    words.fold(0, |sum, (index, word)| sum ^ mix(index, *word))
}

/// Scatters a word and its place (the finaliser of SplitMix64, twice).
fn mix(index: usize, word: u64) -> u64 {
    let scatter = |mut x: u64| {
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    };
    let place = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    scatter(place.wrapping_add(scatter(word)))
}

/// The words that differ, for people: at most a few of them.
pub fn difference(before: &[u64], after: &[u64]) -> String {
    const MOST: usize = 12;
    let words = before.iter().zip(after).enumerate();
    let changed: Vec<_> = words.filter(|(_, (old, new))| old != new).collect();
    let mut text: Vec<String> = changed
        .iter()
        .take(MOST)
        .map(|(index, (old, new))| format!("{:#x}: {old:#x} -> {new:#x}", index * 8))
        .collect();
    if changed.len() > MOST {
        text.push(format!("and {} more", changed.len() - MOST));
    }
    text.join(", ")
}
