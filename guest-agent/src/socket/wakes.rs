//! Wake-ups and deaths, between the processes of this node and those of others.

use std::time::Instant;

use log::debug;
use lupin_abi::port::{ToManager, Wake};
use lupin_abi::socket::{MAX_WAKE, Reply, Request, decode, encode};

use super::Server;
use crate::poll::Poller;

impl Server {
    /// Takes the packet of `len` bytes in the buffer if it is a wake-up of a client that said
    /// hello. There is no answer to it, and what is refused is dropped: a client that breaks the
    /// rules costs itself a wake-up.
    pub(super) fn take_wake(&mut self, id: u32, len: usize, sender: u32) -> bool {
        if len > MAX_WAKE {
            return false;
        }
        let Ok(Request::Wake {
            segment,
            offset,
            classes,
            all,
        }) = decode(&self.buffer[..len])
        else {
            return false;
        };
        let Some(client) = self.clients.get(&id).filter(|client| client.greeted) else {
            return false;
        };
        let peer = client.peer.clone();
        if !self.wakes.allowance.may(Instant::now()) || (sender != 0 && sender != peer.pid) {
            return true;
        }
        // The kernel knows who asks, and the directory where the segment lies: so a process wakes
        // those who sleep in the segments that it may write to, and nobody else.
        let held = self.processes.get(&peer.pid).map(|p| &p.segments);
        let at = self.segments.place_of(segment, offset, |lease, segment| {
            held.is_some_and(|held| held.contains(&lease))
                || (segment.group.is_none() && peer.may(6, segment.uid, segment.gid, segment.mode))
        });
        match at {
            Some(at) => {
                let classes = self.send_short(len, classes);
                if classes != 0 {
                    self.wakes.push(Wake { at, classes, all });
                }
            }
            None => debug!("client {id}: no wake-up at {offset} of segment {segment}"),
        }
        true
    }

    /// Sends the wake-up in the buffer by the short way, if there is one; gives the classes of the
    /// nodes that it did not reach.
    fn send_short(&mut self, len: usize, classes: u16) -> u16 {
        let Some(peers) = &self.peers else {
            return classes;
        };
        let fabric = self.segments.directory().memory().fabric();
        let mut nodes = 0;
        let of = peers.of(classes.into(), fabric).inspect(|_| nodes += 1);
        let left = peers.send(&self.buffer[..len], of);
        self.wakes.allowance.charge(nodes);
        left as u16
    }

    /// Wake-ups for other nodes.
    pub fn take_wakes(&mut self) -> impl Iterator<Item = ToManager> + use<> {
        self.wakes.take_wakes()
    }

    /// News for other nodes; tells the processes of this one first, who are reached sooner.
    pub fn take_news(&mut self, poller: &Poller) -> impl Iterator<Item = ToManager> + use<> {
        self.note_changes();
        if self.unsent {
            self.pump_groups(poller);
        }
        if self.wakes.has_deaths() {
            self.tell_deaths(poller);
        }
        self.wakes.take_news()
    }

    /// A wake-up from another node, that came through the manager.
    pub fn wake(&mut self, wake: Wake) {
        let class = self.segments.directory().memory().identity().node;
        let class = class.wake_class();
        if wake.classes & (1 << class) != 0 {
            self.segments.wake(wake.at, class, wake.all);
        }
    }

    /// What changed here in the groups is to be told, here and on other nodes.
    pub(super) fn note_changes(&mut self) {
        if self.groups.take_changed() {
            self.unsent = true;
            self.wakes.groups_changed();
        }
    }

    /// Tells those who watch that somebody died. One who has not read the last such packet yet
    /// needs no other.
    pub fn tell_deaths(&mut self, poller: &Poller) {
        let Ok(packet) = encode(&Reply::Deaths) else {
            return;
        };
        let is_due = |client: &super::Client| {
            client.watches_deaths && client.out.back().is_none_or(|(last, _)| *last != packet)
        };
        let due = self.clients.iter().filter(|(_, client)| is_due(client));
        let ids: Vec<u32> = due.map(|(id, _)| *id).collect();
        for id in ids {
            self.reply(poller, id, &Reply::Deaths, Vec::new());
        }
    }

    /// The doorbell was rung, or may have been: tells of node failures since the last look.
    pub(super) fn look_for_failures(&mut self, poller: &Poller) {
        let fabric = self.segments.directory().memory().fabric();
        let head = fabric.state().ring_head();
        if head != std::mem::replace(&mut self.ring_head, head) {
            self.tell_deaths(poller);
        }
    }
}

#[cfg(test)]
#[path = "wakes_test.rs"]
mod wakes_test;
