//! The heartbeat: a thread that does nothing else.
//!
//! It runs under `SCHED_FIFO` with locked memory, so that neither a busy node nor a node short of
//! memory looks like a dead one, and wakes at absolute times, so that its own run time does not
//! add up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use log::{debug, warn};
use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::memory::NodeMemory;

/// Priority of the heartbeat among real-time threads: above ordinary ones, below watchdogs.
const PRIORITY: i32 = 50;

/// The running heartbeat; ends when dropped.
#[derive(Debug)]
pub struct Heartbeat {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts to beat every `period`.
    ///
    /// A node without the right to real-time priority or locked memory beats all the same, and
    /// says so in its log.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(node: Arc<NodeMemory>, period: Duration) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = Builder::new()
            .name("heartbeat".into())
            .stack_size(128 << 10)
            .spawn(move || run(&node, period, &stopped))?;
        // Only what is mapped by now, the thread's stack included: the heartbeat needs no more,
        // and locking later mappings would count whole segments against the limit. Of that, only
        // what is used, which of the heartbeat is all after its first beat: pages that were
        // brought in for nothing make the end of this process, for which peers wait, longer.
        let used = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
        if let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT | used) {
            warn!("heartbeat: memory is not locked ({error}): paging may delay it");
        }
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Ends within one period. A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

fn run(node: &NodeMemory, period: Duration, stop: &AtomicBool) {
    let parameter = libc::sched_param {
        sched_priority: PRIORITY,
    };
    // SAFETY: pid 0 is the calling thread, and the parameter lives through the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) } != 0 {
        let error = io::Error::last_os_error();
        warn!("heartbeat: no real-time priority ({error}): a busy node may look hung");
    }
    debug!("heartbeat: every {period:?}");
    let mut next = now();
    while !stop.load(Ordering::Relaxed) {
        node.section().beat();
        next += period;
        let now = now();
        if next < now {
            // Overslept: go on from here instead of beating in a burst.
            next = now + period;
        }
        sleep_until(next);
    }
}

fn now() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock exists on every Linux, and `time` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn sleep_until(time: Duration) {
    let time = libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: time.subsec_nanos().into(),
    };
    // SAFETY: `time` is a valid absolute time; no remainder is asked for. EINTR: once more.
    while unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &time,
            std::ptr::null_mut(),
        )
    } == libc::EINTR
    {}
}
