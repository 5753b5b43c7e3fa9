//! Files that are replaced as a whole: a reader finds the old one or the new one, whoever dies and
//! however full the disk is.
//!
//! A file that would not change is not written at all. So a manager can take a pod over although
//! there is no room left: what it puts on record then is what is there already.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Makes `bytes` the content of the file `path`.
///
/// # Errors
/// Of the file system; the file is as it was then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = Path::new(&name);
    fs::write(temporary, bytes)
        .and_then(|()| fs::rename(temporary, path))
        // What was written of it takes room that somebody needs.
        .inspect_err(|_| drop(fs::remove_file(temporary)))
}

/// Makes `bytes` the content of a file that cannot be replaced because somebody holds its lock.
/// Its blocks are kept: where it held as much before, this needs no room.
///
/// # Errors
/// Of the file system.
pub fn overwrite(file: &File, bytes: &[u8]) -> io::Result<()> {
    file.write_all_at(bytes, 0)?;
    file.set_len(bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        replace(&path, b"first").unwrap();
        let before = fs::metadata(&path).unwrap();
        replace(&path, b"first").unwrap();
        let after = fs::metadata(&path).unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino;
        assert_eq!(inode(&before), inode(&after), "nothing was written");
        replace(&path, b"second").unwrap();
        // Something is in the way.
        fs::create_dir(folder.path().join("record.new")).unwrap();
        replace(&path, b"third").unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"second");
    }

    #[test]
    fn a_locked_file_is_overwritten_by_less_and_by_more() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for text in ["one and two", "one", "one, two and three"] {
            overwrite(file.as_file_mut(), text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), text);
        }
    }
}
