//! What the host's scheduler did to the threads of a process.

use std::{fs, io};

use super::process::stat_fields;

/// One thread's account with the scheduler, in nanoseconds since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadTimes {
    /// Kernel thread id.
    pub tid: u32,
    /// On a CPU.
    pub run_ns: u64,
    /// Runnable, but waiting for a CPU. The kernel adds a wait only when it is over.
    pub delay_ns: u64,
    /// Runnable at this moment (on a CPU or waiting for one), or in an uninterruptible wait such
    /// as a page fault that reads from disk: whether it goes on is up to the host.
    pub up_to_host: bool,
}

/// The ids of a process's threads; empty if it is gone.
pub fn of_process(pid: u32) -> Vec<u32> {
    ids(pid).unwrap_or_default()
}

fn ids(pid: u32) -> io::Result<Vec<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Reads the account of one thread of a process; `None` if it is gone, or if the kernel keeps no
/// accounts (`CONFIG_SCHED_INFO`, which every distribution has).
pub fn times(pid: u32, tid: u32) -> Option<ThreadTimes> {
    account(pid, tid).ok().flatten()
}

/// The accounts of these threads of a process, without those that are gone. `None` if we lack the
/// means to look (descriptors, memory): whether a thread waits for a CPU is not known then.
pub fn accounts(pid: u32, tids: &[u32]) -> Option<Vec<ThreadTimes>> {
    let mut all = Vec::with_capacity(tids.len());
    for tid in tids {
        match account(pid, *tid) {
            Ok(account) => all.extend(account),
            Err(e) if is_blind(&e) => return None,
            Err(_) => {}
        }
    }
    Some(all)
}

/// [`accounts`] of all threads of a process; empty if it is gone.
pub fn accounts_of_process(pid: u32) -> Option<Vec<ThreadTimes>> {
    match ids(pid) {
        Ok(tids) => accounts(pid, &tids),
        Err(e) if is_blind(&e) => None,
        Err(_) => Some(Vec::new()),
    }
}

/// Whether an error is about us, and not about what we look at.
fn is_blind(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

fn account(pid: u32, tid: u32) -> io::Result<Option<ThreadTimes>> {
    let schedstat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"))?;
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"))?;
    let state = stat_fields(&stat).and_then(|mut fields| fields.next());
    let account = parse_schedstat(&schedstat).zip(state);
    Ok(account.map(|((run_ns, delay_ns), state)| ThreadTimes {
        tid,
        run_ns,
        delay_ns,
        up_to_host: matches!(state, "R" | "D"),
    }))
}

/// Time on a CPU and time spent waiting for one, in nanoseconds, of one thread of a process;
/// `None` if it is gone.
pub(super) fn schedstat(pid: u32, tid: u32) -> Option<(u64, u64)> {
    let schedstat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    parse_schedstat(&schedstat)
}

/// `run delay timeslices`, in nanoseconds.
fn parse_schedstat(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let run = fields.next()?.parse().ok()?;
    let delay = fields.next()?.parse().ok()?;
    Some((run, delay))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_threads_have_accounts() {
        let pid = std::process::id();
        let tids = of_process(pid);
        assert!(tids.contains(&pid));
        let before = times(pid, pid).unwrap();
        assert_eq!(before.tid, pid);
        assert!(times(pid, 1).is_none(), "not our thread");
        let known = accounts(pid, &[pid, 1]).unwrap();
        assert_eq!(known.len(), 1, "{known:?}");
        assert!(!accounts_of_process(pid).unwrap().is_empty());
        assert_eq!(accounts_of_process(u32::MAX), Some(Vec::new()));
        assert!(of_process(u32::MAX).is_empty());
    }

    #[test]
    fn garbage_is_no_account() {
        assert_eq!(parse_schedstat("12 34 5\n"), Some((12, 34)));
        assert_eq!(parse_schedstat(""), None);
        assert_eq!(parse_schedstat("a b c"), None);
    }
}
