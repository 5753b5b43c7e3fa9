//! The checks that a file passes before anything in it is believed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use lupin_abi::layout::{HEADER_SIZE, INSTANCES_SIZE, NODE_SIZE, SECTION_HEADER_SIZE};
use lupin_abi::{AttachError, NodeId, PodHeader, SectionKind};

use super::map::Mapping;
use super::{Geometry, MemoryError, failed};
use crate::podfile::size::display;

/// Opens and locks an existing pod memory; `None` if there is none.
pub(super) fn lock_existing(path: &Path) -> Result<Option<File>, MemoryError> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        // A FIFO or a device would block or act on open.
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(path, "open the pod memory")(e)),
    };
    let metadata = file
        .metadata()
        .map_err(failed(path, "look at the pod memory"))?;
    if !metadata.is_file() {
        return Err(MemoryError::NotAFile { path: path.into() });
    }
    lock(path, &file)?;
    Ok(Some(file))
}

/// Takes the exclusive lock without waiting.
pub(super) fn lock(path: &Path, file: &File) -> Result<(), MemoryError> {
    file.try_lock().map_err(|e| match e {
        std::fs::TryLockError::WouldBlock => MemoryError::InUse { path: path.into() },
        std::fs::TryLockError::Error(e) => failed(path, "lock the pod memory")(e),
    })
}

/// Opens a second description of a locked file, by its descriptor: the name may have changed.
pub(super) fn open_again(path: &Path, file: &File) -> Result<File, MemoryError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(failed(path, "open the pod memory for nodes"))
}

/// Checks every header and the shape, then maps what a manager needs.
pub(super) fn attach(
    path: &Path,
    file: &File,
    geometry: &Geometry,
) -> Result<(PodHeader, Mapping), MemoryError> {
    let refuse = |source| MemoryError::Attach {
        path: path.into(),
        source,
    };
    let available = file
        .metadata()
        .map_err(failed(path, "look at the pod memory"))?
        .size();
    if available < HEADER_SIZE as u64 {
        return Err(refuse(AttachError::Truncated {
            expected: HEADER_SIZE as u64,
            actual: available,
        }));
    }
    let mut bytes = [0u8; HEADER_SIZE];
    file.read_exact_at(&mut bytes, 0)
        .map_err(failed(path, "read the pod header"))?;
    let header = PodHeader::decode(&bytes, available).map_err(refuse)?;
    check_shape(path, &header, geometry)?;

    let section = |offset, kind, node, size| {
        let mut bytes = [0u8; SECTION_HEADER_SIZE];
        file.read_exact_at(&mut bytes, offset)
            .map_err(failed(path, "read a section header"))?;
        header
            .check_section(&bytes, kind, node, size)
            .map_err(refuse)
    };
    for node in (1..=header.node_capacity()).filter_map(NodeId::new) {
        if let Some(range) = header.node(node) {
            section(range.offset, SectionKind::Node, node.get(), NODE_SIZE)?;
        }
    }
    let instances = header.instances();
    section(instances.offset, SectionKind::Instances, 0, INSTANCES_SIZE)?;
    let kernel = header.kernel();
    section(kernel.offset, SectionKind::System, 0, kernel.size)?;

    let map =
        Mapping::new(file, header.system().offset).map_err(failed(path, "map the pod memory"))?;
    Ok((header, map))
}

fn check_shape(path: &Path, header: &PodHeader, wanted: &Geometry) -> Result<(), MemoryError> {
    if header.name() != wanted.name {
        return Err(MemoryError::OtherPod {
            path: path.into(),
            found: header.name().into(),
            expected: wanted.name.clone(),
        });
    }
    let differs = |key, found: String, expected: String| {
        if found == expected {
            return Ok(());
        }
        Err(MemoryError::Geometry {
            path: path.into(),
            key,
            found,
            expected,
        })
    };
    differs(
        "memory.node_capacity",
        header.node_capacity().to_string(),
        wanted.node_capacity.to_string(),
    )?;
    differs(
        "memory.system",
        display(header.system().size),
        display(wanted.system),
    )?;
    differs(
        "memory.pool",
        display(header.pool().size),
        display(wanted.pool),
    )
}
