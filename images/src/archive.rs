//! The file tree of an initramfs and its `newc` form.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cpio::newc::{self, ModeFileType};

use crate::ImageError;
use crate::modinfo::interpreter;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory { mode: u32 },
    File { mode: u32, data: Vec<u8> },
    Symlink { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// A file tree that is written as a `newc` cpio archive, the format of an
/// initramfs.
///
/// Everything belongs to root and carries no time stamp, entries are sorted by
/// path, and parent directories appear by themselves (mode 0755): the same
/// content always gives the same bytes.
///
/// The kernel unpacks several archives one after the other, so an archive may
/// also be appended to another one to add files to it.
#[derive(Debug, Clone, Default)]
pub struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an empty directory with permission bits `mode`.
    ///
    /// # Errors
    /// [`ImageError::BadPath`], or [`ImageError::Occupied`] if `path` is something else already.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<&mut Self, ImageError> {
        let key = self.admit(path)?;
        match self.nodes.insert(key, Node::Directory { mode }) {
            None | Some(Node::Directory { .. }) => Ok(self),
            Some(_) => Err(ImageError::Occupied { path: path.into() }),
        }
    }

    /// Adds a file with the given content and permission bits `mode`.
    ///
    /// # Errors
    /// [`ImageError::BadPath`], [`ImageError::TooLarge`], or [`ImageError::Occupied`] if `path`
    /// exists with other content.
    pub fn file(
        &mut self,
        path: &str,
        mode: u32,
        data: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, ImageError> {
        let data = data.into();
        if u32::try_from(data.len()).is_err() {
            return Err(ImageError::TooLarge {
                path: path.into(),
                bytes: data.len() as u64,
            });
        }
        self.insert(path, Node::File { mode, data })
    }

    /// Adds a symbolic link at `path` that points to `target`.
    ///
    /// # Errors
    /// As for [`Archive::file`].
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, ImageError> {
        self.insert(
            path,
            Node::Symlink {
                target: target.into(),
            },
        )
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// As for [`Archive::file`].
    pub fn char_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<&mut Self, ImageError> {
        self.insert(path, Node::CharDevice { mode, major, minor })
    }

    /// Copies a file of the host into the image and keeps whether it may be executed.
    ///
    /// # Errors
    /// [`ImageError::Read`], and as for [`Archive::file`].
    pub fn host_file(&mut self, host: &Path, path: &str) -> Result<&mut Self, ImageError> {
        let (data, executable) = read_host_file(host)?;
        self.file(path, if executable { 0o755 } else { 0o644 }, data)
    }

    /// Copies a program of the host into the image.
    ///
    /// # Errors
    /// [`ImageError::NotStatic`] if it asks for a dynamic loader, which no image has, and as for
    /// [`Archive::host_file`].
    pub fn host_program(&mut self, host: &Path, path: &str) -> Result<&mut Self, ImageError> {
        let (data, _) = read_host_file(host)?;
        if let Some(interpreter) = interpreter(&data) {
            return Err(ImageError::NotStatic {
                path: host.into(),
                interpreter,
            });
        }
        self.file(path, 0o755, data)
    }

    /// Whether there is an entry at `path`.
    pub fn contains(&self, path: &str) -> bool {
        path.strip_prefix('/')
            .is_some_and(|key| self.nodes.contains_key(key))
    }

    /// Writes the archive, trailer included.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_to<W: Write>(&self, mut out: W) -> io::Result<()> {
        for (inode, (path, node)) in (1..).zip(&self.nodes) {
            let entry = newc::Builder::new(path).ino(inode).nlink(1);
            let (entry, data): (_, &[u8]) = match node {
                Node::Directory { mode } => (
                    entry
                        .nlink(2)
                        .mode(*mode)
                        .set_mode_file_type(ModeFileType::Directory),
                    &[],
                ),
                Node::File { mode, data } => (
                    entry.mode(*mode).set_mode_file_type(ModeFileType::Regular),
                    data,
                ),
                Node::Symlink { target } => (
                    entry.mode(0o777).set_mode_file_type(ModeFileType::Symlink),
                    target.as_bytes(),
                ),
                Node::CharDevice { mode, major, minor } => (
                    entry
                        .mode(*mode)
                        .rdev_major(*major)
                        .rdev_minor(*minor)
                        .set_mode_file_type(ModeFileType::Char),
                    &[],
                ),
            };
            // The length was checked when the entry was added.
            let mut writer = entry.write(&mut out, data.len() as u32);
            writer.write_all(data)?;
            writer.finish()?;
        }
        newc::trailer(&mut out)?;
        out.flush()
    }

    /// The archive as bytes in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes)
            .expect("writing to memory does not fail");
        bytes
    }

    fn insert(&mut self, path: &str, node: Node) -> Result<&mut Self, ImageError> {
        let key = self.admit(path)?;
        match self.nodes.get(&key) {
            Some(there) if *there != node => Err(ImageError::Occupied { path: path.into() }),
            _ => {
                self.nodes.insert(key, node);
                Ok(self)
            }
        }
    }

    /// Checks a path, creates its parents and returns it as cpio spells it.
    fn admit(&mut self, path: &str) -> Result<String, ImageError> {
        let bad = || ImageError::BadPath { path: path.into() };
        let relative = path.strip_prefix('/').ok_or_else(bad)?;
        let parts: Vec<&str> = relative.split('/').collect();
        if parts
            .iter()
            .any(|part| matches!(*part, "" | "." | "..") || part.contains('\0'))
        {
            return Err(bad());
        }
        for depth in 1..parts.len() {
            let parent = parts[..depth].join("/");
            match self.nodes.get(&parent) {
                // A link may lead to a directory; the kernel follows it.
                Some(Node::Directory { .. } | Node::Symlink { .. }) => {}
                Some(_) => {
                    return Err(ImageError::Occupied {
                        path: format!("/{parent}"),
                    });
                }
                None => {
                    self.nodes.insert(parent, Node::Directory { mode: 0o755 });
                }
            }
        }
        Ok(relative.into())
    }
}

fn read_host_file(host: &Path) -> Result<(Vec<u8>, bool), ImageError> {
    let read = |source| ImageError::Read {
        path: host.into(),
        source,
    };
    let data = fs::read(host).map_err(read)?;
    let mode = fs::metadata(host).map_err(read)?.permissions().mode();
    Ok((data, mode & 0o111 != 0))
}

#[cfg(test)]
#[path = "archive_test.rs"]
mod archive_test;
