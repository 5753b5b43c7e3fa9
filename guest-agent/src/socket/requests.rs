//! What each request does.

use std::os::fd::OwnedFd;
use std::time::Instant;

use log::info;
use lupin_abi::layout::SectionKind;
use lupin_abi::socket::{RefusalCode, Reply, Request, SegmentInfo, decode};
use lupin_abi::{ABI_VERSION, Generation, ThreadId};

use super::Server;
use super::limits::THREADS_PER_PROCESS;
use super::packet::Peer;
use crate::directory::DirectoryError;
use crate::memory::{MemoryError, Owner, SectionFd};
use crate::poll::Poller;
use crate::segments::{Created, LeaseId, SegmentError};
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
            Request::CreateSegment { name, size, mode } => {
                if mode & !0o777 != 0 {
                    let message = format!("mode {mode:#o} has bits beyond 0777");
                    return refusal(RefusalCode::Invalid, message);
                }
                let owner = Owner {
                    uid: peer.uid,
                    gid: peer.gid,
                    mode,
                };
                self.segments.create(&name, size, owner, id)?;
                info!("segment {name:?}: {size} bytes for user {}", peer.uid);
                Ok(None)
            }
            Request::OpenSegment { name, read_only } => {
                let want = if read_only { 4 } else { 6 };
                let (lease, fd) = self.segments.open(&name, read_only, |segment| {
                    peer.may(want, segment.uid, segment.gid, segment.mode)
                })?;
                self.hold(peer.pid, lease);
                Ok(Some(segment_reply(fd, false)))
            }
            Request::RemoveSegment { name } => {
                let process = self.processes.get(&peer.pid);
                let own = process.map(|p| p.segments.clone()).unwrap_or_default();
                self.segments.remove(&name, &own, |segment| {
                    peer.uid == 0 || peer.uid == segment.uid
                })?;
                info!("segment {name:?}: removed by user {}", peer.uid);
                Ok(Some((Reply::Done, Vec::new())))
            }
            Request::ListSegments => {
                let list = self.segments.directory().list();
                let readable = list
                    .into_iter()
                    .filter(|s| peer.may(4, s.uid, s.gid, s.mode))
                    .take(LISTED)
                    .map(|s| SegmentInfo {
                        name: s.name,
                        size: s.size,
                        uid: s.uid,
                        gid: s.gid,
                        mode: s.mode,
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
        }
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
    pub(super) fn on_created(&mut self, poller: &Poller, created: Created) {
        let Created { client: id, result } = created;
        let pid = self.clients.get_mut(&id).map(|client| {
            client.waiting = false;
            client.peer.pid
        });
        match (pid, result) {
            (Some(pid), Ok((lease, fd))) => {
                self.hold(pid, lease);
                let (reply, fds) = segment_reply(fd, true);
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
}

fn segment_reply(SectionFd { fd, window }: SectionFd, created: bool) -> (Reply, Vec<OwnedFd>) {
    let mapping = window;
    (Reply::Segment { mapping, created }, vec![fd])
}

#[cfg(test)]
#[path = "requests_test.rs"]
mod requests_test;
