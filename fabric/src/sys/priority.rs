//! Real-time priority for the few threads that others wait for when a node has failed.

use std::io;

use libc::{SCHED_FIFO, SCHED_RESET_ON_FORK, sched_param, sched_setscheduler};

/// Among real-time threads: above ordinary ones, and below the heartbeats of agents, which must
/// not miss a beat because a manager is busy.
const PRIORITY: i32 = 20;

/// Lets the calling thread run before all ordinary threads of the host. Threads and processes that
/// it makes do not inherit that.
///
/// # Errors
/// If this process may not: it goes on with ordinary priority, and a busy host delays it.
pub fn raise() -> io::Result<()> {
    let parameter = sched_param {
        sched_priority: PRIORITY,
    };
    // SAFETY: pid 0 is the calling thread, and the parameter lives through the call.
    match unsafe { sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &parameter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
