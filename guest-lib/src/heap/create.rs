//! Creating and opening a heap.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use super::Heap;
use super::error::HeapError;
use super::layout::{FIELDS, HEAP_MAGIC, HEAP_VERSION, Header, Places, buddy_spec};
use crate::buddy::{Buddy, BuddyError};
use crate::liveness::Liveness;
use crate::log::checksum;
use crate::mem::{cas64, load64, store64};
use crate::seal::{Seal, Unsealed};
use crate::shm::Mapping;
use crate::wait::deadline_after;

/// What a heap consists of. It fills the memory that it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeapSpec {
    /// How many may take part at a time, 1 to [`MAX_PARTICIPANTS`](super::MAX_PARTICIPANTS). Each
    /// costs 8 KiB.
    pub participants: u32,
}

impl Default for HeapSpec {
    /// 64 participants.
    fn default() -> Self {
        Self { participants: 64 }
    }
}

impl<'m> Heap<'m> {
    /// Creates a heap in `memory`, which is all zero, or takes over from a creator who died.
    ///
    /// # Errors
    /// [`HeapError::Exists`], [`HeapError::BeingCreated`] (by somebody alive),
    /// [`HeapError::TooSmall`], [`HeapError::Spec`], or [`HeapError::NotAHeap`] if the memory
    /// holds other data.
    pub fn create<J: Liveness>(
        memory: &'m Mapping,
        spec: &HeapSpec,
        me: InstanceId,
        judge: &J,
    ) -> Result<Self, HeapError> {
        if me.id() == 0 || me.generation() == 0 {
            return Err(HeapError::NoInstance(me));
        }
        let places = Places::fit(spec.participants, memory.len())?;
        let header: &Header = memory.get(0)?;
        // The magic first: a death right after it leaves a heap without a creator, not data of
        // an unknown kind.
        match cas64(&header.magic, 0, HEAP_MAGIC, Ordering::AcqRel) {
            Ok(_) | Err(HEAP_MAGIC) => {}
            Err(_) => return Err(HeapError::NotAHeap("it holds other data")),
        }
        let creator = load64(&header.creator, Ordering::Acquire);
        let claim = InstanceId::from_word(creator);
        if load64(&header.seal, Ordering::Acquire) != 0 {
            return Err(HeapError::Exists);
        }
        if creator != 0 && claim != me && judge.is_alive(claim) {
            return Err(HeapError::BeingCreated(claim));
        }
        if let Err(other) = cas64(&header.creator, creator, me.word(), Ordering::AcqRel) {
            return Err(HeapError::BeingCreated(InstanceId::from_word(other)));
        }
        // The creator before may have sealed the heap between the two looks, and died after it.
        if load64(&header.seal, Ordering::Acquire) != 0 {
            return Err(HeapError::Exists);
        }
        if creator != 0 {
            // A dead creator may have left parts of a heap of another shape.
            clear(memory, &places)?;
        }
        let fields = fields_of(&places, memory.len());
        for (cell, field) in header.fields.iter().zip(fields) {
            store64(cell, field, Ordering::Relaxed);
        }
        let spans = buddy_spec(places.spans);
        let buddy = match Buddy::create(memory, places.buddy, &spans, me, judge) {
            Err(BuddyError::BeingCreated(other)) => return Err(HeapError::BeingCreated(other)),
            other => other?,
        };
        // One that was declared dead meanwhile must not seal another's work.
        let now = InstanceId::from_word(load64(&header.creator, Ordering::Acquire));
        if now != me {
            return Err(HeapError::BeingCreated(now));
        }
        // Release: whoever sees the seal sees the heap.
        store64(&header.seal, checksum(fields), Ordering::Release);
        Self::view(memory, places, buddy)
    }

    /// Opens the heap in `memory`, or creates it: for programs of which any may come first. Waits
    /// up to `patience` for a creator that lives, and takes over from one that dies.
    ///
    /// # Errors
    /// Those of [`create`](Self::create), but for `Exists`, and of [`open`](Self::open), but for
    /// `Unfinished`.
    pub fn open_or_create<J: Liveness>(
        memory: &'m Mapping,
        spec: &HeapSpec,
        me: InstanceId,
        judge: &J,
        patience: Duration,
    ) -> Result<Self, HeapError> {
        let deadline = deadline_after(patience);
        loop {
            match Self::create(memory, spec, me, judge) {
                Err(HeapError::Exists | HeapError::BeingCreated(_)) => {}
                created => return created,
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match Self::open(memory, judge, left) {
                // The creator died: now it is this one's turn.
                Err(HeapError::Unfinished(_)) => {}
                opened => return opened,
            }
        }
    }

    /// Opens a heap. Waits up to `patience` for one that is being created.
    ///
    /// # Errors
    /// [`HeapError::NotAHeap`], [`HeapError::Unfinished`] if its creator died,
    /// [`HeapError::BeingCreated`] if it is still not complete.
    pub fn open<J: Liveness>(
        memory: &'m Mapping,
        judge: &J,
        patience: Duration,
    ) -> Result<Self, HeapError> {
        let header: &Header = memory.get(0)?;
        let words = Seal {
            magic: &header.magic,
            creator: &header.creator,
            seal: &header.seal,
        };
        let sealed = words.wait(HEAP_MAGIC, judge, patience);
        let seal = sealed.map_err(|unsealed| match unsealed {
            Unsealed::OtherData => HeapError::NotAHeap("it holds other data"),
            Unsealed::Unfinished(creator) => HeapError::Unfinished(creator),
            Unsealed::BeingCreated(creator) => HeapError::BeingCreated(creator),
        })?;
        let mut fields = [0; FIELDS];
        for (field, cell) in fields.iter_mut().zip(&header.fields) {
            *field = load64(cell, Ordering::Relaxed);
        }
        if checksum(fields) != seal {
            return Err(HeapError::NotAHeap("its header is damaged"));
        }
        let [version, participants, _, bytes] = fields;
        if version != HEAP_VERSION {
            return Err(HeapError::NotAHeap("it is of another version"));
        }
        if bytes > memory.len() {
            return Err(HeapError::TooSmall {
                needed: bytes,
                available: memory.len(),
            });
        }
        let participants = u32::try_from(participants).unwrap_or(u32::MAX);
        let places = Places::fit(participants, bytes)?;
        if fields_of(&places, bytes) != fields {
            return Err(HeapError::NotAHeap("its layout is another program's"));
        }
        let buddy = Buddy::open(memory, places.buddy)?;
        if buddy.spec() != buddy_spec(places.spans) {
            return Err(HeapError::NotAHeap("its spans are of another shape"));
        }
        Self::view(memory, places, buddy)
    }
}

fn fields_of(places: &Places, bytes: u64) -> [u64; FIELDS] {
    let (participants, spans) = (places.participants.into(), places.spans.into());
    [HEAP_VERSION, participants, spans, bytes]
}

/// Makes everything that lies before the spans all zero, except for who creates.
fn clear(memory: &Mapping, places: &Places) -> Result<(), HeapError> {
    let header: &Header = memory.get(0)?;
    let from = memory.offset_of(&header.fields)?;
    for word in memory.get_slice::<AtomicU64>(from, (places.first_span - from) / 8)? {
        // Mostly zero already: leave such pages as they are.
        if load64(word, Ordering::Relaxed) != 0 {
            store64(word, 0, Ordering::Relaxed);
        }
    }
    Ok(())
}
