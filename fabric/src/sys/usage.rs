//! What a node takes of the host: memory and time of all its processes.

use std::fs;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::threads;

/// Most processes of a node that are looked at: a bound on what one question may cost.
const MOST_PROCESSES: usize = 4096;

/// What a process and all its descendants take. The times are sums over the threads that live:
/// take differences of two looks, and expect them to shrink when a process ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Resident memory, in bytes; what processes share counts once for each.
    pub memory_bytes: u64,
    /// Time on a CPU, in nanoseconds.
    pub run_ns: u64,
    /// Time in which a thread could run and waited for a CPU of the host, in nanoseconds: what a
    /// guest calls stolen.
    pub delay_ns: u64,
    /// Processes.
    pub processes: u32,
    /// Threads of them.
    pub threads: u32,
}

impl Usage {
    /// Looks at a process and its descendants; `None` if it is gone. Processes that begin or end
    /// meanwhile are counted or not.
    pub fn of_tree(pid: u32) -> Option<Self> {
        let mut sum = Self::default();
        let mut waiting = vec![pid];
        while let Some(pid) = waiting.pop() {
            if sum.processes as usize >= MOST_PROCESSES {
                break;
            }
            let Some(resident) = resident_bytes(pid) else {
                continue;
            };
            sum.memory_bytes = sum.memory_bytes.saturating_add(resident);
            sum.processes += 1;
            for tid in threads::of_process(pid) {
                let Some((run, delay)) = threads::schedstat(pid, tid) else {
                    continue;
                };
                sum.threads += 1;
                sum.run_ns = sum.run_ns.saturating_add(run);
                sum.delay_ns = sum.delay_ns.saturating_add(delay);
                let children = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"));
                let children = children.unwrap_or_default();
                waiting.extend(
                    children
                        .split_ascii_whitespace()
                        .filter_map(|pid| pid.parse::<u32>().ok()),
                );
            }
        }
        (sum.processes > 0).then_some(sum)
    }
}

/// Resident memory of one process; `None` if it is gone.
fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    // A kernel thread or a zombie has none.
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    Some(kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_tree_is_its_root_and_all_below() {
        let mut tree = Command::new("sh")
            .args(["-c", "sleep 60 & sleep 60 & wait"])
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let usage = loop {
            let usage = Usage::of_tree(tree.id()).unwrap();
            if usage.processes == 3 {
                break usage;
            }
            assert!(std::time::Instant::now() < deadline, "{usage:?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        assert!(usage.threads >= 3 && usage.memory_bytes > 0 && usage.run_ns > 0);
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", tree.id()));
        tree.kill().unwrap();
        tree.wait().unwrap();
        for child in children.unwrap().split_ascii_whitespace() {
            let pid = nix::unistd::Pid::from_raw(child.parse().unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        assert_eq!(Usage::of_tree(u32::MAX), None);
    }
}
