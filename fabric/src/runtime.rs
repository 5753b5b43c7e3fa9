//! The pod's runtime folder: everything about a running pod that is not in pod memory.
//!
//! ```text
//! /run/lupin/pods/<pod>/          mode 0700; 0750 for the group `lupin` if there is one
//!   fabricd.lock                  flock: one manager; its pid, start time, and boot of the host
//!   fabricd.sock                  control interface; mode 0660
//!   api.sock                      HTTP; mode 0660
//!   fabricd.log
//!   pod.toml                      the pod file as it was when the pod came up
//!   pod.json                      the pod as it runs
//!   manager.json                  which boot of the host, which pod memory: is this a take-over?
//!   nodes/<name>/                 mode 0700
//!     node.json                   the process that runs the node
//!     intent.json                 what an operator wants to happen after a life
//!     console.log                 what the node wrote
//!     control.sock agent.sock exit.json
//!     run/                        /run/lupin inside a namespace node
//!   peers/                        /run/lupin/peers inside every namespace node; mode 0700
//! ```
//!
//! Records are written to a temporary name and renamed: a reader finds the old or the new one. A
//! manager that takes over changes none of them, so it needs no room on the disk.
//!
//! A pid and a start time name a process of one boot only. What a manager of an earlier boot left is
//! never believed, and removed by the next manager, where the folder outlives boots.

mod kept;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub use kept::{KeptPod, PodFolder};
use lupin_abi::Generation;
use lupin_abi::socket::PEERS;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::CONTROL_SOCKET;
use crate::http::API_SOCKET;
use crate::sys::process::{ProcessName, host_boot_id, start_time};
use crate::sys::replace::{overwrite, replace};
use crate::vmm_protocol;

/// Where pods have their runtime folders, unless [`RUNTIME_DIR_ENV`] or a flag says otherwise.
pub const DEFAULT_RUNTIME_DIR: &str = "/run/lupin/pods";
/// Environment variable that overrides [`DEFAULT_RUNTIME_DIR`].
pub const RUNTIME_DIR_ENV: &str = "LUPIN_RUNTIME_DIR";
/// The group whose members may use the sockets of a manager that runs as root.
pub const GROUP: &str = "lupin";

/// Longest path of a UNIX socket, without the closing zero.
const MAX_SOCKET_PATH: usize = 107;

/// Why a runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Another manager runs.
    #[error("{}: another fabric manager runs this pod (process {pid}); steer it with `lupin-vmm pod`, or bring the pod down first", folder.display())]
    Locked {
        /// The pod's runtime folder.
        folder: PathBuf,
        /// What that manager wrote into the lock file.
        pid: String,
    },
    /// Somebody else could change what is in it.
    #[error("{}: the folder belongs to user {uid}, not to you; remove it or choose another --runtime-dir", folder.display())]
    Owner {
        /// The folder.
        folder: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Socket paths have a limit of the kernel.
    #[error("{}: the path is {length} bytes long and a socket path may have {MAX_SOCKET_PATH}; choose a shorter --runtime-dir", path.display())]
    PathTooLong {
        /// The longest socket path that the pod would need.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// A system call failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl RuntimeError {
    /// The error number of the system call that failed; 0 if none did.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or_default(),
            _ => 0,
        }
    }
}

/// The process that runs a node, across managers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// The process: VMM, or init of the namespaces.
    pub process: ProcessName,
    /// The boot of the host in which it was started.
    pub host_boot_id: String,
    /// The generation that it runs as.
    pub generation: Generation,
    /// `kvm` or `namespace`.
    pub backend: String,
    /// When it was started, in nanoseconds of the monotonic clock.
    pub started_ns: u64,
}

/// What shall happen when a life of a node is over, because an operator wants it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The node is started again.
    Restart,
    /// The node stays down.
    Down,
    /// The node is removed from the pod.
    Removed,
}

impl Then {
    /// The number in events of kind [`NodeStopping`](lupin_abi::event::EventKind::NodeStopping).
    pub const fn number(self) -> u64 {
        match self {
            Self::Restart => 1,
            Self::Down => 2,
            Self::Removed => 3,
        }
    }
}

/// The end of a life that an operator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// Of which life. A later one has nothing to do with it.
    pub generation: Generation,
    /// What comes then.
    pub then: Then,
    /// When it was asked for, in nanoseconds of the monotonic clock.
    pub asked_ns: u64,
    /// When patience is over, in nanoseconds of the monotonic clock.
    pub until_ns: u64,
    /// How long the node may take to end, in milliseconds.
    pub grace_ms: u64,
    /// Until when the node drains before it is asked to end, in nanoseconds of the monotonic
    /// clock; absent if it does not drain first.
    #[serde(default)]
    pub drain_until_ns: Option<u64>,
}

/// What a manager leaves to the next one, besides pod memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManagerRecord {
    host_boot_id: String,
    pod_id: String,
}

/// A pod's runtime folder, locked by this process.
#[derive(Debug)]
pub struct RuntimeFolder {
    path: PathBuf,
    _lock: File,
}

impl RuntimeFolder {
    /// Makes the folder of `pod` under `base` if needed, and takes its lock.
    ///
    /// # Errors
    /// If another manager has it, if it belongs to another user, or of the file system.
    pub fn open(base: &Path, pod: &str, longest_node: usize) -> Result<Self, RuntimeError> {
        let path = std::path::absolute(base)
            .unwrap_or_else(|_| base.into())
            .join(pod);
        let node = path.join("nodes").join("x".repeat(longest_node));
        let socket = node.join(vmm_protocol::CONTROL_SOCKET);
        let length = socket.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(RuntimeError::PathTooLong {
                path: socket,
                length,
            });
        }
        make_folder(&path, operators())?;
        let lock_path = path.join("fabricd.lock");
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(failed(&lock_path, "open the lock file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let text = fs::read_to_string(&lock_path).unwrap_or_default();
                return Err(RuntimeError::Locked {
                    folder: path,
                    pid: text.lines().next().unwrap_or_default().into(),
                });
            }
            Err(fs::TryLockError::Error(e)) => {
                return Err(failed(&lock_path, "lock the lock file")(e));
            }
        }
        let nodes = path.join("nodes");
        make_folder(&nodes, None)?;
        let boot = host_boot_id();
        let text = fs::read_to_string(&lock_path).unwrap_or_default();
        // Without the third line nobody had come far enough to leave anything.
        if text.lines().nth(2).is_some_and(|of| of != boot) {
            remove_stale(&path, &nodes)?;
        }
        // Comes last: whoever dies before leaves the removal to the next.
        let pid = std::process::id();
        let start_time = start_time(pid).unwrap_or_default();
        let text = format!("{pid}\n{start_time}\n{boot}\n");
        overwrite(&lock, text.as_bytes()).map_err(failed(&lock_path, "write the lock file"))?;
        Ok(Self { path, _lock: lock })
    }

    /// Who took the lock last in this boot: the manager of the pod in `folder`, if it still runs.
    pub fn last_manager(folder: &Path) -> Option<ProcessName> {
        let text = fs::read_to_string(folder.join("fabricd.lock")).ok()?;
        let mut lines = text.lines();
        let name = ProcessName {
            pid: lines.next()?.parse().ok()?,
            start_time: lines.next()?.parse().ok()?,
        };
        (lines.next()? == host_boot_id()).then_some(name)
    }

    /// Whether the pod in `folder` was left without being brought down: it needs a manager.
    pub fn needs_manager(folder: &Path) -> bool {
        read_json::<ManagerRecord>(&folder.join("manager.json"))
            .is_some_and(|found| found.host_boot_id == host_boot_id())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join(CONTROL_SOCKET)
    }

    /// Whether a manager of this boot left this pod without bringing it down: nodes may run.
    pub fn is_takeover(&self, pod_id: u128) -> bool {
        read_json::<ManagerRecord>(&self.path.join("manager.json"))
            .is_some_and(|found| found == ManagerRecord::current(pod_id))
    }

    /// Records that this pod is run from here on: a successor takes over.
    ///
    /// # Errors
    /// Of the file system.
    pub fn mark_running(&self, pod_id: u128) -> Result<(), RuntimeError> {
        let path = self.path.join("manager.json");
        write_json(&path, &ManagerRecord::current(pod_id))
    }

    /// Keeps the pod file as it is used, for those who ask for the pod by name.
    ///
    /// # Errors
    /// Of the file system.
    pub fn keep_pod_file(&self, file: &Path) -> Result<(), RuntimeError> {
        let path = self.path.join("pod.toml");
        let bytes = fs::read(file).map_err(failed(file, "read the pod file"))?;
        replace(&path, &bytes).map_err(failed(&path, "copy the pod file to"))
    }

    /// The folder of one node, made if needed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn node(&self, name: &str) -> Result<NodeFolder, RuntimeError> {
        self.records().node(name)
    }

    /// Removes what would make a successor believe that the pod runs. The logs stay.
    pub fn mark_stopped(&self) {
        let _ = fs::remove_file(self.path.join("manager.json"));
        let _ = fs::remove_file(self.control_socket());
        let _ = fs::remove_file(self.path.join(API_SOCKET));
    }
}

impl ManagerRecord {
    fn current(pod_id: u128) -> Self {
        Self {
            host_boot_id: host_boot_id(),
            pod_id: format!("{pod_id:032x}"),
        }
    }
}

/// The runtime folder of one node.
#[derive(Clone, Debug)]
pub struct NodeFolder {
    path: PathBuf,
}

impl NodeFolder {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The stream to the node's agent.
    pub fn agent_socket(&self) -> PathBuf {
        self.path.join(vmm_protocol::AGENT_SOCKET)
    }

    /// The control socket of the node's VMM.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join(vmm_protocol::CONTROL_SOCKET)
    }

    /// What the node writes to its console.
    pub fn console(&self) -> PathBuf {
        self.path.join(vmm_protocol::CONSOLE_FILE)
    }

    /// `/run/lupin` of a namespace node.
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// The folder that becomes `/run/lupin/peers` of the pod's namespace nodes, where their agents
    /// take wake-ups of each other. For the agents' user alone, which is the manager's.
    ///
    /// # Errors
    /// Of the file system.
    pub fn make_peers(&self) -> Result<PathBuf, RuntimeError> {
        // Beside the folder of all nodes.
        let pod = self.path.ancestors().nth(2).unwrap_or(&self.path);
        let peers = pod.join(PEERS);
        make_folder(&peers, None)?;
        Ok(peers)
    }

    /// Removes what an earlier life left; the record and the logs stay.
    ///
    /// # Errors
    /// Of the file system.
    pub fn clean(&self) -> Result<(), RuntimeError> {
        for path in [
            self.agent_socket(),
            self.control_socket(),
            self.path.join(vmm_protocol::EXIT_FILE),
        ] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path, "remove what an earlier life left")(e));
                }
                _ => {}
            }
        }
        let run = self.run();
        match fs::remove_dir_all(&run) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed(&run, "remove what an earlier life left")(e));
            }
            _ => {}
        }
        // Open to all: inside the node it is /run/lupin, whose way leads not through here.
        DirBuilder::new()
            .mode(0o755)
            .create(&run)
            .map_err(failed(&run, "create the folder"))
    }

    /// The process on record, if a record of this boot is there.
    pub fn record(&self) -> Option<NodeRecord> {
        let record: NodeRecord = read_json(&self.path.join("node.json"))?;
        (record.host_boot_id == host_boot_id()).then_some(record)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write_record(&self, record: &NodeRecord) -> Result<(), RuntimeError> {
        write_json(&self.path.join("node.json"), record)
    }

    /// What an operator wants to happen after a life, if that is on record.
    pub fn intent(&self) -> Option<Intent> {
        read_json(&self.path.join("intent.json"))
    }

    /// Puts on record what an operator wants.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write_intent(&self, intent: &Intent) -> Result<(), RuntimeError> {
        write_json(&self.path.join("intent.json"), intent)
    }

    /// Forgets what an operator wanted.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove_intent(&self) -> Result<(), RuntimeError> {
        let path = self.path.join("intent.json");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(failed(&path, "remove the record")(e))
            }
            _ => Ok(()),
        }
    }

    /// The last lines that the node wrote to its console; empty if it wrote none.
    pub fn console_tail(&self, lines: usize) -> Vec<String> {
        tail(&self.console(), lines)
    }

    /// Opens the console for a new life: what an earlier life wrote stays as `console.log.1`.
    ///
    /// # Errors
    /// Of the file system.
    pub fn rotate_console(&self) -> Result<(), RuntimeError> {
        let (now, before) = (self.console(), self.path.join("console.log.1"));
        match fs::rename(&now, before) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(failed(&now, "keep the console of the earlier life")(e))
            }
            _ => Ok(()),
        }
    }
}

/// The last lines of a text file that may be large and need not be UTF-8.
fn tail(path: &Path, lines: usize) -> Vec<String> {
    use std::io::{Read, Seek, SeekFrom};
    const MOST: u64 = 16 << 10;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.size();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        file.take(MOST).read_to_end(&mut bytes)
    });
    if read.is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let printable = |line: &str| -> String {
        line.chars()
            .filter(|c| !c.is_control())
            .take(300)
            .collect::<String>()
    };
    let all: Vec<String> = text
        .lines()
        .map(printable)
        .filter(|line| !line.trim().is_empty())
        .collect();
    all[all.len().saturating_sub(lines)..].to_vec()
}

/// Removes what only means something in the boot in which it was written. Logs stay.
fn remove_stale(folder: &Path, nodes: &Path) -> Result<(), RuntimeError> {
    log::info!("{}: left by an earlier boot of this host", folder.display());
    let remove = |path: PathBuf| match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(failed(&path, "remove what an earlier boot left")(e))
        }
        _ => Ok(()),
    };
    let entries = fs::read_dir(nodes).map_err(failed(nodes, "list the folders of nodes"))?;
    for node in entries.flatten().map(|entry| entry.path()) {
        for name in [
            "node.json",
            vmm_protocol::AGENT_SOCKET,
            vmm_protocol::CONTROL_SOCKET,
            vmm_protocol::EXIT_FILE,
        ] {
            remove(node.join(name))?;
        }
        let run = node.join("run");
        match fs::remove_dir_all(&run) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed(&run, "remove what an earlier boot left")(e));
            }
            _ => {}
        }
    }
    for name in [CONTROL_SOCKET, API_SOCKET, "manager.json"] {
        remove(folder.join(name))?;
    }
    Ok(())
}

/// The group that may enter the folders of pods, for a manager that may give it to them.
fn operators() -> Option<u32> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    // Read by hand: the C library's own way loads plugins, which a static program cannot.
    gid_of(GROUP, &fs::read_to_string("/etc/group").ok()?)
}

/// The number of a group in the text of `/etc/group`.
fn gid_of(name: &str, text: &str) -> Option<u32> {
    let mut lines = text.lines().map(|line| line.split(':'));
    let mut fields = lines.find(|fields| fields.clone().next() == Some(name))?;
    fields.nth(2)?.parse().ok()
}

/// Makes a folder that is ours alone, or that one group may look into as well, with the folders
/// above it.
fn make_folder(path: &Path, group: Option<u32>) -> Result<(), RuntimeError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed(parent, "create the folder"))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed(path, "create the folder")(e));
        }
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(failed(path, "look at the folder"))?;
    let us = nix::unistd::geteuid().as_raw();
    if metadata.uid() != us || !metadata.is_dir() {
        return Err(RuntimeError::Owner {
            folder: path.into(),
            uid: metadata.uid(),
        });
    }
    let set = |mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(failed(path, "set the permissions of the folder"))
    };
    let Some(group) = group else {
        return set(0o700);
    };
    // The group first: its mode must not serve another one.
    std::os::unix::fs::lchown(path, None, Some(group))
        .map_err(failed(path, "give the folder to its group"))?;
    set(0o750)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(e) => {
            log::warn!("{}: not a record of this version: {e}", path.display());
            None
        }
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RuntimeError> {
    serde_json::to_vec(value)
        .map_err(io::Error::from)
        .and_then(|bytes| replace(path, &bytes))
        .map_err(failed(path, "write the record"))
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    let path = path.into();
    move |source| RuntimeError::Io {
        path,
        action,
        source,
    }
}

#[cfg(test)]
#[path = "runtime_test.rs"]
mod runtime_test;
