//! Programs that share the memory of a CXL pod and survive each other's failures.
//!
//! A pod is several operating systems over one memory; any of them may die at any instruction
//! while the others go on. This library gives a program what it needs to be one of the others:
//!
//! | module | what it gives |
//! |---|---|
//! | [`client`] | attach to the pod; segments, thread instances, events |
//! | [`liveness`] | is that owner dead? |
//! | [`lock`] | locks whose dead holders can be succeeded: barging, queued, readers-writer |
//! | [`sync`] | barrier, semaphore, once-cell and condition variable that the dead do not block |
//! | [`shm`] | mapped shared memory, and the only ways to touch it |
//! | [`pod_safe`] | which types may lie there |
//! | [`offset_ptr`] | pointers inside a segment |
//! | [`log`] | one atomic change of several words |
//! | [`buddy`] | large chunks; the allocator of a whole pod |
//! | [`work`] | jobs cut into units that survive their workers |
//! | [`supervise`] | threads that are restarted, and move off nodes that died |
//! | [`wait`] | how waiting is bounded |
//!
//! ```no_run
//! use lupin::shm::Access;
//! use lupin::abi::system::LockWords;
//! use lupin::lock::{LockError, RecoverableLock};
//! use lupin::Pod;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pod = Pod::attach()?;
//! let me = pod.register_thread(None)?;
//! let segment = pod.create_segment("counters", 2 << 20, 0o660)?;
//!
//! // A lock and two counters that are equal outside of the lock, on all nodes.
//! let lock = RecoverableLock::new(segment.get::<LockWords>(0)?);
//! let (left, right): (&AtomicU64, &AtomicU64) = (segment.get(64)?, segment.get(128)?);
//!
//! let guard = lock
//!     .lock(me.instance(), &pod.threads_alive())?
//!     .or_repair(|dead| {
//!         // `dead` may have died between the two stores below.
//!         eprintln!("finishing the work of {dead}");
//!         right.store(left.load(Ordering::Relaxed), Ordering::Relaxed);
//!         Ok::<_, LockError>(())
//!     })?;
//! left.fetch_add(1, Ordering::Relaxed);
//! right.fetch_add(1, Ordering::Relaxed);
//! guard.unlock()?;
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

pub mod buddy;
pub mod client;
pub mod collections;
pub mod epoch;
pub mod heap;
pub mod liveness;
pub mod lock;
pub mod log;
#[allow(dead_code, reason = "the set of accesses is kept complete")]
mod mem;
pub mod offset_ptr;
pub mod pod_safe;
pub mod revocation;
mod seal;
pub mod shm;
pub mod supervise;
pub mod sync;
#[cfg(test)]
mod test_memory;
#[cfg(test)]
mod test_random;
pub mod wait;
pub mod work;

pub use client::{
    Admission, ClientError, Events, GroupEvent, Happening, Membership, OwnThread, Patience, Pod,
    Secret, Segment, Thread,
};
pub use lupin_abi as abi;
pub use lupin_abi::{Generation, InstanceId, NodeId, ThreadId};
/// Whether accesses to pod memory are counted in this build: for programs that measure.
#[doc(hidden)]
pub const HAS_CRASH_POINTS: bool = cfg!(feature = "crash-points");
#[cfg(feature = "crash-points")]
#[doc(hidden)]
pub use mem::{crash, probe};
