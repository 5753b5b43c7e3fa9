//! KVM nodes: one VMM process per life.
//!
//! The polite fence asks the VMM's fence thread to delete the writable pod memslots, for a
//! bounded time. If there is no answer, the process is killed, and the fence is complete when its
//! last thread is gone: virtual CPUs are threads, and nothing else runs guest code.

mod control;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use lupin_abi::event::FencePath;
use lupin_abi::{Cause, Generation, NodeId};
use nix::sched::CloneFlags;

use super::{
    Exit, Fence, Instance, PowerControl, Prepared, StartError, StartRequest, kill_and_wait,
};
use crate::agent_link::ring;
use crate::podfile::{Backend, DiskAccess};
use crate::runtime::{NodeFolder, NodeRecord};
use crate::sys::process::{Ended, Process, ProcessName};
use crate::sys::spawn::{Held, Program, hold};
use crate::sys::threads::{self, ThreadTimes};
use crate::vmm_protocol::{ExitRecord, ExitStatus, Reply, Request};
use control::Control;

/// Between two attempts to reach a VMM that is starting.
const HELLO_PAUSE: Duration = Duration::from_millis(20);
/// How long one answer to a hello may take.
const HELLO_BOUND: Duration = Duration::from_secs(2);
/// How long all vCPUs together may take to leave the guest, or to enter it.
const MOVE_BOUND: Duration = Duration::from_secs(5);

/// Starts KVM nodes.
#[derive(Clone, Debug)]
pub struct VmmPower {
    /// The program: `lupin-vmm`.
    pub program: PathBuf,
    /// How long the polite fence may take.
    pub fence_bound: Duration,
}

impl VmmPower {
    fn instance(
        &self,
        process: Process,
        folder: NodeFolder,
        node: NodeId,
        generation: Generation,
    ) -> Arc<VmmInstance> {
        let instance = Arc::new_cyclic(|this| VmmInstance {
            this: this.clone(),
            process,
            folder,
            node,
            generation,
            fence_bound: self.fence_bound,
            greets: AtomicBool::new(false),
            greeting: OnceLock::new(),
            ended: OnceLock::new(),
            quitting: OnceLock::new(),
        });
        instance.greet_in_background();
        instance
    }
}

impl PowerControl for VmmPower {
    fn prepare(&self, request: &StartRequest<'_>) -> Result<Box<dyn Prepared>, StartError> {
        let Backend::Kvm(guest) = &request.node.backend else {
            return Err(StartError::permanent("this node is no KVM guest"));
        };
        if !self.program.is_file() {
            let message = format!(
                "there is no VMM at {}; build lupin-vmm, or say where it is with --vmm or \
                 LUPIN_VMM",
                self.program.display()
            );
            return Err(StartError::no_program(message));
        }
        let log = request.folder.path().join("vmm.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|e| StartError::of_host(format_args!("open {}", log.display()), &e))?;
        let joined = |parts: &[OsString]| {
            let mut whole = OsString::new();
            for part in parts {
                whole.push(part);
            }
            whole
        };
        let mut args: Vec<OsString> = vec![
            "run".into(),
            "--name".into(),
            request.node.name.clone().into(),
            "--kernel".into(),
            guest.kernel.clone().into(),
            "--initramfs".into(),
            guest.initramfs.clone().into(),
            "--cpus".into(),
            format!("count={}", guest.cpus).into(),
            "--memory".into(),
            format!("size={}", crate::podfile::size::display(guest.memory)).into(),
            "--pod-memory".into(),
            joined(&[
                "file=".into(),
                request.memory.path().into(),
                format!(
                    ",node={},generation={},heartbeat_ms={}",
                    request.node.id,
                    request.generation,
                    request.heartbeat_period.as_millis()
                )
                .into(),
            ]),
            "--serial".into(),
            joined(&["file=".into(), request.folder.console().into()]),
            "--runtime-dir".into(),
            request.folder.path().into(),
        ];
        for (n, disk) in guest.disks.iter().enumerate() {
            // One that is not kept loses its name as soon as the VMM has it open.
            let fresh = || request.folder.path().join(format!("disk{n}.overlay"));
            let mut option: OsString = joined(&["path=".into(), disk.path.clone().into()]);
            match disk.access {
                DiskAccess::ReadWrite => {}
                DiskAccess::ReadOnly => option.push(",readonly=on"),
                DiskAccess::Overlay | DiskAccess::KeptOverlay => {
                    option.push(",overlay=");
                    option.push(disk.kept.clone().unwrap_or_else(fresh));
                    if disk.kept.is_some() {
                        option.push(",keep=on");
                    }
                }
            }
            if let Some(id) = &disk.id {
                option.push(format!(",id={id}"));
            }
            args.extend(["--disk".into(), option]);
        }
        if !guest.cmdline.is_empty() {
            args.extend(["--cmdline".into(), guest.cmdline.clone().into()]);
        }
        let held = hold(&Program {
            path: self.program.clone(),
            args,
            namespaces: CloneFlags::empty(),
            inherit: Vec::new(),
            output: &log,
        })
        .map_err(|e| StartError::of_host("make the VMM's process", &e))?;
        Ok(Box::new(PreparedVmm {
            held,
            power: self.clone(),
            folder: request.folder.clone(),
            node: request.node.id,
            generation: request.generation,
        }))
    }

    fn adopt(
        &self,
        request: &StartRequest<'_>,
        record: &NodeRecord,
    ) -> io::Result<Option<Arc<dyn Instance>>> {
        let found = Process::find(record.process)?;
        Ok(found.map(|process| {
            let instance: Arc<dyn Instance> = self.instance(
                process,
                request.folder.clone(),
                request.node.id,
                record.generation,
            );
            instance
        }))
    }

    fn last_words(&self, folder: &NodeFolder, record: &NodeRecord) -> Exit {
        exit_of(folder, record.process.pid, None)
    }
}

#[derive(Debug)]
struct PreparedVmm {
    held: Held,
    power: VmmPower,
    folder: NodeFolder,
    node: NodeId,
    generation: Generation,
}

impl Prepared for PreparedVmm {
    fn process(&self) -> ProcessName {
        self.held.name()
    }

    fn release(self: Box<Self>) -> Result<Arc<dyn Instance>, StartError> {
        let process = self
            .held
            .release()
            .map_err(|e| StartError::of_program(&self.power.program, &e))?;
        Ok(self
            .power
            .instance(process, self.folder, self.node, self.generation))
    }
}

/// What a VMM said of itself.
#[derive(Debug)]
struct Greeting {
    doorbell: OwnedFd,
    vcpu_tids: Vec<u32>,
}

/// One life of a KVM node.
#[derive(Debug)]
struct VmmInstance {
    this: Weak<Self>,
    process: Process,
    folder: NodeFolder,
    node: NodeId,
    generation: Generation,
    fence_bound: Duration,
    /// A thread asks the VMM who it is, or has asked.
    greets: AtomicBool,
    greeting: OnceLock<Greeting>,
    ended: OnceLock<Option<Ended>>,
    quitting: OnceLock<Control>,
}

impl VmmInstance {
    /// Asks the VMM who it is, which listens some time after its start: the manager's loop cannot
    /// wait for that. `false` if there is no thread to be had for it; asked again then, whenever
    /// the answer is wanted.
    fn greet_in_background(&self) -> bool {
        // Relaxed: it guards nothing. Two threads would only ask twice.
        if self.greets.swap(true, Ordering::Relaxed) {
            return true;
        }
        let weak = self.this.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("hello-{}", self.node))
            .spawn(move || {
                while let Some(instance) = weak.upgrade() {
                    if instance.greet() || instance.process.is_gone() {
                        return;
                    }
                    drop(instance);
                    std::thread::sleep(HELLO_PAUSE);
                }
            });
        if let Err(e) = &spawned {
            let node = self.node;
            log::error!("node {node} cannot be rung yet: no thread to greet its VMM: {e}");
            self.greets.store(false, Ordering::Relaxed);
        }
        spawned.is_ok()
    }

    /// Asks the VMM who it is; `true` once there is nothing more to ask.
    fn greet(&self) -> bool {
        let socket = self.folder.control_socket();
        let Ok(control) = Control::connect(&socket) else {
            return false;
        };
        let (reply, doorbell) = match control.ask(&Request::Hello, HELLO_BOUND) {
            Ok(answer) => answer,
            Err(e) => {
                log::debug!("node {}: no hello from its VMM yet: {e}", self.node);
                return false;
            }
        };
        let Reply::Hello {
            pid,
            node,
            generation,
            vcpu_tids,
        } = reply
        else {
            log::error!("node {}: its VMM answers hello with {reply:?}", self.node);
            return true;
        };
        let expected = (self.process.name().pid, self.node.get(), self.generation);
        if (pid, node, generation) != expected {
            log::error!(
                "node {}: the VMM on its socket is process {pid}, node {node}, generation \
                 {generation}; expected {expected:?}",
                self.node
            );
            return true;
        }
        let Some(doorbell) = doorbell else {
            log::error!(
                "node {} cannot be rung: its VMM sent no doorbell",
                self.node
            );
            return true;
        };
        let _ = self.greeting.set(Greeting {
            doorbell,
            vcpu_tids,
        });
        // What happened while the bell was not known went unheard.
        self.ring();
        true
    }

    /// Asks for something until it is done or [`MOVE_BOUND`] is over.
    fn move_to(&self, request: &Request, done: &Reply) -> io::Result<()> {
        let until = Instant::now() + MOVE_BOUND;
        loop {
            let answer = Control::connect(&self.folder.control_socket())
                .and_then(|control| control.ask(request, HELLO_BOUND));
            let error = match answer {
                Ok((reply, _)) if reply == *done => return Ok(()),
                Ok((Reply::Error { message }, _)) => io::Error::other(message),
                Ok((other, _)) => io::Error::other(format!("the VMM answers {other:?}")),
                Err(e) => e,
            };
            if self.process.is_gone() || Instant::now() >= until {
                return Err(error);
            }
            std::thread::sleep(HELLO_PAUSE);
        }
    }

    /// The polite fence.
    fn delete_memslots(&self) -> io::Result<u32> {
        let control = Control::connect(&self.folder.control_socket())?;
        match control.ask(&Request::Fence, self.fence_bound)?.0 {
            Reply::Fenced { slots, .. } => Ok(slots),
            other => Err(io::Error::other(format!("the VMM answers {other:?}"))),
        }
    }
}

impl Instance for VmmInstance {
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
        let (path, slots) = if self.process.is_gone() {
            (FencePath::Exited, 0)
        } else {
            match self.delete_memslots() {
                Ok(slots) => (FencePath::Memslots, slots),
                Err(e) => {
                    let took = begin.elapsed().as_millis();
                    log::info!(
                        "node {}: no polite fence after {took} ms ({e}): killing its VMM",
                        self.node
                    );
                    kill_and_wait(&self.process)?;
                    (FencePath::Killed, 0)
                }
            }
        };
        Ok(Fence {
            path,
            nanos: begin.elapsed().as_nanos() as u64,
            slots,
        })
    }

    fn pause(&self) -> io::Result<()> {
        self.move_to(&Request::Pause, &Reply::Paused)
    }

    fn resume(&self) -> io::Result<()> {
        self.move_to(&Request::Resume, &Reply::Resumed)
    }

    fn quit(&self) {
        let sent = Control::connect(&self.folder.control_socket()).and_then(|control| {
            control.send(&Request::Quit)?;
            Ok(control)
        });
        match sent {
            // Kept open: the VMM answers before it exits, and nobody need wait for that.
            Ok(control) => drop(self.quitting.set(control)),
            Err(_) => self.kill(),
        }
    }

    fn kill(&self) {
        if let Err(e) = self.process.kill() {
            log::error!("cannot kill process {}: {e}", self.process.name().pid);
        }
    }

    fn ring(&self) -> bool {
        match self.greeting.get() {
            Some(greeting) => ring(greeting.doorbell.as_fd()).is_ok(),
            None => {
                self.greet_in_background();
                false
            }
        }
    }

    fn exit(&self) -> Exit {
        let ended = *self.ended.get_or_init(|| self.process.reap());
        exit_of(&self.folder, self.process.name().pid, ended)
    }

    fn thread_times(&self) -> Option<Vec<ThreadTimes>> {
        let Some(greeting) = self.greeting.get() else {
            return self.greet_in_background().then(Vec::new);
        };
        threads::accounts(self.process.name().pid, &greeting.vcpu_tids)
    }
}

/// Why a VMM ended: what it wrote, else how its process ended.
fn exit_of(folder: &NodeFolder, pid: u32, ended: Option<Ended>) -> Exit {
    let record = ExitRecord::read(folder.path(), pid);
    let status = record.as_ref().map(|record| record.status).or(match ended {
        Some(Ended::Code(code)) => ExitStatus::from_code(code),
        _ => None,
    });
    let exit = Exit::of_process(ended);
    let Some(status) = status else {
        return exit;
    };
    let (cause, permanent) = match status {
        ExitStatus::PowerOff => (Cause::GuestPowerOff, false),
        ExitStatus::Internal => (Cause::VmmExit, false),
        ExitStatus::BadArguments | ExitStatus::NoKvm => (Cause::StartFailed, true),
        ExitStatus::Reset => (Cause::GuestReboot, false),
        ExitStatus::Panic => (Cause::Panic, false),
        ExitStatus::Crash => (Cause::TripleFault, false),
        ExitStatus::Stopped => (Cause::Operator, false),
    };
    Exit {
        cause,
        evidence: [status.code() as u32 as u64, 0],
        permanent,
        detail: record.map_or(exit.detail, |record| record.detail),
    }
}
