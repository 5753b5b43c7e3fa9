//! Which node a thread id belongs on: the same answer on every node, without talk.

use crate::NodeId;

/// The node that shall run `id`, of those that can: by rendezvous hashing, so that the loss of a node
/// moves the ids of that node alone, and spreads them. `None` if there is no node.
pub fn place(id: u32, nodes: impl IntoIterator<Item = NodeId>) -> Option<NodeId> {
    nodes
        .into_iter()
        .max_by_key(|node| (mix(u64::from(id) << 32 | u64::from(node.get())), *node))
}

/// The finalizer of splitmix64: every bit of the input changes half of the output.
const fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u32) -> NodeId {
        NodeId::new(id).unwrap()
    }

    #[test]
    fn the_loss_of_a_node_moves_its_ids_alone_and_to_all_others() {
        let nodes: Vec<_> = (1..=8).map(node).collect();
        let mut load = [0; 9];
        let mut heirs = std::collections::BTreeSet::new();
        for id in 1..=8000 {
            let before = place(id, nodes.iter().copied()).unwrap();
            load[before.get() as usize] += 1;
            // In whatever order they are named.
            assert_eq!(place(id, nodes.iter().rev().copied()), Some(before));
            let left = nodes.iter().copied().filter(|n| *n != node(3));
            let after = place(id, left).unwrap();
            if before == node(3) {
                heirs.insert(after);
            } else {
                assert_eq!(after, before);
            }
        }
        assert_eq!(heirs.len(), 7);
        assert!(
            load[1..].iter().all(|n| (700..1300).contains(n)),
            "{load:?}"
        );
        assert_eq!(place(1, []), None);
    }
}
