//! Who has a file mapped for writing.

use std::fs;
use std::io;

/// The processes, but this one, that have the file with this device and inode number mapped
/// shared and writable, each with its command. Processes that cannot be read are left out: they
/// belong to somebody who could not open the file either.
///
/// # Errors
/// If `/proc` cannot be listed.
pub fn writers(device: u64, inode: u64) -> io::Result<Vec<(u32, String)>> {
    let device = format!("{:02x}:{:02x}", libc::major(device), libc::minor(device));
    let us = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(maps) = fs::read_to_string(entry.path().join("maps")) else {
            continue;
        };
        if pid != us && maps.lines().any(|line| is_writer(line, &device, inode)) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push((pid, command.trim().into()));
        }
    }
    Ok(found)
}

/// `7f00-7f10 rw-s 00200000 08:01 4711   /pods/demo.pod`
fn is_writer(line: &str, device: &str, inode: u64) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let permissions = fields.next().unwrap_or_default().as_bytes();
    let [_, b'w', _, b's'] = permissions else {
        return false;
    };
    fields.nth(1) == Some(device) && fields.next().and_then(|n| n.parse().ok()) == Some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_that_file_count() {
        let line = |p: &str| format!("7f00-7f10 {p} 00200000 08:01 4711   /pods/demo.pod");
        assert!(is_writer(&line("rw-s"), "08:01", 4711));
        assert!(!is_writer(&line("r--s"), "08:01", 4711));
        assert!(!is_writer(&line("rw-p"), "08:01", 4711));
        assert!(!is_writer(&line("rw-s"), "08:02", 4711));
        assert!(!is_writer(&line("rw-s"), "08:01", 4712));
        assert!(!is_writer("", "08:01", 4711));
    }

    #[test]
    fn this_process_is_never_named() {
        let own = writers(0, 0).unwrap();
        assert!(own.iter().all(|(pid, _)| *pid != std::process::id()));
    }
}
