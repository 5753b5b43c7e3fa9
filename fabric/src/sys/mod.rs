//! What the manager asks of Linux: processes that cannot be mistaken for others, and time.

pub mod clock;
pub mod journal;
pub mod mappings;
pub mod notify;
pub mod priority;
pub mod process;
pub mod socket;
pub mod spawn;
pub mod threads;
pub mod tree;
pub mod usage;
