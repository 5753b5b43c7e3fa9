//! Where the counters are that nodes store to, and the loop that does it.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::unistd::Pid;

/// Where in the pool the counters begin: behind anything that a manager formats there.
pub const COUNTERS_AT: u64 = 4096;
/// From one counter to the next: a line each.
pub const COUNTER_STRIDE: u64 = 64;
/// Most processors of a node, and so most counters.
pub const MOST: u64 = 8;
/// How much of the pool a node maps: what devices are cut in.
const MAPPED: usize = 2 << 20;

/// How many threads or virtual processors store, and so how many counters there are: as many as
/// the machine has processors, but two at least.
pub fn storers() -> u64 {
    let here = std::thread::available_parallelism().map_or(2, usize::from);
    (here as u64).clamp(2, MOST)
}

/// The place in the pool of a node's counter. The first node's are where a guest that knows no
/// node ids has them.
pub fn place(node: u32, index: u64) -> u64 {
    COUNTERS_AT + (u64::from(node.saturating_sub(1)) * MOST + index) * COUNTER_STRIDE
}

/// Maps the pool, which begins at `offset` of `memory`, and counts for ever, on every processor.
///
/// # Errors
/// Why it cannot.
pub fn count(
    memory: impl AsFd,
    offset: u64,
    node: u32,
    storers: u64,
) -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    let length = NonZeroUsize::new(MAPPED).ok_or("no length")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let at = i64::try_from(offset)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let pool = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, memory, at)? };
    let counter = |index| -> &'static AtomicU64 {
        let at = place(node, index) as usize;
        assert!(at < MAPPED, "too many nodes");
        // SAFETY: the pool is mapped for as long as the process lives and page aligned, and the
        // counter lies in it; everybody uses counters as atomics, or from outside.
        unsafe { &*pool.as_ptr().cast::<u8>().add(at).cast::<AtomicU64>() }
    };
    for index in 1..storers {
        let counter = counter(index);
        std::thread::Builder::new().spawn(move || increment(counter, index))?;
    }
    increment(counter(0), 0)
}

fn increment(counter: &AtomicU64, index: u64) -> ! {
    let mut own = CpuSet::new();
    // One processor each where there are as many: every one of a guest's stores.
    if own.set(index as usize).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &own);
    }
    loop {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
