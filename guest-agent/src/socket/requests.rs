//! What each request does.

use std::os::fd::OwnedFd;
use std::time::Instant;

use log::info;
use lupin_abi::layout::SectionKind;
use lupin_abi::socket::{Lifetime, RefusalCode, Reply, Request, SegmentInfo, SegmentName, decode};
use lupin_abi::system::Segment;
use lupin_abi::{ABI_VERSION, Generation, ThreadId};

use super::Server;
use super::limits::THREADS_PER_PROCESS;
use crate::directory::{DirectoryError, NewSegment};
use crate::memory::{MemoryError, Owner, SectionFd};
use crate::peer::Peer;
use crate::poll::Poller;
use crate::segments::{LeaseId, Scrubbed, SegmentError};
use crate::task;
use crate::threads::Thread;

/// Segments listed in one reply: as many as surely fit into a packet.
const LISTED: usize = 512;

/// A request that was not carried out.
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) message: String,
}

impl From<DirectoryError> for Refusal {
    fn from(error: DirectoryError) -> Self {
        Self {
            code: error.code(),
            message: error.to_string(),
        }
    }
}

impl From<MemoryError> for Refusal {
    fn from(error: MemoryError) -> Self {
        Self {
            code: RefusalCode::Failed,
            message: error.to_string(),
        }
    }
}

impl From<SegmentError> for Refusal {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::Directory(error) => error.into(),
            SegmentError::Memory(error) => error.into(),
        }
    }
}

pub(super) fn refusal<T>(code: RefusalCode, message: impl Into<String>) -> Result<T, Refusal> {
    let message = message.into();
    Err(Refusal { code, message })
}

/// A reply now, with descriptors, or (`None`) later.
pub(super) type Answer = Result<Option<(Reply, Vec<OwnedFd>)>, Refusal>;

impl Server {
    /// Handles the packet of `len` bytes in the buffer.
    pub(super) fn on_packet(&mut self, poller: &Poller, id: u32, len: usize, sender: u32) {
        if self.take_wake(id, len, sender) {
            return;
        }
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let peer = client.peer.clone();
        if !self.limits.request(peer.uid, Instant::now()) {
            let message = "too many requests of this user; slow down";
            return self.refuse(poller, id, RefusalCode::Limit, message);
        }
        let request = match decode::<Request>(&self.buffer[..len]) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("a packet of {len} bytes is not a request: {error}");
                return self.cut_off(poller, id, message);
            }
        };
        if sender != 0 && sender != peer.pid {
            let message = format!(
                "process {sender} inherited this connection from process {}: connect anew",
                peer.pid
            );
            return self.refuse(poller, id, RefusalCode::Protocol, message);
        }
        match (&request, client.greeted) {
            (Request::Hello { version }, false) if *version != ABI_VERSION => {
                client.closing = true;
                let message = format!("client speaks version {version}, agent {ABI_VERSION}");
                return self.refuse(poller, id, RefusalCode::Version, message);
            }
            (Request::Hello { .. }, false) => client.greeted = true,
            (Request::Hello { .. }, true) => {
                return self.cut_off(poller, id, "a second Hello".into());
            }
            (_, false) => return self.cut_off(poller, id, "a request before Hello".into()),
            (_, true) => {}
        }
        match self.carry_out(poller, id, &peer, request) {
            Ok(Some((reply, fds))) => self.reply(poller, id, &reply, fds),
            Ok(None) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.waiting = true;
                }
                self.flush(poller, id);
            }
            Err(Refusal { code, message }) => self.refuse(poller, id, code, message),
        }
        self.pump_client(poller, id);
        self.pump_watch(poller, id);
    }

    fn carry_out(&mut self, poller: &Poller, id: u32, peer: &Peer, request: Request) -> Answer {
        match request {
            Request::Hello { .. } => self.welcome(),
            Request::RegisterThread { id, tid } => self.register(poller, peer, id, tid),
            Request::ReleaseThread { id, generation } => self.release(peer, id, generation),
            Request::CreateSegment {
                segment,
                size,
                mode,
                lifetime,
            } => {
                let new = (&segment, size, mode, lifetime);
                self.create_segment(id, peer, new)
            }
            Request::OpenSegment { segment, read_only } => {
                self.check_segment(peer, &segment)?;
                let want = if read_only { 4 } else { 6 };
                let may = |segment: &Segment| may(peer, want, segment);
                let (lease, fds) = self.segments.open(&segment, read_only, may)?;
                self.hold(peer.pid, lease);
                Ok(Some(self.segment_reply(lease, fds, false)))
            }
            Request::ReopenSegment {
                entry,
                uses,
                read_only,
            } => {
                let want = if read_only { 4 } else { 6 };
                let (groups, process) = (&self.groups, self.processes.get(&peer.pid));
                let may = |segment: &Segment| match segment.group {
                    Some(group) => process.is_some_and(|p| groups.is_member(group, &p.threads)),
                    None => may(peer, want, segment),
                };
                let number = (entry, uses);
                let (lease, fds) = self.segments.reopen(number, read_only, may)?;
                self.hold(peer.pid, lease);
                Ok(Some(self.segment_reply(lease, fds, false)))
            }
            Request::GrowSegment { segment, size } => {
                self.check_segment(peer, &segment)?;
                let may = |segment: &Segment| may(peer, 6, segment);
                let Some((lease, fds)) = self.segments.grow(&segment, size, id, may)? else {
                    return Ok(None);
                };
                self.hold(peer.pid, lease);
                Ok(Some(self.segment_reply(lease, fds, false)))
            }
            Request::RenameSegment { segment, to } => {
                self.check_segment(peer, &segment)?;
                let may = |segment: &Segment| owns(peer, segment);
                self.segments.rename(&segment, &to, may)?;
                Ok(Some((Reply::Done, Vec::new())))
            }
            Request::RemoveSegment { segment, revoke } => {
                self.check_segment(peer, &segment)?;
                let process = self.processes.get(&peer.pid);
                let own = process.map(|p| p.segments.clone()).unwrap_or_default();
                let may = |segment: &Segment| owns(peer, segment);
                self.segments.remove(&segment, revoke, &own, may)?;
                info!("segment {:?}: removed by user {}", segment.name, peer.uid);
                Ok(Some((Reply::Done, Vec::new())))
            }
            Request::ListSegments => {
                let list = self.segments.directory().list();
                let readable = list
                    .into_iter()
                    .filter(|segment| match segment.group {
                        Some(group) => self.check_member(peer, group).is_ok(),
                        None => may(peer, 4, segment),
                    })
                    .take(LISTED)
                    .map(|s| SegmentInfo {
                        size: s.size(),
                        name: s.name,
                        uid: s.uid,
                        gid: s.gid,
                        mode: s.mode,
                        group: s.group,
                    });
                Ok(Some((Reply::Segments(readable.collect()), Vec::new())))
            }
            Request::Subscribe { from } => {
                let head = self
                    .segments
                    .directory()
                    .memory()
                    .fabric()
                    .state()
                    .ring_head();
                if from > head.saturating_add(1) {
                    let message = format!("event {from} is not yet due: the newest is {head}");
                    return refusal(RefusalCode::Invalid, message);
                }
                let next = if from == 0 {
                    head.saturating_add(1)
                } else {
                    from
                };
                if let Some(client) = self.clients.get_mut(&id) {
                    client.events = Some(next);
                }
                Ok(Some((Reply::Done, Vec::new())))
            }
            Request::Group(request) => self.group_request(id, peer, request),
            Request::WatchDeaths => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.watches_deaths = true;
                }
                Ok(Some((Reply::Done, Vec::new())))
            }
            // Those that `take_wake` takes are all that fit its bound.
            Request::Wake { .. } => refusal(RefusalCode::Protocol, "a wake-up before Hello"),
        }
    }

    /// Segments of a group are for its members, whatever they are to be used for; whether there
    /// is such a segment, or such a group, nobody else is told.
    fn check_segment(&self, peer: &Peer, segment: &SegmentName) -> Result<(), Refusal> {
        match segment.group {
            Some(group) => self.check_member(peer, group),
            None => Ok(()),
        }
    }

    fn create_segment(
        &mut self,
        id: u32,
        peer: &Peer,
        (name, size, mode, lifetime): (&SegmentName, u64, u32, Lifetime),
    ) -> Answer {
        if mode & !0o777 != 0 {
            let message = format!("mode {mode:#o} has bits beyond 0777");
            return refusal(RefusalCode::Invalid, message);
        }
        self.check_segment(peer, name)?;
        let owner = Owner {
            uid: peer.uid,
            gid: peer.gid,
            mode,
        };
        let new = NewSegment {
            name,
            size,
            owner,
            lifetime,
        };
        self.segments.create(&new, id)?;
        info!(
            "segment {:?}: {size} bytes for user {}",
            name.name, peer.uid
        );
        Ok(None)
    }

    fn welcome(&mut self) -> Answer {
        let backend = self.segments.backend();
        let fabric = backend.section(SectionKind::Fabric, true)?;
        let instances = backend.section(SectionKind::Instances, true)?;
        let identity = self.segments.directory().memory().identity();
        let reply = Reply::Welcome {
            version: ABI_VERSION,
            node: identity.node.get(),
            generation: identity.generation,
            fabric: fabric.window,
            instances: instances.window,
        };
        Ok(Some((reply, vec![fabric.fd, instances.fd])))
    }

    fn register(
        &mut self,
        poller: &Poller,
        peer: &Peer,
        wanted: Option<u32>,
        tid: Option<u32>,
    ) -> Answer {
        if let Some(id) = wanted {
            self.settle(id);
        }
        let Some(process) = self.processes.get_mut(&peer.pid) else {
            return refusal(RefusalCode::Failed, "this process is not watched");
        };
        if process.threads.len() >= THREADS_PER_PROCESS {
            let message = format!("this process has {THREADS_PER_PROCESS} threads already");
            return refusal(RefusalCode::Limit, message);
        }
        let holder = match tid {
            None => task::process(peer.pid),
            Some(tid) => match task::thread(peer.pid, tid) {
                Some(holder) => holder,
                None => {
                    let message = format!("{tid} is no living thread of this process");
                    return refusal(RefusalCode::Invalid, message);
                }
            },
        };
        let thread = self.threads.register(wanted, holder)?;
        process.hold(poller, thread, holder);
        let reply = Reply::Thread {
            id: thread.id.get(),
            generation: thread.generation,
        };
        Ok(Some((reply, Vec::new())))
    }

    fn release(&mut self, peer: &Peer, id: u32, generation: Generation) -> Answer {
        let Some(thread) = ThreadId::new(id).map(|id| Thread { id, generation }) else {
            return refusal(RefusalCode::Invalid, format!("{id} is not a thread id"));
        };
        let process = self.processes.get_mut(&peer.pid);
        let Some(process) = process.filter(|p| p.threads.contains(&thread)) else {
            let entry = self
                .segments
                .directory()
                .memory()
                .instances()
                .thread(thread.id);
            return if entry.generation() == generation && !entry.node().is_none() {
                let message = format!("thread {id}.{generation} is not this process's");
                refusal(RefusalCode::IdTaken, message)
            } else {
                let message = format!("there is no thread {id}.{generation}");
                refusal(RefusalCode::NotFound, message)
            };
        };
        // First: a member does not leave by dying.
        self.groups.leave(None, &[thread])?;
        self.threads.end([thread])?;
        process.forget(&thread);
        self.take_from_former(peer.pid, None);
        self.wakes.threads_died();
        Ok(Some((Reply::Done, Vec::new())))
    }

    fn hold(&mut self, pid: u32, lease: LeaseId) {
        if let Some(process) = self.processes.get_mut(&pid)
            && process.segments.insert(lease)
        {
            self.segments.hold(lease);
        }
    }

    /// A segment is ready; its client may be gone.
    pub(super) fn on_scrubbed(&mut self, poller: &Poller, scrubbed: Scrubbed) {
        let Scrubbed {
            client: id,
            created,
            result,
        } = scrubbed;
        let pid = self.clients.get_mut(&id).map(|client| {
            client.waiting = false;
            client.peer.pid
        });
        match (pid, result) {
            (Some(pid), Ok((lease, fds))) => {
                self.hold(pid, lease);
                let (reply, fds) = self.segment_reply(lease, fds, created);
                self.reply(poller, id, &reply, fds);
            }
            (Some(_), Err(error)) => {
                let Refusal { code, message } = error.into();
                self.refuse(poller, id, code, message);
            }
            // Nobody holds the lease: the next recheck lets the segment go. It stays in the pod,
            // as a file does whose creator died.
            (None, _) => {}
        }
        self.pump_client(poller, id);
    }

    fn segment_reply(
        &self,
        lease: LeaseId,
        parts: Vec<SectionFd>,
        created: bool,
    ) -> (Reply, Vec<OwnedFd>) {
        let parts = parts.into_iter().map(|part| (part.window, part.fd));
        let (mappings, fds) = parts.unzip();
        let (entry, uses) = self.segments.number_of(lease);
        // Others of the node can be expelled from a group, and it uses the same devices as they.
        let is_shared = self.segments.group_of(lease).is_some();
        let reply = Reply::Segment {
            mappings,
            created,
            entry,
            uses,
            revocable: is_shared && self.segments.can_revoke(),
        };
        (reply, fds)
    }
}

/// Whether a peer may read (4) or write as well (6) a segment. Of a group's, its members may do
/// everything, and nobody else has come so far.
fn may(peer: &Peer, want: u32, segment: &Segment) -> bool {
    segment.group.is_some() || peer.may(want, segment.uid, segment.gid, segment.mode)
}

/// Whether a peer may do with the name of a segment as it likes.
fn owns(peer: &Peer, segment: &Segment) -> bool {
    segment.group.is_some() || peer.uid == 0 || peer.uid == segment.uid
}

#[cfg(test)]
#[path = "requests_test.rs"]
mod requests_test;
