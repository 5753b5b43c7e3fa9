//! What the library is measured against, where that is no crate of others: the same algorithms
//! without recovery, and the C library's robust mutex.

pub mod mcs;
pub mod robust;
pub mod tatas;

#[cfg(test)]
mod peers_test;
