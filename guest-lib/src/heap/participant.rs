//! Taking part in a heap.

use core::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::InstanceId;
use lupin_abi::system::LockWords;

use super::class::class_of;
use super::error::HeapError;
use super::intent::is_live;
use super::layout::{HOLDS, IntentLine, Place, Use};
use super::slab::{Cache, NO_SLAB, free_own};
use super::{Heap, KIND_CHORE, KIND_FREE, KINDS_RESERVED, SPAN, no_such};
use crate::liveness::Liveness;
use crate::lock::{Acquired, LockError, LockGuard, RecoverableLock};
use crate::log::{Log, Record};
use crate::mem::{load64, store64};
use crate::shm::Mapping;

/// One thread that takes part in a heap.
///
/// Dropping it leaves the heap, as [`leave`](Self::leave) does, without a place to report errors;
/// but not in a panic, which may have come from the middle of anything: then the place stays
/// taken until the instance is dead.
pub struct Participant<'m, J: Liveness> {
    pub(super) heap: Heap<'m>,
    pub(super) place: &'m Place,
    pub(super) index: u32,
    pub(super) me: InstanceId,
    pub(super) judge: J,
    pub(super) log: Log<'m>,
    pub(super) tag: u64,
    pub(super) cache: Cache<'m>,
    /// `None` once it has left.
    guard: Option<LockGuard<'m>>,
}

impl<'m> Heap<'m> {
    /// Takes part. The thread gets the place that an earlier life of it had, if that is free;
    /// dead participants whose places are looked at are settled.
    ///
    /// # Errors
    /// [`HeapError::Full`], [`HeapError::AlreadyJoined`], [`HeapError::NoInstance`];
    /// [`HeapError::Damaged`] or [`HeapError::Log`] if no place is left but damaged ones.
    pub fn join<J: Liveness>(
        &self,
        me: InstanceId,
        judge: J,
    ) -> Result<Participant<'m, J>, HeapError> {
        if me.id() == 0 || me.generation() == 0 {
            return Err(HeapError::NoInstance(me));
        }
        let lock = self.lock(me, &judge)?;
        let (index, guard) = self.take_place(me, &judge)?;
        let place = self.place(index)?;
        let lives = load64(&place.lives, Ordering::Relaxed);
        place.intent.clear();
        // The last one here may have died with a pin.
        store64(&place.epoch.word, 0, Ordering::Relaxed);
        store64(&place.lives, lives.wrapping_add(1), Ordering::Relaxed);
        // Release: from here on the place tells of this life.
        store64(&place.life, me.word(), Ordering::Release);
        lock.unlock()?;
        let mut participant = self.participant(index, me, judge, Some(guard))?;
        if lives == 0 {
            // A new place has no slabs; only if others became vacant there is one to adopt.
            participant.cache.nothing_vacated();
        }
        Ok(participant)
    }

    fn participant<J: Liveness>(
        &self,
        index: u32,
        me: InstanceId,
        judge: J,
        guard: Option<LockGuard<'m>>,
    ) -> Result<Participant<'m, J>, HeapError> {
        let place = self.place(index)?;
        Ok(Participant {
            heap: *self,
            place,
            index,
            me,
            judge,
            log: self.log_of(index)?,
            tag: load64(&place.intent.tag, Ordering::Relaxed),
            cache: Cache::new(self.places.spans),
            guard,
        })
    }

    /// The participant that `me` is already, as a process would know it that has always been
    /// there; it never leaves. For tests that move an operation into a process of its own.
    ///
    /// # Errors
    /// [`HeapError::NoInstance`] if it does not take part.
    #[cfg(feature = "crash-points")]
    #[doc(hidden)]
    pub fn resume<J: Liveness>(
        &self,
        me: InstanceId,
        judge: J,
    ) -> Result<Participant<'m, J>, HeapError> {
        for index in 0..self.places.participants {
            let place = self.place(index)?;
            if load64(&place.lock.owner, Ordering::Acquire) == me.word() {
                let mut participant = self.participant(index, me, judge, None)?;
                participant.load_own()?;
                return Ok(participant);
            }
        }
        Err(HeapError::NoInstance(me))
    }

    /// Takes a place: the one that an earlier life had, else one that nobody had (so that others
    /// find theirs again), else a vacant one, else a dead one's.
    fn take_place<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<(u32, LockGuard<'m>), HeapError> {
        let (mut former, mut new, mut vacant, mut dead) = (None, None, None, Vec::new());
        for index in 0..self.places.participants {
            let place = self.place(index)?;
            let owner = InstanceId::from_word(load64(&place.lock.owner, Ordering::Acquire));
            let life = InstanceId::from_word(load64(&place.life, Ordering::Acquire));
            if owner == me {
                return Err(HeapError::AlreadyJoined(me));
            }
            let is_takeable = owner.is_none() || !judge.is_alive(owner);
            if life.id() == me.id() && is_takeable {
                former = former.or(Some(index));
            } else if owner.is_none() && life.is_none() {
                new = new.or(Some(index));
            } else if owner.is_none() {
                vacant = vacant.or(Some(index));
            } else if is_takeable {
                dead.push(index);
            }
        }
        let mut error = HeapError::Full {
            participants: self.places.participants,
        };
        for index in former.into_iter().chain(new).chain(vacant).chain(dead) {
            let place = self.place(index)?;
            let settled = match RecoverableLock::new(&place.lock).try_lock(me, judge) {
                Ok(Acquired::Clean(guard)) => Ok(guard),
                Ok(Acquired::Orphaned(orphan)) => {
                    self.settle_place(index, place, orphan, &mut Vec::new())
                }
                Err(LockError::Timeout { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            match settled {
                Ok(guard) => return Ok((index, guard)),
                Err(damage) => error = damage,
            }
        }
        Err(error)
    }
}

impl<'m, J: Liveness> Participant<'m, J> {
    /// The same participant, as its process knows it now; it never leaves. For tests that set a
    /// heap up once and bring its memory back to that state before each run.
    #[cfg(feature = "crash-points")]
    #[doc(hidden)]
    pub fn twin(&self) -> Self
    where
        J: Clone,
    {
        Self {
            judge: self.judge.clone(),
            cache: self.cache.clone(),
            guard: None,
            ..*self
        }
    }

    /// Who takes part.
    pub fn instance(&self) -> InstanceId {
        self.me
    }

    /// Who judges whether others live.
    pub fn judge(&self) -> &J {
        &self.judge
    }

    /// The memory in which the heap lies.
    pub fn memory(&self) -> &'m Mapping {
        self.heap.memory
    }

    /// The heap.
    pub fn heap(&self) -> Heap<'m> {
        self.heap
    }

    /// This participant's place: the words of its epoch and its limbo.
    pub(crate) fn place(&self) -> &'m Place {
        self.place
    }

    /// Numbers the operations to come, for [`Heap::outcome_of`]. Begin each operation whose
    /// outcome matters by a number of its own: the outcome of the one before may be forgotten
    /// from then on.
    pub fn tag(&mut self, tag: u64) {
        self.tag = tag;
        self.place.intent.set_tag(tag);
    }

    /// The offset of one of this participant's [`HOLDS`] private slots: for blocks that are not
    /// yet, or no longer, part of anything. Whatever is in them when the participant leaves or
    /// dies is freed.
    ///
    /// # Panics
    /// If `n` is not below [`HOLDS`]: a mistake of the program.
    pub fn hold(&self, n: usize) -> u64 {
        assert!(n < HOLDS, "hold {n} of {HOLDS}");
        self.heap.hold_at(self.index, n)
    }

    /// Allocates a block of at least `bytes` bytes into a slot: a null word of shared memory that
    /// is the caller's alone until this returns. The block's contents are arbitrary. It is
    /// aligned to 8 bytes, sizes that are multiples of 64 to 64, and powers of two from 1 KiB to
    /// 4 KiB to their size; larger ones to 4 KiB.
    ///
    /// If the participant dies inside, the allocation has happened and the slot owns the block,
    /// or it has not and the slot is null, once the dead one is settled.
    ///
    /// The stores of small allocations are `Release`: readers that find the block by an `Acquire`
    /// load of the slot find it allocated. Publish it only after filling it.
    ///
    /// # Errors
    /// [`HeapError::SlotInUse`], [`HeapError::Size`], [`HeapError::OutOfMemory`],
    /// [`HeapError::Memory`] if the slot is no aligned word of the mapping. For large blocks, and
    /// when a new slab is needed, those of the heap's lock and of the log.
    #[inline]
    pub fn alloc_into(&mut self, slot: u64, bytes: u64) -> Result<u64, HeapError> {
        let memory = self.heap.memory;
        let cell: &AtomicU64 = memory.get(slot)?;
        let block = load64(cell, Ordering::Acquire);
        if block != 0 {
            return Err(HeapError::SlotInUse { slot, block });
        }
        let Some(class) = class_of(bytes) else {
            return self.alloc_run(slot, bytes);
        };
        match self.alloc_known(slot, cell, class) {
            Some(block) => Ok(block),
            None => self.alloc_elsewhere(slot, cell, class),
        }
    }

    /// Allocates a block that is known to be free.
    #[inline]
    fn alloc_known(&mut self, slot: u64, cell: &AtomicU64, class: usize) -> Option<u64> {
        let (block, word) = self.cache.classes[class].run.take()?;
        self.cache.last = class;
        // Only this thread makes blocks of its slabs live, so neither a check against others nor
        // a read-modify-write is needed. Relaxed: the word was loaded with Acquire when the block
        // was found to be free.
        let before = load64(word, Ordering::Relaxed);
        if is_live(before) {
            // Only a stray store of somebody can have done that; the block is lost.
            return None;
        }
        let line = &self.place.intent;
        line.begin_alloc(slot, block, before);
        // Release, each: in this order for whoever comes after a death, at any instruction.
        store64(word, before + 1, Ordering::Release);
        store64(cell, block, Ordering::Release);
        line.end_alloc(block);
        Some(block)
    }

    #[cold]
    #[inline(never)]
    fn alloc_elsewhere(
        &mut self,
        slot: u64,
        cell: &AtomicU64,
        class: usize,
    ) -> Result<u64, HeapError> {
        loop {
            self.refill(class)?;
            if let Some(block) = self.alloc_known(slot, cell, class) {
                return Ok(block);
            }
        }
    }

    /// Frees the block that a slot owns, and makes the slot null. The slot is the caller's alone
    /// until this returns; the block may have been allocated by anybody.
    ///
    /// Of several who free one block at the same moment, because a slot was copied or is not the
    /// caller's alone, one succeeds. A block in one of this participant's own
    /// [`hold`](Self::hold)s is nobody else's: it is freed without a look at others, who would be
    /// told that they had freed it, too, if they had a copy and did so at that very moment.
    ///
    /// If the participant dies inside, the block is freed and the slot is null, once the dead one
    /// is settled, or nothing has happened.
    ///
    /// # Errors
    /// [`HeapError::EmptySlot`], [`HeapError::DoubleFree`], [`HeapError::Foreign`] for a word that
    /// is not the offset of a block; [`HeapError::Memory`] if the slot is no aligned word of the
    /// mapping. For large blocks those of the heap's lock and of the log.
    #[inline]
    pub fn free_from(&mut self, slot: u64) -> Result<(), HeapError> {
        self.free::<false>(slot)
    }

    /// As [`free_from`](Self::free_from), on the participant's own account: the outcome of the
    /// application's last operation stays what it is. For retired blocks.
    ///
    /// # Errors
    /// As [`free_from`](Self::free_from).
    pub(crate) fn free_chore_from(&mut self, slot: u64) -> Result<(), HeapError> {
        self.free::<true>(slot)
    }

    #[inline]
    fn free<const CHORE: bool>(&mut self, slot: u64) -> Result<(), HeapError> {
        let memory = self.heap.memory;
        let cell: &AtomicU64 = memory.get(slot)?;
        let at = load64(cell, Ordering::Acquire);
        let is_private = CHORE || self.place.contains(cell);
        let line = self.place.line(CHORE);
        // What was allocated last often goes first; it is the one to allocate next, too.
        let run = &mut self.cache.classes[self.cache.last].run;
        if let Some((index, word)) = run.find(at) {
            if !free_own(line, (slot, cell), (at, word), is_private) {
                return Err(HeapError::DoubleFree { slot, block: at });
            }
            run.put(index);
            return Ok(());
        }
        let within = at.wrapping_sub(self.heap.places.first_span);
        let id = match self.cache.by_span.get((within / SPAN) as usize) {
            Some(&id) if id != NO_SLAB => id,
            _ => return self.free_elsewhere::<CHORE>(slot, cell, at),
        };
        let slab = &mut self.cache.slabs[id as usize];
        let Some(index) = slab.geometry.index_of((within % SPAN) as u32) else {
            return Err(HeapError::Foreign { block: at });
        };
        let word = &slab.words[index as usize];
        if !free_own(line, (slot, cell), (at, word), is_private) {
            return Err(HeapError::DoubleFree { slot, block: at });
        }
        slab.put(index);
        if slab.free_count == 1 {
            self.cache.list(id);
        } else if slab.is_empty() {
            return self.on_empty(id);
        }
        Ok(())
    }

    /// Frees a block that lies in no slab of this participant that it knows.
    #[cold]
    #[inline(never)]
    fn free_elsewhere<const CHORE: bool>(
        &mut self,
        slot: u64,
        cell: &AtomicU64,
        at: u64,
    ) -> Result<(), HeapError> {
        if at == 0 {
            return Err(HeapError::EmptySlot { slot });
        }
        let heap = &self.heap;
        if let Use::Slab { .. } = heap.usage_of(at)? {
            let line = self.place.line(CHORE);
            return heap.free_small(self.index, line, (slot, cell), heap.block(at)?);
        }
        self.free_run(slot, at, if CHORE { KIND_CHORE } else { KIND_FREE })
    }

    /// Bytes that the block at this offset has room for.
    ///
    /// # Errors
    /// [`HeapError::Foreign`] if it is not the offset of a block.
    pub fn size_of_block(&self, block: u64) -> Result<u64, HeapError> {
        self.heap.size_of_block(block)
    }

    /// Begins a record of this participant's log: one atomic change of several words, under locks
    /// that it holds. `kind` is the application's, below `0xffff_0000`.
    ///
    /// # Errors
    /// [`HeapError::ReservedKind`], [`HeapError::Log`].
    pub fn begin(&mut self, kind: u32) -> Result<Record<'m>, HeapError> {
        if kind >= KINDS_RESERVED {
            return Err(HeapError::ReservedKind(kind));
        }
        self.begin_any(kind)
    }

    /// Begins a record that is an operation of its own.
    pub(super) fn begin_any(&mut self, kind: u32) -> Result<Record<'m>, HeapError> {
        let record = self.log.begin(self.me, kind, self.tag)?;
        // After the log tells of the new operation: there is no moment at which an older one
        // would be taken for the last.
        self.place.intent.clear();
        Ok(record)
    }

    /// Begins a record that nobody asks about; the outcome of the last operation stays.
    pub(super) fn begin_chore(&mut self) -> Result<Record<'m>, HeapError> {
        self.place.save_last(self.log)?;
        Ok(self.log.begin(self.me, KIND_CHORE, self.tag)?)
    }

    /// Takes the lock at offset `words`; if its holder died, after settling that one's work, so
    /// that what the lock protects is consistent (if it changes by records only).
    ///
    /// # Errors
    /// [`HeapError::Lock`], [`HeapError::Memory`], and those of [`settle`](Self::settle); the
    /// lock is then left as an orphan.
    pub fn lock(&mut self, words: u64) -> Result<LockGuard<'m>, HeapError> {
        let words: &LockWords = self.heap.memory.get(words)?;
        RecoverableLock::new(words)
            .lock(self.me, &self.judge)?
            .or_repair(|dead| self.settle(dead))
    }

    /// Settles the work of one dead instance, if it took part and nobody has done so.
    ///
    /// # Errors
    /// As [`Heap::recover`].
    pub fn settle(&mut self, dead: InstanceId) -> Result<(), HeapError> {
        let guard = self.heap.lock(self.me, &self.judge)?;
        let heap = self.heap;
        let result =
            heap.settle_where(self.me, &self.judge, |owner| owner == dead, &mut Vec::new());
        guard.unlock()?;
        result
    }

    /// Leaves the heap: frees what is in the holds, gives back what can be, and makes the place
    /// vacant. Slabs with live blocks, and retired blocks, are left for others to adopt.
    ///
    /// # Errors
    /// [`HeapError::Lock`] if the participant was declared dead meanwhile; those of
    /// [`free_from`](Self::free_from), and the place is vacant all the same.
    pub fn leave(mut self) -> Result<(), HeapError> {
        self.go()
    }

    fn go(&mut self) -> Result<(), HeapError> {
        let Some(guard) = self.guard.take() else {
            return Ok(());
        };
        let cleaned = self.clean_up();
        guard.unlock()?;
        self.heap.announce_vacancy();
        cleaned
    }

    fn clean_up(&mut self) -> Result<(), HeapError> {
        let heap = self.heap;
        let guard = heap.lock(self.me, &self.judge)?;
        heap.free_holds(self.index, self.place)?;
        guard.unlock()?;
        self.trim()
    }
}

impl Heap<'_> {
    /// Bytes that the block at this offset has room for.
    ///
    /// # Errors
    /// [`HeapError::Foreign`] if it is not the offset of a block.
    pub fn size_of_block(&self, block: u64) -> Result<u64, HeapError> {
        match self.usage_of(block)? {
            Use::Slab { .. } => {
                let found = self.block(block)?;
                let geometry = super::class::geometry(found.class);
                let geometry = geometry.ok_or_else(|| no_such("size class", 0, 0))?;
                Ok(geometry.size.into())
            }
            Use::Run { order } if (block - self.places.first_span).is_multiple_of(SPAN) => {
                Ok(SPAN << order.min(32))
            }
            _ => Err(HeapError::Foreign { block }),
        }
    }
}

impl Place {
    /// Whether a slot is the place's own: nobody frees from it but the participant there, or
    /// whoever settles that one's work.
    #[inline]
    pub(super) fn contains(&self, slot: &AtomicU64) -> bool {
        let within = core::ptr::from_ref(slot)
            .addr()
            .wrapping_sub(core::ptr::from_ref(self).addr());
        within < size_of::<Self>()
    }

    #[inline]
    fn line(&self, is_chore: bool) -> &IntentLine {
        match is_chore {
            false => &self.intent,
            true => &self.chore,
        }
    }
}

impl<J: Liveness> Drop for Participant<'_, J> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whatever the panic interrupted is settled by others, once the instance is dead.
            core::mem::forget(self.guard.take());
            return;
        }
        // Without a place to report errors; `leave` has one.
        let _ = self.go();
    }
}

impl<J: Liveness> core::fmt::Debug for Participant<'_, J> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut out = f.debug_struct("Participant");
        out.field("instance", &self.me).field("place", &self.index);
        out.finish_non_exhaustive()
    }
}
