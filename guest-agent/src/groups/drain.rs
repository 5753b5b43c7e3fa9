//! A node that drains: no member comes, and the manager learns how many are left.

use lupin_abi::fabric::NodeState;

use super::Groups;

impl Groups {
    /// Since when this node drains, if it does: the time in the generation table, which is the name
    /// of that drain.
    pub(super) fn draining(&self) -> Option<u64> {
        let node = self.memory.identity().node;
        let entry = self.memory.fabric().entry(node);
        let drains = entry.state() == NodeState::Draining && self.memory.is_current();
        drains.then(|| entry.since_ns())
    }

    /// Tells the manager how many members are left on this node, if it drains. One thread of the
    /// agent admits members and reports: whoever was admitted before the state was seen is counted,
    /// and nobody is admitted after.
    pub fn report_drain(&self) {
        if let Some(since_ns) = self.draining() {
            let members: usize = self.own.values().map(Vec::len).sum();
            let members = u32::try_from(members).unwrap_or(u32::MAX);
            self.memory.node().report_members_left(since_ns, members);
        }
    }
}
