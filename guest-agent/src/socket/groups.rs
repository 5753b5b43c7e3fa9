//! What processes ask about groups, and what those that watch one are sent.

use std::time::Instant;

use log::{debug, warn};
use lupin_abi::groups::{GroupId, GroupReply, GroupRequest};
use lupin_abi::socket::{RefusalCode, Reply};
use lupin_abi::{InstanceId, ThreadId};

use super::requests::{Answer, Refusal, refusal};
use super::{LOGGED_PER_TICK, Server};
use crate::groups::{GroupError, Watched};
use crate::peer::Peer;
use crate::poll::Poller;
use crate::segments::LeaseId;
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
            GroupRequest::SetAdmission { name, admission } => {
                let set = self.groups.set_admission(&name, &admission, peer);
                if let Err(GroupError::Denied { .. }) = &set {
                    self.count_denied(&name, peer, "change the rule of");
                }
                set?;
                Ok(Some((Reply::Done, Vec::new())))
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
                    self.count_denied(&name, peer, "join");
                }
                let (group, before) = joined?;
                answer(GroupReply::Joined { group, before })
            }
            GroupRequest::Leave { group, threads } => {
                let threads = self.own_threads(peer, &threads)?;
                self.groups.leave(Some(group), &threads)?;
                self.take_from_former(peer.pid, Some(group));
                Ok(Some((Reply::Done, Vec::new())))
            }
            GroupRequest::Expel {
                name,
                thread: (id, generation),
                process,
            } => {
                let thread = InstanceId::new(id, generation);
                let expelled = self.groups.expel(&name, thread, process, peer);
                if let Err(GroupError::Denied { .. }) = &expelled {
                    self.count_denied(&name, peer, "expel members of");
                }
                let (members, memory) = expelled?;
                answer(GroupReply::Expelled { members, memory })
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

    /// Takes from a process of this node the segments of a group, or of all groups, of which it is
    /// no member any more; false if that has to be tried again.
    ///
    /// All processes of a node use the same devices: those who stay lose them, too, and open them
    /// once more ([`Request::ReopenSegment`](lupin_abi::socket::Request)). Nobody is disturbed for a
    /// process that left of its own accord and has let go of the segment itself.
    fn take_segments(&mut self, pid: u32, group: Option<GroupId>, left: bool) -> bool {
        if !self.segments.can_revoke() {
            return true;
        }
        let process = self.processes.get(&pid);
        let is_over = |of: GroupId| {
            let threads = process.into_iter().flat_map(|process| &process.threads);
            group.is_none_or(|group| group == of) && !self.groups.is_member(of, threads)
        };
        // Of what was opened through an earlier agent, or by a process that is gone and may have
        // handed it on, nothing is known.
        let known = process.filter(|process| !process.is_adopted);
        let leases = self.segments.of_groups();
        let leases: Vec<LeaseId> = leases
            .filter(|(lease, of)| {
                known.is_none_or(|process| process.segments.contains(lease)) && is_over(*of)
            })
            .map(|(lease, _)| lease)
            .collect();
        let mut all = true;
        for lease in leases {
            let is_used = !left || self.segments.is_used_by(lease, pid);
            if is_used && !self.segments.take_away(lease) {
                all = false;
                continue;
            }
            let process = self.processes.get_mut(&pid);
            if process.is_some_and(|process| process.segments.remove(&lease)) {
                self.segments.release(lease);
            }
        }
        all
    }

    /// Takes the segments of a group, or of all, from a process that has left.
    pub(super) fn take_from_former(&mut self, pid: u32, group: Option<GroupId>) {
        let former = (pid, group);
        // Once, however often it joins and leaves meanwhile.
        if !self.take_segments(pid, group, true) && !self.former.contains(&former) {
            self.former.push(former);
        }
    }

    /// Takes the memory of their groups from members of this node that others have expelled.
    fn take_from_expelled(&mut self) {
        if self.expelled.is_empty() {
            return;
        }
        let expelled = std::mem::take(&mut self.expelled);
        let (mut done, mut later) = (Vec::new(), Vec::new());
        for one in expelled {
            match self.take_segments(one.pid, Some(one.group), false) {
                true => done.push(one),
                false => later.push(one),
            }
        }
        if !done.is_empty()
            && let Err(error) = self.groups.settle(&done)
        {
            debug!("groups: expelled members are settled later: {error}");
            later.append(&mut done);
        }
        self.postponed.extend(later);
    }

    /// Tries again what could not be taken before: the segment was growing, or the kernel refused.
    pub(super) fn take_postponed(&mut self) {
        for (pid, group) in std::mem::take(&mut self.former) {
            self.take_from_former(pid, group);
        }
        self.expelled.append(&mut self.postponed);
        self.take_from_expelled();
    }

    /// Wrong credentials are worth a line in the log, a flood of them is not.
    fn count_denied(&mut self, name: &str, peer: &Peer, what: &str) {
        self.denied += 1;
        if self.denied <= LOGGED_PER_TICK {
            let (pid, uid) = (peer.pid, peer.uid);
            warn!("process {pid} of user {uid} may not {what} group {name:?}");
        }
    }

    /// Another node has news of groups. A hint, at whatever rate its agent gives them: the look
    /// itself decides when the next one may be.
    pub fn on_group_news(&mut self, poller: &Poller) {
        let begin = Instant::now();
        if self.news.may(begin) {
            self.pump_groups(poller);
            self.news.took(begin, Instant::now());
        }
    }

    /// Sends readers of groups what they have not been sent; tells of nodes that failed.
    pub(super) fn pump_groups(&mut self, poller: &Poller) {
        self.groups.bury_nodes();
        let expelled = self.groups.take_expelled();
        self.expelled.extend(expelled);
        self.take_from_expelled();
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
            // Before the reading: whoever was expelled by now hears of that first.
            let process = self.processes.get(&client.peer.pid);
            let is_member = process.is_some_and(|p| self.groups.is_member(group, &p.threads));
            let reply = match self.groups.read(watch, look, NOTICES_PER_PACKET) {
                Watched::Nothing if is_member => return,
                Watched::Nothing | Watched::Ended => {
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
            warn!("{more} more requests about groups were refused");
        }
        self.denied = 0;
    }
}
