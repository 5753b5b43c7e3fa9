//! Segments: named chunks of pod memory.

use core::ops::Deref;
use core::time::Duration;
use std::os::fd::OwnedFd;
use std::time::Instant;

use lupin_abi::socket::{RefusalCode, Reply, Request, SegmentInfo};

use super::connection::{name_of, refused_or};
use super::{ClientError, Pod};
use crate::shm::{Access, Mapping};
use crate::wait::deadline_after;

/// The first pause before the agent is asked again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// A mapped segment. Its memory is used through [`Mapping`].
#[derive(Debug)]
pub struct Segment {
    name: String,
    created: bool,
    memory: Mapping,
}

impl Segment {
    /// The segment's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this handle created it.
    pub fn is_created(&self) -> bool {
        self.created
    }
}

impl Deref for Segment {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.memory
    }
}

impl Pod {
    /// Creates a segment of at least `size` bytes (rounded up to 2 MiB), scrubbed to zero, with
    /// permission bits `mode` as for a file, and maps it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `Exists`, `NoSpace`, `Invalid`, `Permission`. If the agent
    /// was restarted in the middle of the request, `Exists` may speak of the segment that this
    /// very request created: it then belongs to nobody and its contents are all zero.
    pub fn create_segment(&self, name: &str, size: u64, mode: u32) -> Result<Segment, ClientError> {
        let request = Request::CreateSegment {
            name: name.into(),
            size,
            mode,
        };
        self.map_segment(name, &request, Access::ReadWrite)
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
        let segment = self.until_settled(|| {
            // In this order: whoever comes late asks for no memory.
            match self.open_now(name, Access::ReadWrite) {
                Err(error) if error.refusal() == Some(RefusalCode::NotFound) => {}
                opened => return settled(opened, RefusalCode::Busy),
            }
            settled(self.create_segment(name, size, mode), RefusalCode::Exists)
        })?;
        match segment.len() < size {
            true => Err(ClientError::Smaller {
                name: name.into(),
                size: segment.len(),
                needed: size,
            }),
            false => Ok(segment),
        }
    }

    /// Opens a segment that exists, and maps it. Waits for one that is being prepared or
    /// removed, at most for the time of [`Patience::request`](super::Patience::request).
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`, or `Busy` once patience ends.
    pub fn open_segment(&self, name: &str, access: Access) -> Result<Segment, ClientError> {
        self.until_settled(|| settled(self.open_now(name, access), RefusalCode::Busy))
    }

    fn open_now(&self, name: &str, access: Access) -> Result<Segment, ClientError> {
        let request = Request::OpenSegment {
            name: name.into(),
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

    /// Removes a segment.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission`, or `Busy` while a node uses it.
    pub fn remove_segment(&self, name: &str) -> Result<(), ClientError> {
        let request = Request::RemoveSegment { name: name.into() };
        match self.request(&request)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(refused_or(name_of(&request), other)),
        }
    }

    /// The segments that this program may read.
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
        name: &str,
        request: &Request,
        access: Access,
    ) -> Result<Segment, ClientError> {
        let what = name_of(request);
        let (reply, fds) = self.request(request)?;
        let Reply::Segment { mapping, created } = reply else {
            return Err(refused_or(what, reply));
        };
        let count = fds.len();
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| ClientError::Protocol {
            what,
            detail: format!("expected 1 descriptor, got {count}"),
        })?;
        Ok(Segment {
            name: name.into(),
            created,
            memory: Mapping::new(&fd, mapping.offset, mapping.size, access)?,
        })
    }
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
