//! The first process of a namespace node, until it becomes the agent.
//!
//! Runs as `lupin-fabricd namespace-init`, already inside the new namespaces: it makes the mounts
//! private, gives the node a `/proc` and a `/run/lupin` of its own, sets the host name, and
//! executes the agent in its place.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

/// What to set up, and what to become.
#[derive(Clone, Debug)]
pub struct NamespaceInit {
    /// The host name inside.
    pub hostname: String,
    /// The folder that becomes `/run/lupin`.
    pub run: PathBuf,
    /// The agent and its arguments; at least one word.
    pub command: Vec<OsString>,
}

/// Exit code of a node whose namespaces could not be set up: as in `podman run`.
pub const FAILED: u8 = 125;

/// Where the folder is mounted: the agent's socket is below it.
const RUN_LUPIN: &str = "/run/lupin";

impl NamespaceInit {
    /// Sets up the namespaces of the calling process and executes the command.
    ///
    /// # Errors
    /// Says which step failed. To be called in new PID, mount and UTS namespaces only: refuses to
    /// run as anything but their first process.
    pub fn run(&self) -> io::Result<Infallible> {
        if std::process::id() != 1 {
            let message = "namespace-init is for the first process of a PID namespace; it is \
                           started by the fabric manager";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let nothing = None::<&str>;
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, flags, nothing).map_err(step("make the mounts private"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, nothing).map_err(step("mount /proc"))?;
        std::fs::create_dir_all(RUN_LUPIN).map_err(step("make /run/lupin"))?;
        mount(
            Some(&self.run),
            Path::new(RUN_LUPIN),
            nothing,
            MsFlags::MS_BIND,
            nothing,
        )
        .map_err(step("mount /run/lupin"))?;
        nix::unistd::sethostname(&self.hostname).map_err(step("set the host name"))?;
        let words: Vec<CString> = self
            .command
            .iter()
            .map(|word| CString::new(word.as_bytes()))
            .collect::<Result<_, _>>()?;
        let program = words.first().ok_or(io::ErrorKind::InvalidInput)?;
        nix::unistd::execv(program, &words).map_err(step("execute the agent"))
    }
}

/// Names the step that failed.
fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        let error: io::Error = error.into();
        io::Error::new(error.kind(), format!("cannot {step}: {error}"))
    }
}
