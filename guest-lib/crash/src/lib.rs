//! Ends every operation of the library at every instruction and every store, recovers, and looks
//! at what is left.
//!
//! What is tried, for each operation and each state of its memory (a [`Case`]):
//!
//! * [`steps`]: the operation runs in a process that is stepped instruction by instruction. Each
//!   distinct state that its shared memory is in is what a death at that instruction would leave;
//!   another process recovers a copy of it, audits it, and goes on using it.
//! * [`square`]: the operation dies before its n-th store, its recovery before its m-th, for all n
//!   and m; a second survivor recovers after both.
//! * [`mutants`]: a program that lacks one of its stores must not pass the above.
//!
//! # How to add a case
//!
//! Put a type that implements [`Case`] into `src/cases/<module>.rs`, and a reference to it into
//! that file's `CASES`. A new file is named in `src/cases.rs`. Then
//! `cargo run --release -p lupin-crash -- crash --op <name>`.
//!
//! A good case
//! * prepares its states by the library's own operations; a dead owner in a state is
//!   [`PREDECESSOR`](case::PREDECESSOR), who died by `lupin::crash::dies_after` or by forgetting a
//!   guard;
//! * runs one operation, on as little memory as is enough;
//! * compares what it finds after recovery with what was there before and what should be there
//!   after: all or nothing, and all if `world.returned`;
//! * goes on with operations that would stumble over what a death left: the same slot, the same
//!   lock, the last free block.

pub mod case;
pub mod cases;
pub mod control;
pub mod memory;
pub mod mutants;
mod process;
pub mod sites;
pub mod square;
pub mod steps;
pub mod suite;
mod symbols;
pub mod worker;

pub use case::Case;

/// Why the suite cannot be run; nothing that it finds is one.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// The system refused something.
    #[error("the system refused: {0}")]
    System(#[from] nix::errno::Errno),
    /// A pipe or file failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// No shared memory.
    #[error(transparent)]
    Memory(#[from] lupin::shm::ShmError),
    /// There is no such operation.
    #[error("there is no operation {0}; --list tells which there are")]
    NoSuchOperation(String),
    /// A traced process did something unexpected.
    #[error("the traced process {0}")]
    Tracee(String),
    /// Instructions cannot be stepped.
    #[error("instructions are stepped on x86-64 only")]
    Architecture,
}
