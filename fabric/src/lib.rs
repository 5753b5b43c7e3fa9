//! The fabric manager of a Lupin pod.
pub mod agent_link;
pub mod api;
pub mod vmm_protocol;
