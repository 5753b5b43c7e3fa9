//! The pod's thread instances: who is which thread, on which life of which node.
//!
//! One granule at the start of the system section. Agents write it; applications map it
//! read-only, so that anybody can judge the owner of a lock:
//!
//! > an instance `t` is dead if `threads[t.id].generation != t.generation`, or if
//! > `generation[node] != node_generation` for the node instance that registered it.
//!
//! One store, the raise of a node's generation, therefore kills every thread of that node.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub use crate::id::MAX_THREADS;
use crate::id::{Generation, InstanceId, ThreadId};
use crate::layout::{INSTANCES_SIZE, SECTION_HEADER_SIZE};

/// Bytes before the first entry.
const TABLE_AT: usize = 4096;

/// One thread id.
///
/// Written only by an agent that holds the directory lock of the system section, in this order:
/// the generation is raised (which kills the old life), then the node is stored, and only then
/// is the new instance handed out.
#[repr(C, align(32))]
#[derive(Debug)]
pub struct ThreadEntry {
    generation: AtomicU32,
    pid: AtomicU32,
    node: AtomicU64,
    tid: AtomicU32,
    _reserved: AtomicU32,
    started: AtomicU64,
}

/// Whose life an instance shares, as the node numbers it: for the node's own agents, which may
/// have to find it again after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The process; 0 if nobody's.
    pub pid: u32,
    /// The thread of that process on whose life the instance depends; 0 if on the process's.
    pub tid: u32,
    /// When that thread, or else the process, was started, in clock ticks since the node's boot:
    /// numbers are used again. 0 if it is not known.
    pub started: u64,
}

impl ThreadEntry {
    /// The thread's current generation; 0 if the id was never used.
    ///
    /// `Acquire`: whoever reads a raised generation also sees the stores that the dead life made,
    /// because its agent raises it after the death.
    pub fn generation(&self) -> Generation {
        self.generation.load(Ordering::Acquire)
    }

    /// The node instance that registered the current life; [`InstanceId::NONE`] if it ended in
    /// an orderly way.
    pub fn node(&self) -> InstanceId {
        InstanceId::from_word(self.node.load(Ordering::Acquire))
    }

    /// Who holds the id. Of interest to the agents of the node that [`node`](Self::node) names,
    /// which wrote it in an earlier life or in this one; to others a diagnostic.
    pub fn holder(&self) -> Holder {
        Holder {
            pid: self.pid.load(Ordering::Relaxed),
            tid: self.tid.load(Ordering::Relaxed),
            started: self.started.load(Ordering::Relaxed),
        }
    }

    /// Ends the current life, if any, and makes the next generation current. For an agent with
    /// the directory lock. `Release`: pairs with [`generation`](Self::generation).
    ///
    /// Returns `None`, and changes nothing, when the id has used up its generations.
    pub fn raise(&self) -> Option<Generation> {
        let next = self.generation.load(Ordering::Relaxed).checked_add(1)?;
        self.generation.store(next, Ordering::Release);
        Some(next)
    }

    /// Binds the id to a node instance and to whoever holds it there. For an agent with the
    /// directory lock, after [`raise`](Self::raise).
    ///
    /// `Release`: who reads the node also reads the holder.
    pub fn bind(&self, node: InstanceId, holder: Holder) {
        self.pid.store(holder.pid, Ordering::Relaxed);
        self.tid.store(holder.tid, Ordering::Relaxed);
        self.started.store(holder.started, Ordering::Relaxed);
        self.node.store(node.word(), Ordering::Release);
    }
}

/// The instances range as it lies in memory.
#[repr(C)]
#[derive(Debug)]
pub struct InstancesSection {
    header: [AtomicU64; SECTION_HEADER_SIZE / 8],
    _gap: [AtomicU64; (TABLE_AT - SECTION_HEADER_SIZE) / 8],
    threads: [ThreadEntry; MAX_THREADS as usize],
}

const _: () = {
    assert!(size_of::<ThreadEntry>() == 32);
    assert!(core::mem::offset_of!(InstancesSection, threads) == TABLE_AT);
    assert!(size_of::<InstancesSection>() as u64 == INSTANCES_SIZE);
};

impl InstancesSection {
    /// Views mapped memory as the instances range.
    ///
    /// # Safety
    /// `base` points to at least [`INSTANCES_SIZE`] bytes that stay mapped for `'a`, is page
    /// aligned, and this process accesses those bytes through this crate's atomics only. A
    /// mapping without write permission is enough for the readers.
    pub unsafe fn from_ptr<'a>(base: *const u8) -> &'a Self {
        // SAFETY: the caller vouches for size, alignment and life time; every field is an atomic.
        unsafe { &*base.cast::<Self>() }
    }

    /// The words of the section header.
    pub fn header_words(&self) -> &[AtomicU64] {
        &self.header
    }

    /// One thread's entry.
    pub fn thread(&self, thread: ThreadId) -> &ThreadEntry {
        // In bounds: ThreadId is 1..=MAX_THREADS by construction.
        &self.threads[thread.index()]
    }

    /// All entries, by index (the id less one).
    pub fn threads(&self) -> &[ThreadEntry] {
        &self.threads
    }
}
