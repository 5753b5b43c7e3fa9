//! Identities: which node or thread, and which of its lives.

use core::fmt;

/// The number of a node, fixed for as long as the node belongs to the pod, across reboots.
///
/// Valid ids are `1..=`[`MAX_NODES`]; 0 means "no node", so that an all-zero word owns nothing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "u32", into = "u32")]
pub struct NodeId(u32);

/// The largest node id, and the number of entries of the generation table.
pub const MAX_NODES: u32 = 1024;

/// Classes that nodes fall into as sleepers: a word of pod memory has room for so many, twice.
pub const WAKE_CLASSES: u32 = 16;

impl NodeId {
    /// Accepts `1..=MAX_NODES`.
    pub const fn new(id: u32) -> Option<Self> {
        if id >= 1 && id <= MAX_NODES {
            Some(Self(id))
        } else {
            None
        }
    }

    /// The id as a number, at least 1.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The index of this node in tables that have one entry a node.
    pub const fn index(self) -> usize {
        self.0 as usize - 1
    }

    /// The class of this node among those that a wake-up names, below [`WAKE_CLASSES`]. Nodes of
    /// one class are woken together, for nothing at worst.
    pub const fn wake_class(self) -> u32 {
        (self.0 - 1) % WAKE_CLASSES
    }
}

/// The number names no node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadNodeId(pub u32);

impl fmt::Display for BadNodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is no node id: they are 1 to {MAX_NODES}", self.0)
    }
}

impl TryFrom<u32> for NodeId {
    type Error = BadNodeId;

    fn try_from(id: u32) -> Result<Self, BadNodeId> {
        Self::new(id).ok_or(BadNodeId(id))
    }
}

impl From<NodeId> for u32 {
    fn from(id: NodeId) -> Self {
        id.get()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number of a thread instance in the pod, stable across restarts of that thread.
///
/// Valid ids are `1..=`[`MAX_THREADS`]; 0 means "no thread".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ThreadId(u32);

/// The largest thread id: as many as fit into the instances, which `instances` checks.
pub const MAX_THREADS: u32 = 65_408;

impl ThreadId {
    /// Accepts `1..=MAX_THREADS`.
    pub const fn new(id: u32) -> Option<Self> {
        if id >= 1 && id <= MAX_THREADS {
            Some(Self(id))
        } else {
            None
        }
    }

    /// The id as a number, at least 1.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The index of this thread in the instance table.
    pub const fn index(self) -> usize {
        self.0 as usize - 1
    }
}

impl fmt::Display for ThreadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of an id. Starts at 1, is raised at least once for every failure, never goes back.
///
/// Generation 0 means that the id never lived.
pub type Generation = u32;

/// An id together with one of its lives, in one word: the id in the high half, the generation
/// in the low half.
///
/// The pair is loaded, stored and compared-and-swapped whole, so that no reader ever combines
/// the id of one owner with the generation of another (LUPIN paper, section 3.1). The zero word
/// owns nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
#[repr(transparent)]
pub struct InstanceId(u64);

impl InstanceId {
    /// The word that owns nothing.
    pub const NONE: Self = Self(0);

    /// Packs an id and a generation. An id of 0 gives a word for which [`is_none`](Self::is_none)
    /// holds only if the generation is 0 as well, so callers pass checked ids.
    pub const fn new(id: u32, generation: Generation) -> Self {
        Self(((id as u64) << 32) | generation as u64)
    }

    /// The instance of a node.
    pub const fn of_node(node: NodeId, generation: Generation) -> Self {
        Self::new(node.get(), generation)
    }

    /// The instance of a thread.
    pub const fn of_thread(thread: ThreadId, generation: Generation) -> Self {
        Self::new(thread.get(), generation)
    }

    /// Takes the word as it is stored in pod memory.
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word to store in pod memory.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The id half.
    pub const fn id(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The generation half.
    pub const fn generation(self) -> Generation {
        self.0 as u32
    }

    /// Whether this is the word that owns nothing.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The id half as a node id, if it can be one.
    pub const fn node(self) -> Option<NodeId> {
        NodeId::new(self.id())
    }

    /// The id half as a thread id, if it can be one.
    pub const fn thread(self) -> Option<ThreadId> {
        ThreadId::new(self.id())
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id(), self.generation())
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_both_halves_at_their_extremes() {
        for id in [0, 1, 7, MAX_NODES, u32::MAX] {
            for generation in [0, 1, 2, u32::MAX] {
                let instance = InstanceId::new(id, generation);
                assert_eq!(instance.id(), id);
                assert_eq!(instance.generation(), generation);
                assert_eq!(InstanceId::from_word(instance.word()), instance);
            }
        }
    }

    #[test]
    fn every_id_of_the_tables_packs_and_no_other_is_one() {
        for id in 0..=2 * MAX_THREADS {
            let in_nodes = (1..=MAX_NODES).contains(&id);
            let in_threads = (1..=MAX_THREADS).contains(&id);
            assert_eq!(NodeId::new(id).map(NodeId::get), in_nodes.then_some(id));
            assert_eq!(
                ThreadId::new(id).map(ThreadId::get),
                in_threads.then_some(id)
            );
            for bit in 0..32 {
                for generation in [1 << bit, !(1 << bit)] {
                    let instance = InstanceId::new(id, generation);
                    assert_eq!((instance.id(), instance.generation()), (id, generation));
                    assert_eq!(instance.node(), NodeId::new(id));
                    // No other pair has this word: one bit more or less is another one.
                    let other = InstanceId::new(id, generation ^ 1 << bit);
                    assert_ne!(instance.word(), other.word());
                }
            }
        }
    }

    #[test]
    fn ids_outside_their_tables_are_refused() {
        assert!(NodeId::new(0).is_none());
        assert!(NodeId::new(MAX_NODES).is_some());
        assert!(NodeId::new(MAX_NODES + 1).is_none());
        assert!(ThreadId::new(0).is_none());
        assert!(ThreadId::new(u32::MAX).is_none());
        assert!(InstanceId::NONE.node().is_none());
    }
}
