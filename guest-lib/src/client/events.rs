//! The fabric's events as they happen.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use lupin_abi::Event;
use lupin_abi::fabric::RingRead;
use lupin_abi::socket::{Reply, Request};

use super::connection::{exchange, name_of, refused_or};
use super::packet::PacketSocket;
use super::{ClientError, Pod, check_life};
use crate::wait::deadline_after;

/// What a subscriber is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// An event of the fabric.
    Event(Event),
    /// The subscriber fell behind and lost events: the generation table is the truth. The next
    /// event will be this one.
    Lost {
        /// Sequence number.
        next: u64,
    },
}

/// A subscription. As an iterator it blocks for the next event and never ends; a broken
/// connection is restored, and no event is told twice or left out.
#[derive(Debug)]
pub struct Events {
    pod: Pod,
    socket: PacketSocket,
    /// The first sequence number not yet told.
    next: u64,
}

impl Pod {
    /// Subscribes to events from sequence number `from` on; 0 means from now on.
    ///
    /// # Errors
    /// Connection errors.
    pub fn subscribe(&self, from: u64) -> Result<Events, ClientError> {
        // "From now on" is fixed here, so that it survives a restart of the agent.
        let next = match from {
            0 => self.fabric().state().ring_head() + 1,
            from => from,
        };
        let socket = subscribe(self, next)?;
        Ok(Events {
            pod: self.clone(),
            socket,
            next,
        })
    }
}

impl Events {
    /// Waits at most `timeout` for the next event; `None` if there is none by then.
    ///
    /// # Errors
    /// If the agent stays away, or answers nonsense.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<Happening>, ClientError> {
        let deadline = deadline_after(timeout);
        loop {
            // The ring is the truth; a packet only says that it is worth a look.
            match self.pod.fabric().read(self.next) {
                RingRead::Event(event) => {
                    self.next += 1;
                    // Its packet, if it is here already, so that packets do not pile up.
                    let _ = self.socket.try_receive();
                    return Ok(Some(Happening::Event(event)));
                }
                RingRead::Lost { oldest } => {
                    // Forward in any case, whatever a damaged ring says.
                    self.next = oldest.max(self.next + 1);
                    return Ok(Some(Happening::Lost { next: self.next }));
                }
                RingRead::NotYet => {}
            }
            match self.socket.receive(deadline) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::TimedOut => return Ok(None),
                Err(_) => self.socket = subscribe(&self.pod, self.next)?,
            }
        }
    }
}

impl Iterator for Events {
    type Item = Result<Happening, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_within(Duration::from_secs(3600)) {
                Ok(None) => {}
                Ok(Some(happening)) => return Some(Ok(happening)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// To poll on: readable when it is worth to call [`Events::next_within`], perhaps with a timeout
/// of zero.
impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd().as_fd()
    }
}

fn subscribe(pod: &Pod, from: u64) -> Result<PacketSocket, ClientError> {
    let address = &pod.inner.address;
    let (socket, welcome) = address.connect()?;
    check_life(pod.inner.me, &welcome)?;
    let request = Request::Subscribe { from };
    let patience = address.patience.request;
    match exchange(&socket, &request, deadline_after(patience), patience)? {
        (Reply::Done, _) => Ok(socket),
        (other, _) => Err(refused_or(name_of(&request), other)),
    }
}
