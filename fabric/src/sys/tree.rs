//! The processes of a tree.

use std::collections::{HashMap, HashSet};
use std::fs;

use super::process::{ProcessName, stat_fields};
use super::threads;

/// A process as it was when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who it is.
    pub name: ProcessName,
    /// Whether none of its threads can run: stopped, traced and stopped, or dead.
    pub stands: bool,
    /// Whether it is dead and waits for its parent to take note.
    pub is_dead: bool,
}

/// A process, its descendants, and whoever else is in its PID namespace. Empty if it is gone.
/// A process that begins meanwhile may be missing: look again until nothing new is found.
///
/// Only processes that the own `/proc` shows are found.
pub fn of(root: u32) -> Vec<Member> {
    let mut found = HashMap::new();
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let namespace = pid_namespace(root);
    let mut waiting = vec![root];
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some((parent, member)) = look(pid) else {
            continue;
        };
        found.insert(pid, member);
        children.entry(parent).or_default().push(pid);
        if namespace.is_some() && pid_namespace(pid) == namespace {
            waiting.push(pid);
        }
    }
    let mut seen = HashSet::new();
    let mut tree = Vec::new();
    while let Some(pid) = waiting.pop() {
        if seen.insert(pid) {
            tree.extend(found.get(&pid).copied());
            waiting.extend(children.get(&pid).into_iter().flatten());
        }
    }
    tree
}

/// The PID namespace of a process, unless it is our own.
fn pid_namespace(pid: u32) -> Option<std::path::PathBuf> {
    let namespace = fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
    let ours = fs::read_link("/proc/self/ns/pid").ok()?;
    (namespace != ours).then_some(namespace)
}

/// Parent and state of a process.
fn look(pid: u32) -> Option<(u32, Member)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat_fields(&stat)?;
    let is_dead = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    // Field 22; two were taken.
    let start_time = fields.nth(17)?.parse().ok()?;
    let stands = is_dead
        || threads::of_process(pid)
            .into_iter()
            .all(|tid| stands(pid, tid));
    let name = ProcessName { pid, start_time };
    let member = Member {
        name,
        stands,
        is_dead,
    };
    Some((parent, member))
}

/// A thread that is gone cannot run either.
fn stands(pid: u32, tid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")) else {
        return true;
    };
    let state = stat_fields(&stat).and_then(|mut fields| fields.next());
    matches!(state, Some("T" | "t" | "Z" | "X"))
}
