//! Creation of a pod memory: whole or not at all.
//!
//! The file is made under a temporary name beside its place and linked to its name when it is
//! complete, so no crash leaves a half-formatted file under the name of a pod. Within the file
//! the pod header is written last, and its magic last of all, for the day when the memory is a
//! device that cannot be renamed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::{HEADER_SIZE, INSTANCES_SIZE, NODE_SIZE};
use lupin_abi::{NodeId, PodHeader, SectionKind};

use super::{Geometry, MemoryError, attach, failed};

/// Creates, formats and locks the pod memory; `None` if `path` has come to exist meanwhile.
pub(super) fn create(path: &Path, geometry: &Geometry) -> Result<Option<File>, MemoryError> {
    let temporary = temporary_name(path);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed(path, "create the pod memory"))?;
    // Before truncation: another manager may be formatting under this very name.
    attach::lock(path, &file)?;
    // The one that held the lock until now may have given this very file its final name.
    let ours = file.metadata().map_err(failed(path, "look at it"))?;
    let named = std::fs::metadata(&temporary);
    if ours.nlink() != 1 || !named.is_ok_and(|named| named.ino() == ours.ino()) {
        return Ok(None);
    }
    write(path, &file, geometry)?;
    let linked = std::fs::hard_link(&temporary, path);
    let removed = std::fs::remove_file(&temporary);
    match linked {
        Ok(()) => removed
            .map(|()| Some(file))
            .map_err(failed(path, "remove the temporary name of the pod memory")),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(None),
        Err(e) => Err(failed(path, "give the pod memory its name")(e)),
    }
}

fn write(path: &Path, file: &File, geometry: &Geometry) -> Result<(), MemoryError> {
    let pod_id = random_id().map_err(failed(path, "draw a random pod id"))?;
    let header = PodHeader::new(
        pod_id,
        &geometry.name,
        geometry.node_capacity,
        geometry.system,
        geometry.pool,
    )
    .map_err(|source| MemoryError::Attach {
        path: path.into(),
        source,
    })?;
    let put = |bytes: &[u8], at: u64| {
        file.write_all_at(bytes, at)
            .map_err(failed(path, "write the section headers"))
    };
    // Sparse: what nobody touches takes no room, and reads as zero.
    file.set_len(0)
        .and_then(|()| file.set_len(header.total_size()))
        .map_err(failed(path, "give the pod memory its size"))?;
    // But what the manager itself stores to must not fail later on a full disk: that would be a
    // SIGBUS in the manager.
    nix::fcntl::fallocate(
        file,
        nix::fcntl::FallocateFlags::empty(),
        0,
        size_of::<FabricSection>() as i64,
    )
    .or_else(|e| match e {
        // The file system cannot promise; the check for free space must do.
        nix::errno::Errno::EOPNOTSUPP => Ok(()),
        e => Err(e),
    })
    .map_err(|e| failed(path, "reserve room for the fabric section")(e.into()))?;
    for node in (1..=header.node_capacity()).filter_map(NodeId::new) {
        if let Some(range) = header.node(node) {
            let section = header.encode_section(SectionKind::Node, node.get(), NODE_SIZE);
            put(&section, range.offset)?;
        }
    }
    let instances = header.encode_section(SectionKind::Instances, 0, INSTANCES_SIZE);
    put(&instances, header.instances().offset)?;
    let kernel = header.kernel();
    let system = header.encode_section(SectionKind::System, 0, kernel.size);
    put(&system, kernel.offset)?;
    let encoded = header.encode();
    const { assert!(HEADER_SIZE > 8) };
    put(&encoded[8..], 8)?;
    put(&encoded[..8], 0)?;
    // The format shall survive a crash of the host as well as one of this process.
    (&*file)
        .flush()
        .and_then(|()| file.sync_all())
        .map_err(failed(path, "write the pod memory to disk"))
}

/// `demo.pod` -> `.demo.pod.formatting`, in the same folder.
pub(super) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".formatting");
    path.with_file_name(name)
}

fn random_id() -> io::Result<u128> {
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}
