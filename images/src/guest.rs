//! The initramfs that a pod node boots.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Archive, ImageError, KernelTree};

/// Where the guest agent is inside a guest.
pub const AGENT_PATH: &str = "/usr/bin/lupin-guest-agent";

/// The list of modules that the image's `/init` loads: absolute paths, one a line, in order.
pub const MODULE_LIST_PATH: &str = "/etc/lupin/modules";

/// Modules that every pod node needs: the bus and ports of the fabric device,
/// the driver that turns soft-reserved memory into dax devices, the device
/// that tells the host about a panic, disks, and the host's random bytes.
pub const GUEST_MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "dax_hmem",
    "device_dax",
    "pvpanic-pci",
    "virtio_blk",
    "virtio-rng",
];

const INIT_SCRIPT: &str = include_str!("init.sh");

/// Builds the initramfs of a pod node.
///
/// The image holds a busybox, the modules of [`GUEST_MODULES`] in load order, an `/init` that
/// mounts, loads, names the virtio ports and then becomes the guest agent, and what is added here.
///
/// On the kernel command line `lupin.init=/path` starts another program in the agent's place.
/// Without an agent, and without that override, a node says so on its console and powers off.
///
/// ```no_run
/// use lupin_images::{GuestImage, KernelTree};
/// # fn main() -> Result<(), lupin_images::ImageError> {
/// let kernel = KernelTree::open("unpacked/linux-image".as_ref())?;
/// GuestImage::new("bin/busybox".as_ref())
///     .agent("lupin-guest-agent".as_ref())
///     .program("lupin-wordcount".as_ref(), "/usr/bin/lupin-wordcount")
///     .write(&kernel, "initramfs.img".as_ref())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct GuestImage {
    busybox: PathBuf,
    agent: Option<PathBuf>,
    programs: Vec<(PathBuf, String)>,
    files: Vec<(PathBuf, String)>,
    texts: Vec<(String, String)>,
    modules: Vec<String>,
}

impl GuestImage {
    /// An image with a static busybox and nothing else.
    pub fn new(busybox: &Path) -> Self {
        Self {
            busybox: busybox.into(),
            agent: None,
            programs: Vec::new(),
            files: Vec::new(),
            texts: Vec::new(),
            modules: GUEST_MODULES.map(str::to_owned).into(),
        }
    }

    /// Puts the guest agent in, at [`AGENT_PATH`].
    pub fn agent(mut self, host: &Path) -> Self {
        self.agent = Some(host.into());
        self
    }

    /// Puts a static program of the host at `path` inside the guest.
    pub fn program(mut self, host: &Path, path: &str) -> Self {
        self.programs.push((host.into(), path.into()));
        self
    }

    /// Puts any file of the host at `path` inside the guest.
    pub fn file(mut self, host: &Path, path: &str) -> Self {
        self.files.push((host.into(), path.into()));
        self
    }

    /// Puts a file with the given content at `path` inside the guest; executable if it starts
    /// with `#!`.
    pub fn text(mut self, path: &str, content: &str) -> Self {
        self.texts.push((path.into(), content.into()));
        self
    }

    /// Loads one more module, with its dependencies, after those of [`GUEST_MODULES`].
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.into());
        self
    }

    /// The image's file tree for the given kernel.
    ///
    /// # Errors
    /// Every variant of [`ImageError`] but [`ImageError::Write`].
    pub fn archive(&self, kernel: &KernelTree) -> Result<Archive, ImageError> {
        let mut archive = Archive::new();
        // The kernel opens /dev/console for init before anything is mounted.
        archive.char_device("/dev/console", 0o600, 5, 1)?;
        archive.char_device("/dev/null", 0o666, 1, 3)?;
        for path in ["/proc", "/sys", "/run", "/root", "/mnt", "/var/log"] {
            archive.directory(path, 0o755)?;
        }
        archive.directory("/tmp", 0o1777)?;
        for (path, target) in [
            ("/bin", "usr/bin"),
            ("/sbin", "usr/sbin"),
            ("/lib", "usr/lib"),
        ] {
            archive.symlink(path, target)?;
        }
        archive.directory("/usr/sbin", 0o755)?;
        archive.host_program(&self.busybox, "/usr/bin/busybox")?;
        archive.symlink("/usr/bin/sh", "busybox")?;
        archive.file("/etc/passwd", 0o644, *b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("/etc/group", 0o644, *b"root:x:0:\n")?;
        archive.file("/init", 0o755, INIT_SCRIPT)?;
        archive.kernel_modules(kernel, &self.modules)?;
        if let Some(agent) = &self.agent {
            archive.host_program(agent, AGENT_PATH)?;
        }
        for (host, path) in &self.programs {
            archive.host_program(host, path)?;
        }
        for (host, path) in &self.files {
            archive.host_file(host, path)?;
        }
        for (path, content) in &self.texts {
            let mode = if content.starts_with("#!") {
                0o755
            } else {
                0o644
            };
            archive.file(path, mode, content.as_bytes())?;
        }
        Ok(archive)
    }

    /// Builds the image into the file `out`, which appears complete or not at all.
    ///
    /// # Errors
    /// Every variant of [`ImageError`].
    pub fn write(&self, kernel: &KernelTree, out: &Path) -> Result<(), ImageError> {
        let archive = self.archive(kernel)?;
        let write = |source| ImageError::Write {
            path: out.into(),
            source,
        };
        // The process id keeps two builders of the same file apart.
        let mut temporary = out.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(temporary);
        fs::write(&temporary, archive.to_bytes())
            .and_then(|()| fs::rename(&temporary, out))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))
            .map_err(write)
    }
}

impl Archive {
    /// Adds kernel modules with all that they depend on, and the list of them at
    /// [`MODULE_LIST_PATH`].
    ///
    /// # Errors
    /// Those of [`KernelTree::modules`] and [`Archive::file`].
    pub fn kernel_modules<S: AsRef<str>>(
        &mut self,
        kernel: &KernelTree,
        names: &[S],
    ) -> Result<&mut Self, ImageError> {
        let mut list = String::new();
        for module in kernel.modules(names)? {
            let path = format!("/usr/lib/modules/{}/{}.ko", kernel.release(), module.name);
            list.push_str(&path);
            list.push('\n');
            self.file(&path, 0o644, module.object)?;
        }
        self.file(MODULE_LIST_PATH, 0o644, list)?;
        Ok(self)
    }
}

#[cfg(test)]
#[path = "guest_test.rs"]
mod guest_test;
