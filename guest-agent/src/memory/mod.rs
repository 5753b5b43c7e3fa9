//! Pod memory as this node sees it: found, bound, mapped and checked.
//!
//! Where the sections come from differs between nodes, and is behind [`Backend`]: a guest cuts
//! devdax devices out of soft-reserved memory ([`devdax`]), a namespace node maps ranges of one
//! file ([`podfile`]). What is in them is the same, and [`Attaching`] believes none of it
//! before magic, version, checksum, kind, pod and sizes are checked.

pub mod devdax;
pub mod mapping;
pub mod podfile;
pub mod sysfs;
mod users;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use lupin::shm;
use lupin_abi::fabric::FabricSection;
use lupin_abi::groups::GroupSection;
use lupin_abi::instances::InstancesSection;
use lupin_abi::layout::{AttachError, FABRIC_SIZE, GROUPS_AT, PodHeader, SectionKind, read_header};
use lupin_abi::node::NodeSection;
use lupin_abi::socket::Mapping as Window;
use lupin_abi::system::SystemSection;

use crate::identity::Identity;
use mapping::Mapping;

/// Why pod memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A header is not what this pod, version or node must have there.
    #[error("pod memory refused: {0}")]
    Attach(#[from] AttachError),
    /// The pod has no section for this node.
    #[error("node {node} is not in this pod: it has room for nodes 1 to {capacity}")]
    NoSuchNode {
        /// This node.
        node: u32,
        /// Highest id that the pod has room for.
        capacity: u32,
    },
    /// The kernel shows no device for a range.
    #[error(
        "no dax region holds {missing}; regions there: {found}. Are dax_hmem and device_dax \
         loaded, and is the range soft-reserved?"
    )]
    NoRegion {
        /// Sections and their ranges.
        missing: String,
        /// What there is instead.
        found: String,
    },
    /// A device cannot be made what is needed.
    #[error("{device}: {what}")]
    Device {
        /// Device or region.
        device: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// The memory of agents cannot be mapped.
    #[error("the system section: {0}")]
    Map(shm::ShmError),
    /// A section was asked for before the header was read.
    #[error("pod memory is not attached")]
    NotAttached,
}

impl MemoryError {
    /// An error of the operating system, with what was tried.
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// A descriptor, and the part of it that is meant.
#[derive(Debug)]
pub struct SectionFd {
    /// File or device.
    pub fd: OwnedFd,
    /// Which part of it.
    pub window: Window,
}

/// A range of the pool, in bytes from the pool's start; multiples of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub size: u64,
}

/// Whom a segment belongs to, as for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// Where the sections and segments of pod memory come from on this kind of node.
pub trait Backend: Send {
    /// Bytes of pod memory that there are; `u64::MAX` if sections are found one by one and
    /// checked by their own sizes.
    fn available(&self) -> u64;

    /// Tells the backend what the header says, once it is checked.
    ///
    /// # Errors
    /// If the sections found cannot be this pod's.
    fn attached(&mut self, header: &PodHeader) -> Result<(), MemoryError>;

    /// A new descriptor of a section, made ready first if need be. All but
    /// [`SectionKind::Fabric`] need [`attached`](Self::attached) before; for
    /// [`SectionKind::System`] it covers the section without the instances.
    ///
    /// With `read_only` the descriptor cannot be mapped for writing.
    ///
    /// # Errors
    /// If the section cannot be had.
    fn section(&mut self, kind: SectionKind, read_only: bool) -> Result<SectionFd, MemoryError>;

    /// A new descriptor of a segment, made ready first if need be.
    ///
    /// # Errors
    /// If it cannot be had.
    fn open_segment(
        &mut self,
        extent: Extent,
        owner: Owner,
        read_only: bool,
    ) -> Result<SectionFd, MemoryError>;

    /// Whether [`close_segment`](Self::close_segment) takes the memory from processes that have
    /// it mapped.
    fn can_revoke(&self) -> bool;

    /// Takes away what [`open_segment`](Self::open_segment) made. Where the backend can revoke,
    /// mappings that are left are revoked.
    ///
    /// # Errors
    /// If it is still there afterwards.
    fn close_segment(&mut self, extent: Extent) -> Result<(), MemoryError>;

    /// Whether any process of this node but the agent has a part of the extent mapped.
    fn is_mapped(&self, extent: Extent) -> bool;

    /// Whether a process of this node has a part of the extent mapped, or a descriptor that is of
    /// the extent alone.
    fn is_used_by(&self, extent: Extent, pid: u32) -> bool;

    /// Segments that an earlier agent of this life made ready.
    ///
    /// # Errors
    /// If that cannot be found out.
    fn held_segments(&mut self) -> Result<Vec<Extent>, MemoryError>;
}

/// The sections of pod memory that an agent uses, mapped and checked.
///
/// Shared between the main loop and the heartbeat.
#[derive(Debug)]
pub struct PodMemory {
    header: PodHeader,
    identity: Identity,
    fabric: Mapping,
    node: Arc<NodeMemory>,
    instances: Mapping,
    /// The library's kind of mapping, because its allocator lies in it.
    kernel: shm::Mapping,
}

/// This node's own section. Mapped before the others: with it the agent can already beat, and
/// say that it failed.
#[derive(Debug)]
pub struct NodeMemory(Mapping);

impl NodeMemory {
    /// The section.
    pub fn section(&self) -> &NodeSection {
        // SAFETY: the mapping covers NODE_SIZE bytes (checked in `attach_node`), is page
        // aligned, lives as long as `self`, and is used through these atomics only.
        unsafe { NodeSection::from_ptr(self.0.base()) }
    }
}

/// Attachment in its first half: header and own section are good.
#[derive(Debug)]
pub struct Attaching {
    header: PodHeader,
    identity: Identity,
    fabric: Mapping,
    node: Arc<NodeMemory>,
}

impl Attaching {
    /// Maps and checks the header and this node's section.
    ///
    /// # Errors
    /// [`MemoryError`] that names the section and what is wrong with it.
    pub fn new(backend: &mut dyn Backend, identity: Identity) -> Result<Self, MemoryError> {
        let fabric = map(backend, SectionKind::Fabric, true)?;
        if (fabric.len() as u64) < FABRIC_SIZE {
            return Err(AttachError::Truncated {
                expected: FABRIC_SIZE,
                actual: fabric.len() as u64,
            }
            .into());
        }
        // SAFETY: FABRIC_SIZE bytes, page aligned, alive as long as `fabric`, atomics only.
        let section = unsafe { FabricSection::from_ptr(fabric.base()) };
        let header = PodHeader::decode(&read_header(section.header_words()), backend.available())?;
        backend.attached(&header)?;
        let range = header.node(identity.node).ok_or(MemoryError::NoSuchNode {
            node: identity.node.get(),
            capacity: header.node_capacity(),
        })?;
        let mapping = map(backend, SectionKind::Node, false)?;
        check(
            &header,
            &mapping,
            SectionKind::Node,
            identity.node.get(),
            range.size,
        )?;
        Ok(Self {
            header,
            identity,
            fabric,
            node: Arc::new(NodeMemory(mapping)),
        })
    }

    /// This node's section.
    pub fn node(&self) -> &Arc<NodeMemory> {
        &self.node
    }

    /// Maps and checks the rest.
    ///
    /// # Errors
    /// [`MemoryError`] that names the section and what is wrong with it.
    pub fn finish(self, backend: &mut dyn Backend) -> Result<PodMemory, MemoryError> {
        let instances = map(backend, SectionKind::Instances, false)?;
        let size = self.header.instances().size;
        check(&self.header, &instances, SectionKind::Instances, 0, size)?;
        let SectionFd { fd, window } = backend.section(SectionKind::System, false)?;
        let size = self.header.kernel().size;
        if window.size < size {
            return Err(AttachError::Truncated {
                expected: size,
                actual: window.size,
            }
            .into());
        }
        let kernel = shm::Mapping::new(&fd, window.offset, window.size, shm::Access::ReadWrite)
            .map_err(MemoryError::Map)?;
        // SAFETY: at least one granule (the header's rule, checked above), page aligned, alive as
        // long as `kernel`, atomics only.
        let section = unsafe { SystemSection::from_ptr(kernel.as_ptr()) };
        let found = read_header(section.header_words());
        self.header
            .check_section(&found, SectionKind::System, 0, size)?;
        Ok(PodMemory {
            header: self.header,
            identity: self.identity,
            fabric: self.fabric,
            node: self.node,
            instances,
            kernel,
        })
    }
}

impl PodMemory {
    /// The pod's layout.
    pub fn header(&self) -> &PodHeader {
        &self.header
    }

    /// Who uses it.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The fabric section, mapped read-only.
    pub fn fabric(&self) -> &FabricSection {
        // SAFETY: FABRIC_SIZE bytes (checked in `Attaching::new`), page aligned, alive as long
        // as `self`, used through atomics only.
        unsafe { FabricSection::from_ptr(self.fabric.base()) }
    }

    /// This node's section.
    pub fn node(&self) -> &NodeSection {
        self.node.section()
    }

    /// The pod's thread instances.
    pub fn instances(&self) -> &InstancesSection {
        // SAFETY: INSTANCES_SIZE bytes (checked in `finish`), page aligned, alive as long as
        // `self`, used through atomics only.
        unsafe { InstancesSection::from_ptr(self.instances.base()) }
    }

    /// What only agents use.
    pub fn system(&self) -> &SystemSection {
        // SAFETY: at least one granule (the header's rule, checked in `finish`), page aligned,
        // alive as long as `self`, used through atomics only.
        unsafe { SystemSection::from_ptr(self.kernel.as_ptr()) }
    }

    /// All of what only agents use, for the pod's allocator, which lies at
    /// [`ALLOCATOR_AT`](lupin_abi::layout::ALLOCATOR_AT) and stores to the directory as well.
    pub fn kernel(&self) -> &shm::Mapping {
        &self.kernel
    }

    /// The control groups.
    pub fn groups(&self) -> &GroupSection {
        // SAFETY: the header's rule for the system section leaves a granule at GROUPS_AT (checked
        // in `finish`), page aligned, alive as long as `self`, used through atomics only.
        unsafe { GroupSection::from_ptr(self.kernel.as_ptr().add(GROUPS_AT as usize)) }
    }

    /// Whether this node, in this life, still belongs to the pod.
    pub fn is_current(&self) -> bool {
        self.fabric().is_current(self.identity.instance())
    }
}

pub(crate) fn map(
    backend: &mut dyn Backend,
    kind: SectionKind,
    read_only: bool,
) -> Result<Mapping, MemoryError> {
    let SectionFd { fd, window } = backend.section(kind, read_only)?;
    Mapping::new(&fd, window.offset, window.size, !read_only)
        .map_err(|e| MemoryError::os(format!("mmap of the {} section", kind.name()), e))
}

fn check(
    header: &PodHeader,
    mapping: &Mapping,
    kind: SectionKind,
    node: u32,
    size: u64,
) -> Result<(), MemoryError> {
    if (mapping.len() as u64) < size {
        return Err(AttachError::Truncated {
            expected: size,
            actual: mapping.len() as u64,
        }
        .into());
    }
    header.check_section(&read_header(mapping.words()), kind, node, size)?;
    Ok(())
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod memory_test;
