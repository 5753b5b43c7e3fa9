//! The command line of the agent.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The agent inside every node of a Lupin pod.
///
/// In a guest it learns from the kernel command line who it is; in a namespace node, from flags.
/// It binds the node's part of the pod memory, beats, serves processes on its socket, and obeys
/// the fabric manager.
#[derive(Debug, Parser)]
#[command(
    name = "lupin-guest-agent",
    version,
    after_help = "Exit status:\n  0  the node was shut down, or the agent told to end\n  \
                  1  something unforeseen\n  2  bad arguments or kernel command line\n  \
                  3  pod memory refused: header, version, size or checksum\n  \
                  4  devices of the pod memory are missing or cannot be bound\n\n\
                  An agent that is init does not exit on 3 and 4: it stays reachable for the \
                  fabric manager, without being part of the pod.\n\n\
                  SIGUSR2: become the successor, the file at this program's path, without an end of \
                  the node, its processes, or their memberships."
)]
pub struct Options {
    /// Be init: reap orphans, and end the whole node on SIGTERM or on request
    #[arg(long)]
    pub init: bool,

    /// Be the agent of a namespace node; takes its identity and pod memory from flags
    #[arg(long, requires_all = ["node", "generation", "pod_memory_fd"])]
    pub namespace: bool,

    /// This node's number, 1 to 1024
    #[arg(long, value_name = "ID", requires = "namespace")]
    pub node: Option<u32>,

    /// This node's generation
    #[arg(long, value_name = "G", requires = "namespace")]
    pub generation: Option<u32>,

    /// Inherited descriptor of the pod memory file
    #[arg(long, value_name = "FD", requires = "namespace")]
    pub pod_memory_fd: Option<RawFd>,

    /// Inherited descriptor of the listening socket for the fabric manager
    #[arg(long, value_name = "FD", requires = "namespace")]
    pub agent_listener_fd: Option<RawFd>,

    /// Inherited descriptor of the doorbell, an eventfd
    #[arg(long, value_name = "FD", requires = "namespace")]
    pub doorbell_fd: Option<RawFd>,

    /// Milliseconds between heartbeats, 1 to 1000
    #[arg(long, value_name = "MS", default_value_t = 8, requires = "namespace")]
    pub heartbeat_ms: u64,

    /// Where processes of this node find the agent
    #[arg(
        long,
        value_name = "PATH",
        env = lupin_abi::socket::SOCKET_ENV,
        default_value = lupin_abi::socket::SOCKET_PATH
    )]
    pub socket: PathBuf,

    /// File to read the kernel command line from
    #[arg(long, value_name = "PATH", default_value = "/proc/cmdline")]
    pub cmdline: PathBuf,

    /// Where sysfs is mounted
    #[arg(long, value_name = "DIR", default_value = "/sys")]
    pub sysfs: PathBuf,

    /// Where device nodes are
    #[arg(long, value_name = "DIR", default_value = "/dev")]
    pub dev: PathBuf,
}

/// Takes over a descriptor that was inherited under `flag`.
///
/// # Errors
/// `EBADF` if it is not open or one of the standard three.
pub fn inherit(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd <= libc::STDERR_FILENO {
        return Err(Errno::EBADF);
    }
    // SAFETY: F_SETFD on any number is harmless; it fails with EBADF if that is not open.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(result)?;
    // SAFETY: open, and passed to this program by the flag's contract: nothing else in it uses
    // this number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    debug_assert!(fcntl(&fd, FcntlArg::F_GETFD).is_ok_and(|f| f & FdFlag::FD_CLOEXEC.bits() != 0));
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
        let parse = |args: &[&str]| Options::try_parse_from([&["agent"], args].concat());
        assert!(parse(&["--init"]).is_ok());
        assert!(parse(&["--node", "1"]).is_err());
        assert!(parse(&["--namespace", "--node", "1"]).is_err());
        let options = parse(&[
            "--namespace",
            "--node=3",
            "--generation=2",
            "--pod-memory-fd=7",
            "--heartbeat-ms=4",
        ])
        .unwrap();
        assert_eq!((options.node, options.heartbeat_ms), (Some(3), 4));
        assert!(!options.init);
    }

    #[test]
    fn descriptors_that_are_not_there_are_refused() {
        assert_eq!(inherit(2).unwrap_err(), Errno::EBADF);
        assert_eq!(inherit(-1).unwrap_err(), Errno::EBADF);
        assert_eq!(inherit(987_654).unwrap_err(), Errno::EBADF);
    }
}
