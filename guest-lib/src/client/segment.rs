//! Segments: named chunks of pod memory.

use core::ops::Deref;
use core::time::Duration;
use std::os::fd::OwnedFd;
use std::time::Instant;

use lupin_abi::groups::GroupId;
use lupin_abi::socket::{Lifetime, RefusalCode, Reply, Request, SegmentInfo, SegmentName};

use super::connection::{exchange, name_of, refused_or};
use super::wake::Registered;
use super::{ClientError, Membership, Pod, check_life};
use crate::revocation::Parts;
use crate::shm::{Access, Mapping};
use crate::wait::deadline_after;

/// The first pause before the agent is asked again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// How long the agent may take to hand out anew what it took away.
const REOPEN: Duration = Duration::from_secs(10);

/// A mapped segment. Its memory is used through [`Mapping`].
#[derive(Debug)]
pub struct Segment {
    pod: Pod,
    name: SegmentName,
    created: bool,
    /// Before the memory: what is unmapped is not registered any more.
    wakeable: Registered,
    memory: Mapping,
}

impl Segment {
    /// The segment's name.
    pub fn name(&self) -> &str {
        &self.name.name
    }

    /// The group that it belongs to.
    pub fn group(&self) -> Option<GroupId> {
        self.name.group
    }

    /// Whether this handle created it.
    pub fn is_created(&self) -> bool {
        self.created
    }

    /// Appends zeros until the segment has at least `size` bytes (rounded up to 2 MiB), and maps
    /// it anew; maps what others have appended if that is enough.
    ///
    /// Offsets stay what they are; addresses change, which nobody notices who reaches the memory
    /// through this handle, since nothing can be borrowed from it now. Others see what was
    /// appended after [`refresh`](Self::refresh).
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission`, `Busy` while another node makes it
    /// grow, `NoSpace`, or `Quota`. The segment is as it was then, and stays mapped.
    pub fn grow(&mut self, size: u64) -> Result<(), ClientError> {
        let segment = self.name.clone();
        let request = Request::GrowSegment { segment, size };
        let (_, wakeable, memory) = self.pod.ask_for_memory(&request, self.memory.access())?;
        self.replace(wakeable, memory)
    }

    /// Maps what others have appended meanwhile, as [`grow`](Self::grow) does; false if there is
    /// nothing.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`; connection errors.
    pub fn refresh(&mut self) -> Result<bool, ClientError> {
        let access = self.memory.access();
        let found = self.pod.open_now(&self.name, access)?;
        let is_longer = found.len() > self.len();
        if is_longer {
            self.replace(found.wakeable, found.memory)?;
        }
        Ok(is_longer)
    }

    fn replace(&mut self, wakeable: Registered, mut memory: Mapping) -> Result<(), ClientError> {
        if self.memory.is_guarded() {
            memory.guard()?;
        }
        self.wakeable = wakeable;
        self.memory = memory;
        Ok(())
    }

    /// From here on, a revocation is an error that [`intact`](Mapping::intact) tells, and no
    /// longer the end of the process. See [`revocation`](crate::revocation) for what that means.
    ///
    /// # Errors
    /// [`GuardError`](crate::revocation::GuardError); the segment is as it was.
    pub fn guard(&mut self) -> Result<(), crate::revocation::GuardError> {
        self.memory.guard()
    }

    /// Gives the segment another name. Others have it open under the old one, and cannot open it
    /// under that any more.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission`, `Exists`, or `Invalid`.
    pub fn rename(&mut self, to: &str) -> Result<(), ClientError> {
        self.pod.rename(&self.name, to)?;
        self.name.name = to.into();
        Ok(())
    }
}

impl Deref for Segment {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.memory
    }
}

/// The segments of a group, for a member: see [`Membership::segments`].
#[derive(Clone, Copy, Debug)]
pub struct GroupSegments<'a> {
    pod: &'a Pod,
    group: GroupId,
}

impl Membership {
    /// The group's segments. Only members may create, open and map them, and each of them may do
    /// everything with them. Their names are the group's own.
    pub fn segments(&self) -> GroupSegments<'_> {
        GroupSegments {
            pod: &self.pod,
            group: self.group(),
        }
    }
}

impl GroupSegments<'_> {
    fn named(&self, name: &str) -> SegmentName {
        SegmentName {
            group: Some(self.group),
            name: name.into(),
        }
    }

    /// Creates a segment of at least `size` bytes (rounded up to 2 MiB), scrubbed to zero, and
    /// maps it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `Exists`, `NoSpace`, `Quota`, `Invalid`, or `Permission`.
    pub fn create(
        &self,
        name: &str,
        size: u64,
        lifetime: Lifetime,
    ) -> Result<Segment, ClientError> {
        self.pod.create(&self.named(name), size, 0, lifetime)
    }

    /// Opens the segment of this name, or creates it, as
    /// [`Pod::open_or_create_segment`] does.
    ///
    /// # Errors
    /// Those of [`create`](Self::create) but `Exists`, [`ClientError::Smaller`], and `Busy` once
    /// patience ends.
    pub fn open_or_create(
        &self,
        name: &str,
        size: u64,
        lifetime: Lifetime,
    ) -> Result<Segment, ClientError> {
        let name = self.named(name);
        self.pod.open_or_create(&name, size, 0, lifetime)
    }

    /// Opens a segment that exists, and maps it, as [`Pod::open_segment`] does.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`, or `Busy` once patience ends.
    pub fn open(&self, name: &str, access: Access) -> Result<Segment, ClientError> {
        self.pod.open(&self.named(name), access)
    }

    /// Removes a segment that nobody else uses.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission`, or `Busy`.
    pub fn remove(&self, name: &str) -> Result<(), ClientError> {
        self.pod.remove(self.named(name), false)
    }

    /// Removes a segment and takes it from those who use it: see [`Pod::revoke_segment`].
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`.
    pub fn revoke(&self, name: &str) -> Result<(), ClientError> {
        self.pod.remove(self.named(name), true)
    }
}

impl Pod {
    /// Creates a segment of at least `size` bytes (rounded up to 2 MiB), scrubbed to zero, with
    /// permission bits `mode` as for a file, and maps it. It belongs to no group: see
    /// [`Membership::segments`] for those that do.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `Exists`, `NoSpace`, `Invalid`, `Permission`. If the agent
    /// was restarted in the middle of the request, `Exists` may speak of the segment that this
    /// very request created: it then belongs to nobody and its contents are all zero.
    pub fn create_segment(&self, name: &str, size: u64, mode: u32) -> Result<Segment, ClientError> {
        self.create(&of_no_group(name), size, mode, Lifetime::Kept)
    }

    /// Opens the segment of this name, or creates it as [`create_segment`](Self::create_segment)
    /// does: what programs call that run on several nodes and of which any may come first. One
    /// of them creates it ([`Segment::is_created`] tells which); if that one dies meanwhile,
    /// another does. Since a created segment is all zero, structures that take all-zero memory
    /// for a new one can be used at once by whoever comes.
    ///
    /// Waits while others prepare or remove it, at most for the time of
    /// [`Patience::request`](super::Patience::request).
    ///
    /// # Errors
    /// [`ClientError::Smaller`]; [`ClientError::Refused`] with `NoSpace`, `Invalid`,
    /// `Permission`, or `Busy` once patience ends.
    pub fn open_or_create_segment(
        &self,
        name: &str,
        size: u64,
        mode: u32,
    ) -> Result<Segment, ClientError> {
        self.open_or_create(&of_no_group(name), size, mode, Lifetime::Kept)
    }

    /// Opens a segment that exists, and maps it. Waits for one that is being prepared or
    /// removed, at most for the time of [`Patience::request`](super::Patience::request).
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`, or `Busy` once patience ends.
    pub fn open_segment(&self, name: &str, access: Access) -> Result<Segment, ClientError> {
        self.open(&of_no_group(name), access)
    }

    /// Removes a segment that nobody else uses. For its owner.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission`, or `Busy` while a node uses it.
    pub fn remove_segment(&self, name: &str) -> Result<(), ClientError> {
        self.remove(of_no_group(name), false)
    }

    /// Removes a segment and takes it from those who use it. For its owner.
    ///
    /// The name is free at once. In guests whoever still touches the memory gets SIGBUS
    /// ([`revocation`](crate::revocation) makes an error of it); on namespace nodes a
    /// mapping cannot be taken away, and the memory is given to nobody else before it is let go.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`.
    pub fn revoke_segment(&self, name: &str) -> Result<(), ClientError> {
        self.remove(of_no_group(name), true)
    }

    fn create(
        &self,
        name: &SegmentName,
        size: u64,
        mode: u32,
        lifetime: Lifetime,
    ) -> Result<Segment, ClientError> {
        let request = Request::CreateSegment {
            segment: name.clone(),
            size,
            mode,
            lifetime,
        };
        self.map_segment(name, &request, Access::ReadWrite)
    }

    fn open_or_create(
        &self,
        name: &SegmentName,
        size: u64,
        mode: u32,
        lifetime: Lifetime,
    ) -> Result<Segment, ClientError> {
        let segment = self.until_settled(|| {
            // In this order: whoever comes late asks for no memory.
            match self.open_now(name, Access::ReadWrite) {
                Err(error) if error.refusal() == Some(RefusalCode::NotFound) => {}
                opened => return settled(opened, RefusalCode::Busy),
            }
            let created = self.create(name, size, mode, lifetime);
            settled(created, RefusalCode::Exists)
        })?;
        match segment.len() < size {
            true => Err(ClientError::Smaller {
                name: segment.name().into(),
                size: segment.len(),
                needed: size,
            }),
            false => Ok(segment),
        }
    }

    fn open(&self, name: &SegmentName, access: Access) -> Result<Segment, ClientError> {
        self.until_settled(|| settled(self.open_now(name, access), RefusalCode::Busy))
    }

    fn open_now(&self, name: &SegmentName, access: Access) -> Result<Segment, ClientError> {
        let request = Request::OpenSegment {
            segment: name.clone(),
            read_only: access == Access::ReadOnly,
        };
        self.map_segment(name, &request, access)
    }

    /// Tries until others are done with a segment. An agent tells the death of whoever prepares
    /// it by another answer, so a pause between two tries is all that there is to wait.
    fn until_settled(&self, mut attempt: impl FnMut() -> Attempt) -> Result<Segment, ClientError> {
        let deadline = deadline_after(self.inner.address.patience.request);
        let (mut pause, longest) = PAUSES;
        loop {
            match attempt() {
                Attempt::Settled(result) => return result,
                Attempt::Busy(error) if Instant::now() + pause > deadline => return Err(error),
                Attempt::Busy(_) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(longest);
        }
    }

    fn remove(&self, segment: SegmentName, revoke: bool) -> Result<(), ClientError> {
        self.tell(&Request::RemoveSegment { segment, revoke })
    }

    fn rename(&self, name: &SegmentName, to: &str) -> Result<(), ClientError> {
        let (segment, to) = (name.clone(), to.into());
        self.tell(&Request::RenameSegment { segment, to })
    }

    fn tell(&self, request: &Request) -> Result<(), ClientError> {
        match self.request(request)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(refused_or(name_of(request), other)),
        }
    }

    /// The segments that this program may read, those of its groups among them.
    ///
    /// # Errors
    /// Connection errors.
    pub fn list_segments(&self) -> Result<Vec<SegmentInfo>, ClientError> {
        match self.request(&Request::ListSegments)? {
            (Reply::Segments(list), _) => Ok(list),
            (other, _) => Err(refused_or(name_of(&Request::ListSegments), other)),
        }
    }

    fn map_segment(
        &self,
        name: &SegmentName,
        request: &Request,
        access: Access,
    ) -> Result<Segment, ClientError> {
        let (created, wakeable, memory) = self.ask_for_memory(request, access)?;
        Ok(Segment {
            pod: self.clone(),
            name: name.clone(),
            created,
            wakeable,
            memory,
        })
    }

    /// Opens once more the very segment that had a number, after it was taken away; `None` if this
    /// process may not have it any more. On a connection of its own: the thread that needs the
    /// memory may be in the middle of anything.
    fn reopen(&self, (entry, uses): (u32, u32), read_only: bool) -> Option<Parts> {
        let request = Request::ReopenSegment {
            entry,
            uses,
            read_only,
        };
        let mut address = self.inner.address.clone();
        address.patience.request = address.patience.request.min(REOPEN);
        let deadline = deadline_after(REOPEN);
        let (mut pause, longest) = PAUSES;
        loop {
            let (socket, welcome) = address.connect().ok()?;
            check_life(self.inner.me, &welcome).ok()?;
            match exchange(&socket, &request, deadline, REOPEN) {
                Ok((Reply::Segment { mappings, .. }, fds)) if fds.len() == mappings.len() => {
                    return Some(parts(fds, mappings));
                }
                // The user's requests are too many for a moment, or the agent makes room for its
                // successor.
                Ok((
                    Reply::Refused {
                        code: RefusalCode::Limit | RefusalCode::Failed,
                        ..
                    },
                    _,
                ))
                | Err(ClientError::Connection { .. })
                    if Instant::now() + pause < deadline =>
                {
                    std::thread::sleep(pause);
                }
                _ => return None,
            }
            pause = (pause * 2).min(longest);
        }
    }

    /// Maps what the agent answers with; and whether it was created for this.
    fn ask_for_memory(
        &self,
        request: &Request,
        access: Access,
    ) -> Result<(bool, Registered, Mapping), ClientError> {
        let what = name_of(request);
        let (reply, fds) = self.request(request)?;
        let Reply::Segment {
            mappings,
            created,
            entry,
            uses,
            revocable,
        } = reply
        else {
            return Err(refused_or(what, reply));
        };
        if fds.len() != mappings.len() {
            let (needed, count) = (mappings.len(), fds.len());
            return Err(ClientError::Protocol {
                what,
                detail: format!("expected {needed} descriptors, got {count}"),
            });
        }
        let mut memory = Mapping::of_parts(&parts(fds, mappings), access)?;
        if revocable {
            let number = (entry, uses);
            let (pod, read_only) = (self.clone(), access == Access::ReadOnly);
            memory.restored_by(Box::new(move || pod.reopen(number, read_only)))?;
        }
        let wakeable = Registered::new(self, entry, &memory);
        Ok((created, wakeable, memory))
    }
}

/// What the agent hands out, as it is mapped.
fn parts(fds: Vec<OwnedFd>, mappings: Vec<lupin_abi::socket::Mapping>) -> Parts {
    let parts = fds.into_iter().zip(mappings);
    parts.map(|(fd, at)| (fd, at.offset, at.size)).collect()
}

fn of_no_group(name: &str) -> SegmentName {
    let (group, name) = (None, name.into());
    SegmentName { group, name }
}

/// What came of asking for a segment.
enum Attempt {
    Settled(Result<Segment, ClientError>),
    /// Somebody else is at it.
    Busy(ClientError),
}

/// Whether a refusal is one that others will see to, `busy`, or the answer.
fn settled(result: Result<Segment, ClientError>, busy: RefusalCode) -> Attempt {
    match result {
        Err(error) if error.refusal() == Some(busy) => Attempt::Busy(error),
        result => Attempt::Settled(result),
    }
}
