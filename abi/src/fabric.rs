//! The fabric section: what the host says and every node may read.
//!
//! ```text
//! 0x00000  pod header            256 B, constant
//! 0x00100  fabric state          epoch, ring head
//! 0x01000  generation table      1024 entries of 64 B
//! 0x20000  event ring            4096 slots of 128 B
//! ```
//!
//! Only the fabric manager in charge stores here; guests map it through a read-only memslot.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::event::{Cause, EVIDENCE_WORDS, Event, EventKind, wire_enum};
use crate::id::{Generation, InstanceId, MAX_NODES, NodeId};
use crate::layout::{FABRIC_SIZE, HEADER_SIZE};

/// Slots of the event ring. A reader that falls this far behind learns that it did.
pub const RING_SLOTS: usize = 4096;

wire_enum! {
    /// Where a node stands in its life, as the manager sees it.
    NodeState {
        /// The pod has no such node.
        Absent = 0 => "absent",
        /// Its process runs; its agent has not reported yet.
        Starting = 1 => "starting",
        /// It uses pod memory.
        Joined = 2 => "joined",
        /// It failed and is being fenced: its generation is about to be raised.
        Failing = 3 => "failing",
        /// Fenced, generation raised, waiting to be started again.
        Restarting = 4 => "restarting",
        /// Fenced, generation raised, and left down.
        Down = 5 => "down",
        /// It has joined and stands still, or is about to, because an operator wants it to.
        Paused = 6 => "paused",
        /// It was asked to end itself.
        Stopping = 7 => "stopping",
        /// It uses pod memory, and is to be left alone: it will be stopped.
        Draining = 8 => "draining",
    }
}

/// One node's line of the generation table.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct GenerationEntry {
    generation: AtomicU32,
    state: AtomicU32,
    cause: AtomicU32,
    restarts: AtomicU32,
    since_ns: AtomicU64,
    _reserved: [AtomicU64; 5],
}

impl NodeState {
    /// Whether a process of the node's current generation may exist and store to pod memory.
    pub const fn may_store(self) -> bool {
        match self {
            Self::Starting
            | Self::Joined
            | Self::Failing
            | Self::Paused
            | Self::Stopping
            | Self::Draining => true,
            Self::Absent | Self::Restarting | Self::Down => false,
        }
    }
}

impl GenerationEntry {
    /// The node's current generation; 0 if it never lived.
    ///
    /// `Acquire`: whoever reads a raised generation also sees all that the fenced instance
    /// stored to pod memory before it was fenced, because the manager raises it after the fence.
    pub fn generation(&self) -> Generation {
        self.generation.load(Ordering::Acquire)
    }

    /// Publishes a generation. For the fabric manager, after the fence.
    ///
    /// `Release`: pairs with [`generation`](Self::generation).
    pub fn set_generation(&self, generation: Generation) {
        self.generation.store(generation, Ordering::Release);
    }

    /// The node's state; [`NodeState::Absent`] for a number of another version.
    pub fn state(&self) -> NodeState {
        NodeState::from_raw(self.state.load(Ordering::Acquire)).unwrap_or(NodeState::Absent)
    }

    /// The cause of the node's last failure.
    pub fn cause(&self) -> Cause {
        Cause::from_raw(self.cause.load(Ordering::Acquire)).unwrap_or(Cause::None)
    }

    /// When the node entered its state, in nanoseconds of the host's monotonic clock.
    pub fn since_ns(&self) -> u64 {
        self.since_ns.load(Ordering::Relaxed)
    }

    /// How often the node was started again.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Publishes a state with the time it began. For the fabric manager.
    pub fn set_state(&self, state: NodeState, since_ns: u64) {
        self.since_ns.store(since_ns, Ordering::Relaxed);
        // Release: a reader of the state reads the time that belongs to it or a later one.
        self.state.store(state as u32, Ordering::Release);
    }

    /// Records the cause of a failure. For the fabric manager.
    pub fn set_cause(&self, cause: Cause) {
        self.cause.store(cause as u32, Ordering::Release);
    }

    /// Counts a restart. For the fabric manager.
    pub fn set_restarts(&self, restarts: u32) {
        self.restarts.store(restarts, Ordering::Relaxed);
    }
}

/// The mutable words that belong to the pod as a whole.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct FabricState {
    epoch: AtomicU64,
    ring_head: AtomicU64,
    manager_beat: AtomicU64,
    _reserved: [AtomicU64; 5],
}

impl FabricState {
    /// How many managers have taken charge of this pod.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Raises the epoch at a take-over. For the fabric manager.
    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Moves with every look that the fabric manager takes at the nodes, so that its backup sees
    /// it work. Only "changed or not" means anything.
    pub fn manager_beat(&self) -> u64 {
        self.manager_beat.load(Ordering::Relaxed)
    }

    /// Moves it. For the fabric manager.
    pub fn beat_manager(&self) {
        // One writer, and nothing is published by it.
        let next = self.manager_beat.load(Ordering::Relaxed).wrapping_add(1);
        self.manager_beat.store(next, Ordering::Relaxed);
    }

    /// The sequence number of the newest event; 0 if there is none.
    ///
    /// `Acquire`: the slots up to it are complete.
    pub fn ring_head(&self) -> u64 {
        self.ring_head.load(Ordering::Acquire)
    }
}

/// One slot of the event ring, guarded by its sequence number.
#[repr(C, align(128))]
#[derive(Debug)]
struct EventSlot {
    /// 0 while it is being written.
    seq: AtomicU64,
    words: [AtomicU64; 15],
}

/// What a reader finds at a position of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingRead {
    /// The event.
    Event(Event),
    /// Nothing has happened there yet.
    NotYet,
    /// The position was overwritten: the reader has lost events and must re-read the
    /// generation table, which is the truth; it may go on at `oldest`.
    Lost {
        /// The oldest position that still holds an event.
        oldest: u64,
    },
}

/// The fabric section as it lies in memory.
#[repr(C)]
#[derive(Debug)]
pub struct FabricSection {
    header: [AtomicU64; HEADER_SIZE / 8],
    state: FabricState,
    _gap: [AtomicU64; (0x1000 - HEADER_SIZE - 64) / 8],
    table: [GenerationEntry; MAX_NODES as usize],
    _gap2: [AtomicU64; (0x20000 - 0x11000) / 8],
    ring: [EventSlot; RING_SLOTS],
}

/// Where [`FabricState::manager_beat`] lies, in bytes from the start of pod memory, for whoever
/// reads it without a mapping.
pub const MANAGER_BEAT_AT: u64 = (core::mem::offset_of!(FabricSection, state)
    + core::mem::offset_of!(FabricState, manager_beat)) as u64;

const _: () = {
    assert!(size_of::<GenerationEntry>() == 64);
    assert!(size_of::<FabricState>() == 64);
    assert!(size_of::<EventSlot>() == 128);
    assert!(core::mem::offset_of!(FabricSection, state) == 0x100);
    assert!(core::mem::offset_of!(FabricSection, table) == 0x1000);
    assert!(core::mem::offset_of!(FabricSection, ring) == 0x20000);
    assert!(size_of::<FabricSection>() == 0xa0000);
    assert!(size_of::<FabricSection>() as u64 <= FABRIC_SIZE);
};

impl FabricSection {
    /// Views mapped memory as the fabric section.
    ///
    /// # Safety
    /// `base` points to at least [`FABRIC_SIZE`] bytes that stay mapped for `'a`, is aligned to
    /// 128 bytes (mappings are page aligned), and this process accesses those bytes through this
    /// crate's atomics only. A mapping without write permission is enough for the readers.
    pub unsafe fn from_ptr<'a>(base: *const u8) -> &'a Self {
        // SAFETY: the caller vouches for size, alignment and life time; every field is an atomic,
        // for which any bit pattern is valid and concurrent stores are allowed.
        unsafe { &*base.cast::<Self>() }
    }

    /// The words of the pod header, for [`crate::layout::read_header`].
    pub fn header_words(&self) -> &[AtomicU64] {
        &self.header
    }

    /// Epoch and ring head.
    pub fn state(&self) -> &FabricState {
        &self.state
    }

    /// One node's line.
    pub fn entry(&self, node: NodeId) -> &GenerationEntry {
        // In bounds: NodeId is 1..=MAX_NODES by construction.
        &self.table[node.index()]
    }

    /// Whether `instance` is the current life of its node.
    pub fn is_current(&self, instance: InstanceId) -> bool {
        instance
            .node()
            .is_some_and(|node| self.entry(node).generation() == instance.generation())
    }

    /// Appends an event and returns its sequence number. For the one manager in charge: there is
    /// a single writer, which the pod's lock file guarantees. `event.seq` is ignored.
    ///
    /// A manager that dies in the middle leaves a slot that no reader takes for an event, and
    /// the next manager writes the same position again.
    pub fn append(&self, event: &Event) -> u64 {
        let seq = self.state.ring_head.load(Ordering::Relaxed) + 1;
        let slot = &self.ring[(seq % RING_SLOTS as u64) as usize];
        slot.seq.store(0, Ordering::Relaxed);
        // Release fence: a reader that sees any of the new words below also sees the 0 above
        // (Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012).
        fence(Ordering::Release);
        let words = [
            event.time_ns,
            event.epoch,
            u64::from(event.node) | (event.kind as u64) << 32,
            u64::from(event.old_generation) | u64::from(event.generation) << 32,
            event.cause as u64,
        ];
        for (cell, word) in slot.words.iter().zip(words.iter().chain(&event.evidence)) {
            cell.store(*word, Ordering::Relaxed);
        }
        // Release: the words above belong to this number.
        slot.seq.store(seq, Ordering::Release);
        // Release: whoever reads the head finds the slot complete.
        self.state.ring_head.store(seq, Ordering::Release);
        seq
    }

    /// Reads the event at `seq` (from 1).
    pub fn read(&self, seq: u64) -> RingRead {
        let head = self.state.ring_head();
        if seq == 0 || seq > head {
            return if seq == 0 {
                RingRead::Lost {
                    oldest: oldest(head),
                }
            } else {
                RingRead::NotYet
            };
        }
        let slot = &self.ring[(seq % RING_SLOTS as u64) as usize];
        // Acquire: pairs with the Release store in `append`.
        if slot.seq.load(Ordering::Acquire) != seq {
            return RingRead::Lost {
                oldest: oldest(self.state.ring_head()),
            };
        }
        let mut words = [0u64; 5 + EVIDENCE_WORDS];
        for (word, cell) in words.iter_mut().zip(&slot.words) {
            *word = cell.load(Ordering::Relaxed);
        }
        // Acquire fence: if a word above came from a later event, the load below sees that
        // event's 0 or number.
        fence(Ordering::Acquire);
        if slot.seq.load(Ordering::Relaxed) != seq {
            return RingRead::Lost {
                oldest: oldest(self.state.ring_head()),
            };
        }
        let kind = EventKind::from_raw((words[2] >> 32) as u32);
        let cause = Cause::from_raw(words[4] as u32);
        let (Some(kind), Some(cause)) = (kind, cause) else {
            // Written by another version, which the attach check excludes: treat as lost.
            return RingRead::Lost {
                oldest: (seq + 1).min(head),
            };
        };
        let mut evidence = [0; EVIDENCE_WORDS];
        evidence.copy_from_slice(&words[5..]);
        RingRead::Event(Event {
            seq,
            time_ns: words[0],
            epoch: words[1],
            kind,
            node: words[2] as u32,
            old_generation: words[3] as u32,
            generation: (words[3] >> 32) as u32,
            cause,
            evidence,
        })
    }
}

/// The oldest position that the writer is not about to overwrite.
fn oldest(head: u64) -> u64 {
    (head + 2).saturating_sub(RING_SLOTS as u64).max(1)
}

#[cfg(test)]
#[path = "fabric_test.rs"]
mod fabric_test;
