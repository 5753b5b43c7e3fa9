//! `--disk`: which file is a disk, and who may change it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::SECTOR;
use super::disk::Disk;
use super::overlay::{Overlay, OverlayError};
use crate::run::options::{KeyValues, OptionError};

/// Disks at most: each is a thread, a PCI function and two interrupts.
pub const MAX_DISKS: usize = 16;

/// Longest id: what the protocol has room for.
pub const MAX_ID: usize = 20;

/// How long another process may hold an image after its node has ended: a VMM that was killed
/// lets go of its files some time after its last guest instruction.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// `--disk path=FILE[,readonly=on|off][,overlay=FILE[,keep=on|off]][,id=TEXT]`
///
/// A disk: a raw image or a block device of the host. Disks appear as /dev/vda, /dev/vdb and so
/// on, in the order given. With overlay, the image is only read, so that many guests can share
/// it, and what the guest writes goes to the overlay: begun anew, and gone when the guest ends,
/// unless keep=on. The id is what the guest finds in /sys/block/vda/serial, and under
/// /dev/disk/by-id with udev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image or block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
    /// Where the guest's writes go instead of `path`.
    pub overlay: Option<OverlaySpec>,
    /// At most 20 bytes.
    pub id: Option<String>,
}

/// Where a guest's changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlaySpec {
    /// The file.
    pub path: PathBuf,
    /// Whether it outlasts the guest; else the file loses its name as soon as it is open.
    pub keep: bool,
}

impl FromStr for DiskSpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let known = ["path", "readonly", "overlay", "keep", "id"];
        let mut options = KeyValues::parse(text, &known)?;
        let path = options.required("path")?.into();
        let readonly = options.switch("readonly")?;
        let keep = options.switch("keep")?;
        let overlay = options.optional("overlay")?;
        if readonly && overlay.is_some() {
            let why = "an overlay is for a guest that writes; leave one of the two out";
            return Err(OptionError::value("readonly", "on", why));
        }
        if keep && overlay.is_none() {
            return Err(OptionError::Missing("overlay"));
        }
        let id = options.optional("id")?;
        if let Some(id) = &id
            && (id.len() > MAX_ID || !id.bytes().all(|b| b.is_ascii_graphic()))
        {
            let why = "use at most 20 printable ASCII characters without spaces";
            return Err(OptionError::value("id", id, why));
        }
        Ok(Self {
            path,
            readonly,
            overlay: overlay.map(|path| OverlaySpec {
                path: path.into(),
                keep,
            }),
            id,
        })
    }
}

/// Why a disk cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file cannot be opened or asked for its size.
    #[error("--disk path={}: {source}", path.display())]
    Open {
        /// The image or the overlay.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is neither a file nor a block device.
    #[error("--disk path={}: it is neither a file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// The size is no multiple of a sector.
    #[error(
        "--disk path={}: it has {size} bytes, which is not a multiple of {SECTOR}; is it a raw image?",
        path.display()
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process uses it in a way that excludes ours.
    #[error(
        "--disk path={}: another process {what}; share an image with readonly=on or overlay=FILE",
        path.display()
    )]
    InUse {
        /// The image or the overlay.
        path: PathBuf,
        /// What the other one does.
        what: &'static str,
    },
    /// The overlay cannot be used.
    #[error("--disk overlay={}: {source}", path.display())]
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// What is wrong with it.
        source: OverlayError,
    },
}

impl DiskSpec {
    /// Opens the files and locks them: an image is read by many or written by one.
    ///
    /// # Errors
    /// [`DiskError`] names the file.
    pub fn open(&self) -> Result<Disk, DiskError> {
        let writes = !self.readonly && self.overlay.is_none();
        let open = |source| DiskError::Open {
            path: self.path.clone(),
            source,
        };
        let mut image = OpenOptions::new()
            .read(true)
            .write(writes)
            .open(&self.path)
            .map_err(open)?;
        let kind = image.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk(self.path.clone()));
        }
        lock(&image, &self.path, writes)?;
        // Works for block devices, whose metadata have no size.
        let size = image.seek(SeekFrom::End(0)).map_err(open)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: self.path.clone(),
                size,
            });
        }
        let overlay = self
            .overlay
            .as_ref()
            .map(|spec| spec.open(&image, size))
            .transpose()?;
        Ok(Disk::new(image, size, self.readonly, overlay))
    }
}

impl OverlaySpec {
    fn open(&self, image: &File, size: u64) -> Result<Overlay, DiskError> {
        let error = |source| DiskError::Overlay {
            path: self.path.clone(),
            source,
        };
        let io = |source| error(OverlayError::Io(source));
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.keep {
            let file = options
                .create(true)
                .truncate(false)
                .open(&self.path)
                .map_err(io)?;
            lock(&file, &self.path, true)?;
            return Overlay::kept(file, image, size).map_err(error);
        }
        // One that a VMM did not get to unlink, or that was kept before. Its user, if there is
        // one, has it open and goes on.
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        }
        let file = options.create_new(true).open(&self.path).map_err(io)?;
        std::fs::remove_file(&self.path).map_err(io)?;
        Overlay::fresh(file, size).map_err(io)
    }
}

/// Takes the lock that goes with the use: shared to read, exclusive to write.
fn lock(file: &File, path: &Path, exclusive: bool) -> Result<(), DiskError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let locked = if exclusive {
            file.try_lock()
        } else {
            file.try_lock_shared()
        };
        match locked {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(TryLockError::WouldBlock) => {
                let what = if exclusive { "uses it" } else { "writes to it" };
                return Err(DiskError::InUse {
                    path: path.into(),
                    what,
                });
            }
            Err(TryLockError::Error(source)) => {
                return Err(DiskError::Open {
                    path: path.into(),
                    source,
                });
            }
        }
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod spec_test;
