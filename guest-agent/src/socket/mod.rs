//! The application socket: processes of this node become part of the pod here.
//!
//! ```text
//!   connect -> Hello -> Welcome + 2 descriptors -> RegisterThread, CreateSegment, ... -> close
//!                                                  Subscribe -> Event, Event, ...
//!                                                  Group -> members, notifications
//! ```
//!
//! What a client sends is decided upon by what the kernel says of it (`SO_PEERCRED`, and
//! `SO_PASSCRED` for each packet), never by what it says of itself. A client that breaks the
//! protocol is told so and cut off; nothing that it sends ends the agent or blocks it. Threads
//! and segments belong to the *process*, which is watched through a pidfd: closing a connection
//! ends nothing, the death of the process ends everything.

mod deaths;
mod exit;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod groups;
mod limits;
mod packet;
mod process;
mod requests;
mod wakes;

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info, warn};
use lupin::client::peers::Peers;
use lupin_abi::fabric::RingRead;
use lupin_abi::groups::GroupId;
use lupin_abi::instances::Holder;
use lupin_abi::socket::{MAX_PACKET, RefusalCode, Reply, encode};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen,
    setsockopt, socket, sockopt,
};

use crate::groups::{Expelled, Groups, Watch};
use crate::peer::Peer;
use crate::poll::{Poller, READABLE, Source};
use crate::proc_events::ProcEvents;
use crate::segments::Segments;
use crate::task;
use crate::threads::{Thread, Threads};
use crate::wakes::Wakes;
use deaths::Unburied;
use limits::{Limits, Paced};
use packet::Received;
use process::{Process, Processes};

/// Packets of one client that are taken before the others get their turn.
const PACKETS_PER_TURN: usize = 16;
/// Connections that are accepted before others get their turn.
const ACCEPTS_PER_TURN: usize = 32;
/// Events that one subscriber is sent before the others get their turn.
const EVENTS_PER_TURN: usize = 256;

/// Clients cut off between two ticks that the log tells of one by one.
const LOGGED_PER_TICK: usize = 4;
/// Ticks between two looks at segments that outlived the processes that opened them: each look
/// reads the maps of all processes.
const RECHECK_TICKS: u64 = 8;

/// One connection.
#[derive(Debug)]
struct Client {
    fd: OwnedFd,
    peer: Peer,
    /// Hello was exchanged.
    greeted: bool,
    /// Replies that wait for room in the socket.
    out: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Next event to send, once subscribed.
    events: Option<u64>,
    /// What it has been sent of a group's notifications, once it watches one.
    watch: Option<Watch>,
    /// Is told of deaths.
    watches_deaths: bool,
    /// A segment is being scrubbed for it: no further request is read.
    waiting: bool,
    /// Cut off once `out` is empty.
    closing: bool,
    /// What the poller watches.
    interest: EpollFlags,
}

/// The server of the application socket.
pub struct Server {
    path: PathBuf,
    listener: OwnedFd,
    clients: HashMap<u32, Client>,
    next_client: u32,
    processes: Processes,
    limits: Limits,
    wakes: Wakes,
    /// The short way to other nodes, where there is one.
    peers: Option<Peers>,
    /// Head of the event ring when watchers of deaths were last told of node failures.
    ring_head: u64,
    threads: Threads,
    segments: Segments,
    groups: Groups,
    /// Members of this node that were expelled, and whose processes have the group's memory yet.
    expelled: Vec<Expelled>,
    /// Those of them from whom it could not be taken yet.
    postponed: Vec<Expelled>,
    /// Processes that have left a group, or all, and could not be relieved of the memory yet.
    former: Vec<(u32, Option<GroupId>)>,
    /// Readers of groups have not been sent all yet.
    unsent: bool,
    /// News of groups from other nodes, looked at so often that it does not take all the time.
    news: Paced,
    buffer: Box<[u8; MAX_PACKET]>,
    /// Off while the agent has no descriptors left to accept with.
    accepting: bool,
    /// Clients cut off since the last tick: more than a few are only counted.
    cut_off: usize,
    /// Requests to join a group refused since the last tick, as well.
    denied: usize,
    ticks: u64,
    /// Dead threads that could not be ended, or whose groups could not be told.
    unburied: Unburied,
    /// Threads of an earlier agent of whom nothing is known yet.
    orphans: Vec<(Thread, Holder)>,
    /// Where the kernel has no descriptors of threads.
    proc_events: Option<ProcEvents>,
}

impl Server {
    /// Listens on `path`, which a dead agent may have left behind, and takes over the threads
    /// that an earlier agent of this life registered.
    ///
    /// # Errors
    /// If the socket cannot be made, or another agent serves it.
    pub fn new(
        path: &Path,
        poller: &Poller,
        threads: Threads,
        segments: Segments,
        restarted: bool,
    ) -> io::Result<Self> {
        let listener = listen_on(path)?;
        poller.add(&listener, Source::ClientListener, EpollFlags::EPOLLIN)?;
        let memory = Arc::clone(segments.directory().memory());
        let capacity = memory.header().node_capacity();
        let peers = Peers::find(path, Some(memory.identity().node), capacity);
        let groups = Groups::new(memory, segments.can_revoke());
        let mut server = Self {
            path: path.into(),
            listener,
            clients: HashMap::new(),
            next_client: 0,
            processes: Processes::new(),
            limits: Limits::default(),
            wakes: Wakes::default(),
            peers,
            ring_head: 0,
            threads,
            segments,
            groups,
            expelled: Vec::new(),
            postponed: Vec::new(),
            former: Vec::new(),
            unsent: false,
            news: Paced::default(),
            buffer: Box::new([0; MAX_PACKET]),
            accepting: true,
            cut_off: 0,
            denied: 0,
            ticks: 0,
            unburied: Unburied::new(),
            orphans: Vec::new(),
            proc_events: proc_events(poller),
        };
        if restarted {
            server.orphans = server.threads.own();
            server.adopt_threads(poller);
        }
        // After the threads: members among them whose process is gone are dead by now.
        server.groups.begin().map_err(io::Error::other)?;
        server.expelled = server.groups.left_expelled();
        Ok(server)
    }

    /// The segments of this node.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Accepts waiting connections.
    pub fn on_listener(&mut self, poller: &Poller) {
        for _ in 0..ACCEPTS_PER_TURN {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(self.listener.as_raw_fd(), flags) {
                // SAFETY: the kernel has just made this descriptor for this process.
                Ok(fd) => self.accept(poller, unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(error) => {
                    // Out of descriptors, most likely. The socket would be reported again and
                    // again; it is looked at by the tick instead.
                    warn!("accept on {}: {error}", self.path.display());
                    poller.remove(&self.listener);
                    self.accepting = false;
                    return;
                }
            }
        }
    }

    fn accept(&mut self, poller: &Poller, fd: OwnedFd) {
        let peer = match Peer::of(fd.as_fd()) {
            Ok(peer) => peer,
            Err(error) => {
                warn!("a client whose process is not known ({error}) is cut off");
                return;
            }
        };
        let refuse = |code, message: &str| {
            let message = message.into();
            if let Ok(packet) = encode(&Reply::Refused { code, message }) {
                let _ = packet::send(fd.as_fd(), &packet, &[]);
            }
        };
        let now = Instant::now();
        if !self.limits.connect(peer.uid, now) {
            debug!("user {} has too many connections", peer.uid);
            refuse(RefusalCode::Limit, "too many connections of this user");
            return;
        }
        // Credentials with every packet: a connection that was inherited over a fork is noticed.
        let prepared = setsockopt(&fd, sockopt::PassCred, &true)
            .and_then(|()| self.process_of(poller, &fd, &peer));
        if let Err(error) = prepared {
            self.limits.disconnect(peer.uid);
            if error != Errno::ESRCH {
                warn!("client of process {}: {error}", peer.pid);
            }
            return;
        }
        let id = loop {
            self.next_client = self.next_client.wrapping_add(1);
            if !self.clients.contains_key(&self.next_client) {
                break self.next_client;
            }
        };
        if let Err(error) = poller.add(&fd, Source::Client(id), READABLE) {
            warn!("client of process {}: {error}", peer.pid);
            self.forget_connection(&peer);
            return;
        }
        debug!(
            "client {id}: process {} of user {} connected",
            peer.pid, peer.uid
        );
        self.clients.insert(
            id,
            Client {
                fd,
                peer,
                greeted: false,
                out: VecDeque::new(),
                events: None,
                watch: None,
                watches_deaths: false,
                waiting: false,
                closing: false,
                interest: READABLE,
            },
        );
    }

    /// Counts a connection for its process, which is watched from its first connection on.
    fn process_of(&mut self, poller: &Poller, fd: &OwnedFd, peer: &Peer) -> Result<(), Errno> {
        let pidfd = process::pidfd_of_peer(fd.as_fd(), peer.pid)?;
        // The pid may have been given to another process whose predecessor is not yet mourned.
        if self
            .processes
            .get(&peer.pid)
            .is_some_and(Process::has_ended)
        {
            self.on_process(peer.pid);
        }
        if !self.processes.contains_key(&peer.pid) {
            self.watch(poller, peer.pid, Process::new(pidfd))?;
        }
        if let Some(process) = self.processes.get_mut(&peer.pid) {
            process.connections += 1;
        }
        Ok(())
    }

    /// Something happened on a connection.
    pub fn on_client(&mut self, poller: &Poller, id: u32, flags: EpollFlags) {
        self.flush(poller, id);
        for _ in 0..PACKETS_PER_TURN {
            let Some(client) = self.clients.get(&id) else {
                return;
            };
            if client.closing || client.waiting || !client.out.is_empty() {
                break;
            }
            match packet::receive(client.fd.as_fd(), &mut self.buffer) {
                Ok(Received::Packet(len, sender)) => self.on_packet(poller, id, len, sender),
                Ok(Received::Oversize) => {
                    let message = format!("a packet is longer than {MAX_PACKET} bytes");
                    self.cut_off(poller, id, message);
                }
                Ok(Received::End) => return self.close(id),
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(error) => {
                    debug!("client {id}: {error}");
                    return self.close(id);
                }
            }
        }
        // Hung up with nothing readable left, or while no request may be read.
        if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            let readable = self
                .clients
                .get(&id)
                .is_some_and(|c| !c.closing && !c.waiting && c.out.is_empty());
            if !readable {
                return self.close(id);
            }
        }
        // Room may have come for events that waited for it.
        self.pump_client(poller, id);
        self.pump_watch(poller, id);
    }

    /// Queues a reply and sends what the socket takes.
    fn reply(&mut self, poller: &Poller, id: u32, reply: &Reply, fds: Vec<OwnedFd>) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        match encode(reply) {
            Ok(packet) => client.out.push_back((packet, fds)),
            Err(error) => {
                warn!("client {id}: a reply does not fit into a packet: {error}");
                client.closing = true;
            }
        }
        self.flush(poller, id);
    }

    fn refuse(
        &mut self,
        poller: &Poller,
        id: u32,
        code: RefusalCode,
        message: impl std::fmt::Display,
    ) {
        let message = message.to_string();
        debug!("client {id}: refused ({code:?}): {message}");
        self.reply(poller, id, &Reply::Refused { code, message }, Vec::new());
    }

    /// Tells a client that broke the protocol so, and ends the connection.
    fn cut_off(&mut self, poller: &Poller, id: u32, message: String) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.closing = true;
        self.cut_off += 1;
        if self.cut_off <= LOGGED_PER_TICK {
            warn!(
                "client {id}: process {} of user {} is cut off: {message}",
                client.peer.pid, client.peer.uid
            );
        }
        self.refuse(poller, id, RefusalCode::Protocol, message);
    }

    fn flush(&mut self, poller: &Poller, id: u32) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let mut ended = false;
        while let Some((packet, fds)) = client.out.front() {
            match packet::send(client.fd.as_fd(), packet, fds) {
                Ok(()) => {
                    client.out.pop_front();
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    debug!("client {id}: {error}");
                    ended = true;
                    break;
                }
            }
        }
        if ended || (client.closing && client.out.is_empty()) {
            return self.close(id);
        }
        let mut interest = EpollFlags::empty();
        if !client.out.is_empty() {
            interest |= EpollFlags::EPOLLOUT;
        } else if !client.waiting {
            interest |= READABLE;
        }
        if interest != client.interest {
            client.interest = interest;
            if let Err(error) = poller.modify(&client.fd, Source::Client(id), interest) {
                warn!("client {id}: {error}");
                self.close(id);
            }
        }
    }

    fn close(&mut self, id: u32) {
        if let Some(client) = self.clients.remove(&id) {
            debug!("client {id}: closed");
            self.forget_connection(&client.peer);
            // A program that was replaced leaves its connections behind.
            self.inspect(client.peer.pid);
        }
    }

    fn forget_connection(&mut self, peer: &Peer) {
        self.limits.disconnect(peer.uid);
        if let Some(process) = self.processes.get_mut(&peer.pid) {
            process.connections = process.connections.saturating_sub(1);
            if process.is_idle() {
                self.processes.remove(&peer.pid);
            }
        }
    }

    /// Sends subscribers what happened since; the ring is the truth, whoever rang.
    pub fn pump_events(&mut self, poller: &Poller) {
        self.look_for_failures(poller);
        // The manager rings when a node is to drain.
        self.groups.report_drain();
        let ids: Vec<u32> = self
            .clients
            .iter()
            .filter(|(_, c)| c.events.is_some())
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.pump_client(poller, id);
        }
        self.pump_groups(poller);
        // Of a death, the agent hears here first.
        self.segments.tidy();
    }

    fn pump_client(&mut self, poller: &Poller, id: u32) {
        for _ in 0..EVENTS_PER_TURN {
            let Some(client) = self.clients.get_mut(&id) else {
                return;
            };
            let Some(next) = client.events.filter(|_| client.out.is_empty()) else {
                return;
            };
            let fabric = self.segments.directory().memory().fabric();
            let reply = match fabric.read(next) {
                RingRead::NotYet => return,
                RingRead::Event(event) => {
                    client.events = Some(next + 1);
                    Reply::Event(event)
                }
                RingRead::Lost { oldest } => {
                    // Onwards in any case, also past an event of a kind that is not known.
                    let oldest = oldest.max(next + 1);
                    client.events = Some(oldest);
                    Reply::EventsLost { next: oldest }
                }
            };
            self.reply(poller, id, &reply, Vec::new());
        }
    }

    /// Whether anybody waits for events.
    pub fn has_subscribers(&self) -> bool {
        self.clients.values().any(|c| c.events.is_some())
    }

    /// Whether [`work`](Self::work) has something to do.
    pub fn has_work(&self) -> bool {
        self.segments.has_work()
            || self.unsent
            || self.groups.has_changed()
            || self.wakes.has_deaths()
    }

    /// When [`work`](Self::work) has something to do that is not due yet.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.news.deadline()
    }

    /// Goes on with long work for a moment.
    pub fn work(&mut self, poller: &Poller) {
        if let Some(scrubbed) = self.segments.work() {
            self.on_scrubbed(poller, scrubbed);
        }
        self.note_changes();
        if self.unsent {
            self.pump_groups(poller);
        }
        if self.news.is_due(Instant::now()) {
            self.on_group_news(poller);
        }
    }

    /// What is due now and then.
    pub fn tick(&mut self, poller: &Poller) {
        self.ticks += 1;
        self.limits.tidy(Instant::now());
        if self.ticks.is_multiple_of(RECHECK_TICKS) {
            self.take_postponed();
            self.segments.recheck();
            self.segments.directory().collect();
        }
        if self.cut_off > LOGGED_PER_TICK {
            warn!(
                "{} more clients were cut off",
                self.cut_off - LOGGED_PER_TICK
            );
        }
        self.cut_off = 0;
        self.tick_deaths(poller);
        self.tick_groups();
        if !self.accepting {
            self.accepting = poller
                .add(&self.listener, Source::ClientListener, EpollFlags::EPOLLIN)
                .is_ok();
        }
        self.on_listener(poller);
        // Subscribers whose socket had no room, or who had more to get than one turn gives.
        self.pump_events(poller);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The process connector, where it is needed and to be had.
fn proc_events(poller: &Poller) -> Option<ProcEvents> {
    if task::has_thread_pidfds() {
        return None;
    }
    ProcEvents::new(poller)
        .inspect_err(|error| info!("process connector: {error}: threads are looked at by the tick"))
        .ok()
}

fn listen_on(path: &Path) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let address = UnixAddr::new(path)?;
    let new_socket = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
    };
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        // Left behind by a dead agent, or served by a living one?
        match connect(new_socket()?.as_raw_fd(), &address) {
            Err(Errno::ECONNREFUSED) => fs::remove_file(path)?,
            _ => {
                let message = format!("{} is served by another program", path.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
        }
    }
    let fd = new_socket()?;
    bind(fd.as_raw_fd(), &address)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

#[cfg(test)]
#[path = "expulsion_test.rs"]
mod expulsion_test;
#[cfg(test)]
#[path = "fuzz_test.rs"]
mod fuzz_test;
#[cfg(test)]
#[path = "groups_test.rs"]
mod groups_test;
#[cfg(test)]
mod harness;
#[cfg(test)]
#[path = "segments_test.rs"]
mod segments_test;
#[cfg(test)]
#[path = "socket_test.rs"]
mod socket_test;
