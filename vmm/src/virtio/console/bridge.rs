//! A port bridged to a UNIX stream socket.
//!
//! # Sessions
//! A session is one host connection paired with one opening of the port by the guest. Neither
//! outlives the other, so both ends start at a frame boundary and no byte of one session is ever
//! seen in another:
//!
//! ```text
//!                  host connected and guest open
//!        ┌──────┐ ──────────────────────────────> ┌──────┐
//!   ───> │ None │                                 │ Open │ bytes flow both ways
//!        └──────┘ <────────────────────────────── └──────┘
//!            ^        guest closes: what it wrote     │ host closes, or is replaced:
//!            │        is flushed, host is closed      v the guest is told
//!            │                                    ┌───────┐
//!            └─────────────────────────────────── │ Stale │ what the guest writes is dropped
//!                         guest closes            └───────┘
//! ```
//!
//! * The newest host connection wins; the one before it is closed.
//! * A session in which no byte has moved leaves nothing stale: the next host may follow at once.
//! * A connection made while the guest has the port closed, or while a session is stale, waits; its
//!   bytes stay in the socket. One that ends while it waits is forgotten with them.
//! * Bytes that the guest writes while no host is connected stay in the ring until one is, or
//!   until the guest closes.
//! * While a session is open nothing is lost: bytes for the guest stay in the socket while the
//!   guest has no buffers, and buffers of the guest stay in the ring while the socket is full
//!   (beyond 256 KiB in between). No vCPU waits for either.
//! * A host that shuts down its sending half has closed the connection.
//!
//! # What the guest's user space sees
//! With the Linux driver: `poll` reports `POLLHUP`, and `read` returns 0 once the received bytes
//! are read, while no host is connected. A program that reads 0 after it has read or written
//! anything must close the port and open it again; the next host is announced after that. To wait for a host without
//! spinning, use edge-triggered `epoll` (the change wakes it) on a non-blocking descriptor, or
//! look every few tens of milliseconds; a blocking `write` sleeps until a host is there, but cannot
//! learn that a session has become stale.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

use super::{ConsoleError, PortQueues};
use crate::virtio::{Chain, QueueError};

/// Bytes from the guest held for a host that does not read, before the guest's buffers wait.
pub(super) const HIGH_WATER: usize = 256 << 10;

/// Bytes taken over when the guest closes the port: more than a Linux driver can have in its ring.
const CLOSE_LIMIT: usize = 4 << 20;

/// Bytes moved to the guest at once.
const READ_SIZE: usize = 64 << 10;

/// Connections accepted per wake-up.
const ACCEPT_BATCH: usize = 16;

const LISTENER: u32 = 0;
const CONNECTION: u32 = 1;
const LINGERING: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Session {
    None,
    Open,
    Stale,
}

/// Host's end of the port.
pub(super) struct Bridge {
    listener: UnixListener,
    /// Event number of the listener; those of the connections follow.
    events: u32,
    queues: PortQueues,
    guest_open: bool,
    session: Session,
    /// Bytes have moved in this session.
    moved: bool,
    connection: Option<Connection>,
    /// A connection whose guest has closed, until it has taken what was written before.
    lingering: Option<Connection>,
    /// A connection ended since the guest was last told about the host's state.
    ended: bool,
    /// A chain of which only so many bytes have been taken.
    partial: Option<(Chain, u64)>,
    buffer: Vec<u8>,
}

struct Connection {
    stream: UnixStream,
    event: u32,
    watched: EventSet,
    /// Bytes for the host.
    out: Vec<u8>,
    /// The guest has no buffer for the bytes that wait in the socket.
    no_room: bool,
    /// The host does not take bytes any more; it may still have sent some.
    deaf: bool,
}

impl Connection {
    fn new(stream: UnixStream, event: u32) -> Self {
        let watched = EventSet::empty();
        Self {
            stream,
            event,
            watched,
            out: Vec::new(),
            no_room: false,
            deaf: false,
        }
    }

    /// Watches for `wanted`; for nothing at all the descriptor leaves epoll, which would report a
    /// hang-up again and again.
    fn watch(&mut self, wanted: EventSet, ops: &mut EventOps) {
        if wanted == self.watched {
            return;
        }
        let events = Events::with_data(&self.stream, self.event, wanted);
        let changed = if self.watched.is_empty() {
            ops.add(events)
        } else if wanted.is_empty() {
            ops.remove(events)
        } else {
            ops.modify(events)
        };
        match changed {
            Ok(()) => self.watched = wanted,
            Err(e) => log::error!("console: watching a connection failed: {e}"),
        }
    }

    /// Writes what the host takes without waiting.
    fn flush(&mut self) {
        let mut sent = 0;
        while sent < self.out.len() && !self.deaf {
            match self.stream.write(&self.out[sent..]) {
                Ok(len) if len > 0 => sent += len,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => self.deaf = true,
            }
        }
        if self.deaf {
            self.out.clear();
        } else {
            self.out.drain(..sent);
        }
    }
}

impl Bridge {
    /// Listens on `path`, readable and writable for the owner alone, in place of a socket that a
    /// former process left.
    pub(super) fn listen(path: PathBuf, events: u32) -> Result<Self, ConsoleError> {
        let listener = listen(&path).map_err(|source| ConsoleError::Listen { path, source })?;
        Ok(Self {
            listener,
            events,
            queues: PortQueues::default(),
            guest_open: false,
            session: Session::None,
            moved: false,
            connection: None,
            lingering: None,
            ended: false,
            partial: None,
            buffer: vec![0; READ_SIZE],
        })
    }

    pub(super) fn watch(&self, ops: &mut EventOps) {
        let events = Events::with_data(&self.listener, self.events + LISTENER, EventSet::IN);
        if let Err(e) = ops.add(events) {
            log::error!("console: nobody can connect: {e}");
        }
    }

    pub(super) fn start(&mut self, queues: PortQueues) {
        self.queues = queues;
    }

    /// The driver has gone: as if the guest had closed, but its rings are not looked at again.
    pub(super) fn stop(&mut self, ops: &mut EventOps) {
        self.queues = PortQueues::default();
        self.partial = None;
        self.guest_open = false;
        if self.session == Session::Open {
            self.linger(ops);
        }
        self.session = Session::None;
        self.settle(ops);
    }

    /// See [`Backend::take_host_state`](super::Backend::take_host_state).
    pub(super) fn take_host_state(&mut self) -> (bool, bool) {
        let open = self.connection.is_some() && self.session != Session::Stale;
        (open, std::mem::take(&mut self.ended))
    }

    /// The guest has opened or closed the port.
    pub(super) fn guest_open(&mut self, open: bool, ops: &mut EventOps) -> Result<(), QueueError> {
        if open == self.guest_open {
            return Ok(());
        }
        self.guest_open = open;
        if !open {
            // All that the guest wrote is in the ring by now.
            self.take_rest()?;
            if self.session == Session::Open {
                self.linger(ops);
            }
            self.session = Session::None;
        }
        self.pair(ops)
    }

    /// The guest has added receive buffers.
    pub(super) fn room_in_guest(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        if let Some(connection) = &mut self.connection {
            connection.no_room = false;
        }
        self.pump(ops)
    }

    /// The guest has written.
    pub(super) fn bytes_from_guest(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        self.pump(ops)
    }

    /// One of the bridge's descriptors is ready.
    pub(super) fn ready(&mut self, events: Events, ops: &mut EventOps) -> Result<(), QueueError> {
        match events.data() - self.events {
            LISTENER => self.accept(ops),
            CONNECTION if self.session == Session::Open => self.pump(ops),
            // Only the end of a waiting connection is watched for.
            CONNECTION => {
                self.end_connection(ops);
                Ok(())
            }
            _ => {
                self.settle(ops);
                Ok(())
            }
        }
    }

    fn accept(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        for _ in 0..ACCEPT_BATCH {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => {
                    crate::guest_warn!("console: accepting a connection failed: {e}");
                    break;
                }
            };
            if let Err(e) = stream.set_nonblocking(true) {
                log::warn!("console: refusing a connection: {e}");
                continue;
            }
            self.end_connection(ops);
            self.connection = Some(Connection::new(stream, self.events + CONNECTION));
        }
        self.pair(ops)
    }

    /// Starts a session if both ends are there.
    fn pair(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        if self.session == Session::None && self.guest_open && self.connection.is_some() {
            self.session = Session::Open;
            self.moved = false;
        }
        self.pump(ops)
    }

    /// The host's end is gone, or has to go.
    fn end_connection(&mut self, ops: &mut EventOps) {
        if let Some(mut connection) = self.connection.take() {
            connection.watch(EventSet::empty(), ops);
            self.ended = true;
            if self.session == Session::Open {
                self.session = match self.moved {
                    true => Session::Stale,
                    false => Session::None,
                };
            }
        }
    }

    /// Lets the connection take what is left for it, then closes it.
    fn linger(&mut self, ops: &mut EventOps) {
        if let Some(mut former) = self.lingering.take() {
            former.watch(EventSet::empty(), ops);
        }
        if let Some(mut connection) = self.connection.take() {
            connection.watch(EventSet::empty(), ops);
            connection.event = self.events + LINGERING;
            self.ended = true;
            self.lingering = Some(connection);
        }
    }

    /// Moves what can be moved, in both directions, then watches for what stopped it.
    fn pump(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let mut outcome = match self.session {
            Session::Open => self.drain_guest().and_then(|()| self.feed_guest(ops)),
            Session::None | Session::Stale => Ok(()),
        };
        // Not `else`: the session may have just ended.
        if self.session == Session::Stale && outcome.is_ok() {
            outcome = self.drop_from_guest();
        }
        self.settle(ops);
        outcome
    }

    /// Flushes, and registers for exactly the events that would let something move.
    fn settle(&mut self, ops: &mut EventOps) {
        if let Some(lingering) = &mut self.lingering {
            lingering.flush();
            if lingering.out.is_empty() {
                lingering.watch(EventSet::empty(), ops);
                self.lingering = None;
            } else {
                lingering.watch(EventSet::OUT, ops);
            }
        }
        if let Some(connection) = &mut self.connection {
            let mut wanted = EventSet::empty();
            if self.session != Session::Open {
                wanted |= EventSet::READ_HANG_UP;
            } else {
                if !connection.no_room {
                    wanted |= EventSet::IN;
                }
                if !connection.out.is_empty() {
                    wanted |= EventSet::OUT;
                }
            }
            connection.watch(wanted, ops);
        }
    }

    /// Host to guest, in an open session.
    fn feed_guest(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let (Some(queue), Some(connection)) = (&mut self.queues.to_guest, &mut self.connection)
        else {
            return Ok(());
        };
        let (mut filled, mut ended) = (false, false);
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                connection.no_room = true;
                break;
            };
            let room = chain.writable_len().min(READ_SIZE as u64) as usize;
            if room == 0 {
                return Err(QueueError::Short { head: chain.head() });
            }
            match connection.stream.read(&mut self.buffer[..room]) {
                Ok(len) if len > 0 => {
                    queue.write(&chain, &self.buffer[..len])?;
                    queue.done(&chain, len as u32)?;
                    filled = true;
                    self.moved = true;
                }
                outcome => {
                    queue.undo_pop();
                    ended = match outcome {
                        Ok(_) => true,
                        Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                        Err(e) => e.kind() != ErrorKind::WouldBlock,
                    };
                    break;
                }
            }
        }
        if filled {
            queue.interrupt();
        }
        if ended {
            self.end_connection(ops);
        }
        Ok(())
    }

    /// Guest to host, in an open session.
    fn drain_guest(&mut self) -> Result<(), QueueError> {
        let (Some(queue), Some(connection)) = (&mut self.queues.from_guest, &mut self.connection)
        else {
            return Ok(());
        };
        let mut used = 0;
        loop {
            if connection.out.len() >= HIGH_WATER {
                connection.flush();
                if connection.out.len() >= HIGH_WATER {
                    break;
                }
            }
            if used >= queue.size() {
                queue.again();
                break;
            }
            let (chain, offset) = match self.partial.take() {
                Some(partial) => partial,
                None => match queue.pop()? {
                    Some(chain) => (chain, 0),
                    None => break,
                },
            };
            let start = connection.out.len();
            let left = chain.readable_len() - offset;
            let take = left.min((HIGH_WATER - start) as u64) as usize;
            connection.out.resize(start + take, 0);
            queue.read(&chain, offset, &mut connection.out[start..])?;
            self.moved = true;
            if take as u64 == left {
                queue.done(&chain, 0)?;
                used += 1;
            } else {
                self.partial = Some((chain, offset + take as u64));
            }
        }
        connection.flush();
        if used > 0 {
            queue.interrupt();
        }
        Ok(())
    }

    /// Takes what is left in the ring of a guest that closes: for the host if a session was open.
    fn take_rest(&mut self) -> Result<(), QueueError> {
        if self.session != Session::Open {
            return self.drop_from_guest();
        }
        let (Some(queue), Some(connection)) = (&mut self.queues.from_guest, &mut self.connection)
        else {
            return Ok(());
        };
        for _ in 0..=queue.size() {
            let (chain, offset) = match self.partial.take() {
                Some(partial) => partial,
                None => match queue.pop()? {
                    Some(chain) => (chain, 0),
                    None => break,
                },
            };
            let start = connection.out.len();
            let left = chain.readable_len() - offset;
            let take = left.min(CLOSE_LIMIT.saturating_sub(start) as u64) as usize;
            if (take as u64) < left {
                crate::guest_warn!(
                    "console: dropping {} bytes of a closing guest",
                    left - take as u64
                );
            }
            connection.out.resize(start + take, 0);
            queue.read(&chain, offset, &mut connection.out[start..])?;
            queue.done(&chain, 0)?;
        }
        queue.interrupt();
        Ok(())
    }

    /// Takes what the guest wrote for nobody.
    fn drop_from_guest(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.from_guest else {
            return Ok(());
        };
        let mut used = 0;
        loop {
            let chain = match self.partial.take() {
                Some((chain, _)) => chain,
                None => match queue.pop()? {
                    Some(chain) => chain,
                    None => break,
                },
            };
            queue.done(&chain, 0)?;
            used += 1;
            if used > queue.size() {
                queue.again();
                break;
            }
        }
        if used > 0 {
            queue.interrupt();
        }
        Ok(())
    }
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path)
        && metadata.file_type().is_socket()
    {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
