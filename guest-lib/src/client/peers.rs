//! The short way of a wake-up: a datagram straight to the agents of other nodes.
//!
//! Namespace nodes share a kernel, and the manager gives all of them one folder in which the agent
//! of each takes wake-ups on a socket that has the node's number for a name. Guests share none, and
//! their wake-ups pass through their agents and the manager.
//!
//! Who may send is who may enter the folder: processes of the agent's own user, which could as
//! well trace or kill the agent. All others ask their own agent, which checks the segment and sends
//! in their place. A datagram says where somebody may sleep and carries nothing else, so the worst
//! that a sender can do is to let sleepers look for nothing, which costs them some microseconds
//! each; and the agent takes no more of them than its allowance.
//!
//! The name is resolved for each datagram, so that a node that is back is found under its new
//! socket. Nobody needs to be reached on a node that the generation table calls down. Any other
//! that does not take a datagram (its agent is being restarted, its queue is full, it is a guest)
//! is named to the caller, for the longer way.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use lupin_abi::NodeId;
use lupin_abi::fabric::FabricSection;
use lupin_abi::socket::PEERS;

use super::packet::unix_address;

/// The agents of the nodes that can be reached so.
#[derive(Debug)]
pub struct Peers {
    socket: OwnedFd,
    folder: PathBuf,
    own: Option<NodeId>,
    /// Nodes that the pod may have.
    capacity: u32,
}

impl Peers {
    /// The peers of the agent of node `own`, whose socket is at `agent`, in a pod of up to
    /// `capacity` nodes. `None` if there is no such way, or not for this process.
    pub fn find(agent: &Path, own: Option<NodeId>, capacity: u32) -> Option<Self> {
        let folder = agent.parent()?.join(PEERS);
        // The dot is what one must be allowed to enter the folder for.
        if !folder.join(".").is_dir() {
            return None;
        }
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
        if fd == -1 {
            return None;
        }
        // SAFETY: a new descriptor that nobody else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Some(Self {
            socket,
            folder,
            own,
            capacity,
        })
    }

    /// The nodes of `classes` on which somebody may sleep, without the own one.
    pub fn of(&self, classes: u32, fabric: &FabricSection) -> impl Iterator<Item = NodeId> {
        let all = (1..=self.capacity).filter_map(NodeId::new);
        all.filter(move |node| classes & (1 << node.wake_class()) != 0)
            .filter(|node| Some(*node) != self.own)
            .filter(|node| fabric.entry(*node).state().may_store())
    }

    /// Sends a packet to these nodes; gives the classes of those that did not take it. Never
    /// blocks.
    pub fn send(&self, packet: &[u8], nodes: impl Iterator<Item = NodeId>) -> u32 {
        nodes
            .filter(|node| !self.takes(*node, packet))
            .fold(0, |left, node| left | 1 << node.wake_class())
    }

    fn takes(&self, node: NodeId, packet: &[u8]) -> bool {
        let Ok((address, len)) = unix_address(&self.folder.join(node.get().to_string())) else {
            return false;
        };
        loop {
            // SAFETY: the buffer is valid for its length, and `len` bytes of the address are set.
            let sent = unsafe {
                libc::sendto(
                    self.socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                    (&raw const address).cast(),
                    len,
                )
            };
            if sent != -1 {
                return true;
            }
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return false;
            }
        }
    }
}

#[cfg(test)]
#[path = "peers_test.rs"]
mod peers_test;
