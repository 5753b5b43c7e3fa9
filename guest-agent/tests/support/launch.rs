//! What a manager makes for agents of namespace nodes: formatted pod memory, and their processes.

use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use lupin_abi::NodeId;
use lupin_abi::layout::{PodHeader, SectionKind};
use nix::sys::memfd::{MFdFlags, memfd_create};

pub const AGENT: &str = env!("CARGO_BIN_EXE_lupin-guest-agent");

/// Pod memory with sections for the nodes 1 to `nodes`.
pub fn pod_memory(header: &PodHeader, nodes: u32) -> File {
    let file = File::from(memfd_create("pod", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(header.total_size()).unwrap();
    let nodes = (1..=nodes).map(|id| {
        let range = header.node(NodeId::new(id).unwrap()).unwrap();
        (SectionKind::Node, id, range)
    });
    for (kind, id, range) in nodes.chain([
        (SectionKind::Instances, 0, header.instances()),
        (SectionKind::System, 0, header.kernel()),
    ]) {
        let bytes = header.encode_section(kind, id, range.size);
        file.write_all_at(&bytes, range.offset).unwrap();
    }
    file.write_all_at(&header.encode(), 0).unwrap();
    file
}

/// Starts an agent that is passed the pod's memory, the listener of its manager, and its doorbell.
pub fn spawn(mut command: Command, passed: [RawFd; 3]) -> Agent {
    command
        .args(["--pod-memory-fd=40", "--agent-listener-fd=41"])
        .arg("--doorbell-fd=42")
        .stdin(Stdio::null());
    let dup = move || {
        for (fd, target) in passed.iter().zip(40..) {
            // SAFETY: system calls on descriptors of the child alone, after the fork.
            if unsafe { libc::dup2(*fd, target) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(dup) };
    Agent(command.spawn().unwrap())
}

/// Killed if a test ends early.
pub struct Agent(pub Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
