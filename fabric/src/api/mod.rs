//! The manager's control interface: what operators and programs may ask of a running pod.
//!
//! | module | what it holds |
//! |---|---|
//! | [`control`] | the seam: what a manager must be able to do ([`PodControl`]), and what it tells |
//! | `schema` | the schemas of what it tells, for descriptions |
//! | [`wire`] | requests and replies: one JSON object a line |
//! | [`server`] | the manager's side: threads that serve clients on a UNIX socket |
//! | [`client`] | the other side, for the command line and for programs |
//!
//! A connection carries any number of requests, one after the other. Two of them change what
//! the connection is: `events` turns it into a stream of events until it is closed or done, and
//! `exec` into a stream of frames of [`lupin_abi::port`] until the command is over. Try it:
//!
//! ```text
//! $ echo '{"status":{}}' | nc -UN /run/lupin/pods/demo/fabricd.sock
//! $ echo '{"events":{"follow":true}}' | nc -U /run/lupin/pods/demo/fabricd.sock
//! ```

pub mod client;
mod clients;
pub mod control;
#[cfg(test)]
pub(crate) mod sample;
pub(crate) mod schema;
mod serve;
pub mod server;
pub mod wire;

pub use client::{Client, ClientError};
pub use control::{
    ControlError, Difference, Effect, HeartbeatStatus, NodeAction, NodeStatus, PodControl,
    PodPhase, PodStatus,
};
pub use server::Server;

/// Name of the control socket in a pod's runtime folder.
pub const CONTROL_SOCKET: &str = "fabricd.sock";

#[cfg(test)]
#[path = "api_test.rs"]
mod api_test;
