//! Data structures for any number of nodes, any of which may die at any instruction.
//!
//! | structure | what | where it lies |
//! |---|---|---|
//! | [`Counters`] | sums that survive deaths; an addition that is redone counts once | a range of a mapping |
//! | [`Table`] | cells that are computed once | a range of a mapping |
//! | [`Journal`] | records of any length, appended | a range of a mapping |

pub mod counters;
mod error;
pub mod journal;
mod region;
pub mod table;

pub use counters::{Counters, CountersSpec, Shard};
pub use error::CollectionError;
pub use journal::{
    Appender, Journal, JournalAudit, JournalRecord, JournalSpec, Records, Reservation,
};
pub use table::{Claim, Claimed, Table, TableProgress, TableSpec};

#[cfg(test)]
mod test_support;
