//! What processes ask about groups, and what those that watch one are sent.

use log::warn;
use lupin_abi::ThreadId;
use lupin_abi::groups::{GroupId, GroupReply, GroupRequest};
use lupin_abi::socket::{RefusalCode, Reply};

use super::packet::Peer;
use super::requests::{Answer, Refusal, refusal};
use super::{LOGGED_PER_TICK, Server};
use crate::groups::{GroupError, Watched};
use crate::poll::Poller;
use crate::threads::Thread;

/// Threads in one request.
const THREADS_PER_REQUEST: usize = 4096;
/// Slots of the ring that one reader is shown before the others get their turn.
const LOOKS_PER_TURN: usize = 4096;
/// Notifications in one packet.
const NOTICES_PER_PACKET: usize = 256;

impl From<GroupError> for Refusal {
    fn from(error: GroupError) -> Self {
        Self {
            code: error.code(),
            message: error.to_string(),
        }
    }
}

fn answer(reply: GroupReply) -> Answer {
    Ok(Some((Reply::Group(reply), Vec::new())))
}

impl Server {
    /// Carries out a request about groups.
    pub(super) fn group_request(&mut self, id: u32, peer: &Peer, request: GroupRequest) -> Answer {
        match request {
            GroupRequest::Create {
                name,
                admission,
                quota,
            } => {
                let group = self.groups.create(&name, &admission, quota, peer)?;
                answer(GroupReply::Created { group })
            }
            GroupRequest::Remove { name } => {
                self.groups.remove(&name, peer)?;
                Ok(Some((Reply::Done, Vec::new())))
            }
            GroupRequest::List => answer(GroupReply::Groups(self.groups.list(peer))),
            GroupRequest::Join {
                name,
                secret,
                threads,
            } => {
                let threads = self.own_threads(peer, &threads)?;
                let joined = self.groups.join(&name, secret.as_ref(), &threads, peer);
                if let Err(GroupError::Denied { .. }) = &joined {
                    self.count_denied(&name, peer);
                }
                let (group, before) = joined?;
                answer(GroupReply::Joined { group, before })
            }
            GroupRequest::Leave { group, threads } => {
                let threads = self.own_threads(peer, &threads)?;
                self.groups.leave(Some(group), &threads)?;
                self.expel_former_members();
                Ok(Some((Reply::Done, Vec::new())))
            }
            GroupRequest::Members { group, after } => {
                self.check_member(peer, group)?;
                let list = self.groups.members(group, after)?;
                answer(GroupReply::Members {
                    seq: list.seq,
                    members: list.members,
                    more: list.more,
                })
            }
            GroupRequest::Watch { group, from } => {
                self.check_member(peer, group)?;
                let watch = self.groups.watch(group, from)?;
                if let Some(client) = self.clients.get_mut(&id) {
                    client.watch = Some(watch);
                }
                Ok(Some((Reply::Done, Vec::new())))
            }
        }
    }

    /// The threads that a client names, if all of them are its own: nobody joins, or leaves, in
    /// another's name.
    fn own_threads(&self, peer: &Peer, named: &[(u32, u32)]) -> Result<Vec<Thread>, Refusal> {
        if named.is_empty() || named.len() > THREADS_PER_REQUEST {
            let message = format!(
                "{} threads; a request names 1 to {THREADS_PER_REQUEST}",
                named.len()
            );
            return refusal(RefusalCode::Invalid, message);
        }
        let process = self.processes.get(&peer.pid);
        let mut threads = Vec::with_capacity(named.len());
        for &(id, generation) in named {
            let thread = ThreadId::new(id).map(|id| Thread { id, generation });
            let own = thread.filter(|t| process.is_some_and(|p| p.threads.contains(t)));
            let Some(thread) = own else {
                let message = format!("thread {id}.{generation} is not this process's");
                return refusal(RefusalCode::Permission, message);
            };
            threads.push(thread);
        }
        threads.sort_unstable();
        threads.dedup();
        Ok(threads)
    }

    pub(super) fn check_member(&self, peer: &Peer, group: GroupId) -> Result<(), Refusal> {
        let process = self.processes.get(&peer.pid);
        if process.is_some_and(|p| self.groups.is_member(group, &p.threads)) {
            return Ok(());
        }
        // The same whether there is such a group or not.
        let message = format!("this process is no member of group {group}");
        refusal(RefusalCode::Permission, message)
    }

    /// Takes the segments of groups from processes that are no members any more, if no process of
    /// this node that has them open still is one: all of them use the same devices.
    pub(super) fn expel_former_members(&mut self) {
        let (processes, groups) = (&self.processes, &self.groups);
        self.segments.expel(|lease, group| {
            let mut holders = processes.values().filter(|p| p.segments.contains(&lease));
            holders.any(|process| groups.is_member(group, &process.threads))
        });
    }

    /// Wrong credentials are worth a line in the log, a flood of them is not.
    fn count_denied(&mut self, name: &str, peer: &Peer) {
        self.denied += 1;
        if self.denied <= LOGGED_PER_TICK {
            let (pid, uid) = (peer.pid, peer.uid);
            warn!("process {pid} of user {uid} may not join group {name:?}");
        }
    }

    /// Sends readers of groups what they have not been sent; tells of nodes that failed.
    pub(super) fn pump_groups(&mut self, poller: &Poller) {
        self.groups.bury_nodes();
        self.unsent = false;
        let ids: Vec<u32> = self
            .clients
            .iter()
            .filter(|(_, client)| client.watch.is_some())
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.pump_watch(poller, id);
        }
    }

    /// Sends one reader what its socket takes, within its turn.
    pub(super) fn pump_watch(&mut self, poller: &Poller, id: u32) {
        let mut looks = LOOKS_PER_TURN;
        while let Some(client) = self.clients.get_mut(&id) {
            if !client.out.is_empty() || client.closing {
                return;
            }
            let Some(watch) = &mut client.watch else {
                return;
            };
            let group = watch.group;
            let look = looks.min(NOTICES_PER_PACKET * 4);
            let reply = match self.groups.read(watch, look, NOTICES_PER_PACKET) {
                Watched::Nothing => {
                    let process = self.processes.get(&client.peer.pid);
                    if process.is_some_and(|p| self.groups.is_member(group, &p.threads)) {
                        return;
                    }
                    client.watch = None;
                    GroupReply::Ended
                }
                Watched::Ended => {
                    client.watch = None;
                    GroupReply::Ended
                }
                Watched::Behind => {
                    looks -= look;
                    if looks == 0 {
                        self.unsent = true;
                        return;
                    }
                    continue;
                }
                Watched::Notices(notices) => GroupReply::Notices(notices),
                Watched::Overflow(next) => GroupReply::Overflow { next },
            };
            self.reply(poller, id, &Reply::Group(reply), Vec::new());
        }
    }

    /// What is due now and then.
    pub(super) fn tick_groups(&mut self) {
        if self.denied > LOGGED_PER_TICK {
            let more = self.denied - LOGGED_PER_TICK;
            warn!("{more} more requests to join a group were refused");
        }
        self.denied = 0;
    }
}
