//! Is the owner dead? The one question that everything recoverable asks.

use lupin_abi::InstanceId;
use lupin_abi::fabric::FabricSection;
use lupin_abi::instances::InstancesSection;

/// Judges whether an instance still lives.
///
/// A verdict "dead" is final: a dead instance never stores to pod memory again, and everything
/// that it did store is visible to whoever got the verdict. "Alive" may be late: the judge asks
/// tables that are updated some milliseconds after a death.
///
/// A word that cannot be an instance at all is dead, so that garbage never holds a lock for ever.
pub trait Liveness {
    /// Whether `instance` may still act.
    fn is_alive(&self, instance: InstanceId) -> bool;
}

impl<F: Fn(InstanceId) -> bool> Liveness for F {
    fn is_alive(&self, instance: InstanceId) -> bool {
        self(instance)
    }
}

/// Judges nodes, by the generation table. For agents: their locks are owned by nodes.
#[derive(Clone, Copy, Debug)]
pub struct NodeLiveness<'a> {
    fabric: &'a FabricSection,
}

impl<'a> NodeLiveness<'a> {
    /// A judge over the pod's generation table.
    pub const fn new(fabric: &'a FabricSection) -> Self {
        Self { fabric }
    }
}

impl Liveness for NodeLiveness<'_> {
    fn is_alive(&self, node: InstanceId) -> bool {
        // Generation 0 never lived, also where the table still says 0.
        node.generation() != 0 && self.fabric.is_current(node)
    }
}

/// Judges threads, by two levels: the thread's own generation, and that of the node which
/// registered it. For applications: their locks and claims are owned by threads.
#[derive(Clone, Copy, Debug)]
pub struct ThreadLiveness<'a> {
    nodes: NodeLiveness<'a>,
    instances: &'a InstancesSection,
}

impl<'a> ThreadLiveness<'a> {
    /// A judge over the pod's generation table and thread instances.
    pub const fn new(fabric: &'a FabricSection, instances: &'a InstancesSection) -> Self {
        Self {
            nodes: NodeLiveness::new(fabric),
            instances,
        }
    }
}

impl Liveness for ThreadLiveness<'_> {
    fn is_alive(&self, thread: InstanceId) -> bool {
        let Some(id) = thread.thread() else {
            return false;
        };
        let entry = self.instances.thread(id);
        // An agent raises the generation before it binds the id to a node, so a node read after
        // a generation that still matches is that life's or a later one's. A later one's can
        // only make a dead thread look alive once more; the next look finds the generation.
        thread.generation() != 0
            && entry.generation() == thread.generation()
            && self.nodes.is_alive(entry.node())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::{fabric_section, instances_section};
    use lupin_abi::instances::Holder;
    use lupin_abi::{NodeId, ThreadId};

    #[test]
    fn one_raise_of_a_node_kills_all_its_threads() {
        let (fabric, instances) = (fabric_section(), instances_section());
        let judge = ThreadLiveness::new(fabric, instances);
        let node = NodeId::new(3).unwrap();
        fabric.entry(node).set_generation(7);
        let threads: Vec<_> = (1..=4)
            .map(|id| {
                let id = ThreadId::new(id).unwrap();
                let generation = instances.thread(id).raise().unwrap();
                instances
                    .thread(id)
                    .bind(InstanceId::of_node(node, 7), Holder::default());
                InstanceId::of_thread(id, generation)
            })
            .collect();
        assert!(threads.iter().all(|t| judge.is_alive(*t)));
        instances.thread(threads[0].thread().unwrap()).raise();
        assert!(!judge.is_alive(threads[0]));
        assert!(judge.is_alive(threads[1]));
        fabric.entry(node).set_generation(8);
        assert!(threads.iter().all(|t| !judge.is_alive(*t)));
    }

    #[test]
    fn garbage_and_the_never_born_are_dead() {
        let (fabric, instances) = (fabric_section(), instances_section());
        let (threads, nodes) = (
            ThreadLiveness::new(fabric, instances),
            NodeLiveness::new(fabric),
        );
        for word in [0, 1, 1 << 32, u64::MAX, 0xdead_beef_dead_beef] {
            let instance = InstanceId::from_word(word);
            assert!(!threads.is_alive(instance), "{word:#x}");
            assert!(!nodes.is_alive(instance), "{word:#x}");
        }
    }
}
