//! What the fabric manager and the VMM process of one node say to each other.
//!
//! The VMM listens on [`CONTROL_SOCKET`] in the node's runtime folder (`SOCK_SEQPACKET`, one JSON
//! message a packet). Its fence thread answers, which takes no device lock: a VMM whose devices
//! are stuck can still be fenced. Just before it exits, the VMM writes an [`ExitRecord`] to
//! [`EXIT_FILE`], so that a manager that is not its parent learns why it ended.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys::replace::replace;

/// Control socket of the VMM, in the node's runtime folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Stream to the agent inside the node, in the node's runtime folder.
pub const AGENT_SOCKET: &str = "agent.sock";
/// Last words of a VMM, in the node's runtime folder.
pub const EXIT_FILE: &str = "exit.json";
/// What the node wrote to its console, in the node's runtime folder.
pub const CONSOLE_FILE: &str = "console.log";
/// Longest packet on the control socket, in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// From the manager to a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Who are you? The reply comes with the doorbell: an eventfd as `SCM_RIGHTS`.
    Hello,
    /// Delete the writable pod memslots. Idempotent; cannot be undone in this process.
    Fence,
    /// Make all vCPUs leave the guest and stay out. Idempotent. The fence works meanwhile.
    Pause,
    /// Let the vCPUs run on. Idempotent.
    Resume,
    /// Counters.
    Status,
    /// Exit at once with [`ExitStatus::Stopped`].
    Quit,
}

/// From a VMM to the manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Answer to [`Request::Hello`].
    Hello {
        /// Process id of the VMM.
        pid: u32,
        /// Node number; 0 for a VM without pod memory.
        node: u32,
        /// Generation that the node runs as.
        generation: u32,
        /// Kernel thread ids of the vCPU threads, by vCPU index.
        vcpu_tids: Vec<u32>,
    },
    /// Answer to [`Request::Fence`]: no store of this guest reaches pod memory any more.
    Fenced {
        /// Writable memslots deleted, now or by an earlier request.
        slots: u32,
        /// Nanoseconds that the deletion took; 0 if it had been done before.
        nanos: u64,
    },
    /// Answer to [`Request::Pause`]: no vCPU executes a guest's instruction.
    Paused,
    /// Answer to [`Request::Resume`].
    Resumed,
    /// Answer to [`Request::Status`].
    Status(VmmStatus),
    /// Answer to [`Request::Quit`], sent before the exit.
    Quitting,
    /// The request could not be carried out.
    Error {
        /// What was wrong.
        message: String,
    },
}

/// Counters of a VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct VmmStatus {
    /// Guest stores to the read-only fabric section that were dropped.
    pub fabric_writes_dropped: u64,
    /// Guest accesses to pod memory after the fence that were dropped.
    pub fenced_accesses_dropped: u64,
    /// Times the guest was rung.
    pub doorbells: u64,
    /// Whether the pod memslots are deleted.
    pub fenced: bool,
    /// Requests that the guest's disks answered.
    pub disk_requests: u64,
    /// Those among them that failed.
    pub disk_errors: u64,
    /// Bytes that the guest read from its disks.
    pub disk_bytes_read: u64,
    /// Bytes that the guest wrote to its disks.
    pub disk_bytes_written: u64,
    /// Whether the vCPUs were told to stay out of the guest.
    pub paused: bool,
}

/// How a VMM ended: the exit code of `lupin-vmm run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum ExitStatus {
    /// The guest powered itself off.
    PowerOff = 0,
    /// The VMM failed; its log says how.
    Internal = 1,
    /// Bad arguments, configuration or files; nothing was started.
    BadArguments = 2,
    /// The guest asked for a reset (reboot).
    Reset = 3,
    /// The guest kernel panicked.
    Panic = 4,
    /// The guest crashed: triple fault, or an instruction that KVM could not run.
    Crash = 5,
    /// Stopped by request: `Quit`, SIGTERM or SIGINT.
    Stopped = 6,
    /// `/dev/kvm` is missing or cannot be used.
    NoKvm = 7,
}

impl ExitStatus {
    /// Every status.
    pub const ALL: [Self; 8] = [
        Self::PowerOff,
        Self::Internal,
        Self::BadArguments,
        Self::Reset,
        Self::Panic,
        Self::Crash,
        Self::Stopped,
        Self::NoKvm,
    ];

    /// The process exit code.
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// The status for a process exit code, if it is one of ours.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.code() == code)
    }
}

/// Last words of a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExitRecord {
    /// Process id of the VMM that wrote it.
    pub pid: u32,
    /// Generation that the node ran as; 0 for a VM without pod memory.
    pub generation: u32,
    /// Why it ended.
    pub status: ExitStatus,
    /// More, for people.
    pub detail: String,
}

impl ExitRecord {
    /// Writes the record to `folder`, whole or not at all.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        replace(&folder.join(EXIT_FILE), &serde_json::to_vec(self)?)
    }

    /// Reads the record that process `pid` left in `folder`; `None` if it left none.
    pub fn read(folder: &Path, pid: u32) -> Option<Self> {
        let bytes = std::fs::read(folder.join(EXIT_FILE)).ok()?;
        let record: Self = serde_json::from_slice(&bytes).ok()?;
        (record.pid == pid).then_some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_distinct_and_map_back() {
        for status in ExitStatus::ALL {
            assert_eq!(ExitStatus::from_code(status.code()), Some(status));
        }
        assert_eq!(ExitStatus::from_code(137), None);
    }

    #[test]
    fn last_words_are_read_only_for_the_process_that_spoke_them() {
        let folder = tempfile::tempdir().unwrap();
        let record = ExitRecord {
            pid: 7,
            generation: 2,
            status: ExitStatus::Panic,
            detail: "x".into(),
        };
        record.write(folder.path()).unwrap();
        assert_eq!(ExitRecord::read(folder.path(), 7), Some(record));
        assert_eq!(ExitRecord::read(folder.path(), 8), None);
        std::fs::write(folder.path().join(EXIT_FILE), b"{").unwrap();
        assert_eq!(ExitRecord::read(folder.path(), 7), None);
    }
}
