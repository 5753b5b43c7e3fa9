//! The agent inside every node of a Lupin pod.
//!
//! The fabric manager and the VMM stand outside of a node; the agent is what they and the node's
//! processes can rely on inside. It is one static binary: PID 1 or a service of a stock Linux
//! guest, or PID 1 of a namespace node.
//!
//! ```text
//!        fabric manager                                 processes of this node
//!              | port / socket                                   | /run/lupin/agent.sock
//!              v                                                 v
//!   doorbell   link: exec, shutdown          socket: threads, segments, events
//!        \        |                                 |         |
//!         +-------+------ agent: one epoll loop ----+         |
//!                                                             v
//!   heartbeat (own thread, real-time)         directory + threads under one recoverable lock
//!        |                                                    |
//!        v                                                    v
//!   [node section]         [fabric, read-only]       [instances | system]     [pool]
//!   +--------------------- memory: devdax or one file, checked at attach -----------+
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`identity`] | who this node is |
//! | [`memory`] | finds, binds, maps and checks the sections |
//! | [`heartbeat`] | says that the node lives |
//! | [`directory`], [`segments`] | which ranges of the pool are segments, and who here uses them |
//! | [`threads`] | ids of threads, in each of their lives |
//! | [`groups`] | which processes of the pod belong together, and are told of each other's deaths |
//! | [`socket`] | what processes may ask |
//! | [`link`] | what the manager may ask |
//! | [`doorbell`] | somebody says that something happened |
//! | [`init`] | reaping and the node's end |
//! | [`agent`] | all of it together |
//! | [`logging`] | the log of both programs |
//! | [`upgrade`] | becoming the next version |
//! | [`supervise`] | the program beside it, that begins other programs again |
//!
//! Nothing that a process, a peer node or a manager sends ends the agent: its end is its node's.

pub mod agent;
pub mod cli;
mod crash;
pub mod directory;
pub mod doorbell;
pub mod groups;
pub mod heartbeat;
pub mod identity;
pub mod init;
pub mod link;
pub mod logging;
pub mod memory;
mod notify;
pub mod peer;
pub mod poll;
mod priority;
mod proc_events;
pub mod run;
pub mod segments;
pub mod socket;
pub mod supervise;
mod task;
pub mod threads;
pub mod upgrade;
pub mod wakes;

#[cfg(any(test, feature = "fuzz"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the tests use more of it"))]
mod test_pod;
