//! Who waits for the agent's thread when the node is busy: everybody who is to learn that another
//! node has failed.

use std::io;

/// Above ordinary processes, but of their kind: whatever the agent does, a long scrub for example,
/// they get their share meanwhile. (Only the heartbeat, which does nothing long, is a real-time
/// thread.)
const NICE: libc::c_int = -10;

/// Lets the calling thread run soon after it is woken. What it starts does not inherit that.
///
/// # Errors
/// If this process may not: it goes on as it is.
pub fn raise() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
    // SAFETY: pid 0 is the calling thread, and the parameter lives through the call.
    if unsafe { libc::sched_setscheduler(0, policy, &none) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers; 0 is the calling thread, for Linux counts threads here.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn children_do_not_inherit_it() {
        // A thread of its own: the other tests keep theirs.
        let of_child = std::thread::spawn(|| {
            raise().ok()?;
            let stat = Command::new("cat").arg("/proc/self/stat").output().ok()?;
            let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
            // Field 19, counted from 1; field 3 is the first behind the command.
            let fields = stat.rsplit_once(") ")?.1.split(' ').nth(16)?.parse::<i32>();
            fields.ok()
        });
        // None without the right to raise it: then there is nothing to inherit.
        let nice = of_child.join().unwrap();
        assert!(matches!(nice, None | Some(0)), "{nice:?}");
    }
}
