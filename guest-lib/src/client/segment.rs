//! Segments: named chunks of pod memory.

use core::ops::Deref;
use std::os::fd::OwnedFd;

use lupin_abi::socket::{Reply, Request, SegmentInfo};

use super::connection::{name_of, refused_or};
use super::{ClientError, Pod};
use crate::shm::{Access, Mapping};

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

    /// Opens a segment that exists, and maps it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` or `Permission`.
    pub fn open_segment(&self, name: &str, access: Access) -> Result<Segment, ClientError> {
        let request = Request::OpenSegment {
            name: name.into(),
            read_only: access == Access::ReadOnly,
        };
        self.map_segment(name, &request, access)
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
