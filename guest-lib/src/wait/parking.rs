//! Where sleepers announce themselves to whoever ends their wait.

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering, compiler_fence};

use super::{class, futex};
use crate::mem::{add32, cas32, fence, load32, or32, swap32};

/// Nobody sleeps, as far as the flag knows.
const NOBODY: u32 = 0;

/// Where those wait who share a flag and a futex word; the module documentation says how.
///
/// The flag is two sets of classes of nodes: in the low half those of which somebody may sleep,
/// in the high half those of them of whose nodes every processor knows it.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Parking<'a> {
    /// Not 0 if somebody may sleep.
    pub flag: &'a AtomicU32,
    /// The futex word.
    pub word: &'a AtomicU32,
}

impl Parking<'_> {
    /// Announces a sleeper. The caller looks once more at what it waits for, with at least
    /// `Acquire`, and then sleeps on `word` with the value returned.
    pub fn announce(&self) -> u32 {
        // Before the flag: whoever lowers the flag after this one raised it changes the word
        // after that, so that the sleep does not begin.
        let seen = load32(self.word, Ordering::Acquire);
        let (raised, known) = (class::own(), class::own_known());
        if load32(self.flag, Ordering::Acquire) & known == 0 {
            let flag = or32(self.flag, raised, Ordering::SeqCst) | raised;
            barrier_for_both();
            // Release: who finds the flag known may rely on this one's barrier. Fails if somebody
            // lowered it meanwhile, who has changed the word or will; or if another class came,
            // and then the next sleeper makes one more barrier.
            let _ = cas32(self.flag, flag, flag | known, Ordering::AcqRel);
        }
        seen
    }

    /// Says that there may be further sleepers of this node, by one whom [`wake`](Self::wake)
    /// woke.
    pub fn pass_on(&self) {
        or32(self.flag, class::own(), Ordering::Relaxed);
    }

    /// Wakes up to `count` sleepers of each node, if there are any, after the store that ends
    /// their wait.
    #[inline(always)]
    pub fn wake(&self, count: i32) {
        half_barrier();
        if load32(self.flag, Ordering::Relaxed) != NOBODY {
            self.wake_now(count);
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_now(self, count: i32) {
        // Lowered, not counted down: a count would stay too high for ever after the death of a
        // sleeper. Whoever has slept raises it again when its own turn to wake comes.
        let was = swap32(self.flag, NOBODY, Ordering::AcqRel);
        add32(self.word, 1, Ordering::SeqCst);
        if was & class::own() != 0 {
            futex::wake_own(self.word, count);
        }
        // One of each node, and not of one node: that one's sleeper may have died or given up.
        let others = class::others(was);
        if others != 0 {
            futex::wake_others(self.word, others, count != 1);
        }
    }
}

/// Where those sleep whose wait ends seldom, so that who ends it can afford a barrier of its own.
/// The word changes at each end, also if nobody sleeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bell<'a> {
    /// Set of classes of nodes of which somebody may sleep.
    pub(crate) classes: &'a AtomicU32,
    /// The futex word.
    pub(crate) word: &'a AtomicU32,
}

impl Bell<'_> {
    /// Announces a sleeper, which then looks once more at what it waits for.
    pub(crate) fn announce(&self) {
        let own = class::own();
        if load32(self.classes, Ordering::Relaxed) & own == 0 {
            or32(self.classes, own, Ordering::Relaxed);
        }
        // Between the set and the look. Pairs with the one in `change`, between what ends the
        // wait and the look at the set: at least one of the two sees what the other stored. So it is
        // right between nodes also, which no barrier of a kernel could order.
        fence(Ordering::SeqCst);
    }

    /// Wakes all sleepers, after the store that ends their wait.
    pub(crate) fn ring(&self) {
        if self.change() != 0 {
            self.wake_all();
        }
    }

    /// Wakes one sleeper of this node, and without one all those of other nodes.
    pub(crate) fn ring_one(&self) {
        let found = self.change();
        // The class stays in the set: others of it may sleep.
        if found & class::own() != 0 && futex::wake_own(self.word, 1) > 0 {
            return;
        }
        if found != 0 {
            self.wake_all();
        }
    }

    /// Changes the word, which may be all that sleepers look at; then looks who may sleep.
    fn change(&self) -> u32 {
        add32(self.word, 1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        load32(self.classes, Ordering::Relaxed)
    }

    #[cold]
    fn wake_all(&self) {
        let was = swap32(self.classes, 0, Ordering::AcqRel);
        // Once more, after the set: a sleeper that still found its class in it read the word
        // before this, and does not sleep.
        add32(self.word, 1, Ordering::SeqCst);
        if was & class::own() != 0 {
            futex::wake_own(self.word, i32::MAX);
        }
        let others = class::others(was);
        if others != 0 {
            futex::wake_others(self.word, others, true);
        }
    }
}

/// `membarrier(2)`: unknown, usable, or not.
static EXPEDITED: AtomicU8 = AtomicU8::new(0);
const USABLE: u8 = 1;
const UNUSABLE: u8 = 2;

/// From `linux/membarrier.h`; libc has the names for some targets only.
const MEMBARRIER_CMD_GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
const MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: orders memory accesses and touches none.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// The cheap half of a pair of barriers; the other is [`barrier_for_both`].
#[inline(always)]
pub(crate) fn half_barrier() {
    if cfg!(any(test, feature = "crash-points")) {
        // What the pair is meant to be, for model checkers.
        fence(Ordering::SeqCst);
    } else if EXPEDITED.load(Ordering::Relaxed) == USABLE {
        compiler_fence(Ordering::SeqCst);
    } else {
        half_barrier_unregistered();
    }
}

#[cold]
fn half_barrier_unregistered() {
    if EXPEDITED.load(Ordering::Relaxed) != UNUSABLE {
        let usable = membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED);
        EXPEDITED.store(if usable { USABLE } else { UNUSABLE }, Ordering::Relaxed);
    }
    fence(Ordering::SeqCst);
}

/// The dear half: a full barrier here, and one on every thread of the node that runs a process
/// with [`half_barrier`]s.
#[cold]
pub(crate) fn barrier_for_both() {
    fence(Ordering::SeqCst);
    if !cfg!(any(test, feature = "crash-points")) {
        // Where the kernel refuses, the other side's half is a whole one, if it was refused too.
        let _ = membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
    }
}

#[cfg(test)]
#[path = "parking_test.rs"]
mod parking_test;
