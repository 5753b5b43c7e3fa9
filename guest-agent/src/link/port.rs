//! Finding and opening a virtio port by its name.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// The device of the port called `name`: the link that udev or the image's init made, or what
/// sysfs says where there is neither. `None` if the guest has no such port.
pub fn find(sys: &Path, dev: &Path, name: &str) -> Option<PathBuf> {
    let link = dev.join("virtio-ports").join(name);
    if link.exists() {
        return Some(link);
    }
    let ports = fs::read_dir(sys.join("class/virtio-ports")).ok()?;
    ports.flatten().find_map(|port| {
        let found = fs::read_to_string(port.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| dev.join(port.file_name()))
    })
}

/// Opens a port.
///
/// # Errors
/// `EBUSY` if another process has it; a port has one opener.
pub fn open_port(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_link_or_by_sysfs() {
        let folder = tempfile::tempdir().unwrap();
        let (sys, dev) = (folder.path().join("sys"), folder.path().join("dev"));
        assert_eq!(find(&sys, &dev, "a.b"), None);
        for (port, name) in [("vport1p1", "x\n"), ("vport1p2", "a.b\n"), ("vport1p3", "")] {
            let path = sys.join("class/virtio-ports").join(port);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("name"), name).unwrap();
        }
        assert_eq!(find(&sys, &dev, "a.b"), Some(dev.join("vport1p2")));
        assert_eq!(find(&sys, &dev, "a"), None);
        fs::create_dir_all(dev.join("virtio-ports")).unwrap();
        fs::write(dev.join("virtio-ports/a.b"), "").unwrap();
        assert_eq!(find(&sys, &dev, "a.b"), Some(dev.join("virtio-ports/a.b")));
    }
}
