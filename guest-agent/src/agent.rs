//! The agent as a whole: one thread that waits, and the heartbeat beside it.
//!
//! ```text
//!   start -> [bind, map, check] -> Joined -> loop -> Shutdown or SIGTERM -> end
//!                   | fails
//!                   v
//!             Failed: an init stays reachable for the manager, a service exits
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use lupin_abi::groups::End;
use lupin_abi::layout::SectionKind;
use lupin_abi::node::AgentState;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::WaitStatus;

use crate::directory::{Directory, DirectoryError, Held};
use crate::doorbell::Doorbell;
use crate::heartbeat::Heartbeat;
use crate::identity::{Identity, IdentityError};
use crate::init::{DEFAULT_GRACE, Role, Shutdown, reap};
use crate::link::{Hint, Link};
use crate::memory::{Attaching, Backend, MemoryError, PodMemory, map};
use crate::notify::{notify, watchdog};
use crate::poll::{Poller, Source};
use crate::segments::Segments;
use crate::socket::Server;
use crate::threads::Threads;
use crate::upgrade::Successor;
use crate::wakes::Doorstep;

/// How often the agent looks around without being woken: wake-ups may be lost.
const TICK: Duration = Duration::from_millis(250);
/// How long regions of pod memory may take to appear: when the agent starts, modules are still
/// being loaded.
const REGION_TIMEOUT: Duration = Duration::from_secs(20);
/// How often the agent looks for them.
const REGION_RETRY: Duration = Duration::from_millis(20);

/// Why the agent, or its part in the pod, ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The node does not know who it is.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Arguments that the parser cannot judge.
    #[error("{0}")]
    Arguments(String),
    /// Pod memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl AgentError {
    /// An error of the operating system, with what was tried.
    pub fn os(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let (what, source) = (what.into(), source.into());
        Self::Os { what, source }
    }

    /// The exit status that says it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Identity(_) | Self::Arguments(_) => 2,
            Self::Memory(MemoryError::Attach(_) | MemoryError::NoSuchNode { .. }) => 3,
            Self::Memory(MemoryError::NoRegion { .. } | MemoryError::Device { .. }) => 4,
            Self::Memory(MemoryError::Os { .. } | MemoryError::Map(_)) => 4,
            Self::Memory(MemoryError::NotAttached) | Self::Directory(_) | Self::Os { .. } => 1,
        }
    }
}

/// What finds the node's pod memory. Called again while its regions are missing.
pub type FindMemory = Box<dyn FnMut() -> Result<Box<dyn Backend>, MemoryError>>;

/// A part in the pod that the node is to have.
pub struct Membership {
    identity: Identity,
    socket: PathBuf,
    find: FindMemory,
    next_try: Instant,
    deadline: Instant,
}

impl Membership {
    /// The part of `identity`, in memory that `find` finds, served to processes on `socket`.
    pub fn new(identity: Identity, socket: &Path, find: FindMemory) -> Self {
        let now = Instant::now();
        Self {
            identity,
            socket: socket.into(),
            find,
            next_try: now,
            deadline: now + REGION_TIMEOUT,
        }
    }

    /// Tries to take the part; `None` if that must wait.
    fn take(&mut self, poller: &Poller, now: Instant) -> Option<Result<Pod, AgentError>> {
        match (self.find)() {
            Ok(backend) => Some(Pod::join(backend, self.identity, &self.socket, poller)),
            Err(MemoryError::NoRegion { .. }) if now < self.deadline => {
                self.next_try = now + REGION_RETRY;
                None
            }
            Err(error) => Some(Err(error.into())),
        }
    }
}

/// A node's part in the pod.
pub struct Pod {
    memory: Arc<PodMemory>,
    server: Server,
    /// Takes wake-ups of other nodes until dropped.
    _doorstep: Option<Doorstep>,
    /// Beats until dropped.
    _heartbeat: Heartbeat,
    fenced: bool,
}

impl Pod {
    /// Makes this node part of the pod: maps and checks the sections, starts to beat, serves
    /// `socket`, and says that it has joined.
    ///
    /// # Errors
    /// [`AgentError`]; the node's section says `Failed` then, if there is one.
    pub fn join(
        mut backend: Box<dyn Backend>,
        identity: Identity,
        socket: &Path,
        poller: &Poller,
    ) -> Result<Self, AgentError> {
        let attaching = Attaching::new(backend.as_mut(), identity)?;
        let node = Arc::clone(attaching.node());
        let section = node.section();
        // Between two lives the manager resets the section: what still names this generation
        // was written by an agent of this very life.
        let restarted = section.agent().1 == identity.generation && section.agent_process().1 > 0;
        section.introduce(identity.generation, boot_id(), std::process::id());
        let heartbeat = Heartbeat::start(Arc::clone(&node), identity.heartbeat)
            .map_err(|e| AgentError::os("start of the heartbeat", e))?;
        let joined = Self::finish(attaching, backend, socket, poller, restarted);
        match joined {
            Ok((memory, server, doorstep)) => {
                section.set_state(AgentState::Joined);
                info!(
                    "node {} generation {} joined pod {:?}",
                    identity.node,
                    identity.generation,
                    memory.header().name()
                );
                Ok(Self {
                    memory,
                    server,
                    _doorstep: doorstep,
                    _heartbeat: heartbeat,
                    fenced: false,
                })
            }
            Err(error) => {
                section.set_state(AgentState::Failed);
                Err(error)
            }
        }
    }

    fn finish(
        attaching: Attaching,
        mut backend: Box<dyn Backend>,
        socket: &Path,
        poller: &Poller,
        restarted: bool,
    ) -> Result<(Arc<PodMemory>, Server, Option<Doorstep>), AgentError> {
        let memory = Arc::new(attaching.finish(backend.as_mut())?);
        let directory = Directory::new(Arc::clone(&memory));
        let held = directory.begin(restarted)?;
        for extent in backend.held_segments()? {
            if !held.iter().flat_map(Held::extents).any(|e| e == extent) {
                backend.close_segment(extent)?;
            }
        }
        let pool = || map(backend.as_mut(), SectionKind::Pool, true).map_err(io::Error::other);
        let doorstep = Doorstep::open(socket, Arc::clone(&memory), pool).unwrap_or_else(|error| {
            warn!("wake-ups of other nodes come by the longer way: {error}");
            None
        });
        let threads = Threads::new(directory.clone());
        let segments = Segments::new(directory, backend, held);
        let server = Server::new(socket, poller, threads, segments, restarted)
            .map_err(|e| AgentError::os(format!("serve {}", socket.display()), e))?;
        Ok((memory, server, doorstep))
    }

    fn tick(&mut self, poller: &Poller) {
        self.server.tick(poller);
        if !self.fenced && !self.memory.is_current() {
            self.fenced = true;
            warn!("this node was declared dead: it changes nothing in the pod any more");
        }
    }
}

/// The signals that the agent takes from its queue instead of being interrupted by them. They
/// must be blocked before any thread is started.
///
/// # Errors
/// None that can be caused from outside.
pub fn block_signals() -> Result<SigSet, Errno> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGPWR,
        Signal::SIGHUP,
        Signal::SIGCHLD,
        Signal::SIGUSR2,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

/// The running agent.
pub struct Agent {
    poller: Poller,
    role: Role,
    signals: SignalFd,
    doorbell: Option<Doorbell>,
    link: Link,
    membership: Option<Membership>,
    pod: Option<Pod>,
    shutdown: Option<Shutdown>,
    next_tick: Instant,
    /// `None`: this agent can have no successor in its process.
    successor: Option<Successor>,
    upgrade: bool,
}

impl Agent {
    /// An agent that is to take a part in the pod, or not.
    ///
    /// # Errors
    /// If the system refuses a descriptor.
    pub fn new(
        poller: Poller,
        role: Role,
        signals: &SigSet,
        doorbell: Option<Doorbell>,
        link: Link,
        membership: Option<Membership>,
        successor: Option<Successor>,
    ) -> Result<Self, AgentError> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals =
            SignalFd::with_flags(signals, flags).map_err(|e| AgentError::os("signalfd", e))?;
        poller
            .add(signals.as_fd(), Source::Signals, EpollFlags::EPOLLIN)
            .map_err(|e| AgentError::os("epoll", e))?;
        Ok(Self {
            poller,
            role,
            signals,
            doorbell,
            link,
            membership,
            pod: None,
            shutdown: None,
            next_tick: Instant::now() + TICK,
            successor,
            upgrade: false,
        })
    }

    /// Serves until the node or the agent is told to end.
    ///
    /// # Errors
    /// If a service has no part in the pod: an init stays without. If the kernel can no longer
    /// wait for descriptors.
    pub fn run(mut self) -> Result<(), AgentError> {
        loop {
            self.join()?;
            let events = self
                .poller
                .wait(self.timeout())
                .map_err(|e| AgentError::os("epoll", e))?;
            for (source, flags) in events {
                if self.handle(source, flags) {
                    return Ok(());
                }
                self.relay();
            }
            self.work();
            if let Some(request) = self.link.take_shutdown() {
                self.begin_shutdown(request.grace);
            }
            if self.shutdown.is_some() {
                self.reap();
            }
            if self.upgrade {
                self.make_room();
            }
            let now = Instant::now();
            if let Some(shutdown) = &mut self.shutdown
                && shutdown.proceed(now)
            {
                break;
            }
        }
        // Connections are closed and the heartbeat ends after the last process is gone.
        if let Some(shutdown) = self.shutdown.take() {
            shutdown.finish();
        }
        Ok(())
    }

    /// Takes the part in the pod, once its memory is there.
    fn join(&mut self) -> Result<(), AgentError> {
        let now = Instant::now();
        let Some(membership) = self.membership.as_mut().filter(|m| m.next_try <= now) else {
            return Ok(());
        };
        let Some(result) = membership.take(&self.poller, now) else {
            return Ok(());
        };
        self.membership = None;
        match result {
            Ok(pod) => {
                self.pod = Some(pod);
                notify("READY=1\nSTATUS=joined the pod");
            }
            Err(error) if self.role.is_init() => self.report(&error),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let pod_has_work = self.pod.as_ref().is_some_and(|pod| pod.server.has_work());
        if pod_has_work || self.link.has_work() {
            return Some(Duration::ZERO);
        }
        let of_pod = self.pod.as_ref().and_then(|pod| pod.server.next_deadline());
        let mut next = self.next_tick;
        for deadline in [of_pod, self.link.next_deadline()].into_iter().flatten() {
            next = next.min(deadline);
        }
        if let Some(membership) = &self.membership {
            next = next.min(membership.next_try);
        }
        if let Some(shutdown) = &self.shutdown {
            next = next.min(shutdown.next_deadline());
        }
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Deals with one source; true if the agent ends at once.
    fn handle(&mut self, source: Source, flags: EpollFlags) -> bool {
        let poller = &self.poller;
        match (source, &mut self.pod) {
            (Source::Signals, _) => return self.on_signals(),
            (Source::LinkListener, _) => self.link.on_listener(poller),
            (Source::Link, _) => self.link.on_stream(poller),
            (Source::Command(id), _) => self.link.on_command(id),
            (Source::Doorbell, pod) => {
                let rung = self.doorbell.as_ref().is_some_and(Doorbell::drain);
                if let Some(pod) = pod.as_mut().filter(|_| rung) {
                    pod.server.pump_events(poller);
                }
            }
            (Source::ClientListener, Some(pod)) => pod.server.on_listener(poller),
            (Source::Client(id), Some(pod)) => pod.server.on_client(poller, id, flags),
            (Source::Process(pid), Some(pod)) => pod.server.on_process(pid),
            (Source::Task(pid), Some(pod)) => pod.server.inspect(pid),
            (Source::ProcEvents, Some(pod)) => pod.server.on_proc_events(),
            (
                Source::ClientListener
                | Source::Client(_)
                | Source::Process(_)
                | Source::Task(_)
                | Source::ProcEvents,
                None,
            ) => {}
        }
        false
    }

    /// What other nodes told, and wake-ups for them. At once, for somebody sleeps.
    fn relay(&mut self) {
        let Some(pod) = &mut self.pod else {
            return;
        };
        for hint in self.link.take_hints() {
            match hint {
                Hint::Wake(wake) => pod.server.wake(wake),
                Hint::Deaths => pod.server.tell_deaths(&self.poller),
                Hint::Groups => pod.server.on_group_news(&self.poller),
            }
        }
        self.link.send_hints(pod.server.take_wakes());
    }

    /// News of deaths and groups: to the processes of this node, and then to the others. Once for
    /// all that happened together.
    fn tell(&mut self) {
        if let Some(pod) = &mut self.pod {
            self.link.send_hints(pod.server.take_news(&self.poller));
        }
    }

    fn on_signals(&mut self) -> bool {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                Ok(Signal::SIGCHLD) => self.reap(),
                Ok(Signal::SIGHUP) => {}
                Ok(Signal::SIGUSR2) => {
                    info!("asked to make room for a successor");
                    self.upgrade = true;
                }
                Ok(signal) if self.role.is_init() => {
                    info!("{signal}");
                    self.begin_shutdown(DEFAULT_GRACE);
                }
                Ok(signal) => {
                    // The node goes on: only this service ends.
                    info!("{signal}: the agent ends");
                    return true;
                }
                Err(_) => {}
            }
        }
        false
    }

    fn reap(&mut self) {
        let pids = self.link.pids();
        reap(self.role, &pids, |status| {
            let end = match status {
                WaitStatus::Exited(_, code) => Some(End::Exited(code)),
                WaitStatus::Signaled(_, signal, _) => Some(End::Killed(signal as i32)),
                _ => None,
            };
            let pid = status
                .pid()
                .and_then(|pid| u32::try_from(pid.as_raw()).ok());
            if let (Some(pod), Some(pid), Some(end)) = (&mut self.pod, pid, end) {
                pod.server.on_reaped(pid, end);
            }
            self.link.on_exit(status);
        });
    }

    /// Becomes the successor, once nothing is under way that would be lost: the pipes of the
    /// manager's commands, and a segment that is being scrubbed for somebody who waits.
    fn make_room(&mut self) {
        let is_busy = self.pod.as_ref().is_some_and(|pod| pod.server.has_work());
        let waits = self.membership.is_some() || !self.link.pids().is_empty() || is_busy;
        if self.shutdown.is_some() || waits {
            return;
        }
        self.upgrade = false;
        let Some(successor) = &self.successor else {
            return warn!("this agent cannot have a successor in its process");
        };
        let error = match successor.exec() {
            Err(error) => error,
            Ok(never) => match never {},
        };
        self.report_line(&format!(
            "the successor cannot be executed: {error}; this agent stays"
        ));
    }

    fn report_line(&mut self, line: &str) {
        error!("{line}");
        self.link.log(line);
    }

    fn begin_shutdown(&mut self, grace: Duration) {
        if self.shutdown.is_some() {
            return debug!("the node shuts down already");
        }
        if let Some(pod) = &self.pod {
            pod.memory.node().set_state(AgentState::Stopping);
        }
        notify("STOPPING=1");
        self.shutdown = Some(Shutdown::begin(self.role, grace, Instant::now()));
    }

    /// Long work in small steps, and what is due by time.
    fn work(&mut self) {
        self.tell();
        let poller = &self.poller;
        self.link.work(poller);
        let now = Instant::now();
        let link_is_due = self.link.next_deadline().is_some_and(|at| at <= now);
        if now >= self.next_tick || link_is_due {
            self.link.tick(poller, now);
        }
        if now >= self.next_tick {
            watchdog();
        }
        let Some(pod) = &mut self.pod else {
            if now >= self.next_tick {
                self.next_tick = now + TICK;
            }
            return;
        };
        pod.server.work(poller);
        // What the work or the tick before brought.
        self.relay();
        self.tell();
        let (Some(pod), poller) = (&mut self.pod, &self.poller) else {
            return;
        };
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            pod.tick(poller);
            if let Some(doorbell) = &self.doorbell {
                doorbell.drain();
            }
        }
    }

    /// Tells the manager, if it listens, and the log why there is no part in the pod.
    pub fn report(&mut self, error: &AgentError) {
        self.report_line(&error.to_string());
    }
}

/// The kernel's boot id; 0 if it has none.
fn boot_id() -> u128 {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()
        .and_then(|text| {
            let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
            u128::from_str_radix(&digits, 16).ok()
        })
        .unwrap_or(0)
}
