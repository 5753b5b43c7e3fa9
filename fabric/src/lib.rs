//! The fabric manager of a Lupin pod.
//!
//! It decides which instance of which node lives: it starts the nodes, watches them, fences what
//! fails, raises generations, tells the others, and restarts. It is a library, so that its parts
//! can be tested one by one, and a program, `lupin-fabricd`.
//!
//! ```text
//!            pod file                 operators (api)
//!               |                          |
//!   +-----------v--------------------------v-----------+
//!   |  manager: one thread owns all state              |    fabric section:
//!   |    detect -> fence -> raise -> append -> ring ----------> generation table, event ring
//!   |           -> restart                             |
//!   +---^-------------------------------------+--------+
//!       | pidfds, heartbeats, join            | start, fence, kill, ring
//!   +---+-------------------------------------v--------+
//!   |  power backends: vmm (KVM guest), namespace      |
//!   +--------------------------------------------------+
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`podfile`] | the pod file, read strictly |
//! | [`memory`] | the pod memory: creation, checks, mapping |
//! | [`runtime`] | the pod's runtime folder: lock, sockets, records of running nodes |
//! | [`manager`] | the state machine and the loop that drives it |
//! | [`power`] | how nodes are started, fenced, rung and killed |
//! | [`api`] | what operators and programs may ask of a running manager |
//! | [`http`] | the same for programs that speak HTTP |
//! | [`metrics`] | what a monitoring system collects |
//! | [`agent_link`] | the connection to the agent inside a node |
//! | [`vmm_protocol`] | what manager and VMM process say to each other |
//! | [`sys`] | processes, threads and time of the host |

pub mod agent_link;
pub mod api;
mod count;
pub mod http;
pub mod manager;
pub mod memory;
pub mod metrics;
pub mod namespace_init;
pub mod podfile;
pub mod power;
pub mod runtime;
pub mod standby;
pub mod sys;
pub mod vmm_protocol;
