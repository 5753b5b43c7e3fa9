//! Memory that is freed only when nobody alive can still read it.
//!
//! Readers of a linked structure take no lock: they *pin* the current epoch, follow offsets, and
//! unpin. Whoever unlinks a block *retires* it, and frees it once every reader that might have
//! seen it has unpinned. This is epoch-based reclamation (K. Fraser, *Practical lock-freedom*,
//! Cambridge 2004, section 5.2.3), with two changes for members that die:
//!
//! * **A dead reader blocks nothing.** The epoch moves from `e` to `e + 1` when every *living*
//!   pinned reader has pinned `e`. A verdict "dead" is final, so a dead reader loads nothing any
//!   more, and its line need not be cleared by anybody.
//! * **A block is stamped after its unlinking was applied**, not in the record that unlinks it.
//!   A record of a dead owner is applied by whoever settles it, perhaps much later; a stamp that
//!   lay in the record would be older than readers that found the block in between. So a block is
//!   retired with the stamp 0, and the first [`Epochs::stamp`] after the record is complete says
//!   from when on to count. Two advances after that nobody can hold it:
//!
//! ```text
//!   reader:   pin (line = e, fence) ... finds X ............................ unpin
//!   remover:                        unlink X, fence, stamp s = now (s >= e)
//!   advance:            s -> s+1 may have looked before the pin
//!                       s+1 -> s+2 looks after the stamp, finds e < s+1, does not happen
//! ```
//!
//! The words lie in the heap's header and its participants' places; this module is the rule.

mod reclaim;

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;

use crate::liveness::Liveness;
use crate::mem::{cas64, fence, load64, store64};

pub use reclaim::Pin;

/// Advances after its stamp until a block is out of every reader's reach.
const GRACE: u64 = 2;

/// The epoch of a heap: a word that counts up from 0.
#[derive(Clone, Copy, Debug)]
pub struct Epochs<'m> {
    global: &'m AtomicU64,
}

/// One who may be pinned: whose place it is, and what that one has pinned.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'m> {
    /// [`InstanceId`] of the owner of the place; 0 if it is vacant.
    pub owner: &'m AtomicU64,
    /// 0, or the pinned epoch; stored by the owner alone.
    pub line: &'m AtomicU64,
}

impl<'m> Epochs<'m> {
    /// The epoch in `global`. An all-zero word is a new one.
    pub const fn new(global: &'m AtomicU64) -> Self {
        Self { global }
    }

    /// The current epoch.
    pub fn now(self) -> u64 {
        // Acquire: pairs with the swap of `advance`. Who sees an epoch also sees what those
        // who let it come had done.
        load64(self.global, Ordering::Acquire)
    }

    /// Pins the current epoch in the caller's own `line`: from here to [`unpin`](Self::unpin) no
    /// block is freed that the caller can reach.
    ///
    /// The pin is ordered before all later loads of the caller.
    pub fn pin(self, line: &AtomicU64) {
        // The epoch may move on before the line is seen: an old pin only holds more back.
        // Release: who sees the pin sees that the caller owns the place.
        store64(line, self.now() << 1 | 1, Ordering::Release);
        // SeqCst, with the fences of `advance` and `stamp`: either they see this line, or the
        // caller sees what was unlinked before them. Nothing weaker orders a store before loads.
        fence(Ordering::SeqCst);
    }

    /// Ends the caller's pin.
    pub fn unpin(self, line: &AtomicU64) {
        // Release: the caller's loads come before it.
        store64(line, 0, Ordering::Release);
    }

    /// Moves on to the next epoch if no living reader has pinned an earlier one than the current.
    /// Returns the epoch after that; never waits.
    ///
    /// # Errors
    /// The living reader that holds the epoch back.
    pub fn advance<'r, J: Liveness>(
        self,
        readers: impl IntoIterator<Item = Reader<'r>>,
        judge: &J,
    ) -> Result<u64, InstanceId> {
        let now = self.now();
        fence(Ordering::SeqCst);
        for reader in readers {
            // The line before the owner: a line that a living owner has pinned was pinned after
            // that one came into the place, so the owner that is read then is that one (or a later
            // one, and it is gone). Acquire: pairs with the pin.
            let line = load64(reader.line, Ordering::Acquire);
            if line & 1 == 0 || line >> 1 == now {
                continue;
            }
            let owner = InstanceId::from_word(load64(reader.owner, Ordering::Acquire));
            if !owner.is_none() && judge.is_alive(owner) {
                return Err(owner);
            }
        }
        // AcqRel: the loads of those who unpinned come before whatever is freed in the new epoch.
        match cas64(self.global, now, now + 1, Ordering::AcqRel) {
            Ok(_) => Ok(now + 1),
            Err(newer) => Ok(newer),
        }
    }

    /// The stamp of a block whose unlinking is complete and visible. Never 0, which says that a
    /// block has no stamp yet.
    pub fn stamp(self) -> u64 {
        // SeqCst: see `pin`.
        fence(Ordering::SeqCst);
        self.now() + 1
    }

    /// Whether a block with `stamp` is out of everybody's reach. Never for stamp 0.
    pub fn is_over(self, stamp: u64) -> bool {
        stamp != 0 && self.now() + 1 >= stamp.saturating_add(GRACE)
    }
}

#[cfg(test)]
#[path = "epoch_test.rs"]
mod epoch_test;
