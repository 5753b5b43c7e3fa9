//! The disks of nodes, and who shares which.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lupin_abi::NodeId;

use super::complaint::Complaint;
use super::raw::{self, DiskAccess};
use super::{Backend, Disk, Node, PodFileError};

/// Disks of a guest at most: what the VMM takes.
const MAX_DISKS: usize = 16;
/// Longest serial number: what the protocol has room for.
const MAX_ID: usize = 20;

/// Checks the disks of one node.
pub(super) fn check(
    complain: &Complaint<'_>,
    id: NodeId,
    name: &str,
    settings: &raw::Settings,
    base: &Path,
) -> Result<Vec<Disk>, PodFileError> {
    let key = |n: usize, field: &str| format!("[[node]] id = {id}: disk {n}: {field}");
    let disks = settings.disks.as_deref().unwrap_or_default();
    if disks.len() > MAX_DISKS {
        let key = format!("[[node]] id = {id}: disk");
        let problem = format!("a guest has at most {MAX_DISKS} disks");
        return Err(complain.about(key, disks.len(), problem, "give it fewer"));
    }
    let mut out = Vec::new();
    for (n, disk) in disks.iter().enumerate() {
        let value = format!("{:?}", disk.path);
        if disk.path.is_empty() {
            let advice = "name an image or a block device";
            return Err(complain.about(key(n, "path"), value, "it is empty", advice));
        }
        if disk.path.contains(',') {
            let problem = "a comma separates options on the command line of the VMM";
            return Err(complain.about(key(n, "path"), value, problem, "rename the file"));
        }
        if let Some(serial) = &disk.id
            && (serial.is_empty()
                || serial.len() > MAX_ID
                || serial.contains(',')
                || !serial.bytes().all(|b| b.is_ascii_graphic()))
        {
            let problem = "it is the serial number of a disk";
            let advice = "use 1 to 20 printable ASCII characters without spaces and commas";
            let value = format!("{serial:?}");
            return Err(complain.about(key(n, "id"), value, problem, advice));
        }
        let kept = disk.access == DiskAccess::KeptOverlay;
        out.push(Disk {
            path: base.join(&disk.path),
            access: disk.access,
            kept: kept.then(|| overlay(complain, base, name, n)),
            id: disk.id.clone(),
        });
    }
    Ok(out)
}

/// The kept overlay of a node's nth disk: beside the pod file and named after it.
fn overlay(complain: &Complaint<'_>, base: &Path, node: &str, n: usize) -> PathBuf {
    let mut name = complain.file().file_stem().unwrap_or_default().to_owned();
    name.push(format!(".{node}.disk{n}.overlay"));
    base.join(name)
}

/// An image is written by one disk of one node, or read by many.
pub(super) fn check_sharing(complain: &Complaint<'_>, nodes: &[Node]) -> Result<(), PodFileError> {
    let mut seen: BTreeMap<&Path, (&Node, bool)> = BTreeMap::new();
    for node in nodes {
        let Backend::Kvm(guest) = &node.backend else {
            continue;
        };
        for disk in &guest.disks {
            let writes = disk.access == DiskAccess::ReadWrite;
            match seen.get(disk.path.as_path()) {
                Some((other, wrote)) if writes || *wrote => {
                    let key = format!("[[node]] id = {}: disk.path", node.id);
                    let problem =
                        format!("{other} has this image, too, and one of them writes to it");
                    let advice = "use access = \"overlay\" or \"read-only\" to share an image, or \
                                  copy it";
                    return Err(complain.about(key, disk.path.display(), problem, advice));
                }
                _ => {
                    seen.insert(&disk.path, (node, writes));
                }
            }
        }
    }
    Ok(())
}
