//! `cargo xtask bench SUITE`: what is measured, and by which program.

use clap::Subcommand;

use crate::prover::{Prover, ProverArgs};

/// What to measure; `--help` behind it tells the options.
#[derive(Debug, Subcommand)]
pub(crate) enum Suite {
    /// Locks against plain ones, pthread's and parking_lot's, alone and contended
    Locks(ProverArgs),
    /// Allocators against jemalloc and others, alone and after deaths
    Alloc(ProverArgs),
    /// Maps and queues against those of crossbeam, dashmap and std
    Structures(ProverArgs),
    /// From the SIGKILL of a node to an application in another node (needs root, like all below)
    Detect(ProverArgs),
    /// From the moment that a node stops running to an application in another node
    Hang(ProverArgs),
    /// The same as detect, with the manager killed at the same moment
    Failover(ProverArgs),
    /// Sixteen busy nodes on few processors: none may be taken for hung, but those that are
    FalseKills(ProverArgs),
    /// A thousand nodes that have no process, looked at and judged by a real manager
    Scale(ProverArgs),
    /// From the release of a lock in one node to a sleeper in another
    Wakeup(ProverArgs),
    /// From the death of a process or of a node to the members of its group
    Notify(ProverArgs),
    /// A segment created, opened and mapped, against plain mmap; with --nested in a KVM guest
    Segments(ProverArgs),
}

impl Suite {
    /// The program that measures it, and what it is told: the suite's name first.
    pub(crate) fn program(self) -> (Prover, ProverArgs) {
        let (prover, name, mut args) = match self {
            Self::Locks(args) => (Prover::Bench, "locks", args),
            Self::Alloc(args) => (Prover::Bench, "alloc", args),
            Self::Structures(args) => (Prover::Bench, "structures", args),
            Self::Detect(args) => (Prover::PodBench, "detect", args),
            Self::Hang(args) => (Prover::PodBench, "hang", args),
            Self::Failover(args) => (Prover::PodBench, "failover", args),
            Self::FalseKills(args) => (Prover::PodBench, "false-kills", args),
            Self::Scale(args) => (Prover::PodBench, "scale", args),
            Self::Wakeup(args) => (Prover::PodBench, "wakeup", args),
            Self::Notify(args) => (Prover::PodBench, "notify", args),
            Self::Segments(args) => (Prover::PodBench, "segments", args),
        };
        args.args.insert(0, name.into());
        (prover, args)
    }
}
