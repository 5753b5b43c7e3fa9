//! What is downloaded: which packages make a component, and what is done with them.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{SetupError, file_error};
use crate::host;

/// The text's place in its component.
pub(super) const TEXT_FILE: &str = "text.txt";

/// A series of stock kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// Debian 12's own.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's, from the backports of Debian 12.
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Series::V6_1 => "6.1",
            Series::V6_12 => "6.12",
        })
    }
}

/// Something that set-up provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Component {
    /// A stock cloud kernel with its modules.
    Kernel(Series),
    /// A static busybox.
    Busybox,
    /// QEMU 10 with every library that it needs, so that it runs on any distribution.
    Qemu,
    /// An English text.
    Text,
}

/// How the packages of a component are found.
pub(super) enum Wanted {
    /// These packages, alone.
    Packages(&'static [&'static str]),
    /// The packages that a package without content depends on, alone.
    DependsOf {
        meta: &'static str,
        prefix: &'static str,
    },
    /// A package with all that it depends on, down to the C library.
    Closure(&'static str),
}

impl Component {
    pub(crate) const ALL: [Component; 5] = [
        Component::Kernel(Series::V6_1),
        Component::Kernel(Series::V6_12),
        Component::Busybox,
        Component::Qemu,
        Component::Text,
    ];

    pub(super) fn dir_name(self) -> String {
        match self {
            Component::Kernel(series) => format!("kernel-{series}"),
            Component::Busybox => "busybox".into(),
            Component::Qemu => "qemu".into(),
            Component::Text => "text".into(),
        }
    }

    pub(super) fn describe(self) -> String {
        match self {
            Component::Kernel(series) => format!("stock Debian cloud kernel {series}"),
            Component::Busybox => "static busybox".into(),
            Component::Qemu => "QEMU 10 for the nested test host".into(),
            Component::Text => "an English text".into(),
        }
    }

    /// From Debian 12 itself, or from its backports.
    pub(super) fn is_in_backports(self) -> bool {
        matches!(self, Component::Kernel(Series::V6_12) | Component::Qemu)
    }

    pub(super) fn wanted(self) -> Wanted {
        match self {
            Component::Kernel(_) => Wanted::DependsOf {
                meta: "linux-image-cloud-amd64",
                prefix: "linux-image-",
            },
            Component::Busybox => Wanted::Packages(&["busybox-static"]),
            Component::Qemu => Wanted::Closure("qemu-system-x86"),
            Component::Text => Wanted::Packages(&["dict-foldoc"]),
        }
    }

    /// The last step after unpacking into `dir`.
    pub(super) fn finish(self, dir: &Path) -> Result<(), SetupError> {
        if self != Component::Text {
            return Ok(());
        }
        // A dictionary of computing in running English. `.dict.dz` is gzip with an index.
        let packed = dir.join("usr/share/dictd/foldoc.dict.dz");
        if !packed.is_file() {
            return Err(SetupError::Content {
                package: "dict-foldoc".into(),
                what: "usr/share/dictd/foldoc.dict.dz".into(),
            });
        }
        let input = fs::File::open(&packed).map_err(file_error("cannot open", &packed))?;
        let text = dir.join(TEXT_FILE);
        let output = fs::File::create(&text).map_err(file_error("cannot create", &text))?;
        host::run_ok(
            Command::new("gzip")
                .arg("-dc")
                .stdin(Stdio::from(input))
                .stdout(Stdio::from(output)),
        )?;
        Ok(())
    }
}
