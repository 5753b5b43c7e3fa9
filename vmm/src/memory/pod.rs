//! Pod memory as one node sees it: four sections of the pod's file, mapped for KVM alone.
//!
//! ```text
//! file:   | fabric | node 1 | ... | node N | system          | pool |
//!             |         \__ only this node's     |               |
//! guest:   fabric (ro)   node          instances|system        pool
//! ```
//!
//! This process maps the sections only so that KVM can; apart from reading headers at start
//! it never touches them.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::atomic::AtomicU64;

use lupin_abi::layout::{self, HEADER_SIZE, SECTION_HEADER_SIZE, read_header};
use lupin_abi::{Generation, NodeId, PodHeader, SectionKind};

use super::MemoryError;
use crate::arch::layout::{Range, SECTION_ALIGN, SECTION_HUGE_ALIGN, place_sections};
use crate::run::options::{KeyValues, OptionError};

/// `--pod-memory file=PATH,node=ID,generation=G[,heartbeat_ms=N]`
///
/// The shared memory of the pod (a formatted file, hugetlbfs file or /dev/daxX.Y), which of
/// its nodes this guest is, and which life of it; and how often its agent shows that it lives
/// (default: every 8 ms).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodMemorySpec {
    /// The formatted pod memory.
    pub file: PathBuf,
    /// This guest's node.
    pub node: NodeId,
    /// The generation that this process runs the node as, at least 1.
    pub generation: Generation,
    /// Milliseconds between two heartbeats of the guest's agent, 1 to 1000.
    pub heartbeat_ms: u32,
}

/// Milliseconds between two heartbeats, unless said otherwise: the paper's figure.
pub const DEFAULT_HEARTBEAT_MS: u32 = 8;

impl FromStr for PodMemorySpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut options = KeyValues::parse(text, &["file", "node", "generation", "heartbeat_ms"])?;
        let node: u32 = options.number("node")?;
        let generation: Generation = options.number("generation")?;
        if generation == 0 {
            return Err(OptionError::value(
                "generation",
                "0",
                "generations start at 1",
            ));
        }
        let heartbeat_ms = match options.number("heartbeat_ms") {
            Err(OptionError::Missing(_)) => DEFAULT_HEARTBEAT_MS,
            Ok(ms @ 1..=1000) => ms,
            Ok(ms) => {
                let why = "must be 1 to 1000";
                return Err(OptionError::value("heartbeat_ms", ms, why));
            }
            Err(e) => return Err(e),
        };
        Ok(Self {
            file: options.required("file")?.into(),
            node: NodeId::new(node)
                .ok_or_else(|| OptionError::value("node", node, "node ids are 1 to 1024"))?,
            generation,
            heartbeat_ms,
        })
    }
}

/// One section, mapped and placed.
#[derive(Debug)]
pub struct Section {
    /// Which section. [`SectionKind::System`] includes the instances at its start.
    pub kind: SectionKind,
    /// Where the guest sees it.
    pub guest: Range,
    /// Whether the guest may store there.
    pub writable: bool,
    mapping: Mapping,
}

impl Section {
    /// Where this process sees it, for KVM.
    pub fn host_address(&self) -> u64 {
        self.mapping.address.as_ptr() as u64
    }
}

/// The pod memory of one node.
#[derive(Debug)]
pub struct PodMemory {
    /// What `--pod-memory` said.
    pub spec: PodMemorySpec,
    /// The sections in address order: fabric, node, system, pool.
    pub sections: Vec<Section>,
}

impl PodMemory {
    /// Opens and checks the pod memory, maps this node's sections and places them above
    /// `ram_size` bytes of RAM.
    ///
    /// # Errors
    /// [`MemoryError`] names the file and says what is wrong with it.
    pub fn attach(spec: &PodMemorySpec, ram_size: u64) -> Result<Self, MemoryError> {
        let path = spec.file.display().to_string();
        let io = |what| {
            let path = path.clone();
            move |source| MemoryError::PodFile { path, what, source }
        };
        let invalid = |source| MemoryError::PodLayout {
            path: path.clone(),
            source,
        };

        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&spec.file)
            .map_err(io("open"))?;
        let available = file_size(&file).map_err(io("read its size"))?;
        if available < layout::FABRIC_SIZE {
            return Err(invalid(lupin_abi::AttachError::Truncated {
                expected: layout::FABRIC_SIZE,
                actual: available,
            }));
        }
        let fabric_range = layout::Range {
            offset: 0,
            size: layout::FABRIC_SIZE,
        };
        let fabric = Mapping::new(&file, fabric_range, false).map_err(io("map fabric"))?;
        let bytes: [u8; HEADER_SIZE] = read_header(fabric.words(HEADER_SIZE));
        let header = PodHeader::decode(&bytes, available).map_err(invalid)?;
        let node = header.node(spec.node).ok_or_else(|| MemoryError::PodNode {
            path: path.clone(),
            node: spec.node.get(),
            capacity: header.node_capacity(),
        })?;

        let ranges = [
            (SectionKind::Node, node),
            (SectionKind::System, header.system()),
            (SectionKind::Pool, header.pool()),
        ];
        let mut mappings = vec![(SectionKind::Fabric, false, fabric)];
        for (kind, range) in ranges {
            let mapping = Mapping::new(&file, range, true).map_err(io(kind.name()))?;
            mappings.push((kind, true, mapping));
        }
        check_headers(&header, spec.node, &mappings).map_err(invalid)?;

        let sizes: Vec<u64> = mappings.iter().map(|(_, _, m)| m.size as u64).collect();
        let sections = mappings
            .into_iter()
            .zip(place_sections(ram_size, &sizes))
            .map(|((kind, writable, mapping), guest)| Section {
                kind,
                guest,
                writable,
                mapping,
            })
            .collect();
        Ok(Self {
            spec: spec.clone(),
            sections,
        })
    }

    /// The guest-physical ranges of the sections.
    pub fn ranges(&self) -> Vec<Range> {
        self.sections.iter().map(|section| section.guest).collect()
    }

    /// The value of `lupin.sections=` on the guest's command line.
    pub fn command_line_value(&self) -> String {
        let entry = |Section { kind, guest, .. }: &Section| {
            format!("{}@{:#x}+{:#x}", kind.name(), guest.start, guest.size)
        };
        let entries: Vec<String> = self.sections.iter().map(entry).collect();
        entries.join(",")
    }
}

/// Checks the headers at the start of the node section, the instances and the system section.
fn check_headers(
    header: &PodHeader,
    node: NodeId,
    mappings: &[(SectionKind, bool, Mapping)],
) -> Result<(), lupin_abi::AttachError> {
    for (kind, _, mapping) in mappings {
        let at = |offset: u64| -> [u8; SECTION_HEADER_SIZE] {
            let first = offset as usize / size_of::<AtomicU64>();
            let words = mapping.words(offset as usize + SECTION_HEADER_SIZE);
            read_header(&words[first..])
        };
        match kind {
            // The fabric section's header is the pod header; the pool has none, all of it
            // belongs to segments.
            SectionKind::Fabric | SectionKind::Instances | SectionKind::Pool => {}
            SectionKind::Node => {
                header.check_section(&at(0), *kind, node.get(), mapping.size as u64)?;
            }
            SectionKind::System => {
                let instances = layout::INSTANCES_SIZE;
                header.check_section(&at(0), SectionKind::Instances, 0, instances)?;
                header.check_section(&at(instances), *kind, 0, header.kernel().size)?;
            }
        }
    }
    Ok(())
}

/// Size in bytes of a file or of a devdax character device.
fn file_size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_char_device() {
        return Ok(metadata.len());
    }
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let attribute = format!("/sys/dev/char/{major}:{minor}/size");
    let text = std::fs::read_to_string(Path::new(&attribute))?;
    text.trim().parse().map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{attribute} holds {text:?}"),
        )
    })
}

/// A shared mapping of a part of the pod memory, aligned so that KVM can use huge pages.
#[derive(Debug)]
struct Mapping {
    address: NonNull<c_void>,
    size: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is accessed through
// atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, range: layout::Range, writable: bool) -> io::Result<Self> {
        let to_usize = |n: u64| usize::try_from(n).map_err(io::Error::other);
        let size = to_usize(range.size)?;
        let align = if range.size >= SECTION_HUGE_ALIGN {
            SECTION_HUGE_ALIGN
        } else {
            SECTION_ALIGN
        };
        let align = to_usize(align)?;
        // KVM maps huge pages only where host and guest addresses agree modulo the page size.
        let reserved = map(None, size + align, libc::PROT_NONE, None)?;
        let start = reserved.as_ptr() as usize;
        let aligned = start.next_multiple_of(align);
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let place = NonNull::new(aligned as *mut c_void);
        match map(place, size, protection, Some((file, range.offset))) {
            Ok(address) => {
                unmap(start, aligned - start);
                unmap(aligned + size, start + align - aligned);
                Ok(Self { address, size })
            }
            Err(error) => {
                unmap(start, size + align);
                Err(error)
            }
        }
    }

    /// The first `len` bytes as words.
    fn words(&self, len: usize) -> &[AtomicU64] {
        assert!(len <= self.size, "within the mapping");
        let count = len / size_of::<AtomicU64>();
        // SAFETY: the mapping is readable, page-aligned, at least `len` bytes long and lives as
        // long as `self`; atomics allow other nodes to write there at any time, and no caller
        // stores through them.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.address.as_ptr() as usize, self.size);
    }
}

/// `mmap`: at `place`, which must be part of a reservation of the caller, or anywhere.
fn map(
    place: Option<NonNull<c_void>>,
    size: usize,
    protection: i32,
    file: Option<(&File, u64)>,
) -> io::Result<NonNull<c_void>> {
    let fixed = if place.is_some() { libc::MAP_FIXED } else { 0 };
    let (flags, fd, offset) = match file {
        Some((file, offset)) => (libc::MAP_SHARED, file.as_raw_fd(), offset),
        None => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        ),
    };
    let place = place.map_or(std::ptr::null_mut(), NonNull::as_ptr);
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: without MAP_FIXED the kernel chooses unused addresses; with it the caller owns
    // the range as a PROT_NONE reservation that nothing refers to.
    let address = unsafe { libc::mmap(place, size, protection, flags | fixed, fd, offset) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address).ok_or_else(|| io::Error::other("mapped at address 0"))
}

fn unmap(start: usize, size: usize) {
    if size > 0 {
        // SAFETY: callers pass ranges that they mapped and that nothing refers to any more.
        unsafe { libc::munmap(start as *mut c_void, size) };
    }
}

#[cfg(test)]
#[path = "pod_test.rs"]
pub(crate) mod pod_test;
