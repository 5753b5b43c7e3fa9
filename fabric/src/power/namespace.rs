//! Namespace nodes: a process tree with PID, mount, IPC and UTS namespaces of its own.
//!
//! The first process of the namespace is this program again (`namespace-init`, see
//! [`crate::namespace_init`]), which sets up the mounts and becomes the agent. Killing it ends
//! every process of the namespace; the kernel does not let it become a zombie, and so its pidfd
//! readable, before all of them are gone. That makes the kill a fence.

mod standstill;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use lupin_abi::Cause;
use lupin_abi::event::FencePath;
use nix::sched::CloneFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{
    Exit, Fence, Instance, PowerControl, Prepared, StartError, StartRequest, kill_and_wait,
};
use crate::agent_link::ring;
use crate::namespace_init;
use crate::runtime::{NodeFolder, NodeRecord};
use crate::sys::process::{Ended, Process, ProcessName};
use crate::sys::spawn::{Held, Program, hold};
use crate::sys::threads::{self, ThreadTimes};

/// The namespaces of a node. No network and user namespace: nodes of one host talk over its
/// network, and their processes have the users of the host.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Exit code of an agent that cannot use its command line.
const AGENT_BAD_ARGUMENTS: i32 = 2;

/// Starts namespace nodes.
#[derive(Debug)]
pub struct NamespacePower {
    /// The program that has the subcommand `namespace-init`: `lupin-fabricd`.
    pub init: PathBuf,
    /// The agent: `lupin-guest-agent`.
    pub agent: PathBuf,
}

impl PowerControl for NamespacePower {
    fn prepare(&self, request: &StartRequest<'_>) -> Result<Box<dyn Prepared>, StartError> {
        if !self.agent.is_file() {
            let message = format!(
                "there is no agent at {}; build lupin-guest-agent, or say where it is with \
                 --agent or LUPIN_GUEST_AGENT",
                self.agent.display()
            );
            return Err(StartError::no_program(message));
        }
        standstill::forget(request.folder);
        let console = File::options()
            .create(true)
            .append(true)
            .open(request.folder.console())
            .map_err(|e| StartError::of_host("open the console log", &e))?;
        let listener = UnixListener::bind(request.folder.agent_socket())
            .map_err(|e| StartError::of_host("listen on the agent's socket", &e))?;
        let doorbell =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|e| StartError::of_host("make the doorbell", &e.into()))?;
        let peers = request.folder.make_peers()?;
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().to_string().into();
        let args: Vec<OsString> = vec![
            "namespace-init".into(),
            "--hostname".into(),
            request.node.name.clone().into(),
            "--run".into(),
            request.folder.run().into(),
            "--peers".into(),
            peers.into(),
            "--".into(),
            self.agent.clone().into(),
            "--init".into(),
            "--namespace".into(),
            "--node".into(),
            request.node.id.to_string().into(),
            "--generation".into(),
            request.generation.to_string().into(),
            "--heartbeat-ms".into(),
            request.heartbeat_period.as_millis().to_string().into(),
            "--pod-memory-fd".into(),
            number(request.memory.inheritable()),
            "--agent-listener-fd".into(),
            number(listener.as_fd()),
            "--doorbell-fd".into(),
            number(doorbell.as_fd()),
        ];
        let held = hold(&Program {
            path: self.init.clone(),
            args,
            namespaces: NAMESPACES,
            inherit: vec![
                request.memory.inheritable(),
                listener.as_fd(),
                doorbell.as_fd(),
            ],
            output: &console,
        })
        .map_err(|e| cannot_make(&e))?;
        Ok(Box::new(PreparedNamespace {
            held,
            doorbell: doorbell.into(),
            init: self.init.clone(),
            folder: request.folder.clone(),
        }))
    }

    fn adopt(
        &self,
        request: &StartRequest<'_>,
        record: &NodeRecord,
    ) -> io::Result<Option<Arc<dyn Instance>>> {
        let found = Process::find(record.process)?;
        Ok(found.map(|process| {
            let folder = request.folder.clone();
            let instance: Arc<dyn Instance> =
                Arc::new(NamespaceInstance::new(process, OnceLock::new(), folder));
            instance
        }))
    }
}

/// The first process of the node's namespaces could not be made.
fn cannot_make(error: &io::Error) -> StartError {
    let needs = match error.raw_os_error() {
        Some(libc::EPERM) => " (that needs root)",
        Some(libc::ENOSPC) => " (the host's limits of them are in /proc/sys/user)",
        _ => "",
    };
    let action = format!("make the node's process and namespaces{needs}");
    StartError::of_host(action, error)
}

#[derive(Debug)]
struct PreparedNamespace {
    held: Held,
    doorbell: OwnedFd,
    init: PathBuf,
    folder: NodeFolder,
}

impl Prepared for PreparedNamespace {
    fn process(&self) -> ProcessName {
        self.held.name()
    }

    fn release(self: Box<Self>) -> Result<Arc<dyn Instance>, StartError> {
        let process = self
            .held
            .release()
            .map_err(|e| StartError::of_program(&self.init, &e))?;
        let doorbell = OnceLock::from(self.doorbell);
        let instance = NamespaceInstance::new(process, doorbell, self.folder);
        Ok(Arc::new(instance))
    }
}

/// One life of a namespace node.
#[derive(Debug)]
struct NamespaceInstance {
    process: Process,
    folder: NodeFolder,
    /// An eventfd. After a take-over it comes from the agent.
    doorbell: OnceLock<OwnedFd>,
    ended: OnceLock<Option<Ended>>,
    /// Keeps the node's mounts until this is dropped. Else they go while its first process ends,
    /// and the fence, for which survivors wait, would take as long as the kernel takes for that.
    _mounts: Option<File>,
}

impl NamespaceInstance {
    fn new(process: Process, doorbell: OnceLock<OwnedFd>, folder: NodeFolder) -> Self {
        // Only time is lost without it.
        let mounts = File::open(format!("/proc/{}/ns/mnt", process.name().pid)).ok();
        Self {
            process,
            folder,
            doorbell,
            ended: OnceLock::new(),
            _mounts: mounts,
        }
    }
}

impl Instance for NamespaceInstance {
    fn process(&self) -> ProcessName {
        self.process.name()
    }

    fn watch(&self) -> Option<BorrowedFd<'_>> {
        Some(self.process.as_fd())
    }

    fn is_gone(&self) -> bool {
        self.process.is_gone()
    }

    fn fence(&self) -> io::Result<Fence> {
        let begin = Instant::now();
        let path = if self.process.is_gone() {
            FencePath::Exited
        } else {
            kill_and_wait(&self.process)?;
            FencePath::Killed
        };
        Ok(Fence {
            path,
            nanos: begin.elapsed().as_nanos() as u64,
            slots: 0,
        })
    }

    fn confirm_fence(&self, _fence: &Fence) -> io::Result<()> {
        if self.process.is_gone() {
            return Ok(());
        }
        Err(io::Error::other("its first process still exists"))
    }

    fn pause(&self) -> io::Result<()> {
        standstill::pause(self.process.name().pid, &self.folder)
    }

    fn resume(&self) -> io::Result<()> {
        standstill::resume(self.process.name().pid, &self.folder)
    }

    fn quit(&self) {
        self.kill();
    }

    fn kill(&self) {
        if let Err(e) = self.process.kill() {
            log::error!("cannot kill process {}: {e}", self.process.name().pid);
        }
    }

    fn ring(&self) -> bool {
        self.doorbell
            .get()
            .is_some_and(|bell| ring(bell.as_fd()).is_ok())
    }

    fn learn_doorbell(&self, doorbell: OwnedFd) {
        // A life that we started has its bell: the agent sends the same one again.
        if self.doorbell.set(doorbell).is_ok() {
            self.ring();
        }
    }

    fn exit(&self) -> Exit {
        standstill::forget(&self.folder);
        let ended = *self.ended.get_or_init(|| self.process.reap());
        let exit = Exit::of_process(ended);
        match ended {
            Some(Ended::Code(0)) => Exit {
                cause: Cause::GuestPowerOff,
                detail: "the agent ended the node".into(),
                ..exit
            },
            Some(Ended::Code(code)) if code == i32::from(namespace_init::FAILED) => Exit {
                cause: Cause::StartFailed,
                permanent: true,
                detail: "its namespaces could not be set up".into(),
                ..exit
            },
            Some(Ended::Code(code)) if code == i32::from(namespace_init::LACKING) => Exit {
                cause: Cause::StartFailed,
                detail: "its namespaces could not be set up now".into(),
                ..exit
            },
            Some(Ended::Code(AGENT_BAD_ARGUMENTS)) => Exit {
                cause: Cause::StartFailed,
                permanent: true,
                detail: "the agent refuses its arguments: is it of the same version?".into(),
                ..exit
            },
            _ => exit,
        }
    }

    fn thread_times(&self) -> Option<Vec<ThreadTimes>> {
        threads::accounts_of_process(self.process.name().pid)
    }
}
