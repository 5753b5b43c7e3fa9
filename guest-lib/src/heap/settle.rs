//! Settling the work of the dead.

use core::sync::atomic::Ordering;

use lupin_abi::InstanceId;

use super::error::HeapError;
use super::intent::{self, Done};
use super::layout::{HOLDS, LIVES, OutcomeLine, Place};
use super::{Heap, KIND_CHORE};
use crate::liveness::Liveness;
use crate::lock::{Acquired, LockError, LockGuard, OrphanGuard, RecoverableLock};
use crate::log::{Log, Outcome};
use crate::mem::{add64, load64, store64};

impl<'m> Heap<'m> {
    /// Settles the work of all participants that died: completes or undoes what each was doing,
    /// frees what was in its holds, and makes its place vacant. Returns how the last operation of
    /// each ended. Those who live go on meanwhile.
    ///
    /// # Errors
    /// [`HeapError::Damaged`], [`HeapError::Log`] if a dead one's place holds what no program of
    /// this library wrote; the place stays taken. [`HeapError::Lock`] if the caller was itself
    /// declared dead.
    pub fn recover<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<Vec<Outcome>, HeapError> {
        let guard = self.lock(me, judge)?;
        let mut outcomes = Vec::new();
        let result = self.settle_where(me, judge, |owner| !judge.is_alive(owner), &mut outcomes);
        guard.unlock()?;
        result.map(|()| outcomes)
    }

    /// How the last operation of a dead instance ended, once its work is settled (by
    /// [`recover`](Self::recover), or by whoever joined or came upon its lock); of each place, the
    /// last 8 lives are remembered.
    ///
    /// * An outcome of kind 0: it took part, and died before it began an operation.
    /// * `None`: it left by itself, and so all that it began is done; or it died before it took
    ///   part; or nobody has settled its work yet, or it is forgotten.
    ///
    /// Operations are recognised by their [`tag`](super::Participant::tag)s. Whoever takes over
    /// work of which the dead one was to do operation number `next` asks:
    ///
    /// ```
    /// # use lupin::InstanceId;
    /// # use lupin::heap::{Heap, HeapSpec};
    /// # use lupin::liveness::Liveness;
    /// # use lupin::shm::{Access, Mapping};
    /// # use std::sync::atomic::{AtomicBool, Ordering};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let file = tempfile::tempfile()?;
    /// # file.set_len(1 << 20)?;
    /// # let memory = Mapping::new(&file, 0, 1 << 20, Access::ReadWrite)?;
    /// # let (me, dead) = (InstanceId::new(1, 1), InstanceId::new(2, 1));
    /// # let lives = AtomicBool::new(true);
    /// # let judge = |instance| instance == me || instance == dead && lives.load(Ordering::Relaxed);
    /// # let heap = Heap::create(&memory, &HeapSpec { participants: 4 }, me, &judge)?;
    /// # let mut victim = heap.join(dead, judge)?;
    /// # victim.tag(41);
    /// # victim.alloc_into(heap.root(0)?, 64)?;
    /// # std::mem::forget(victim);
    /// # lives.store(false, Ordering::Relaxed);
    /// /// Whether operation `next` of a dead instance is still to be done.
    /// fn is_to_do<J: Liveness>(
    ///     heap: &Heap<'_>,
    ///     (me, judge): (InstanceId, &J),
    ///     (dead, next): (InstanceId, u64),
    /// ) -> Result<bool, lupin::heap::HeapError> {
    ///     // First: until then the operation may yet be completed or undone.
    ///     heap.recover(me, judge)?;
    ///     Ok(match heap.outcome_of(dead) {
    ///         Some(last) if last.kind != 0 && last.tag == next => !last.happened,
    ///         // It died on the way from the one before to this one.
    ///         Some(_) => true,
    ///         // It left, or never took part: the work itself says how far it is.
    ///         None => true,
    ///     })
    /// }
    /// assert!(!is_to_do(&heap, (me, &judge), (dead, 41))?);
    /// assert!(is_to_do(&heap, (me, &judge), (dead, 42))?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn outcome_of(&self, dead: InstanceId) -> Option<Outcome> {
        self.outcome_lines().find_map(|line| line.read(dead))
    }

    /// All outcomes that are remembered, whoever has settled them: for those who take over work
    /// and do not know who did it. In no particular order; see [`outcome_of`](Self::outcome_of).
    pub fn outcomes(&self) -> impl Iterator<Item = Outcome> + use<'m> {
        self.outcome_lines().filter_map(|line| {
            let owner = InstanceId::from_word(load64(&line.owner, Ordering::Acquire));
            line.read(owner)
        })
    }

    fn outcome_lines(&self) -> impl Iterator<Item = &'m OutcomeLine> + use<'m> {
        let heap = *self;
        (0..heap.places.participants)
            .filter_map(move |index| heap.place(index).ok())
            .flat_map(|place| &place.outcomes)
    }

    /// Takes the heap's lock, after settling what its dead holder was doing under it.
    pub(crate) fn lock<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
    ) -> Result<LockGuard<'m>, HeapError> {
        let lock = RecoverableLock::new(&self.header.lock);
        lock.lock(me, judge)?
            .or_repair(|dead| self.settle_under_lock(dead, me, judge))
    }

    /// Settles everything that a dead holder of the heap's lock may have been doing under it: the
    /// work of its own place, and of those that it was settling.
    fn settle_under_lock<J: Liveness>(
        &self,
        dead: InstanceId,
        me: InstanceId,
        judge: &J,
    ) -> Result<(), HeapError> {
        for index in 0..self.places.participants {
            let place = self.place(index)?;
            let names = [&place.lock.owner, &place.lock.recoverer];
            if !names
                .map(|name| load64(name, Ordering::Acquire))
                .contains(&dead.word())
            {
                continue;
            }
            // Only holders of the heap's lock take others' places, so this waits at most for a
            // judge that does not see both deaths yet.
            if let Acquired::Orphaned(orphan) = RecoverableLock::new(&place.lock).lock(me, judge)? {
                self.settle_work(index, place, orphan.previous())?;
                // The place stays an orphan: its holds are freed when that is asked for.
            }
        }
        Ok(())
    }

    /// Settles the places whose holder is one of `whom`, under the heap's lock.
    pub(super) fn settle_where<J: Liveness>(
        &self,
        me: InstanceId,
        judge: &J,
        whom: impl Fn(InstanceId) -> bool,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), HeapError> {
        let mut result = Ok(());
        for index in 0..self.places.participants {
            let place = self.place(index)?;
            let owner = InstanceId::from_word(load64(&place.lock.owner, Ordering::Acquire));
            if owner.is_none() || !whom(owner) {
                continue;
            }
            match RecoverableLock::new(&place.lock).try_lock(me, judge) {
                Ok(Acquired::Clean(guard)) => guard.unlock()?,
                Ok(Acquired::Orphaned(orphan)) => {
                    match self.settle_place(index, place, orphan, &mut *outcomes) {
                        Ok(guard) => {
                            guard.unlock()?;
                            self.announce_vacancy();
                        }
                        // One damaged place must not keep the others from being settled.
                        Err(error) => result = result.and(Err(error)),
                    }
                }
                // The judge has not heard of it yet, or not any more.
                Err(LockError::Timeout { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        result
    }

    /// Settles a dead participant's place, under the heap's lock, and holds it then.
    pub(super) fn settle_place(
        &self,
        index: u32,
        place: &'m Place,
        orphan: OrphanGuard<'m>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<LockGuard<'m>, HeapError> {
        outcomes.extend(self.settle_work(index, place, orphan.previous())?);
        self.free_holds(index, place)?;
        Ok(orphan.repaired()?)
    }

    /// Completes or undoes what a dead holder of a place was doing; remembers and returns the
    /// outcome, unless it died before it took part or while it settled another's work.
    fn settle_work(
        &self,
        index: u32,
        place: &Place,
        dead: InstanceId,
    ) -> Result<Option<Outcome>, HeapError> {
        let life = InstanceId::from_word(load64(&place.life, Ordering::Acquire));
        let logged = self.log_of(index)?.settle(life)?;
        let done = intent::settle(self, index, &place.intent)?;
        intent::settle(self, index, &place.chore)?;
        if life != dead {
            return Ok(None);
        }
        let lives = load64(&place.lives, Ordering::Relaxed);
        let line = &place.outcomes[lives as usize % LIVES];
        if let Some(outcome) = line.read(dead) {
            return Ok(Some(outcome));
        }
        let outcome = match done {
            Some(done) => outcome_of_intent(dead, done),
            None if logged.seq != 0 && logged.kind != KIND_CHORE => logged,
            None => place.last.read(dead).unwrap_or(Outcome::nothing(dead)),
        };
        line.write(&outcome);
        Ok(Some(outcome))
    }

    /// Frees what a dead participant held privately.
    pub(super) fn free_holds(&self, index: u32, place: &'m Place) -> Result<(), HeapError> {
        for hold in &place.holds[..HOLDS] {
            let block = load64(hold, Ordering::Acquire);
            if block == 0 {
                continue;
            }
            let slot = self.memory.offset_of(hold)?;
            match self.free_chore(index, place, slot) {
                Ok(()) => {}
                // No live block, so nothing can leak.
                Err(HeapError::Foreign { .. } | HeapError::DoubleFree { .. }) => {
                    store64(hold, 0, Ordering::Release);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells those who look for slabs that a place has become vacant.
    pub(super) fn announce_vacancy(&self) {
        add64(&self.header.vacated.word, 1, Ordering::Release);
    }
}

fn outcome_of_intent(owner: InstanceId, done: Done) -> Outcome {
    Outcome {
        kind: done.kind,
        tag: done.tag,
        result: done.block,
        happened: done.happened,
        ..Outcome::nothing(owner)
    }
}

impl Place {
    /// Keeps the outcome of the last operation, if the log is what tells of it, before the log
    /// goes on to a chore.
    pub(super) fn save_last(&self, log: Log<'_>) -> Result<(), HeapError> {
        let last = log.last()?;
        if last.seq != 0 && last.kind != KIND_CHORE {
            self.last.write(&last);
        }
        Ok(())
    }
}

impl OutcomeLine {
    fn read(&self, owner: InstanceId) -> Option<Outcome> {
        let word = owner.word();
        if word == 0 || load64(&self.owner, Ordering::Acquire) != word {
            return None;
        }
        let kind = load64(&self.kind, Ordering::Relaxed);
        let outcome = Outcome {
            seq: load64(&self.seq, Ordering::Relaxed),
            kind: kind as u32,
            tag: load64(&self.tag, Ordering::Relaxed),
            result: load64(&self.result, Ordering::Relaxed),
            happened: kind >> 32 & 1 == 1,
            ..Outcome::nothing(owner)
        };
        // Acquire, after the loads above: still the line of that owner?
        crate::mem::fence(Ordering::Acquire);
        (load64(&self.owner, Ordering::Relaxed) == word).then_some(outcome)
    }

    /// For the one who settles the place.
    fn write(&self, outcome: &Outcome) {
        store64(&self.owner, 0, Ordering::Release);
        crate::mem::fence(Ordering::Release);
        let kind = u64::from(outcome.kind) | u64::from(outcome.happened) << 32;
        store64(&self.seq, outcome.seq, Ordering::Relaxed);
        store64(&self.kind, kind, Ordering::Relaxed);
        store64(&self.tag, outcome.tag, Ordering::Relaxed);
        store64(&self.result, outcome.result, Ordering::Relaxed);
        store64(&self.owner, outcome.owner.word(), Ordering::Release);
    }
}
