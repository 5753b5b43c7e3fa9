//! Hints of one agent for the others: wake-ups of sleepers, and news of deaths and groups.
//!
//! They pass through the thread of the link on which they come and not through the manager's own:
//! a sleeper waits for each, and the state machine has no part in it.

use lupin_abi::NodeId;

use super::handle::{ManagerHandle, lock};
use crate::agent_link::Hint;

impl ManagerHandle {
    /// Passes a hint from the agent of `from` on to those that it is for. Never blocks.
    pub(super) fn pass_on(&self, from: NodeId, hint: Hint) {
        // Links of lives that are not fenced; a link's own lock is taken inside of this one, as
        // everywhere.
        for (node, link) in lock(&self.links).iter() {
            if *node != from && hint.is_for(*node) {
                link.hint(&hint);
            }
        }
    }
}
