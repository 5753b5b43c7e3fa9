//! The layout of pod memory, and every message that crosses a boundary of a Lupin pod.
//!
//! A pod is several operating systems that share one memory. What they share has no common
//! kernel to interpret it, so this crate is the only authority on what a byte in it means:
//! it holds layouts, encodings and the checks made when somebody attaches. It does no I/O,
//! takes no decisions, and needs no operating system (`no_std`, with `alloc` for messages).
//!
//! # Pod memory
//!
//! ```text
//! offset 0                                                              total_size
//! +-----------+----------+-----+----------+---------------------------+----------+
//! | fabric    | node 1   | ... | node N   | system                    | pool     |
//! | 2 MiB     | 2 MiB    |     | 2 MiB    | [instances 2 MiB | rest]  | segments |
//! +-----------+----------+-----+----------+---------------------------+----------+
//!   host        that node           nodes                               groups
//!   writes      writes              write                               write
//! ```
//!
//! | module | what it describes |
//! |---|---|
//! | [`id`] | node ids, generations and the one-word [`InstanceId`] that owns everything |
//! | [`layout`] | where each section lies; the checked [`PodHeader`](layout::PodHeader) |
//! | [`fabric`] | generation table, epoch and event ring: written by the host alone |
//! | [`node`] | a node's heartbeat and agent state: written by that node alone |
//! | [`instances`] | the pod's thread instances: written by agents, readable by everybody |
//! | [`system`] | the segment directory and its recoverable lock: written by agents |
//! | [`groups`] | control groups, their members and notifications: written by agents |
//! | [`event`] | the events of the ring |
//! | [`port`] | frames between the fabric manager and a node's agent |
//! | [`socket`] | packets between an agent and the processes of its node |
//!
//! # Memory that others write
//!
//! All structures that lie in pod memory consist of atomics only and are used through shared
//! references: another node may store to them at any time, so neither `&mut` nor a reference
//! to plain data may ever cover them. Values read from them are hints until checked; a
//! misbehaving node may write anything, and nothing here panics on it.
#![no_std]

extern crate alloc;

pub mod event;
pub mod fabric;
pub mod groups;
pub mod id;
pub mod instances;
pub mod layout;
pub mod node;
pub mod port;
pub mod socket;
pub mod system;
mod words;

pub use event::{Cause, Event, EventKind};
pub use id::{Generation, InstanceId, NodeId, ThreadId};
pub use layout::{AttachError, PodHeader, SectionKind};

/// The version of every layout and message in this crate.
///
/// Raised on any change that an older reader could misread; there is no negotiation: both
/// sides of a boundary must agree, and a mismatch is reported with both numbers.
pub const ABI_VERSION: u32 = 4;
