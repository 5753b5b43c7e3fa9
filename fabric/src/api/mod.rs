//! The manager's control interface: what operators and programs may ask of a running pod.
//!
//! | module | what it holds |
//! |---|---|
//! | [`control`] | the seam: what a manager must be able to do ([`PodControl`]), and what it tells |
//! | [`server`] | the manager's side: threads that serve clients on a UNIX socket |

pub mod control;
pub mod server;

pub use control::{ControlError, NodeStatus, PodControl, PodPhase, PodStatus};
pub use server::Server;

/// Name of the control socket in a pod's runtime folder.
pub const CONTROL_SOCKET: &str = "fabricd.sock";
