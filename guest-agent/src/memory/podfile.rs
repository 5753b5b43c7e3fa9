//! The backend of namespace nodes: all sections are ranges of one file.
//!
//! There is no hardware between one segment and another here: a process that is given the
//! descriptor of a segment could map the rest of the file. Namespace nodes are for development,
//! tests and figures; guests get one device for each segment.

use std::os::fd::{AsRawFd, OwnedFd};

use lupin_abi::layout::{PodHeader, SectionKind};
use lupin_abi::socket::Mapping as Window;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat};

use super::{Backend, Extent, MemoryError, Owner, SectionFd, users};
use crate::identity::Identity;

/// Pod memory as one file.
#[derive(Debug)]
pub struct PodFile {
    fd: OwnedFd,
    size: u64,
    identity: Identity,
    header: Option<PodHeader>,
}

impl PodFile {
    /// Takes the descriptor that the manager passed on.
    ///
    /// # Errors
    /// If it cannot be asked for its size.
    pub fn new(fd: OwnedFd, identity: Identity) -> Result<Self, MemoryError> {
        let stat = fstat(&fd).map_err(|e| MemoryError::os("fstat of the pod memory", e))?;
        Ok(Self {
            fd,
            size: stat.st_size.unsigned_abs(),
            identity,
            header: None,
        })
    }

    /// A descriptor of its own, so that access mode and file position are not shared.
    fn reopen(&self, read_only: bool) -> Result<OwnedFd, MemoryError> {
        let access = if read_only {
            OFlag::O_RDONLY
        } else {
            OFlag::O_RDWR
        };
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        open(path.as_str(), access | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| MemoryError::os(format!("re-open the pod memory through {path}"), e))
    }

    fn pool_window(&self, extent: Extent) -> Result<Window, MemoryError> {
        let header = self.header.as_ref().ok_or(MemoryError::NotAttached)?;
        Ok(Window {
            offset: header.pool().offset + extent.offset,
            size: extent.size,
        })
    }
}

impl Backend for PodFile {
    fn available(&self) -> u64 {
        self.size
    }

    fn attached(&mut self, header: &PodHeader) -> Result<(), MemoryError> {
        self.header = Some(header.clone());
        Ok(())
    }

    fn section(&mut self, kind: SectionKind, read_only: bool) -> Result<SectionFd, MemoryError> {
        let fd = self.reopen(read_only)?;
        if kind == SectionKind::Fabric {
            // Before anything else: the header that says where the rest is lies in it.
            let size = lupin_abi::layout::FABRIC_SIZE.min(self.size);
            return Ok(SectionFd {
                fd,
                window: Window { offset: 0, size },
            });
        }
        let header = self.header.as_ref().ok_or(MemoryError::NotAttached)?;
        let range = match kind {
            SectionKind::Fabric => header.fabric(),
            SectionKind::Node => {
                header
                    .node(self.identity.node)
                    .ok_or(MemoryError::NoSuchNode {
                        node: self.identity.node.get(),
                        capacity: header.node_capacity(),
                    })?
            }
            SectionKind::Instances => header.instances(),
            SectionKind::System => header.kernel(),
            SectionKind::Pool => header.pool(),
        };
        Ok(SectionFd {
            fd,
            window: Window {
                offset: range.offset,
                size: range.size,
            },
        })
    }

    fn open_segment(
        &mut self,
        extent: Extent,
        _owner: Owner,
        read_only: bool,
    ) -> Result<SectionFd, MemoryError> {
        Ok(SectionFd {
            window: self.pool_window(extent)?,
            fd: self.reopen(read_only)?,
        })
    }

    fn can_revoke(&self) -> bool {
        false
    }

    fn close_segment(&mut self, _extent: Extent) -> Result<(), MemoryError> {
        // Nothing was made for it, and a mapping of a file cannot be revoked.
        Ok(())
    }

    fn is_mapped(&self, extent: Extent) -> bool {
        let (Ok(window), Ok(stat)) = (self.pool_window(extent), fstat(&self.fd)) else {
            return false;
        };
        users::is_mapped(stat.st_dev, stat.st_ino, window)
    }

    fn is_used_by(&self, extent: Extent, pid: u32) -> bool {
        let (Ok(window), Ok(stat)) = (self.pool_window(extent), fstat(&self.fd)) else {
            return false;
        };
        users::maps(pid, stat.st_dev, stat.st_ino, window)
    }

    fn held_segments(&mut self) -> Result<Vec<Extent>, MemoryError> {
        // The agent of a namespace node is its PID 1: nothing outlives it.
        Ok(Vec::new())
    }
}
