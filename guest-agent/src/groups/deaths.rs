//! Deaths: of processes and threads of this node, and of other nodes.

use std::time::Duration;

use log::{info, warn};
use lupin::liveness::{Liveness, ThreadLiveness};
use lupin::lock::LockError;
use lupin_abi::groups::{End, MemberState, What};
use lupin_abi::{InstanceId, NodeId};

use super::{GroupError, Groups, Own};
use crate::crash::crash_point;
use crate::directory::LOCK_TIMEOUT;
use crate::threads::Thread;

impl Groups {
    /// Tells of the deaths of threads of this node. Only after their generations were raised,
    /// so after their last store.
    ///
    /// # Errors
    /// Those of the lock; nothing was told then.
    pub fn died(&mut self, threads: &[Thread], end: End) -> Result<(), GroupError> {
        self.end_own(None, threads, |section, slot| {
            section.change().die(slot, end)
        })
    }

    /// Finds the members that an earlier agent of this life left; tells of those that died while
    /// no agent ran.
    pub(super) fn adopt(&mut self) -> Result<(), GroupError> {
        let guard = self.lock(LOCK_TIMEOUT)?;
        let judge = ThreadLiveness::new(self.memory.fabric(), self.memory.instances());
        let mut living = Vec::new();
        for (index, entry) in self.rows() {
            let row = entry.row();
            if row.state != MemberState::Alive || row.member.node != self.me() {
                continue;
            }
            let instance = row.member.thread;
            match instance.thread().filter(|_| judge.is_alive(instance)) {
                Some(id) => {
                    let generation = instance.generation();
                    let group = row.group;
                    living.push((Thread { id, generation }, Own { group, row: index }));
                }
                None => self.commit(&self.section().change().die(entry, End::Unknown)),
            }
        }
        drop(guard);
        for (thread, own) in living {
            self.own.entry(thread).or_default().push(own);
        }
        Ok(())
    }

    /// Tells the groups that know this node that it is back.
    pub(super) fn arrive(&mut self) -> Result<(), GroupError> {
        // With the lock comes the sweep: the failure of the former life was told, should no
        // other node have been there to tell.
        let guard = self.lock(LOCK_TIMEOUT)?;
        let (me, node) = (self.me(), self.memory.identity().node);
        crash_point();
        self.section().set_node(node, me);
        crash_point();
        for (index, entry) in self.section().groups().iter().enumerate() {
            if let Some(id) = entry.id(index)
                && entry.is_known(node)
                && !entry.is_up(node)
            {
                let what = What::NodeBack { node: me };
                self.commit(&self.section().change().node(id, node, true, what));
            }
        }
        drop(guard);
        Ok(())
    }

    /// Tells of nodes that failed, unless another survivor is at it. Returns quickly if none did.
    pub fn bury_nodes(&self) {
        if !self.memory.is_current() || self.failed_nodes().next().is_none() {
            return;
        }
        // Not waited for: whoever has the lock does the same as its first act, or dies; the next
        // tick looks again.
        match self.lock(Duration::ZERO) {
            Ok(_) | Err(GroupError::Lock(LockError::Timeout { .. }) | GroupError::Fenced) => {}
            Err(error) => warn!("groups: the failure of a node is not told yet: {error}"),
        }
    }

    /// Lives of nodes that the groups believe in, and that are over.
    fn failed_nodes(&self) -> impl Iterator<Item = (NodeId, InstanceId)> {
        (1..=self.memory.header().node_capacity())
            .filter_map(NodeId::new)
            .map(|node| (node, self.section().node(node)))
            .filter(|(_, believed)| !believed.is_none() && !self.is_alive(*believed))
    }

    /// Tells all groups of the nodes that failed and of the deaths of their members. Needs the
    /// lock. May stop anywhere and be repeated.
    pub(super) fn sweep(&self) {
        for (node, life) in self.failed_nodes() {
            self.changed.set(true);
            for (index, entry) in self.section().groups().iter().enumerate() {
                if let Some(id) = entry.id(index)
                    && entry.is_up(node)
                {
                    let what = What::NodeFailed { node: life };
                    self.commit(&self.section().change().node(id, node, false, what));
                }
            }
            let mut dead = 0;
            for (_, entry) in self.rows() {
                if entry.state() == MemberState::Alive && entry.row().member.node.id() == node.get()
                {
                    // A member of a later life of the node cannot be there: that life begins
                    // with this very sweep.
                    self.commit(&self.section().change().die(entry, End::Node));
                    dead += 1;
                } else if entry.state() == MemberState::Expelled
                    && entry.row().member.node.id() == node.get()
                {
                    // The node's memory went with it.
                    self.commit(&self.section().change().free(entry));
                }
            }
            if dead > 0 {
                info!("groups: node instance {life} failed with {dead} members");
            }
            crash_point();
            self.section().set_node(node, InstanceId::NONE);
            crash_point();
        }
    }
}
