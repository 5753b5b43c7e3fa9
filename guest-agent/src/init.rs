//! What a node's first process owes the node: reaping orphans, and an orderly end.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, sync};

/// Between SIGTERM and SIGKILL when the one who asks for the end does not say.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(5);
/// How long the killed may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(2);

/// What the agent is to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of a guest, or the right hand of PID 1: reaps, and powers the guest off.
    GuestInit,
    /// PID 1 of a namespace node: reaps, and its exit is the node's end.
    NamespaceInit,
    /// A service beside an init system of the node's own.
    Service,
}

impl Role {
    /// Whether all processes of the node are the agent's to end and to reap.
    pub fn is_init(self) -> bool {
        self != Self::Service
    }
}

/// The node's end, under way.
#[derive(Debug)]
pub struct Shutdown {
    role: Role,
    deadline: Instant,
    killed: bool,
}

impl Shutdown {
    /// Tells all processes to end. In a [`Role::Service`] that is left to the init system.
    pub fn begin(role: Role, grace: Duration, now: Instant) -> Self {
        info!("the node shuts down; processes have {grace:?}");
        if role.is_init() {
            signal_all(Signal::SIGTERM);
            // The stopped do not act on a signal before they go on.
            signal_all(Signal::SIGCONT);
        }
        Self {
            role,
            deadline: now + grace,
            killed: false,
        }
    }

    /// When [`proceed`](Self::proceed) has something to do.
    pub fn next_deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on; true when nothing is left to end.
    pub fn proceed(&mut self, now: Instant) -> bool {
        if !self.role.is_init() || !others_live() {
            return true;
        }
        if now < self.deadline {
            return false;
        }
        if self.killed {
            warn!("some processes survive SIGKILL; ending without them");
            return true;
        }
        signal_all(Signal::SIGKILL);
        self.killed = true;
        self.deadline = now + KILL_TIME;
        false
    }

    /// The last act. Returns only if ending the process is what ends the node, or if the node
    /// cannot be ended.
    pub fn finish(self) {
        sync();
        match self.role {
            Role::NamespaceInit => {}
            Role::GuestInit => {
                info!("powering off");
                power_off();
            }
            Role::Service => {
                for (program, arguments) in [("systemctl", &["poweroff"][..]), ("poweroff", &[])] {
                    let status = Command::new(program)
                        .args(arguments)
                        .stdin(Stdio::null())
                        .status();
                    if status.is_ok_and(|s| s.success()) {
                        return;
                    }
                }
                warn!("neither systemctl nor poweroff would end the node; powering off hard");
                power_off();
            }
        }
    }
}

fn power_off() {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    warn!("power off: {error}");
}

/// Signals every process but this one and PID 1. Only for an agent that is init.
fn signal_all(signal: Signal) {
    match kill(Pid::from_raw(-1), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => warn!("{signal} to all processes: {error}"),
    }
}

/// Whether processes other than this one and PID 1 live. Kernel threads and the dead have no
/// program.
fn others_live() -> bool {
    let own = std::process::id();
    fs::read_dir("/proc").is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let pid = entry.file_name().to_str().and_then(|n| n.parse().ok());
            pid.is_some_and(|pid: u32| pid != own && pid != 1)
                && fs::read_link(entry.path().join("exe")).is_ok()
        })
    })
}

/// Reaps processes that have ended, and tells `ended` of each while its pid is still its own.
///
/// An init reaps all; otherwise only `pids` are looked at, and other children are left to whoever
/// started them.
pub fn reap(role: Role, pids: &[Pid], mut ended: impl FnMut(WaitStatus)) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let mut look = |id: Id| -> bool {
        let pid = match waitid(id, flags) {
            Ok(status) => status.pid(),
            // ECHILD: there are none.
            Err(_) => None,
        };
        let Some((pid, status)) = pid.and_then(|p| Some((p, waitid(Id::Pid(p), flags).ok()?)))
        else {
            return false;
        };
        ended(status);
        let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
        true
    };
    if role.is_init() {
        while look(Id::All) {}
    } else {
        for pid in pids {
            look(Id::Pid(*pid));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processes_asked_for_are_reaped_by_a_service() {
        let mut mine = Command::new("/bin/sh")
            .args(["-c", "exit 7"])
            .spawn()
            .unwrap();
        let mut other = Command::new("/bin/sh")
            .args(["-c", "exit 8"])
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(mine.id().cast_signed());
        let mut seen = Vec::new();
        let start = Instant::now();
        while seen.is_empty() && start.elapsed() < Duration::from_secs(10) {
            reap(Role::Service, &[pid], |status| seen.push(status));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(seen, [WaitStatus::Exited(pid, 7)]);
        assert!(mine.wait().is_err(), "reaped already");
        assert_eq!(other.wait().unwrap().code(), Some(8));
    }
}
