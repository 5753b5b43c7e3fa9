//! The fabric manager of a Lupin pod.
pub mod vmm_protocol;
