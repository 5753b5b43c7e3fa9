//! What happened in the pod: the events of the fabric's ring.

use crate::id::Generation;

macro_rules! wire_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $value:literal => $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[repr(u32)]
        pub enum $name {
            $($(#[$vmeta])* $variant = $value,)*
        }

        impl $name {
            /// Every value, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Decodes the number stored in pod memory; `None` for a number of another version.
            pub const fn from_raw(raw: u32) -> Option<Self> {
                match raw {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The name shown to people and programs.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}
pub(crate) use wire_enum;

wire_enum! {
    /// What kind of thing happened. The order of a failure is always
    /// `FailureDetected`, `Fenced`, `GenerationRaised`, `Rung`.
    EventKind {
        /// A manager took charge of the pod. Evidence: `[epoch, 0 = formatted / 1 = re-attached]`.
        ManagerStarted = 1 => "manager-started",
        /// A manager let go of the pod on request.
        ManagerStopped = 2 => "manager-stopped",
        /// A node's process was started. Evidence: `[pid]`.
        NodeStarted = 3 => "node-started",
        /// A node's agent reported that it uses pod memory. Evidence: `[ns since it was started]`.
        NodeJoined = 4 => "node-joined",
        /// A node was found dead or told to die. The cause says how it was found; the evidence is
        /// the cause's own (see [`Cause`]).
        FailureDetected = 5 => "failure-detected",
        /// No store of the old instance can reach pod memory from here on.
        /// Evidence: `[FencePath, ns that it took, memslots deleted]`.
        Fenced = 6 => "fenced",
        /// The generation table holds the new generation from here on.
        GenerationRaised = 7 => "generation-raised",
        /// The live nodes were rung. Evidence: `[nodes rung, ns that it took]`.
        Rung = 8 => "rung",
        /// A node will be started again. Evidence: `[delay in ms, restarts so far]`.
        NodeRestarting = 9 => "node-restarting",
        /// A node stays down: policy, or told so.
        NodeDown = 10 => "node-down",
        /// A running node was taken over from a manager that died. Evidence: `[pid]`.
        NodeAdopted = 11 => "node-adopted",
        /// A node did not join in time. Evidence: `[ns waited]`.
        JoinTimeout = 12 => "join-timeout",
        /// A node stands still on request: its virtual CPUs, or all its processes. That is no
        /// failure. Evidence: `[ns that it took]`.
        NodePaused = 13 => "node-paused",
        /// A paused node runs again. Evidence: `[ns since the pause was asked for]`.
        NodeResumed = 14 => "node-resumed",
        /// A running node was asked to end. Evidence: `[ms that it has, 1 = to be started again /
        /// 2 = to stay down / 3 = to be removed]`.
        NodeStopping = 15 => "node-stopping",
        /// The hook of a node runs, because that life failed. Evidence: `[pid]`.
        HookStarted = 16 => "hook-started",
        /// A hook failed, or was ended because it took too long. That changes nothing else.
        /// Evidence: `[exit status, signal, ns that it ran]`; all 0 if it could not be started.
        HookFailed = 17 => "hook-failed",
        /// A fence was not confirmed: the generation stays, the node stays `Failing`, and it is
        /// tried again. Evidence: `[attempts so far, ms to the next one]`.
        FenceFailed = 18 => "fence-failed",
        /// A node shall be left alone, and then end: its groups may move off it.
        /// Evidence: `[ms to move off, ms that it has to end then]`.
        NodeDraining = 19 => "node-draining",
        /// No member of a group is left on it, or the time to move off is up. It is ended now.
        /// Evidence: `[members left, ns that it took]`; the number is `u64::MAX` if its agent did
        /// not say.
        NodeDrained = 20 => "node-drained",
        /// It was to be left alone, and need not be any more.
        DrainCancelled = 21 => "drain-cancelled",
        /// A node came to the running pod.
        NodeAdded = 22 => "node-added",
        /// A node left the pod for good. Its generation stays, for a later node of that id.
        NodeRemoved = 23 => "node-removed",
    }
}

wire_enum! {
    /// Why a node failed or stopped.
    Cause {
        /// No failure.
        None = 0 => "none",
        /// The node's process is gone and left no word: SIGKILL, or a crash of the VMM itself.
        /// Evidence: `[exit code or 0, signal or 0]`.
        VmmExit = 1 => "vmm-exit",
        /// The guest kernel panicked and said so through pvpanic.
        Panic = 2 => "panic",
        /// The guest's virtual CPU shut down or could not be emulated.
        TripleFault = 3 => "triple-fault",
        /// The guest rebooted itself: for its peers, a failure like any other.
        GuestReboot = 4 => "guest-reboot",
        /// The guest powered itself off.
        GuestPowerOff = 5 => "guest-power-off",
        /// The heartbeat stood still for longer than the deadline, counted in time that the guest
        /// could have run. Evidence: `[ns without a beat, ns of that available to the guest,
        /// deadline in ns, last counter]`.
        Hang = 6 => "hang",
        /// An operator asked for it. Evidence: `[0 = killed / 1 = it ended when asked / 2 = it did
        /// not end in time / 3 = it could not be asked, ns since it was asked]`.
        Operator = 7 => "operator",
        /// The node was started but never joined.
        NeverJoined = 8 => "never-joined",
        /// The pod is going down.
        PodDown = 9 => "pod-down",
        /// The node could not be started. Evidence: `[exit code of its program, 0, error number of
        /// the host's system call that failed]`; 0 for what does not apply.
        StartFailed = 10 => "start-failed",
    }
}

wire_enum! {
    /// How a node was fenced.
    FencePath {
        /// The process was already gone, and every store of it with it.
        Exited = 1 => "already gone",
        /// The VMM's fence thread deleted the writable pod memslots.
        Memslots = 2 => "memslots deleted",
        /// The process was killed and all its threads are gone.
        Killed = 3 => "killed",
    }
}

/// Words of evidence that an event carries; their meaning depends on kind and cause.
pub const EVIDENCE_WORDS: usize = 8;

/// One event, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Event {
    /// Position in the pod's history, from 1, without gaps.
    pub seq: u64,
    /// The host's monotonic clock, in nanoseconds. Guests cannot compare it with theirs.
    pub time_ns: u64,
    /// The epoch of the manager that wrote it.
    pub epoch: u64,
    /// What happened.
    pub kind: EventKind,
    /// To which node; 0 for the pod as a whole.
    pub node: u32,
    /// The generation before.
    pub old_generation: Generation,
    /// The generation now.
    pub generation: Generation,
    /// Why.
    pub cause: Cause,
    /// The numbers that led to it.
    pub evidence: [u64; EVIDENCE_WORDS],
}
