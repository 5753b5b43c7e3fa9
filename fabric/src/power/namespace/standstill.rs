//! All processes of a node stand still, and run again.
//!
//! The freezer of a version 2 cgroup does it without the processes noticing. The cgroup is made at
//! the first pause, below that of the manager, and the node's processes are moved there; they stay
//! until the node ends. Where there is no such cgroup, or the node's processes have cgroups of
//! their own, every process gets SIGSTOP, and later SIGCONT; those that were stopped before stay
//! so.
//!
//! What was done is on record in the node's folder before it is done: another manager undoes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::runtime::NodeFolder;
use crate::sys::process::Process;
use crate::sys::replace::replace;
use crate::sys::tree::{self, Member};

/// How long all processes together may take to stand, or to run.
const BOUND: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

/// What the names of the cgroups begin with; the pid of the node's first process follows.
const CGROUP_PREFIX: &str = "lupin-node-";

/// What was done to a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Record {
    /// The node's cgroup, if one was made.
    cgroup: Option<PathBuf>,
    /// Whether the processes were stopped by signals.
    by_signals: bool,
    /// The processes that had been stopped before, by somebody else.
    stopped: Vec<u32>,
}

fn record_path(folder: &NodeFolder) -> PathBuf {
    folder.path().join("standstill.json")
}

fn read(folder: &NodeFolder) -> Option<Record> {
    serde_json::from_slice(&fs::read(record_path(folder)).ok()?).ok()
}

fn write(folder: &NodeFolder, record: &Record) -> io::Result<()> {
    replace(&record_path(folder), &serde_json::to_vec(record)?)
}

/// Makes the tree below `init` stand still.
pub(super) fn pause(init: u32, folder: &NodeFolder) -> io::Result<()> {
    let mut record = read(folder).unwrap_or_default();
    if record.by_signals {
        return stop(init);
    }
    let cgroup = match &record.cgroup {
        Some(cgroup) => Ok(cgroup.clone()),
        None => new_cgroup(init),
    };
    let frozen = cgroup.and_then(|cgroup| {
        record.cgroup = Some(cgroup.clone());
        write(folder, &record)?;
        fs::create_dir_all(&cgroup)?;
        freeze(init, &cgroup)
    });
    let Err(error) = frozen else {
        return Ok(());
    };
    log::debug!("process {init} is stopped by signals: {error}");
    if let Some(cgroup) = &record.cgroup {
        thaw(cgroup)?;
    }
    let stopped = |member: &&Member| member.stands && !member.is_dead;
    let members = tree::of(init);
    record.stopped = members.iter().filter(stopped).map(|m| m.name.pid).collect();
    record.by_signals = true;
    write(folder, &record)?;
    stop(init)
}

/// Lets the tree below `init` run.
pub(super) fn resume(init: u32, folder: &NodeFolder) -> io::Result<()> {
    let Some(mut record) = read(folder) else {
        return Ok(());
    };
    if record.by_signals {
        let ours = |member: &&Member| !record.stopped.contains(&member.name.pid);
        for member in tree::of(init).iter().filter(ours) {
            signal(member, libc::SIGCONT)?;
        }
        record.by_signals = false;
        record.stopped.clear();
        write(folder, &record)?;
    }
    record.cgroup.as_deref().map_or(Ok(()), thaw)
}

/// Removes what is left of a node that is gone.
pub(super) fn forget(folder: &NodeFolder) {
    let Some(record) = read(folder) else {
        return;
    };
    if let Some(cgroup) = &record.cgroup
        && let Err(e) = fs::remove_dir(cgroup)
        && e.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{}: cannot remove the cgroup: {e}", cgroup.display());
    }
    let _ = fs::remove_file(record_path(folder));
}

/// Stops all by signals, until a look finds nobody that runs.
fn stop(init: u32) -> io::Result<()> {
    let until = Instant::now() + BOUND;
    loop {
        let runs = |member: &&Member| !member.stands;
        let members = tree::of(init);
        let mut stands = !members.is_empty();
        for member in members.iter().filter(runs) {
            stands = false;
            signal(member, libc::SIGSTOP)?;
        }
        if stands {
            return Ok(());
        }
        in_time(until, "its processes do not stop")?;
    }
}

fn signal(member: &Member, signal: i32) -> io::Result<()> {
    match Process::find(member.name)? {
        Some(process) => process.signal(signal),
        None => Ok(()),
    }
}

fn in_time(until: Instant, what: &str) -> io::Result<()> {
    if Instant::now() >= until {
        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
    }
    std::thread::sleep(PAUSE);
    Ok(())
}

/// Moves all into the cgroup and freezes it.
fn freeze(init: u32, cgroup: &Path) -> io::Result<()> {
    let until = Instant::now() + BOUND;
    let home = cgroup.parent().map(Path::to_owned).unwrap_or_default();
    loop {
        let inside = members(cgroup)?;
        let tree = tree::of(init);
        let outside: Vec<_> = tree
            .iter()
            .filter(|member| !member.is_dead && !inside.contains(&member.name.pid))
            .collect();
        if outside.is_empty() {
            break;
        }
        for member in outside {
            if !same_cgroup(member.name.pid, &home) {
                let what = "a process of the node has a cgroup of its own";
                return Err(io::Error::other(what));
            }
            match fs::write(cgroup.join("cgroup.procs"), member.name.pid.to_string()) {
                // It has ended.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
        in_time(
            until,
            "its processes multiply faster than they can be moved",
        )?;
    }
    fs::write(cgroup.join("cgroup.freeze"), "1")?;
    loop {
        let events = fs::read_to_string(cgroup.join("cgroup.events"))?;
        if events.lines().any(|line| line == "frozen 1") {
            break;
        }
        in_time(until, "its processes do not freeze")?;
    }
    // A pid that was given to another process while it was being moved: give that one back.
    let tree = tree::of(init);
    for pid in members(cgroup)? {
        if !tree.iter().any(|member| member.name.pid == pid) {
            let _ = fs::write(home.join("cgroup.procs"), pid.to_string());
        }
    }
    Ok(())
}

fn thaw(cgroup: &Path) -> io::Result<()> {
    match fs::write(cgroup.join("cgroup.freeze"), "0") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The processes in a cgroup.
fn members(cgroup: &Path) -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Where a cgroup for the node may be made: below the one of its first process, which is ours
/// unless somebody has moved it.
fn new_cgroup(init: u32) -> io::Result<PathBuf> {
    let none = || io::Error::other("there is no version 2 cgroup");
    let home = cgroup_of(init).ok_or_else(none)?;
    let cgroup = home.join(format!("{CGROUP_PREFIX}{init}"));
    sweep(&home);
    fs::create_dir_all(&cgroup)?;
    // The root cgroup of a version 1 hierarchy looks alike; a freezer is what counts.
    if !cgroup.join("cgroup.freeze").exists() {
        let _ = fs::remove_dir(&cgroup);
        return Err(none());
    }
    Ok(cgroup)
}

/// Removes the empty cgroups of nodes that nobody was there to forget.
fn sweep(home: &Path) {
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(CGROUP_PREFIX)
        {
            // The kernel refuses as long as there is a process in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn same_cgroup(pid: u32, cgroup: &Path) -> bool {
    cgroup_of(pid).is_none_or(|found| found == cgroup)
}

/// The folder of a process's version 2 cgroup.
fn cgroup_of(pid: u32) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (_, point, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(point))
    })?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount.join(path))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::runtime::RuntimeFolder;

    /// A shell and two children.
    fn tree_of_three() -> (Child, Vec<Member>) {
        let script = "sleep 100 & sleep 101 & wait";
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let members = three_below(child.id());
        (child, members)
    }

    fn three_below(root: u32) -> Vec<Member> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let members = tree::of(root);
            if members.len() == 3 {
                return members;
            }
            in_time(until, "no children").unwrap();
        }
    }

    #[test]
    fn signals_stop_a_tree_and_leave_alone_what_was_stopped_before() {
        let base = tempfile::tempdir().unwrap();
        let runtime = RuntimeFolder::open(base.path(), "p", 8).unwrap();
        let folder = runtime.node("n").unwrap();
        let (mut child, members) = tree_of_three();
        let root = child.id();
        let before = members.iter().find(|m| m.name.pid != root).unwrap();
        signal(before, libc::SIGSTOP).unwrap();
        let record = Record {
            by_signals: true,
            stopped: vec![before.name.pid],
            ..Record::default()
        };
        write(&folder, &record).unwrap();
        // Twice: as another manager would.
        for _ in 0..2 {
            pause(root, &folder).unwrap();
            assert!(tree::of(root).iter().all(|member| member.stands));
        }
        for _ in 0..2 {
            resume(root, &folder).unwrap();
        }
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let standing = tree::of(root).into_iter().filter(|m| m.stands);
            let standing: Vec<_> = standing.map(|m| m.name.pid).collect();
            if standing == [before.name.pid] {
                break;
            }
            in_time(until, "others stand, or it runs").unwrap();
        }
        forget(&folder);
        assert!(read(&folder).is_none());
        for member in &members {
            signal(member, libc::SIGKILL).unwrap();
        }
        child.wait().unwrap();
    }
}
