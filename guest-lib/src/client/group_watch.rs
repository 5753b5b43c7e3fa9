//! A group's notifications as they happen.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use lupin_abi::groups::{GroupId, GroupReply, GroupRequest, MemberInfo, Notification};
use lupin_abi::socket::{Reply, Request, decode};

use super::connection::{exchange, name_of, refused_or};
use super::packet::PacketSocket;
use super::{ClientError, Pod, check_life};
use crate::wait::deadline_after;

/// What a member is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupEvent {
    /// Something happened.
    Notice(Notification),
    /// The reader fell behind and lost notifications. This is the group as it was when number
    /// `seq` was the newest; the next notification that will be told has the number after it.
    Overflow {
        /// Number of the newest notification that `members` takes into account.
        seq: u64,
        /// The members: the living, and the dead that have not come back.
        members: Vec<MemberInfo>,
    },
}

/// Notifications of a group, in the order of their numbers, none left out and none told twice.
///
/// As an iterator it blocks for the next one, and ends when the membership does. A broken
/// connection is restored: a restart of the agent loses nothing.
#[derive(Debug)]
pub struct Notifications {
    pod: Pod,
    group: GroupId,
    socket: PacketSocket,
    /// Received, not told yet.
    queue: VecDeque<Notification>,
    /// The first number not yet told.
    next: u64,
    ended: bool,
}

impl Notifications {
    pub(super) fn begin(pod: &Pod, group: GroupId, from: u64) -> Result<Self, ClientError> {
        Ok(Self {
            pod: pod.clone(),
            group,
            socket: watch(pod, group, from)?,
            queue: VecDeque::new(),
            next: from,
            ended: false,
        })
    }

    /// Waits at most `timeout` for what comes next; `None` if nothing does by then, or the
    /// membership is over ([`has_ended`](Self::has_ended)).
    ///
    /// # Errors
    /// If the agent stays away, refuses, or answers nonsense.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<GroupEvent>, ClientError> {
        let deadline = deadline_after(timeout);
        loop {
            while let Some(notice) = self.queue.pop_front() {
                if notice.seq > self.next {
                    // The agent numbers without gaps; whatever happened, nothing is passed over.
                    self.queue.push_front(notice);
                    return self.overflow().map(Some);
                }
                if notice.seq == self.next {
                    self.next += 1;
                    return Ok(Some(GroupEvent::Notice(notice)));
                }
            }
            if self.ended {
                return Ok(None);
            }
            match self.receive(deadline) {
                Ok(Some(GroupReply::Notices(notices))) => self.queue.extend(notices),
                Ok(Some(GroupReply::Overflow { .. })) => return self.overflow().map(Some),
                Ok(Some(GroupReply::Ended)) => self.ended = true,
                Ok(other) => {
                    let reply = other.map(Reply::Group).unwrap_or(Reply::Done);
                    return Err(refused_or("the watch of a group", reply));
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
                Err(_) => {
                    self.queue.clear();
                    self.socket = watch(&self.pod, self.group, self.next)?;
                }
            }
        }
    }

    /// Whether the membership is over: nothing more will come.
    pub fn has_ended(&self) -> bool {
        self.ended && self.queue.is_empty()
    }

    fn receive(&self, deadline: Instant) -> io::Result<Option<GroupReply>> {
        let (packet, _) = self.socket.receive(deadline)?;
        match decode(&packet) {
            Ok(Reply::Group(reply)) => Ok(Some(reply)),
            Ok(_) | Err(_) => Ok(None),
        }
    }

    fn overflow(&mut self) -> Result<GroupEvent, ClientError> {
        let (seq, members) = self.pod.members_of(self.group)?;
        // Notifications that the list takes into account are passed over when they come.
        self.next = self.next.max(seq + 1);
        Ok(GroupEvent::Overflow { seq, members })
    }
}

impl Iterator for Notifications {
    type Item = Result<GroupEvent, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_within(Duration::from_secs(3600)) {
                Ok(None) if self.has_ended() => return None,
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// To poll on, once [`Notifications::next_within`] with a timeout of zero has given `None`: readable
/// when it is worth to call it again.
impl AsFd for Notifications {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd().as_fd()
    }
}

fn watch(pod: &Pod, group: GroupId, from: u64) -> Result<PacketSocket, ClientError> {
    let address = &pod.inner.address;
    let (socket, welcome) = address.connect()?;
    check_life(pod.inner.me, &welcome)?;
    let request = Request::Group(GroupRequest::Watch { group, from });
    let patience = address.patience.request;
    match exchange(&socket, &request, deadline_after(patience), patience)? {
        (Reply::Done, _) => Ok(socket),
        (other, _) => Err(refused_or(name_of(&request), other)),
    }
}
