//! A namespace node that does nothing but store to pod memory, from several threads.
//!
//! It stands where the agent belongs and understands as much of the agent's command line as it
//! needs. The manager's namespace set-up starts it, so it is fenced like any namespace node.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::PodHeader;
use lupin_abi::layout::{HEADER_SIZE, Range};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

use crate::payload::{COUNTER_STRIDE, COUNTERS_AT};

/// The flag with which the manager starts an agent in a namespace.
const AGENT_FLAG: &str = "--namespace";
/// Whether this process was started where the agent belongs.
pub fn is_wanted() -> bool {
    std::env::args().any(|argument| argument == AGENT_FLAG)
}

/// The life of the node.
pub fn run() -> ! {
    let stop = |reason: String| -> ! {
        eprintln!("node: {reason}");
        std::process::exit(2)
    };
    let mut arguments = std::env::args().skip_while(|word| word != "--pod-memory-fd");
    let fd = arguments.nth(1).and_then(|word| word.parse::<i32>().ok());
    let Some(fd) = fd else {
        stop("no --pod-memory-fd".into());
    };
    // SAFETY: the manager lets this process inherit the descriptor for its own use.
    let file = unsafe { File::from_raw_fd(fd) };
    let pool = pool(&file).unwrap_or_else(|e| stop(format!("pod memory: {e}")));
    let length = NonZeroUsize::new(pool.size as usize).unwrap_or(NonZeroUsize::MIN);
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let mapped = unsafe {
        mmap(
            None,
            length,
            protection,
            MapFlags::MAP_SHARED,
            &file,
            pool.offset as i64,
        )
    };
    let base = match mapped {
        Ok(base) => base.cast::<u8>(),
        Err(e) => stop(format!("cannot map the pool: {e}")),
    };
    for index in 1..storers() {
        let counter = counter(base.as_ptr(), index);
        std::thread::spawn(move || count(counter));
    }
    count(counter(base.as_ptr(), 0))
}

/// How many threads or virtual processors store, and so how many counters there are: as many as
/// the machine has processors, but two at least and eight at most.
pub fn storers() -> u64 {
    let here = std::thread::available_parallelism().map_or(2, usize::from);
    here.clamp(2, 8) as u64
}

fn pool(file: &File) -> Result<Range, Box<dyn std::error::Error>> {
    let mut bytes = [0; HEADER_SIZE];
    file.read_exact_at(&mut bytes, 0)?;
    let header = PodHeader::decode(&bytes, file.metadata()?.len())?;
    Ok(header.pool())
}

fn counter(pool: *mut u8, index: u64) -> &'static AtomicU64 {
    let at = COUNTERS_AT + index * COUNTER_STRIDE;
    assert!(at < 1 << 20, "too many threads");
    // SAFETY: the pool is mapped for as long as the process lives, is at least 2 MiB long and
    // page aligned; everybody uses the counters as atomics or from outside.
    unsafe { &*pool.add(at as usize).cast::<AtomicU64>() }
}

fn count(counter: &AtomicU64) -> ! {
    loop {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
