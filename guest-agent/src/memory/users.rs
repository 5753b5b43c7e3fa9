//! Who on this node has a range of a file or device mapped: asked of `/proc`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use lupin_abi::socket::Mapping as Window;

/// Whether any process but this one maps a byte of `window` of the file with inode `ino` of the
/// file system `dev`. For a device, that is the inode of its node.
///
/// Processes that end while `/proc` is read are skipped; one that cannot be read counts as not
/// having it, since the agent runs as root.
pub fn is_mapped(dev: u64, ino: u64, window: Window) -> bool {
    let own = std::process::id().to_string();
    let Ok(processes) = fs::read_dir("/proc") else {
        return false;
    };
    processes.flatten().any(|process| {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|n| n.parse::<u32>().is_ok()) else {
            return false;
        };
        pid != own && pid.parse().is_ok_and(|pid| maps(pid, dev, ino, window))
    })
}

/// Whether a process maps a byte of `window` of such a file.
pub fn maps(pid: u32, dev: u64, ino: u64, window: Window) -> bool {
    let key = format!("{:02x}:{:02x} {ino}", libc::major(dev), libc::minor(dev));
    fs::read_to_string(format!("/proc/{pid}/maps"))
        .is_ok_and(|maps| maps.lines().any(|line| line_maps(line, &key, window)))
}

/// Whether a process has such a file open.
pub fn has_open(pid: u32, dev: u64, ino: u64) -> bool {
    fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
        let mut files = fds.flatten().filter_map(|fd| fs::metadata(fd.path()).ok());
        files.any(|file| (file.dev(), file.ino()) == (dev, ino))
    })
}

/// Whether one line of `/proc/PID/maps` maps a byte of `window` of the file `key`.
fn line_maps(line: &str, key: &str, window: Window) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let (Some(range), Some(_), Some(offset), Some(device), Some(inode)) = (
        fields.next(),
        fields.next(),
        fields.next(),
        fields.next(),
        fields.next(),
    ) else {
        return false;
    };
    if key.split_once(' ') != Some((device, inode)) {
        return false;
    }
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let bounds = range
        .split_once('-')
        .and_then(|(a, b)| Some((number(a)?, number(b)?)));
    let (Some((start, end)), Some(offset)) = (bounds, number(offset)) else {
        return false;
    };
    let mapped_end = offset.saturating_add(end.saturating_sub(start));
    offset < window.offset.saturating_add(window.size) && window.offset < mapped_end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_found_until_they_are_closed() {
        let file = tempfile::tempfile().unwrap();
        let stat = file.metadata().unwrap();
        let (pid, dev, ino) = (std::process::id(), stat.dev(), stat.ino());
        assert!(has_open(pid, dev, ino));
        assert!(!has_open(pid, dev, ino + 1) && !has_open(0, dev, ino));
        drop(file);
        assert!(!has_open(pid, dev, ino));
    }

    #[test]
    fn lines_of_maps_are_judged_by_file_and_range() {
        let line = "7f00-9f00 rw-s 00200000 00:01 1026   /memfd:pod (deleted)";
        let at = |offset, size| line_maps(line, "00:01 1026", Window { offset, size });
        assert!(at(0x20_0000, 0x1000));
        assert!(at(0, 0x20_0001));
        assert!(!at(0, 0x20_0000));
        assert!(!at(0x20_2000, 0x1000));
        let window = Window {
            offset: 0,
            size: u64::MAX,
        };
        assert!(!line_maps(line, "00:01 1027", window));
        assert!(!line_maps("", "00:01 1026", window));
        assert!(!line_maps("zz-qq rw-s 0 00:01 1026", "00:01 1026", window));
    }
}
