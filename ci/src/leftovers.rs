//! Processes that a command left behind.
//!
//! Pods are started by daemons and tests by cargo: when those are stopped in the
//! middle, what they had started would live on. While a [`Watch`] exists, such
//! orphans become children of this process, and are ended with it.

use std::collections::HashMap;
use std::fs;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::host::{self, say};

/// Ends every orphan of the commands that were run during its life.
pub(crate) struct Watch(());

impl Watch {
    pub(crate) fn new() -> Self {
        if let Err(errno) = prctl::set_child_subreaper(true) {
            say!("orphaned processes will not be ended: {errno}");
        }
        Self(())
    }

    /// Ends what is left of the commands so far; to be called while none runs.
    pub(crate) fn sweep(&self) {
        // The children of a killed process become ours: look again until there are none.
        for _ in 0..100 {
            let descendants = descendants();
            if descendants.is_empty() {
                return;
            }
            for (pid, name) in descendants {
                say!("ending {name} (process {pid}), which was left behind");
                // It may end by itself in this moment.
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(host::POLL);
            bury();
        }
        say!("some processes could not be ended");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.sweep();
        let _ = prctl::set_child_subreaper(false);
    }
}

/// Reaps ended orphans.
fn bury() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status.pid().is_none() {
            return;
        }
    }
}

/// Every live process below this one, with its name.
fn descendants() -> Vec<(Pid, String)> {
    bury();
    let processes: HashMap<i32, Process> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| Some((pid, Process::read(pid)?)))
        .collect();
    let us = Pid::this().as_raw();
    let is_below = |mut pid: i32| {
        // Bounded: parents may change while we read, and form a circle in our copy.
        for _ in 0..processes.len() {
            match processes.get(&pid) {
                Some(process) if process.parent == us => return true,
                Some(process) => pid = process.parent,
                None => return false,
            }
        }
        false
    };
    processes
        .iter()
        .filter(|(pid, process)| !process.ended && is_below(**pid))
        .map(|(pid, process)| (Pid::from_raw(*pid), process.name.clone()))
        .collect()
}

struct Process {
    parent: i32,
    name: String,
    ended: bool,
}

impl Process {
    /// From `/proc/PID/stat`: `pid (name) state parent ...`, where the name may hold anything.
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        let (before, after) = stat.rsplit_once(')')?;
        let mut fields = after.split_whitespace();
        let state = fields.next()?;
        Some(Self {
            parent: fields.next()?.parse().ok()?,
            name: before.split_once('(')?.1.to_owned(),
            ended: matches!(state, "Z" | "X"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let process = Process::parse("12 (a) Z (b)) S 7 12 12").unwrap();
        assert_eq!((process.parent, process.name.as_str()), (7, "a) Z (b)"));
        assert!(!process.ended);
        assert!(Process::parse("12 (a").is_none());
    }
}
