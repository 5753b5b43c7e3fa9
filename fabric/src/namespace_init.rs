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

use lupin_abi::socket::PEERS;
use nix::mount::{MsFlags, mount};

use crate::sys::is_want;

/// What to set up, and what to become.
#[derive(Clone, Debug)]
pub struct NamespaceInit {
    /// The host name inside.
    pub hostname: String,
    /// The folder that becomes `/run/lupin`.
    pub run: PathBuf,
    /// The folder that becomes `/run/lupin/peers`, the same for all nodes of the pod.
    pub peers: PathBuf,
    /// The agent and its arguments; at least one word.
    pub command: Vec<OsString>,
}

/// Exit code of a node whose namespaces cannot be set up: as in `podman run`.
pub const FAILED: u8 = 125;
/// Exit code of one for which the host lacks something that it may have later.
pub const LACKING: u8 = 124;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {source}")]
pub struct InitError {
    step: String,
    source: io::Error,
}

impl InitError {
    /// The exit code that tells the manager whether to try again.
    pub fn code(&self) -> u8 {
        if is_want(&self.source) {
            LACKING
        } else {
            FAILED
        }
    }
}

/// Where the folder is mounted: the agent's socket is below it.
const RUN_LUPIN: &str = "/run/lupin";

impl NamespaceInit {
    /// Sets up the namespaces of the calling process and executes the command.
    ///
    /// # Errors
    /// Says which step failed. To be called in new PID, mount and UTS namespaces only: refuses to
    /// run as anything but their first process.
    pub fn run(&self) -> Result<Infallible, InitError> {
        if std::process::id() != 1 {
            let message = "namespace-init is for the first process of a PID namespace; it is \
                           started by the fabric manager";
            let source = io::Error::new(io::ErrorKind::InvalidInput, message);
            return Err(step("set up the node")(source));
        }
        let nothing = None::<&str>;
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, flags, nothing).map_err(step("make the mounts private"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, nothing).map_err(step("mount /proc"))?;
        // Into the folder first, which takes it along.
        let inside = self.run.join(PEERS);
        let recursive = MsFlags::MS_BIND | MsFlags::MS_REC;
        for (from, to) in [(&self.peers, &*inside), (&self.run, Path::new(RUN_LUPIN))] {
            let at = to.display();
            std::fs::create_dir_all(to).map_err(step(&format!("make {at}")))?;
            mount(Some(from), to, nothing, recursive, nothing)
                .map_err(step(&format!("mount {at}")))?;
        }
        nix::unistd::sethostname(&self.hostname).map_err(step("set the host name"))?;
        let words: Vec<CString> = self
            .command
            .iter()
            .map(|word| CString::new(word.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(step("name the agent"))?;
        let program = words.first().ok_or(io::ErrorKind::InvalidInput);
        let program = program.map_err(step("name the agent"))?;
        nix::unistd::execv(program, &words).map_err(step("execute the agent"))
    }
}

/// Names the step that failed.
fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> InitError {
    move |error| InitError {
        step: step.into(),
        source: error.into(),
    }
}
