//! Locks whose holders may die.
//!
//! | module | what it gives |
//! |---|---|
//! | [`tatas`] | [`RecoverableLock`]: two words, barging; the one to take unless there is a reason |
//! | [`mcs`] | [`McsLock`]: a queue, first come, first served |
//! | [`rwlock`] | [`RwLock`]: many readers or one writer |
//!
//! # The orphan contract
//!
//! All locks store who holds them, and all keep the same promises when a holder dies:
//!
//! * Whoever comes next gets the lock as [`Acquired::Orphaned`], which names the dead holder.
//!   What the lock protects may be half changed.
//! * The lock stays inconsistent until somebody declares the repair done
//!   ([`OrphanGuard::repaired`]). If the repairer dies, or drops the guard, the next one is told
//!   of the *same* dead holder: a log kept under that name is found by any of them.
//! * Of two that repair at once at most one has the lock.
//! * Nobody waits for the dead. Every wait asks the judge ([`Liveness`](crate::liveness::Liveness))
//!   again when somebody died, as [`wait`](crate::wait) says.
//!
//! These hold for judges that keep theirs: a verdict "dead" comes after the last store of the dead.
//! So a holder that runs has the lock, and the release of a guard that is dropped stores without
//! a look. Who would rather know that a judge was wrong looks first, with
//! [`unlock`](LockGuard::unlock): that finds most such holds, and can promise none, since the
//! verdict may fall between the look and the store.
//!
//! This is what `EOWNERDEAD` and `pthread_mutex_consistent` are to a robust mutex of POSIX, except
//! that no kernel knows the owner: the judge does, for owners on all nodes.
//!
//! One instance is one thread of control: threads that share an instance (an agent's) put a
//! process-local mutex around their use of a lock.

use core::fmt::Debug;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::time::Duration;

use lupin_abi::InstanceId;

pub mod mcs;
pub mod rwlock;
pub mod tatas;

pub use mcs::{McsLock, McsNodes, McsWaiter};
pub use rwlock::{ReadAcquired, ReadGuard, RwLock, RwLockWords};
pub use tatas::{LockState, RecoverableLock};

/// Why a lock was not acquired or released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// The lock was held all the time.
    #[error("the lock was held by {holder} for all of {waited:?}")]
    Timeout {
        /// Who holds it, or repairs it.
        holder: InstanceId,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The lock is held by the instance that asks for it.
    #[error(
        "{0} already holds this lock: either a deadlock, or what an earlier process of the same \
         instance left, which resolve_own() repairs"
    )]
    Deadlock(InstanceId),
    /// The instance that asks is no instance.
    #[error("{0} cannot own a lock")]
    NoInstance(InstanceId),
    /// The caller was declared dead while it held the lock, and somebody took it over: the judge
    /// broke its promise.
    #[error("the lock was taken over from {0}, which had been declared dead")]
    Lost(InstanceId),
    /// All nodes of a table for queue locks are in use.
    #[error("{instance} got none of the {nodes} queue nodes: all are in use")]
    NoNode {
        /// Who asked.
        instance: InstanceId,
        /// Nodes in the table.
        nodes: u16,
    },
    /// A word in pod memory that no program of the pod stored.
    #[error("{what} is corrupt: {word:#x}")]
    Corrupt {
        /// Which word.
        what: &'static str,
        /// What it holds.
        word: u64,
    },
}

mod sealed {
    use super::{Debug, InstanceId, LockError};

    /// A hold on a lock, as far as its guard needs to know it.
    pub trait Hold: Copy + Debug {
        /// Whether the hold is still the caller's: not if a judge called it dead, wrongly.
        fn is_held(&self, me: InstanceId) -> bool;
        /// Ends the hold of consistent data.
        fn release(&self, me: InstanceId);
        /// Makes the dead holder's hold the caller's own, or lets it go.
        fn adopt(&self, me: InstanceId, previous: InstanceId) -> Result<(), LockError>;
        /// Lets a dead holder's lock go unrepaired.
        fn let_go(&self, me: InstanceId);
    }
}
use sealed::Hold;

/// What the new holder of a lock finds.
#[derive(Debug)]
#[must_use = "dropping it releases the lock at once"]
pub enum Acquired<'a, L: Hold = RecoverableLock<'a>> {
    /// The last holder released it.
    Clean(LockGuard<'a, L>),
    /// A holder died inside: the protected data may be half changed.
    Orphaned(OrphanGuard<'a, L>),
}

impl<'a, L: Hold> Acquired<'a, L> {
    /// The guard of consistent data, after `repair` if a holder died inside.
    ///
    /// `repair` is told the dead holder and must be repeatable: its caller may die, and the next
    /// one runs it again.
    ///
    /// # Errors
    /// Those of `repair` (the lock is then released and stays orphaned), and
    /// [`LockError::Lost`].
    #[inline]
    pub fn or_repair<E: From<LockError>>(
        self,
        repair: impl FnOnce(InstanceId) -> Result<(), E>,
    ) -> Result<LockGuard<'a, L>, E> {
        match self {
            Self::Clean(guard) => Ok(guard),
            Self::Orphaned(orphan) => {
                repair(orphan.previous())?;
                Ok(orphan.repaired()?)
            }
        }
    }
}

/// The lock is held, and what it protects is consistent. Dropping it releases the lock.
#[derive(Debug)]
pub struct LockGuard<'a, L: Hold = RecoverableLock<'a>> {
    hold: L,
    me: InstanceId,
    lock: PhantomData<&'a ()>,
}

impl<L: Hold> LockGuard<'_, L> {
    #[inline]
    fn new(hold: L, me: InstanceId) -> Self {
        Self {
            hold,
            me,
            lock: PhantomData,
        }
    }

    /// Who holds the lock.
    #[inline]
    pub fn owner(&self) -> InstanceId {
        self.me
    }

    /// Releases the lock as dropping the guard does, but looks first if it still is the caller's to
    /// release. The look is one load; it costs most where others wait for the lock, since it
    /// takes the lock's line from them once more.
    ///
    /// # Errors
    /// [`LockError::Lost`]: a judge called the caller dead, who is not, and somebody else was
    /// let in. Nothing is released. What the caller changed since then may be mixed with another's
    /// changes.
    #[inline]
    pub fn unlock(self) -> Result<(), LockError> {
        let this = ManuallyDrop::new(self);
        if !this.hold.is_held(this.me) {
            return Err(LockError::Lost(this.me));
        }
        this.hold.release(this.me);
        Ok(())
    }
}

impl<'a> LockGuard<'a> {
    /// The lock that is held.
    pub fn lock(&self) -> RecoverableLock<'a> {
        self.hold
    }
}

impl<L: Hold> Drop for LockGuard<'_, L> {
    #[inline]
    fn drop(&mut self) {
        self.hold.release(self.me);
    }
}

/// The lock is held in a dead holder's place; what it protects may be half changed.
///
/// Dropping it lets the lock go unrepaired: the next to come gets it orphaned again.
#[derive(Debug)]
pub struct OrphanGuard<'a, L: Hold = RecoverableLock<'a>> {
    hold: L,
    me: InstanceId,
    previous: InstanceId,
    lock: PhantomData<&'a ()>,
}

impl<'a, L: Hold> OrphanGuard<'a, L> {
    #[inline]
    fn new(hold: L, me: InstanceId, previous: InstanceId) -> Self {
        Self {
            hold,
            me,
            previous,
            lock: PhantomData,
        }
    }

    /// The holder that died.
    #[inline]
    pub fn previous(&self) -> InstanceId {
        self.previous
    }

    /// Who repairs.
    #[inline]
    pub fn owner(&self) -> InstanceId {
        self.me
    }

    /// Declares the protected data consistent; the lock stays held.
    ///
    /// Everything that the caller stored before is visible to whoever takes the lock next,
    /// also after the caller's death.
    ///
    /// # Errors
    /// [`LockError::Lost`]: the caller was itself declared dead, and another repairs or did.
    #[inline]
    pub fn repaired(self) -> Result<LockGuard<'a, L>, LockError> {
        // The hold is adopted or let go by `adopt`, in the order that the lock needs.
        let this = ManuallyDrop::new(self);
        this.hold.adopt(this.me, this.previous)?;
        Ok(LockGuard::new(this.hold, this.me))
    }
}

impl<L: Hold> Drop for OrphanGuard<'_, L> {
    #[inline]
    fn drop(&mut self) {
        self.hold.let_go(self.me);
    }
}

/// Refuses what could not be told from a free lock or a dead owner.
#[inline]
fn check(me: InstanceId) -> Result<(), LockError> {
    if me.id() == 0 || me.generation() == 0 {
        return Err(LockError::NoInstance(me));
    }
    Ok(())
}
