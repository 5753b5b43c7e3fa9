//! The pod file as it is written.

use serde::{Deserialize, Serialize};

use super::policy::{On, RestartKind};
use super::size::Size;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PodFile {
    pub name: String,
    pub memory: Memory,
    #[serde(default)]
    pub heartbeat: Heartbeat,
    #[serde(default)]
    pub fence: Fence,
    #[serde(default)]
    pub manager: Manager,
    #[serde(default)]
    pub api: Api,
    #[serde(default)]
    pub defaults: Settings,
    #[serde(default, rename = "node")]
    pub nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    pub path: String,
    pub pool: Size,
    pub system: Option<Size>,
    pub node_capacity: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Heartbeat {
    pub period_ms: u64,
    pub poll_ms: u64,
    pub deadline_ms: u64,
    pub join_timeout_ms: u64,
    pub clock: DeadlineClock,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            period_ms: 8,
            poll_ms: 16,
            deadline_ms: 100,
            join_timeout_ms: 60_000,
            clock: DeadlineClock::Available,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Fence {
    pub timeout_ms: u64,
}

impl Default for Fence {
    fn default() -> Self {
        Self { timeout_ms: 200 }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Manager {
    pub backup: bool,
    pub backup_timeout_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Api {
    pub socket: bool,
    pub listen: Option<String>,
    pub token_file: Option<String>,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            socket: true,
            listen: None,
            token_file: None,
        }
    }
}

/// The keys that `[defaults]` and `[[node]]` have in common. They are spelled out twice because
/// serde cannot combine `flatten` with `deny_unknown_fields`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    pub backend: Option<BackendKind>,
    pub kernel: Option<String>,
    pub initramfs: Option<String>,
    pub cmdline: Option<String>,
    pub cpus: Option<u32>,
    pub memory: Option<Size>,
    #[serde(rename = "disk")]
    pub disks: Option<Vec<Disk>>,
    pub restart: Option<RestartKind>,
    pub max_restarts_per_minute: Option<u32>,
    pub hook: Option<Vec<String>>,
    #[serde(default)]
    pub on: On,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    pub path: String,
    pub access: DiskAccess,
    pub id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub id: u32,
    pub name: Option<String>,
    backend: Option<BackendKind>,
    kernel: Option<String>,
    initramfs: Option<String>,
    cmdline: Option<String>,
    cpus: Option<u32>,
    memory: Option<Size>,
    #[serde(rename = "disk")]
    disks: Option<Vec<Disk>>,
    restart: Option<RestartKind>,
    max_restarts_per_minute: Option<u32>,
    hook: Option<Vec<String>>,
    #[serde(default)]
    on: On,
}

impl Node {
    /// The node's own settings, and the defaults where it has none.
    pub fn settings(&self, defaults: &Settings) -> Settings {
        let or = |own: &Option<String>, default: &Option<String>| {
            own.as_ref().or(default.as_ref()).cloned()
        };
        Settings {
            backend: self.backend.or(defaults.backend),
            kernel: or(&self.kernel, &defaults.kernel),
            initramfs: or(&self.initramfs, &defaults.initramfs),
            cmdline: or(&self.cmdline, &defaults.cmdline),
            cpus: self.cpus.or(defaults.cpus),
            memory: self.memory.clone().or(defaults.memory.clone()),
            // All of them or none: disks are told apart by their order.
            disks: self.disks.clone().or(defaults.disks.clone()),
            restart: self.restart.or(defaults.restart),
            max_restarts_per_minute: self
                .max_restarts_per_minute
                .or(defaults.max_restarts_per_minute),
            hook: self.hook.as_ref().or(defaults.hook.as_ref()).cloned(),
            on: self.on.or(&defaults.on),
        }
    }
}

/// The values of `heartbeat.clock`: what counts against a node that does not beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeadlineClock {
    /// Time in which the host let it run.
    Available,
    /// All time. A node that the host starves is taken for dead.
    Wall,
}

/// The values of `backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// A KVM guest.
    Kvm,
    /// A process tree in namespaces of its own.
    Namespace,
}

/// The values of `access` of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAccess {
    /// The node cannot write. Any number of nodes may share the image.
    ReadOnly,
    /// The node writes to the image itself: it is this node's alone.
    ReadWrite,
    /// The node writes to an overlay of its own, which begins empty in each of its lives. Any
    /// number of nodes may share the image.
    Overlay,
    /// The same, but the overlay is kept, in the folder of the pod file.
    KeptOverlay,
}
