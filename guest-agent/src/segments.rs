//! Segments as this node uses them: opened, scrubbed, leased to processes, taken away.
//!
//! A process that opened a segment holds a lease until it dies. When the last lease is gone, and
//! nobody else here has the segment mapped (a child that inherited it), the node takes its device
//! away and says in the directory that it no longer uses the segment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

use log::{debug, warn};
use lupin_abi::system::Segment;

use crate::directory::{Directory, DirectoryError, Held};
use crate::memory::mapping::Mapping;
use crate::memory::{Backend, MemoryError, Owner, SectionFd};

/// Bytes scrubbed before the agent looks after its other duties again.
const SCRUB_STEP: usize = 8 << 20;

/// Why a segment could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The directory says no.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The memory cannot be made ready.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Names one lease of this node; never used twice.
pub type LeaseId = u64;

#[derive(Debug)]
struct Lease {
    held: Held,
    processes: usize,
}

#[derive(Debug)]
struct Scrub {
    lease: LeaseId,
    mapping: Mapping,
    /// Words done.
    at: usize,
    /// Whose request it is.
    client: u32,
}

/// A created segment that is ready, or is not going to be.
#[derive(Debug)]
pub struct Created {
    /// Whose request it was.
    pub client: u32,
    /// What to hand out.
    pub result: Result<(LeaseId, SectionFd), SegmentError>,
}

/// The segments that this node uses.
pub struct Segments {
    directory: Directory,
    backend: Box<dyn Backend>,
    leases: BTreeMap<LeaseId, Lease>,
    scrubs: VecDeque<Scrub>,
    next: LeaseId,
}

impl Segments {
    /// Segments of `directory`, made ready by `backend`. `held` is what an earlier agent of this
    /// life left in use.
    pub fn new(directory: Directory, backend: Box<dyn Backend>, held: Vec<Held>) -> Self {
        let mut segments = Self {
            directory,
            backend,
            leases: BTreeMap::new(),
            scrubs: VecDeque::new(),
            next: 0,
        };
        for held in held {
            segments.lease(held);
        }
        segments
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The backend.
    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    fn lease(&mut self, held: Held) -> LeaseId {
        // An entry of the directory has at most one lease, shared by all processes.
        if let Some((id, _)) = self.leases.iter().find(|(_, l)| l.held.index == held.index) {
            return *id;
        }
        self.next += 1;
        let processes = 0;
        self.leases.insert(self.next, Lease { held, processes });
        self.next
    }

    /// Begins to create a segment; [`work`](Self::work) returns it when it is scrubbed.
    ///
    /// # Errors
    /// [`SegmentError`]; nothing is left of the segment then.
    pub fn create(
        &mut self,
        name: &str,
        size: u64,
        owner: Owner,
        client: u32,
    ) -> Result<(), SegmentError> {
        let held = self.directory.create(name, size, owner)?;
        let mapped = self
            .backend
            .open_segment(held.extent(), owner, false)
            .and_then(|SectionFd { fd, window }| {
                Mapping::new(&fd, window.offset, window.size, true)
                    .map_err(|e| MemoryError::os(format!("mmap of segment {name:?}"), e))
            });
        match mapped {
            Ok(mapping) => {
                let lease = self.lease(held);
                self.scrubs.push_back(Scrub {
                    lease,
                    mapping,
                    at: 0,
                    client,
                });
                Ok(())
            }
            Err(error) => {
                self.directory.forget(&held)?;
                Err(error.into())
            }
        }
    }

    /// Whether [`work`](Self::work) has something to do.
    pub fn has_work(&self) -> bool {
        !self.scrubs.is_empty()
    }

    /// Scrubs a little; returns a segment that became ready.
    pub fn work(&mut self) -> Option<Created> {
        let scrub = self.scrubs.front_mut()?;
        let words = scrub.mapping.words();
        let end = words.len().min(scrub.at + SCRUB_STEP / 8);
        for word in &words[scrub.at..end] {
            // Relaxed: the Release store of the entry's state publishes them all.
            word.store(0, Ordering::Relaxed);
        }
        scrub.at = end;
        if end < words.len() {
            return None;
        }
        let Scrub { lease, client, .. } = self.scrubs.pop_front()?;
        let held = self.leases.get(&lease)?.held.clone();
        let result = self
            .directory
            .publish(&held)
            .map_err(SegmentError::from)
            .and_then(|()| {
                Ok((
                    lease,
                    self.backend
                        .open_segment(held.extent(), held.owner(), false)?,
                ))
            });
        Some(Created { client, result })
    }

    /// Opens a segment for a process, if `may` allows it.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn open(
        &mut self,
        name: &str,
        read_only: bool,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<(LeaseId, SectionFd), SegmentError> {
        let held = self.directory.open(name, may)?;
        let (extent, owner) = (held.extent(), held.owner());
        let lease = self.lease(held);
        match self.backend.open_segment(extent, owner, read_only) {
            Ok(fd) => Ok((lease, fd)),
            Err(error) => {
                self.end_if_unused(lease);
                Err(error.into())
            }
        }
    }

    /// A process begins to hold a lease.
    pub fn hold(&mut self, lease: LeaseId) {
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.processes += 1;
        }
    }

    /// A process that held a lease is gone.
    pub fn release(&mut self, lease: LeaseId) {
        if let Some(entry) = self.leases.get_mut(&lease) {
            entry.processes = entry.processes.saturating_sub(1);
            self.end_if_unused(lease);
        }
    }

    /// Looks again at leases without a process, whose segments somebody still had mapped.
    pub fn recheck(&mut self) {
        let unused: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.processes == 0)
            .map(|(id, _)| *id)
            .collect();
        for lease in unused {
            self.end_if_unused(lease);
        }
    }

    fn end_if_unused(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get(&id) else {
            return;
        };
        let extent = lease.held.extent();
        if lease.processes > 0
            || self.scrubs.iter().any(|scrub| scrub.lease == id)
            || self.backend.is_mapped(extent)
        {
            return;
        }
        match self.backend.close_segment(extent) {
            Ok(()) => {
                debug!("segment {:?} is let go", lease.held.segment.name);
                self.directory.let_go(&lease.held);
                self.leases.remove(&id);
            }
            // Tried again at the next look.
            Err(error) => warn!("segment {:?}: {error}", lease.held.segment.name),
        }
    }

    /// Removes a segment, if `may` allows it and nobody but the caller, who holds the leases
    /// `own`, uses it: a process that still has it mapped would lose it in the middle of its
    /// work, or, where the backend cannot revoke, share it with the next owner of the extent.
    ///
    /// # Errors
    /// [`SegmentError`]. If the memory cannot be taken away, the name is gone but the extent
    /// stays taken for this life of the node.
    pub fn remove(
        &mut self,
        name: &str,
        own: &BTreeSet<LeaseId>,
        may: impl Fn(&Segment) -> bool,
    ) -> Result<(), SegmentError> {
        let named = |(_, lease): &(&LeaseId, &Lease)| lease.held.segment.name == name;
        if let Some(id) = self.leases.iter().find(named).map(|(id, _)| *id) {
            self.end_if_unused(id);
            if let Some(lease) = self.leases.get(&id)
                && may(&lease.held.segment)
                && (lease.processes, own.contains(&id)) != (1, true)
            {
                let name = name.into();
                let by = "processes of this node".into();
                return Err(DirectoryError::Busy { name, by }.into());
            }
        }
        let held = self.directory.begin_remove(name, may)?;
        self.leases
            .retain(|_, lease| lease.held.index != held.index);
        self.backend.close_segment(held.extent())?;
        self.directory.forget(&held)?;
        Ok(())
    }
}
