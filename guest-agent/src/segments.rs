//! Segments as this node uses them: opened, scrubbed, leased to processes, taken away.
//!
//! A process that opened a segment holds a lease until it dies. When the last lease is gone, and
//! nobody else here has the segment mapped (a child that inherited it), the node takes its device
//! away and says in the directory that it no longer uses the segment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

use log::{debug, warn};
use lupin_abi::groups::GroupId;
use lupin_abi::socket::SegmentName;
use lupin_abi::system::Segment;

use crate::directory::{Directory, DirectoryError, Held, NewSegment};
use crate::memory::mapping::Mapping;
use crate::memory::{Backend, Extent, MemoryError, SectionFd};
use crate::wakes::wake_word;

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
    /// For wake-ups from other nodes: of an extent, by its offset, made when the first one comes.
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Debug)]
struct Scrub {
    lease: LeaseId,
    /// What is being made, or appended to.
    held: Held,
    /// What is to be scrubbed.
    mappings: Vec<Mapping>,
    /// Mappings done, and words done of the next one.
    at: (usize, usize),
    /// Whose request it is.
    client: u32,
}

/// What a process is given of a segment: a descriptor for each extent.
pub type Handed = (LeaseId, Vec<SectionFd>);

/// A segment that is ready, or longer, or is not going to be.
#[derive(Debug)]
pub struct Scrubbed {
    /// Whose request it was.
    pub client: u32,
    /// Whether it is a new one.
    pub created: bool,
    /// What to hand out.
    pub result: Result<Handed, SegmentError>,
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
        let of_entry = self.leases.iter_mut();
        let mut of_entry = of_entry.filter(|(_, l)| l.held.index == held.index);
        if let Some((id, lease)) = of_entry.next() {
            // It may have grown since.
            lease.held = held;
            return *id;
        }
        drop(of_entry);
        self.next += 1;
        let lease = Lease {
            held,
            processes: 0,
            mappings: BTreeMap::new(),
        };
        self.leases.insert(self.next, lease);
        self.next
    }

    /// Begins to create a segment; [`work`](Self::work) returns it when it is scrubbed.
    ///
    /// # Errors
    /// [`SegmentError`]; nothing is left of the segment then.
    pub fn create(&mut self, new: &NewSegment<'_>, client: u32) -> Result<(), SegmentError> {
        let held = self.directory.create(new)?;
        self.scrub(held, client)
    }

    /// Begins to append to a segment until it has `size` bytes, if `may` allows it;
    /// [`work`](Self::work) returns it when that is scrubbed. One that is large enough is
    /// returned at once.
    ///
    /// # Errors
    /// [`SegmentError`]; the segment is as it was then.
    pub fn grow(
        &mut self,
        name: &SegmentName,
        size: u64,
        client: u32,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Option<Handed>, SegmentError> {
        let held = self.directory.grow(name, size, may)?;
        if held.unready().next().is_none() {
            return Ok(Some(self.hand_out(held, false)?));
        }
        self.scrub(held, client)?;
        Ok(None)
    }

    /// Queues what is not ready yet.
    fn scrub(&mut self, held: Held, client: u32) -> Result<(), SegmentError> {
        let mut mappings = Vec::new();
        for extent in held.unready() {
            let SectionFd { fd, window } =
                match self.backend.open_segment(extent, held.owner(), false) {
                    Ok(opened) => opened,
                    Err(error) => return Err(self.abandon(&held, error)),
                };
            match Mapping::new(&fd, window.offset, window.size, true) {
                Ok(mapping) => mappings.push(mapping),
                Err(error) => {
                    let what = format!("mmap of segment {:?}", held.segment.name);
                    return Err(self.abandon(&held, MemoryError::os(what, error)));
                }
            }
        }
        let lease = self.lease(held.clone());
        self.scrubs.push_back(Scrub {
            lease,
            held,
            mappings,
            at: (0, 0),
            client,
        });
        Ok(())
    }

    /// Gives back what cannot be made ready; gives the error that says why.
    fn abandon(&mut self, held: &Held, error: MemoryError) -> SegmentError {
        let name = &held.segment.name;
        for extent in held.unready() {
            if let Err(error) = self.backend.close_segment(extent) {
                warn!("segment {name:?}: {error}");
            }
        }
        if let Err(error) = self.directory.abandon(held) {
            warn!("segment {name:?}: {error}");
        }
        error.into()
    }

    /// Whether [`work`](Self::work) has something to do.
    pub fn has_work(&self) -> bool {
        !self.scrubs.is_empty()
    }

    /// Scrubs a little; returns a segment that became ready.
    pub fn work(&mut self) -> Option<Scrubbed> {
        let scrub = self.scrubs.front_mut()?;
        let (part, from) = scrub.at;
        if let Some(mapping) = scrub.mappings.get(part) {
            let words = mapping.words();
            let end = words.len().min(from + SCRUB_STEP / 8);
            for word in &words[from..end] {
                // Relaxed: the Release store of the entry's count or state publishes them all.
                word.store(0, Ordering::Relaxed);
            }
            scrub.at = match end < words.len() {
                true => (part, end),
                false => (part + 1, 0),
            };
            if scrub.at.0 < scrub.mappings.len() {
                return None;
            }
        }
        let Scrub { held, client, .. } = self.scrubs.pop_front()?;
        let result = self.directory.publish(&held).map_err(SegmentError::from);
        Some(Scrubbed {
            client,
            created: held.segment.ready == 0,
            result: result.and_then(|held| self.hand_out(held, false)),
        })
    }

    /// Opens a segment for a process, if `may` allows it.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn open(
        &mut self,
        name: &SegmentName,
        read_only: bool,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Handed, SegmentError> {
        let held = self.directory.open(name, may)?;
        self.hand_out(held, read_only)
    }

    /// Opens, once more for a process, the very segment that had the number `entry` in its
    /// `uses`-th use, if `may` allows it.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn reopen(
        &mut self,
        (entry, uses): (u32, u32),
        read_only: bool,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<Handed, SegmentError> {
        let held = self.directory.reopen(entry as usize, uses, may)?;
        self.hand_out(held, read_only)
    }

    fn hand_out(&mut self, held: Held, read_only: bool) -> Result<Handed, SegmentError> {
        let lease = self.lease(held.clone());
        let mut fds = Vec::new();
        for extent in held.ready() {
            match self.backend.open_segment(extent, held.owner(), read_only) {
                Ok(fd) => fds.push(fd),
                Err(error) => {
                    self.end_if_unused(lease);
                    return Err(error.into());
                }
            }
        }
        Ok((lease, fds))
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

    /// The number of a segment, and which of its uses this is.
    pub fn number_of(&self, lease: LeaseId) -> (u32, u32) {
        let held = self.leases.get(&lease).map(|lease| &lease.held);
        // There are a few hundred entries.
        held.map_or((u32::MAX, 0), |held| (held.index as u32, held.uses))
    }

    /// The group that a segment belongs to.
    pub fn group_of(&self, lease: LeaseId) -> Option<GroupId> {
        self.leases.get(&lease)?.held.segment.group
    }

    /// The segments of groups that this node uses.
    pub fn of_groups(&self) -> impl Iterator<Item = (LeaseId, GroupId)> {
        let leases = self.leases.iter();
        leases.filter_map(|(id, lease)| Some((*id, lease.held.segment.group?)))
    }

    /// Whether a process has a segment mapped, or a descriptor of it.
    pub fn is_used_by(&self, lease: LeaseId, pid: u32) -> bool {
        let lease = self.leases.get(&lease);
        let mut extents = lease.into_iter().flat_map(|lease| lease.held.extents());
        extents.any(|extent| self.backend.is_used_by(extent, pid))
    }

    /// Whether a mapping can be taken away from a process.
    pub fn can_revoke(&self) -> bool {
        self.backend.can_revoke()
    }

    /// Where in the pool the word at `offset` of a segment that this node uses lies, if it is one
    /// and `may` allows it.
    pub fn place_of(
        &self,
        entry: u32,
        offset: u64,
        may: impl FnOnce(LeaseId, &Segment) -> bool,
    ) -> Option<u64> {
        let is_it = |(_, lease): &(&LeaseId, &Lease)| lease.held.index == entry as usize;
        let (id, lease) = self.leases.iter().find(is_it)?;
        if !offset.is_multiple_of(4) || !may(*id, &lease.held.segment) {
            return None;
        }
        let mut left = offset;
        for extent in lease.held.extents() {
            match left.checked_sub(extent.size) {
                Some(rest) => left = rest,
                None => return extent.offset.checked_add(left),
            }
        }
        None
    }

    /// Wakes sleepers of this node, which is of `class`, on the word at `at` of the pool, if that
    /// is in a segment that this node uses.
    pub fn wake(&mut self, at: u64, class: u32, all: bool) {
        let holds = |extent: &Extent| {
            let offset = at.checked_sub(extent.offset);
            offset.is_some_and(|offset| offset < extent.size)
        };
        let mut leases = self.leases.values_mut();
        let found = leases.find_map(|lease| {
            let extent = lease.held.extents().find(holds)?;
            Some((lease, extent))
        });
        let Some((lease, extent)) = found.filter(|_| at.is_multiple_of(4)) else {
            return;
        };
        if !lease.mappings.contains_key(&extent.offset) {
            let opened = self.backend.open_segment(extent, lease.held.owner(), false);
            let mapped = opened.ok().and_then(|SectionFd { fd, window }| {
                Mapping::new(&fd, window.offset, window.size, true).ok()
            });
            lease.mappings.extend(mapped.map(|m| (extent.offset, m)));
        }
        if let Some(mapping) = lease.mappings.get(&extent.offset) {
            wake_word(mapping, at - extent.offset, class, all);
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
        let is_used = lease.processes > 0
            || self.scrubs.iter().any(|scrub| scrub.lease == id)
            || lease.held.extents().any(|e| self.backend.is_mapped(e));
        if !is_used {
            self.end(id);
        }
    }

    /// Takes a segment's devices away, and lets it go. Whoever has it mapped loses it, where the
    /// backend can revoke.
    fn end(&mut self, id: LeaseId) {
        // Otherwise tried again at the next look.
        if self.take_away(id)
            && let Some(lease) = self.leases.remove(&id)
        {
            debug!("segment {:?} is let go", lease.held.segment.name);
            self.directory.let_go(&lease.held);
        }
    }

    /// Removes a segment, if `may` allows it and, unless it is to be `revoke`d, nobody but the
    /// caller, who holds the leases `own`, uses it: a process that still has it mapped would lose
    /// it in the middle of its work. Where the backend cannot revoke, a segment that others use
    /// keeps its memory until they let it go.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn remove(
        &mut self,
        name: &SegmentName,
        revoke: bool,
        own: &BTreeSet<LeaseId>,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<(), SegmentError> {
        // What nobody uses any more, and was not looked at since, is in nobody's way.
        self.recheck();
        let users = |index: usize| {
            let mut leases = self.leases.iter();
            let lease = leases.find(|(_, lease)| lease.held.index == index);
            lease.map(|(id, lease)| (*id, lease.processes))
        };
        let is_only_own =
            |(id, processes): (LeaseId, usize)| (processes, own.contains(&id)) == (1, true);
        let is_busy = |index| users(index).is_some_and(|lease| !is_only_own(lease));
        let held = self.directory.condemn(name, revoke, may, is_busy)?;
        if let Some(lease) = users(held.index)
            && (is_only_own(lease) || self.backend.can_revoke())
        {
            self.end(lease.0);
        }
        self.directory.bury_nodes();
        Ok(())
    }

    /// Gives a segment another name, if `may` allows it.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn rename(
        &mut self,
        name: &SegmentName,
        to: &str,
        may: impl FnOnce(&Segment) -> bool,
    ) -> Result<(), SegmentError> {
        Ok(self.directory.rename(name, to, may)?)
    }

    /// Lets removed segments go, and has what is left of them and of the dead given back.
    pub fn tidy(&mut self) {
        let removed = self.leases.iter();
        let removed = removed.filter(|(_, lease)| self.directory.is_condemned(&lease.held));
        let removed: Vec<LeaseId> = removed.map(|(id, _)| *id).collect();
        for id in removed {
            match self.backend.can_revoke() {
                true => self.end(id),
                false => self.end_if_unused(id),
            }
        }
        self.directory.bury_nodes();
    }

    /// Takes a segment's devices away from all processes of this node. Those who may open it once
    /// more do so. False if that has to wait, or failed.
    pub fn take_away(&mut self, id: LeaseId) -> bool {
        // The agent itself stores to what it scrubs.
        if self.scrubs.iter().any(|scrub| scrub.lease == id) {
            return false;
        }
        let Some(lease) = self.leases.get_mut(&id) else {
            return true;
        };
        lease.mappings.clear();
        let name = &lease.held.segment.name;
        for extent in lease.held.extents() {
            if let Err(error) = self.backend.close_segment(extent) {
                warn!("segment {name:?}: {error}");
                return false;
            }
        }
        true
    }
}
