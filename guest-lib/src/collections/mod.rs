//! Data structures for any number of nodes, any of which may die at any instruction.
//!
//! | structure | what | where it lies |
//! |---|---|---|
//! | [`Counters`] | sums that survive deaths; an addition that is redone counts once | a range of a mapping |
//! | [`Table`] | cells that are computed once | a range of a mapping |
//! | [`Journal`] | records of any length, appended | a range of a mapping |
//! | [`List`] | sorted; readers take no lock | a [heap](crate::heap) |
//! | [`Map`] | hashed; readers take no lock | a heap |
//! | [`Queue`] | first in first out, any number of pushers and poppers | a heap |
//!
//! The last three change by one record of the participant's [log](crate::log) under a recoverable
//! lock of theirs: all of a change happens, or nothing, whenever the participant dies. The record
//! is the last thing an operation does. So after a death, an operation that the dead one had
//! [tagged](crate::heap::Participant::tag) happened exactly if the [outcome] of its instance has
//! that tag and one of the [`kind`]s that the operation names, and says that it happened.
//!
//! Their blocks lie in holds of the participant until they are linked, and after they were taken
//! out: the collections use the three [holds](crate::heap::Participant::hold) with the highest
//! numbers, and leave the others to the application.
//!
//! [outcome]: crate::heap::Heap::outcome_of

pub mod counters;
mod error;
pub mod journal;
pub mod list;
pub mod map;
pub mod queue;
mod region;
mod rooted;
pub mod table;

pub use counters::{Counters, CountersSpec, Shard};
pub use error::CollectionError;
pub use journal::{
    Appender, Journal, JournalAudit, JournalRecord, JournalSpec, Records, Reservation,
};
pub use list::List;
pub use map::{Key, Map};
pub use queue::Queue;
pub use table::{Claim, Claimed, Table, TableProgress, TableSpec};

/// What a record of a collection does; see [`Outcome`](crate::log::Outcome).
pub mod kind {
    /// A collection was created. Its result is the collection's block.
    pub const CREATE: u32 = 0xc000_0001;
    /// See [`List::insert`](super::List::insert).
    pub const LIST_INSERT: u32 = 0xc000_0101;
    /// See [`List::remove`](super::List::remove).
    pub const LIST_REMOVE: u32 = 0xc000_0102;
    /// See [`Map::insert`](super::Map::insert).
    pub const MAP_INSERT: u32 = 0xc000_0201;
    /// See [`Map::update`](super::Map::update).
    pub const MAP_UPDATE: u32 = 0xc000_0202;
    /// See [`Map::remove`](super::Map::remove).
    pub const MAP_REMOVE: u32 = 0xc000_0203;
    /// See [`Queue::push`](super::Queue::push).
    pub const QUEUE_PUSH: u32 = 0xc000_0301;
    /// See [`Queue::pop`](super::Queue::pop).
    pub const QUEUE_POP: u32 = 0xc000_0302;
}

#[cfg(test)]
mod deaths_test;
#[cfg(test)]
mod test_support;
