//! The queue nodes of MCS locks: a table that the locks of one mapping share.

use core::cell::Cell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lupin_abi::InstanceId;

use super::McsWords;
use crate::liveness::Liveness;
use crate::lock::{LockError, check};
use crate::mem::{cas64, load64, store64};
use crate::pod_safe::{PodSafe, PodShared};
use crate::shm::{Mapping, ShmError};
use crate::wait::Parking;

/// Bits of a version in a [`Place`].
const VERSION_BITS: u32 = 48;
const VERSION_MASK: u64 = (1 << VERSION_BITS) - 1;
/// Marks an owner word as a version and no instance: the owner gave up its place in that version
/// of the node. No instance has so large an id.
const GONE: u64 = 1 << 63;
/// How often a walk that others disturb begins again.
const WALKS: u32 = 64;

/// A place in a queue: a node (its number, from 1) in one of its versions.
///
/// A version lasts from one entry into a queue to the end of that stay, so a place that is over
/// is recognised for ever. Versions have 48 bits: at a million acquisitions a second they repeat
/// after nine years, and only a waiter that slept through all of them could take one for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    pub(super) const NONE: Self = Self(0);

    pub(super) const fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub(super) const fn word(self) -> u64 {
        self.0
    }

    pub(super) const fn is_none(self) -> bool {
        self.0 == 0
    }

    const fn number(self) -> u16 {
        (self.0 >> VERSION_BITS) as u16
    }

    const fn version(self) -> u64 {
        self.0 & VERSION_MASK
    }

    /// The place that its node takes next.
    pub(super) const fn next(self) -> Self {
        Self((self.0 & !VERSION_MASK) | (self.0.wrapping_add(1) & VERSION_MASK))
    }

    /// The place that its node took last: it is over if this one is not.
    pub(super) const fn previous(self) -> Self {
        Self((self.0 & !VERSION_MASK) | (self.0.wrapping_sub(1) & VERSION_MASK))
    }

    /// The version word of its node for as long as the place lasts.
    pub(super) const fn lasting(self) -> u64 {
        self.version()
    }

    /// The version word of its node once the place is over.
    pub(super) const fn over(self) -> u64 {
        self.next().version()
    }

    /// The owner word of a node whose owner gave this place up.
    pub(super) const fn gone(self) -> u64 {
        GONE | self.version()
    }
}

/// A place that no program of the pod stored: its node does not exist.
///
/// One word, so that the paths that nobody waits on keep their results in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoPlace(pub(super) u64);

impl From<NoPlace> for LockError {
    fn from(NoPlace(word): NoPlace) -> Self {
        Self::Corrupt {
            what: "a place in the queue of an MCS lock",
            word,
        }
    }
}

/// One node as it lies in memory. All zero is a free node.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct McsNodeWords {
    /// [`InstanceId`] of whoever uses the node; 0 if it is free; [`Place::gone`] if its owner
    /// gave up a place that others may still know.
    pub(super) owner: AtomicU64,
    /// The version. Raised when a place ends: that is how the next in the queue learns it. While
    /// the owner lives and has not given its place up, it alone stores this word.
    pub(super) version: AtomicU64,
    /// The place in front; 0 if there is none: then the owner holds the lock. Means something
    /// only in a queue.
    pub(super) pred: AtomicU64,
    /// Offset of the lock for which the node was used last.
    pub(super) lock: AtomicU64,
    /// Not 0 if whoever stands behind may sleep. A hint.
    waiters: AtomicU32,
    /// Futex word of whoever stands behind.
    wake: AtomicU32,
    _reserved: [AtomicU64; 3],
}

const _: () = assert!(size_of::<McsNodeWords>() == 64);
// SAFETY: `repr(C)` of atomics without padding.
unsafe impl PodSafe for McsNodeWords {}
// SAFETY: all its fields are atomics.
unsafe impl PodShared for McsNodeWords {}

impl McsNodeWords {
    /// Where whoever stands behind sleeps until the place is over, or given up.
    #[inline(always)]
    pub(super) fn parking(&self) -> Parking<'_> {
        Parking {
            flag: &self.waiters,
            word: &self.wake,
        }
    }

    /// Ends a place, by its owner, and wakes whoever sleeps behind it.
    #[inline(always)]
    pub(super) fn end(&self, place: Place) {
        // A store, at a fraction of the price of a swap: nobody else ends the place of an owner
        // that lives. Release: the next in the queue sees what the holder did.
        store64(&self.version, place.over(), Ordering::Release);
        self.parking().wake(1);
    }
}

/// What somebody sees of a place in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The place is over.
    Over,
    /// Its owner may still act.
    Alive(InstanceId),
    /// Its owner died holding the lock.
    DeadHolder(InstanceId),
    /// Its owner died waiting, or gave up; `owner` is the word that says so.
    DeadWaiter { owner: u64, ahead: Place },
}

/// A table of queue nodes in pod memory, shared by all MCS locks of its mapping.
///
/// A place in it is claimed with [`join`](Self::join): one for each lock that a thread holds or
/// waits for at the same time. Dead instances' nodes are claimed again once no queue knows them.
#[derive(Clone, Copy, Debug)]
pub struct McsNodes<'m> {
    pub(super) memory: &'m Mapping,
    nodes: &'m [McsNodeWords],
}

impl<'m> McsNodes<'m> {
    /// Bytes that a table of `count` nodes takes.
    pub const fn size(count: u16) -> u64 {
        count as u64 * size_of::<McsNodeWords>() as u64
    }

    /// The table of `count` nodes at the offset `at`, a multiple of 64. All-zero memory is a table
    /// of free nodes, so nobody creates it. All programs pass the same `count`: one for each lock
    /// that a thread holds or waits for, and as many again for dead waiters, which keep theirs
    /// until somebody alive has gone past them.
    ///
    /// # Errors
    /// [`ShmError::OutOfBounds`], [`ShmError::Unaligned`].
    pub fn new(memory: &'m Mapping, at: u64, count: u16) -> Result<Self, ShmError> {
        let nodes = memory.get_slice(at, count.into())?;
        Ok(Self { memory, nodes })
    }

    /// Claims a node for `me`: a free one, or one that a dead instance left.
    ///
    /// # Errors
    /// [`LockError::NoInstance`]; [`LockError::NoNode`] if all nodes are in use.
    pub fn join<J: Liveness>(self, me: InstanceId, judge: &J) -> Result<McsWaiter<'m>, LockError> {
        check(me)?;
        if me.word() & GONE != 0 {
            return Err(LockError::NoInstance(me));
        }
        let (node, next) = self.claim(me, judge)?;
        Ok(McsWaiter {
            nodes: self,
            me,
            node: Cell::new(node),
            next: Cell::new(next),
        })
    }

    /// Nodes that somebody claimed and has not given back. For audits.
    pub fn in_use(&self) -> usize {
        let owner = |node: &&McsNodeWords| load64(&node.owner, Ordering::Relaxed) != 0;
        self.nodes.iter().filter(owner).count()
    }

    fn claim<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<(&'m McsNodeWords, Place), LockError> {
        let count = self.nodes.len();
        let numbers = || (0..count).map(|n| (n + me.id() as usize) % count);
        for n in numbers() {
            let node = &self.nodes[n];
            // Acquire: pairs with the Release by which its last user let it go.
            if load64(&node.owner, Ordering::Relaxed) == 0
                && cas64(&node.owner, 0, me.word(), Ordering::Acquire).is_ok()
            {
                let version = load64(&node.version, Ordering::Relaxed);
                return Ok((node, self.place(n as u16 + 1, version)));
            }
        }
        for n in numbers() {
            let node = &self.nodes[n];
            let owner = load64(&node.owner, Ordering::Acquire);
            if is_alive(owner, judge) {
                continue;
            }
            let version = load64(&node.version, Ordering::Acquire);
            // Once no queue knows a dead owner's node, none ever will: only its owner puts it
            // into one. And the owner word is never the same again, being an instance that is
            // dead or a version that is over.
            if self.is_queued(n, version)
                || cas64(&node.owner, owner, me.word(), Ordering::AcqRel).is_err()
            {
                continue;
            }
            // Whoever may still be about to end the dead owner's place must not end one of the
            // new owner's. Fails if that has happened already.
            let place = self.place(n as u16 + 1, version);
            let _ = cas64(&node.version, version, place.over(), Ordering::AcqRel);
            return Ok((node, place.next()));
        }
        Err(LockError::NoNode {
            instance: me,
            nodes: count as u16,
        })
    }

    /// Whether the queue of the lock for which a dead owner used a node may still know it.
    fn is_queued(&self, n: usize, version: u64) -> bool {
        let at = load64(&self.nodes[n].lock, Ordering::Acquire);
        if at == 0 {
            return false; // Never used.
        }
        let place = self.place(n as u16 + 1, version);
        match self.memory.get::<McsWords>(at) {
            Ok(words) => self.walk(words, |seen, _| seen == place).unwrap_or(true),
            Err(_) => true, // Garbage; a leaked node does less harm than one that is used twice.
        }
    }

    #[inline]
    pub(super) fn place(&self, number: u16, version: u64) -> Place {
        Place((u64::from(number) << VERSION_BITS) | (version & VERSION_MASK))
    }

    /// The node of a place.
    #[inline]
    pub(super) fn node(&self, place: Place) -> Result<&'m McsNodeWords, NoPlace> {
        let number = usize::from(place.number());
        self.nodes
            .get(number.wrapping_sub(1))
            .ok_or(NoPlace(place.word()))
    }

    /// Whether a place is over, or none at all. `Acquire`: who finds it over sees what its owner
    /// did before it ended.
    #[inline]
    pub(super) fn is_over(&self, place: Place) -> Result<bool, NoPlace> {
        if place.is_none() {
            return Ok(true);
        }
        let version = load64(&self.node(place)?.version, Ordering::Acquire);
        Ok(version != place.lasting())
    }

    /// Looks at a place.
    pub(super) fn look<J: Liveness>(&self, place: Place, judge: &J) -> Result<Seen, NoPlace> {
        if self.is_over(place)? {
            return Ok(Seen::Over);
        }
        let node = self.node(place)?;
        let owner = load64(&node.owner, Ordering::Acquire);
        if is_alive(owner, judge) {
            return Ok(Seen::Alive(InstanceId::from_word(owner)));
        }
        let ahead = Place(load64(&node.pred, Ordering::Acquire));
        // The two words are of this place only if it is not over even now.
        if self.is_over(place)? {
            return Ok(Seen::Over);
        }
        if ahead.is_none() {
            return Ok(Seen::DeadHolder(InstanceId::from_word(owner)));
        }
        Ok(Seen::DeadWaiter { owner, ahead })
    }

    /// Ends a dead owner's place that no queue knows any more, and frees its node. Whoever dies
    /// in between leaves a node that [`claim`](Self::claim) finds.
    pub(super) fn discard(&self, place: Place, owner: u64) -> Result<(), NoPlace> {
        let node = self.node(place)?;
        if self.end_for_dead(place, node) {
            // Release: pairs with the Acquire of a claim. Fails if a claim was first.
            let _ = cas64(&node.owner, owner, 0, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Ends a place in its dead owner's stead; false if it was over.
    pub(super) fn end_for_dead(&self, place: Place, node: &McsNodeWords) -> bool {
        // A swap, as others may do the same, and the node may have been claimed since. AcqRel:
        // the next in the queue sees what was done before. Nobody sleeps behind the place: the
        // one behind it is the caller.
        let (lasting, over) = (place.lasting(), place.over());
        cas64(&node.version, lasting, over, Ordering::AcqRel).is_ok()
    }

    /// Walks a queue from its end to its head, and tells `visit` each place and its owner word
    /// until it returns true; says whether it did. `None` if the queue changed too often, or
    /// holds garbage.
    ///
    /// A place that was in the queue when the walk began, and that only its dead owner could
    /// have taken out, is always met: a queue grows at its end only, behind where the walk began;
    /// whoever is taken out from the middle has its version raised *after* the one behind it has
    /// turned to the one in front; and the one at the head ends only when none is in front of it.
    pub(super) fn walk(
        &self,
        words: &McsWords,
        mut visit: impl FnMut(Place, u64) -> bool,
    ) -> Option<bool> {
        'again: for _ in 0..WALKS {
            let mut behind = None;
            let mut place = Place(load64(&words.tail, Ordering::Acquire));
            // One more than there are nodes: a longer queue is garbage.
            for _ in 0..=self.nodes.len() {
                if place.is_none() {
                    return Some(false);
                }
                let node = self.node(place).ok()?;
                let owner = load64(&node.owner, Ordering::Acquire);
                let ahead = Place(load64(&node.pred, Ordering::Acquire));
                if self.is_over(place).ok()? {
                    // Over because it was at the head, or because it was taken out?
                    let now = match behind {
                        None => load64(&words.tail, Ordering::Acquire),
                        Some(behind) => {
                            let now = load64(&self.node(behind).ok()?.pred, Ordering::Acquire);
                            if self.is_over(behind).ok()? {
                                continue 'again;
                            }
                            now
                        }
                    };
                    if now == place.word() {
                        return Some(false);
                    }
                    continue 'again;
                }
                if visit(place, owner) {
                    return Some(true);
                }
                behind = Some(place);
                place = ahead;
            }
            return None;
        }
        None
    }
}

/// Judges the owner word of a node.
fn is_alive<J: Liveness>(owner: u64, judge: &J) -> bool {
    owner != 0 && owner & GONE == 0 && judge.is_alive(InstanceId::from_word(owner))
}

/// A node that an instance claimed: what it takes to hold one MCS lock at a time.
///
/// Dropping it gives the node back.
#[derive(Debug)]
pub struct McsWaiter<'m> {
    pub(super) nodes: McsNodes<'m>,
    pub(super) me: InstanceId,
    pub(super) node: Cell<&'m McsNodeWords>,
    /// The place that the node takes next. None after a place was given up together with its node.
    pub(super) next: Cell<Place>,
}

impl McsWaiter<'_> {
    /// Who waits.
    pub fn instance(&self) -> InstanceId {
        self.me
    }

    /// Whether the node can take its next place: not while a guard that was forgotten uses it.
    #[inline(always)]
    pub(super) fn is_ready(&self) -> bool {
        let next = self.next.get();
        // Relaxed: the caller's own node.
        !next.is_none() && load64(&self.node.get().version, Ordering::Relaxed) == next.lasting()
    }

    /// Claims another node, in place of one that was given up, or whose guard was forgotten: that
    /// guard's lock is held as long as the instance lives.
    #[cold]
    #[inline(never)]
    pub(super) fn renew<J: Liveness>(&self, judge: &J) -> Result<(), LockError> {
        let (node, next) = self.nodes.claim(self.me, judge)?;
        self.node.set(node);
        self.next.set(next);
        Ok(())
    }
}

impl Drop for McsWaiter<'_> {
    fn drop(&mut self) {
        if self.is_ready() {
            // Release: pairs with the Acquire of the next claim.
            let owner = &self.node.get().owner;
            let _ = cas64(owner, self.me.word(), 0, Ordering::AcqRel);
        }
    }
}
