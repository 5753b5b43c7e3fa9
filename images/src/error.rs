//! What can go wrong while an image is made.

use std::io;
use std::path::PathBuf;

/// A failure to build an image. Every variant names the file or module at fault.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file of the host could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The finished image could not be written.
    #[error("cannot write the image {}: {source}", path.display())]
    Write {
        /// Where it should have gone.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A path inside the image is relative, empty, or climbs out with `..`.
    #[error("'{path}' is no path inside an image: it must be absolute and without '..'")]
    BadPath {
        /// The path as given.
        path: String,
    },
    /// Two different things were put at the same place.
    #[error("the image already holds something else at {path}")]
    Occupied {
        /// The path inside the image.
        path: String,
    },
    /// A file does not fit the 32-bit size field of the `newc` format.
    #[error("{path} has {bytes} bytes; a file in an initramfs must be smaller than 4 GiB")]
    TooLarge {
        /// The path inside the image.
        path: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// The directory holds no unpacked kernel.
    #[error(
        "{} is not an unpacked kernel package: {missing} is missing (unpack a linux-image package there)",
        root.display()
    )]
    NotAKernel {
        /// The directory that was opened.
        root: PathBuf,
        /// What was looked for.
        missing: &'static str,
    },
    /// A module is neither a file of this kernel nor built into it.
    #[error(
        "kernel {release} has no module '{module}', neither as a file nor built in (needed by {wanted_by})"
    )]
    MissingModule {
        /// The module that was looked for.
        module: String,
        /// The kernel's release.
        release: String,
        /// The module that depends on it, or "the image".
        wanted_by: String,
    },
    /// Modules depend on each other in a circle.
    #[error("module '{module}' of kernel {release} depends on itself")]
    ModuleCycle {
        /// A module on the circle.
        module: String,
        /// The kernel's release.
        release: String,
    },
    /// A module file cannot be decompressed or is no ELF object.
    #[error("{} is damaged: {reason}", path.display())]
    BadModule {
        /// The module's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A program that the image needs is linked dynamically.
    #[error(
        "{} is linked dynamically (it asks for {interpreter}), but an image holds no shared libraries; build it statically",
        path.display()
    )]
    NotStatic {
        /// The program's file.
        path: PathBuf,
        /// The dynamic loader it names.
        interpreter: String,
    },
}
