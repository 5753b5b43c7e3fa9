//! Where each section of pod memory lies, and the header that says so.
//!
//! The header is written once, when the pod is formatted, and never changes; whoever attaches
//! reads it, checks it, and refuses with an error that names what is wrong.

use alloc::string::String;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::ABI_VERSION;
use crate::id::{MAX_NODES, NodeId};

/// The unit of every section and segment: the granularity of a devdax device, in bytes.
pub const GRANULE: u64 = 2 << 20;

/// Size of the fabric section, in bytes.
pub const FABRIC_SIZE: u64 = GRANULE;
/// Size of one node's section, in bytes.
pub const NODE_SIZE: u64 = GRANULE;
/// Size of the instances range at the start of the system section, in bytes.
pub const INSTANCES_SIZE: u64 = GRANULE;
/// Where the groups begin, in bytes from the start of the kernel-level state.
pub const GROUPS_AT: u64 = GRANULE;
/// Where the kernel-level allocator begins, in bytes from the start of the kernel-level state. It
/// takes what is left of the system section.
pub const ALLOCATOR_AT: u64 = GROUPS_AT + GRANULE;
/// Smallest system section: the instances range, and a granule each for the segment directory,
/// the groups, and the allocator of a pool that is not large.
pub const MIN_SYSTEM_SIZE: u64 = INSTANCES_SIZE + ALLOCATOR_AT + GRANULE;

/// Bytes that the system section must have for so many nodes and a pool of so many bytes: the
/// allocator keeps a redo log for each node, and a few words for each granule of the pool.
///
/// [`MIN_SYSTEM_SIZE`] does for 16 nodes and a pool of 125 GiB.
pub const fn system_size_for(node_capacity: u32, pool_size: u64) -> u64 {
    let logs = node_capacity as u64 * 2048;
    // Every factor is bounded by the rules of a header, so that nothing overflows there; a
    // wrong header is refused by those rules, whatever comes out here.
    let allocator = logs.saturating_add((pool_size / GRANULE).saturating_mul(32)) + 4096;
    let granules = allocator.div_ceil(GRANULE);
    INSTANCES_SIZE + ALLOCATOR_AT + granules * GRANULE
}

/// First word of a formatted pod memory: `LUPINPOD` in little-endian bytes.
pub const POD_MAGIC: u64 = u64::from_le_bytes(*b"LUPINPOD");
/// First word of every section but the first: `LUPINSEC` in little-endian bytes.
pub const SECTION_MAGIC: u64 = u64::from_le_bytes(*b"LUPINSEC");

/// Bytes that the pod header occupies at the start of the fabric section.
pub const HEADER_SIZE: usize = 256;
/// Bytes that a section header occupies at the start of the other sections.
pub const SECTION_HEADER_SIZE: usize = 64;
/// Longest name of a pod, in bytes of UTF-8.
pub const MAX_POD_NAME: usize = 63;

const POD_CHECKSUM_AT: usize = HEADER_SIZE - 4;
const SECTION_CHECKSUM_AT: usize = SECTION_HEADER_SIZE - 4;

/// The kinds of section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SectionKind {
    /// Pod header, generation table, event ring: written by the host alone.
    Fabric = 1,
    /// One node's heartbeat and agent state: mapped by that node alone.
    Node = 2,
    /// Thread instances: the first granule of the system section, readable by applications.
    Instances = 3,
    /// State shared by the agents of all nodes.
    System = 4,
    /// Segments.
    Pool = 5,
}

impl SectionKind {
    /// The name used on the guest's command line and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fabric => "fabric",
            Self::Node => "node",
            Self::Instances => "instances",
            Self::System => "system",
            Self::Pool => "pool",
        }
    }
}

/// A range of pod memory, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub size: u64,
}

impl Range {
    /// The first byte after the range.
    pub const fn end(self) -> u64 {
        self.offset + self.size
    }
}

/// Why a pod memory or a section of it cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The memory is smaller than a header.
    #[error("pod memory is truncated: {actual} bytes, but the header says {expected}")]
    Truncated {
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },
    /// The first word is not Lupin's.
    #[error("{what} has no Lupin magic: found {found:#018x}, expected {expected:#018x}")]
    Magic {
        /// Which header.
        what: &'static str,
        /// Word found.
        found: u64,
        /// Word expected.
        expected: u64,
    },
    /// Formatted by another version of Lupin.
    #[error("{what} was formatted by ABI version {found}; this program speaks version {expected}")]
    Version {
        /// Which header.
        what: &'static str,
        /// Version found.
        found: u32,
        /// Version expected.
        expected: u32,
    },
    /// The header's checksum does not match its contents.
    #[error("{what} is damaged: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Which header.
        what: &'static str,
        /// Stored checksum.
        found: u32,
        /// Checksum of what is there.
        computed: u32,
    },
    /// A size in the header cannot be right.
    #[error("{what} says {field} = {value}, which {why}")]
    Size {
        /// Which header.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The section is another kind of section, or another node's.
    #[error("expected the {expected} section, found section kind {found} (node {node})")]
    Kind {
        /// Section expected.
        expected: &'static str,
        /// Kind found.
        found: u32,
        /// Node number found in the section.
        node: u32,
    },
    /// The section belongs to another pod.
    #[error("the {section} section belongs to pod {found:032x}, not to pod {expected:032x}")]
    Pod {
        /// Which section.
        section: &'static str,
        /// Pod id found.
        found: u128,
        /// Pod id expected.
        expected: u128,
    },
    /// The pod's name is not UTF-8 or too long.
    #[error("pod name must be 1 to {MAX_POD_NAME} bytes of UTF-8")]
    Name,
}

/// The pod header, decoded and checked.
///
/// A value of this type always describes a consistent layout: it comes from
/// [`PodHeader::new`] or [`PodHeader::decode`], which check every rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodHeader {
    pod_id: u128,
    name: String,
    node_capacity: u32,
    system_size: u64,
    pool_size: u64,
}

impl PodHeader {
    /// Describes a pod that is about to be formatted.
    ///
    /// # Errors
    /// [`AttachError::Size`] or [`AttachError::Name`] for the first rule that is broken.
    pub fn new(
        pod_id: u128,
        name: &str,
        node_capacity: u32,
        system_size: u64,
        pool_size: u64,
    ) -> Result<Self, AttachError> {
        if name.is_empty() || name.len() > MAX_POD_NAME || name.contains('\0') {
            return Err(AttachError::Name);
        }
        let size = |field, value, why| AttachError::Size {
            what: "pod header",
            field,
            value,
            why,
        };
        if node_capacity == 0 || node_capacity > MAX_NODES {
            return Err(size(
                "node_capacity",
                node_capacity.into(),
                "is not in 1..=1024",
            ));
        }
        if !system_size.is_multiple_of(GRANULE) || system_size < MIN_SYSTEM_SIZE {
            return Err(size(
                "system_size",
                system_size,
                "is not a multiple of 2 MiB of at least 8 MiB",
            ));
        }
        if !pool_size.is_multiple_of(GRANULE) || pool_size == 0 {
            return Err(size(
                "pool_size",
                pool_size,
                "is not a multiple of 2 MiB of at least 2 MiB",
            ));
        }
        // Far below overflow, far above any machine: keeps the sums of `Range` exact.
        if system_size > 1 << 50 || pool_size > 1 << 50 {
            return Err(size("pool_size", pool_size, "is more than 1 PiB"));
        }
        if system_size < system_size_for(node_capacity, pool_size) {
            return Err(size(
                "system_size",
                system_size,
                "is too small for the allocator: it takes 2 KiB for each node and 32 bytes for \
                 each 2 MiB of the pool, beside 6 MiB",
            ));
        }
        Ok(Self {
            pod_id,
            name: name.into(),
            node_capacity,
            system_size,
            pool_size,
        })
    }

    /// The pod's random id, new at every format.
    pub fn pod_id(&self) -> u128 {
        self.pod_id
    }

    /// The pod's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many node sections there are; node ids are `1..=node_capacity`.
    pub fn node_capacity(&self) -> u32 {
        self.node_capacity
    }

    /// Bytes of pod memory that the pod needs.
    pub fn total_size(&self) -> u64 {
        self.pool().end()
    }

    /// The fabric section.
    pub fn fabric(&self) -> Range {
        Range {
            offset: 0,
            size: FABRIC_SIZE,
        }
    }

    /// The section of one node, if the pod has room for that id.
    pub fn node(&self, node: NodeId) -> Option<Range> {
        (node.get() <= self.node_capacity).then(|| Range {
            offset: self.fabric().end() + node.index() as u64 * NODE_SIZE,
            size: NODE_SIZE,
        })
    }

    /// The system section, the instances range included.
    pub fn system(&self) -> Range {
        Range {
            offset: self.fabric().end() + u64::from(self.node_capacity) * NODE_SIZE,
            size: self.system_size,
        }
    }

    /// The thread instances: the first granule of the system section.
    pub fn instances(&self) -> Range {
        Range {
            offset: self.system().offset,
            size: INSTANCES_SIZE,
        }
    }

    /// The system section without the instances: what only agents map.
    pub fn kernel(&self) -> Range {
        Range {
            offset: self.system().offset + INSTANCES_SIZE,
            size: self.system_size - INSTANCES_SIZE,
        }
    }

    /// The pool.
    pub fn pool(&self) -> Range {
        Range {
            offset: self.system().end(),
            size: self.pool_size,
        }
    }

    /// The header as it is stored at offset 0.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut out = [0u8; HEADER_SIZE];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &POD_MAGIC.to_le_bytes());
        put(8, &ABI_VERSION.to_le_bytes());
        put(12, &(HEADER_SIZE as u32).to_le_bytes());
        put(16, &self.pod_id.to_le_bytes());
        put(32, &self.total_size().to_le_bytes());
        put(40, &self.node_capacity.to_le_bytes());
        put(48, &self.system_size.to_le_bytes());
        put(56, &self.pool_size.to_le_bytes());
        put(64, self.name.as_bytes());
        let checksum = crc32fast::hash(&out[..POD_CHECKSUM_AT]);
        out[POD_CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Checks and decodes the bytes found at offset 0 of a pod memory of `available` bytes.
    ///
    /// # Errors
    /// Says which of magic, version, checksum or sizes is wrong, in that order.
    pub fn decode(bytes: &[u8; HEADER_SIZE], available: u64) -> Result<Self, AttachError> {
        let what = "pod header";
        check_head(bytes, what, POD_MAGIC, POD_CHECKSUM_AT)?;
        let header_size = u32_at(bytes, 12);
        if header_size as usize != HEADER_SIZE {
            let value = header_size.into();
            let why = "is not this version's";
            return Err(AttachError::Size {
                what,
                field: "header_size",
                value,
                why,
            });
        }
        let name = &bytes[64..64 + MAX_POD_NAME + 1];
        let end = name.iter().position(|b| *b == 0).ok_or(AttachError::Name)?;
        let name = core::str::from_utf8(&name[..end]).map_err(|_| AttachError::Name)?;
        let header = Self::new(
            u128_at(bytes, 16),
            name,
            u32_at(bytes, 40),
            u64_at(bytes, 48),
            u64_at(bytes, 56),
        )?;
        let total = u64_at(bytes, 32);
        if total != header.total_size() {
            let why = "is not the sum of the sections";
            return Err(AttachError::Size {
                what,
                field: "total_size",
                value: total,
                why,
            });
        }
        if available < total {
            return Err(AttachError::Truncated {
                expected: total,
                actual: available,
            });
        }
        Ok(header)
    }

    /// The header of a section other than the fabric section, as it is stored at its start.
    ///
    /// `node` is the node's number for a node section and 0 for all others; `size` is the
    /// section's size in bytes (for [`SectionKind::System`], without the instances).
    pub fn encode_section(
        &self,
        kind: SectionKind,
        node: u32,
        size: u64,
    ) -> [u8; SECTION_HEADER_SIZE] {
        let mut out = [0u8; SECTION_HEADER_SIZE];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &SECTION_MAGIC.to_le_bytes());
        put(8, &ABI_VERSION.to_le_bytes());
        put(12, &(kind as u32).to_le_bytes());
        put(16, &self.pod_id.to_le_bytes());
        put(32, &size.to_le_bytes());
        put(40, &node.to_le_bytes());
        let checksum = crc32fast::hash(&out[..SECTION_CHECKSUM_AT]);
        out[SECTION_CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Checks the bytes found at the start of a section against what this pod must have there.
    ///
    /// # Errors
    /// Says which of magic, version, checksum, kind, pod or size is wrong, in that order.
    pub fn check_section(
        &self,
        bytes: &[u8; SECTION_HEADER_SIZE],
        kind: SectionKind,
        node: u32,
        size: u64,
    ) -> Result<(), AttachError> {
        check_head(bytes, kind.name(), SECTION_MAGIC, SECTION_CHECKSUM_AT)?;
        let (found, found_node) = (u32_at(bytes, 12), u32_at(bytes, 40));
        if found != kind as u32 || found_node != node {
            return Err(AttachError::Kind {
                expected: kind.name(),
                found,
                node: found_node,
            });
        }
        let pod = u128_at(bytes, 16);
        if pod != self.pod_id {
            return Err(AttachError::Pod {
                section: kind.name(),
                found: pod,
                expected: self.pod_id,
            });
        }
        let value = u64_at(bytes, 32);
        if value != size {
            let why = "is not the size of what is mapped";
            return Err(AttachError::Size {
                what: kind.name(),
                field: "size",
                value,
                why,
            });
        }
        Ok(())
    }
}

/// Copies `N` bytes of a header out of pod memory with atomic loads.
///
/// Headers never change after the format, so the copy needs no ordering; it is atomic because a
/// misbehaving node may still write there, and a torn header must end in a checksum error and
/// not in undefined behaviour.
pub fn read_header<const N: usize>(words: &[AtomicU64]) -> [u8; N] {
    let mut out = [0u8; N];
    crate::words::load_bytes(words, &mut out);
    out
}

/// Stores a header into pod memory with atomic stores, its first word last.
///
/// The first word holds the magic: a format that dies half-way leaves a section that every
/// attach refuses.
pub fn write_header(words: &[AtomicU64], bytes: &[u8]) {
    if let Some(first) = words.first() {
        first.store(0, Ordering::Relaxed);
        crate::words::store_bytes(&words[1..bytes.len().div_ceil(8)], &bytes[8..]);
        let mut magic = [0u8; 8];
        magic.copy_from_slice(&bytes[..8]);
        // Release: whoever reads the magic with Acquire reads the rest of the header.
        first.store(u64::from_le_bytes(magic), Ordering::Release);
    }
}

fn check_head(
    bytes: &[u8],
    what: &'static str,
    magic: u64,
    checksum_at: usize,
) -> Result<(), AttachError> {
    let found = u64_at(bytes, 0);
    if found != magic {
        return Err(AttachError::Magic {
            what,
            found,
            expected: magic,
        });
    }
    let found = u32_at(bytes, 8);
    if found != ABI_VERSION {
        return Err(AttachError::Version {
            what,
            found,
            expected: ABI_VERSION,
        });
    }
    let found = u32_at(bytes, checksum_at);
    let computed = crc32fast::hash(&bytes[..checksum_at]);
    if found != computed {
        return Err(AttachError::Checksum {
            what,
            found,
            computed,
        });
    }
    Ok(())
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0u8; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod layout_test;
