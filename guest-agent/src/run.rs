//! From a command line to a running agent.

use std::fs;
use std::os::fd::OwnedFd;

use log::{info, warn};
use lupin_abi::port::{AGENT_PORT, FABRIC_PORT};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::sys::utsname::uname;

use crate::agent::{Agent, AgentError, FindMemory, Membership};
use crate::cli::{Options, inherit};
use crate::doorbell::Doorbell;
use crate::identity::{Identity, from_cmdline};
use crate::init::Role;
use crate::link::{Endpoint, Introduction, Link, port};
use crate::memory::devdax::DevDax;
use crate::memory::podfile::PodFile;
use crate::memory::sysfs::DaxBus;
use crate::memory::{Backend, MemoryError};
use crate::poll::Poller;
use crate::priority;
use crate::upgrade::Successor;

/// Descriptors that the agent may need: clients, processes, segments.
const DESCRIPTORS: u64 = 8192;

struct Plan {
    /// `None`: not a node of a pod.
    pod: Option<(Identity, FindMemory)>,
    endpoint: Option<Endpoint>,
    doorbell: Option<OwnedFd>,
    /// Descriptors that a successor is to inherit as well, by their flags.
    inherited: Vec<(&'static str, OwnedFd)>,
}

/// Runs the agent to its end.
///
/// # Errors
/// [`AgentError`], of which [`AgentError::exit_code`] says the exit status.
pub fn run(options: &Options, signals: &SigSet) -> Result<(), AgentError> {
    let role = role(options);
    raise_descriptor_limit();
    if role.is_init() && std::process::id() != 1 {
        // Orphans come here instead of to PID 1.
        if let Err(error) = prctl::set_child_subreaper(true) {
            warn!("orphans are not reaped here: {error}");
        }
    }
    let poller = Poller::new().map_err(|e| AgentError::os("epoll", e))?;
    let (plan, trouble) = match plan(options) {
        Ok(plan) => (plan, None),
        // A guest that is not of a pod still needs its init. Beside another PID 1 this may be
        // anybody's machine, which must not be powered off because the agent was told to end.
        Err(error) if role == Role::GuestInit && std::process::id() == 1 => {
            (bare_guest(options), Some(error))
        }
        Err(error) => return Err(error),
    };
    let successor = Successor::new(plan.inherited)
        .inspect_err(|error| warn!("/proc/self/exe: {error}: no upgrade in place"))
        .ok();
    let identity = plan.pod.as_ref().map(|(identity, _)| *identity);
    let introduction = Introduction {
        node: identity.map_or(0, |i| i.node.get()),
        generation: identity.map_or(0, |i| i.generation),
        kernel: uname().map_or_else(
            |_| String::new(),
            |name| name.release().to_string_lossy().into_owned(),
        ),
        environment: vec![(
            lupin_abi::socket::SOCKET_ENV.into(),
            options.socket.to_string_lossy().into_owned(),
        )],
    };
    // The namespace manager gets the doorbell from the agent: it may be another than the one
    // that made it.
    let to_send = if options.namespace {
        plan.doorbell.as_ref().and_then(|fd| fd.try_clone().ok())
    } else {
        None
    };
    let link = Link::new(plan.endpoint, introduction, to_send, &poller)
        .map_err(|e| AgentError::os("watch the manager link", e))?;
    let doorbell = match plan.doorbell.map(|fd| Doorbell::new(fd, &poller)) {
        None => None,
        Some(Ok(doorbell)) => Some(doorbell),
        Some(Err(error)) => {
            warn!("doorbell: {error}: events are noticed late");
            None
        }
    };
    let membership = plan
        .pod
        .map(|(identity, find)| Membership::new(identity, &options.socket, find));
    if let Err(error) = priority::raise() {
        info!("no raised priority ({error}): a busy node learns of failures late");
    }
    let mut agent = Agent::new(poller, role, signals, doorbell, link, membership, successor)?;
    if let Some(error) = trouble {
        agent.report(&error);
    }
    agent.run()
}

fn role(options: &Options) -> Role {
    match (options.init, options.namespace) {
        (false, _) => Role::Service,
        (true, false) => Role::GuestInit,
        // Outside of a PID namespace of its own, "all processes" are not this node's.
        (true, true) if std::process::id() == 1 => Role::NamespaceInit,
        (true, true) => Role::Service,
    }
}

fn plan(options: &Options) -> Result<Plan, AgentError> {
    if options.namespace {
        namespace(options)
    } else {
        guest(options)
    }
}

fn namespace(options: &Options) -> Result<Plan, AgentError> {
    let mut inherited = Vec::new();
    let mut take = |flag: &'static str, fd: Option<i32>| {
        fd.map(|fd| {
            let taken = inherit(fd).map_err(|e| {
                AgentError::Arguments(format!("--{flag} {fd}: not an inherited descriptor: {e}"))
            })?;
            let kept = taken.try_clone();
            inherited.push((flag, kept.map_err(|e| AgentError::os("duplicate", e))?));
            Ok::<_, AgentError>(taken)
        })
        .transpose()
    };
    let node = options.node.unwrap_or(0);
    let generation = options.generation.unwrap_or(0);
    let identity = Identity::new(node, generation, options.heartbeat_ms)?;
    let memory = take("pod-memory-fd", options.pod_memory_fd)?
        .ok_or_else(|| AgentError::Arguments("--pod-memory-fd is missing".into()))?;
    let find: FindMemory = Box::new(move || {
        let memory = memory
            .try_clone()
            .map_err(|e| MemoryError::os("duplicate the pod memory's descriptor", e))?;
        Ok(Box::new(PodFile::new(memory, identity)?) as Box<dyn Backend>)
    });
    let endpoint = take("agent-listener-fd", options.agent_listener_fd)?.map(Endpoint::Listener);
    let doorbell = take("doorbell-fd", options.doorbell_fd)?;
    Ok(Plan {
        pod: Some((identity, find)),
        endpoint,
        doorbell,
        inherited,
    })
}

fn guest(options: &Options) -> Result<Plan, AgentError> {
    let text = fs::read_to_string(&options.cmdline)
        .map_err(|e| AgentError::os(format!("read {}", options.cmdline.display()), e))?;
    let (identity, sections) = from_cmdline(&text)?;
    let (sysfs, dev) = (options.sysfs.clone(), options.dev.clone());
    let find: FindMemory = Box::new(move || {
        let bus = DaxBus::new(&sysfs, &dev);
        Ok(Box::new(DevDax::new(bus, sections)?) as Box<dyn Backend>)
    });
    Ok(Plan {
        pod: Some((identity, find)),
        ..bare_guest(options)
    })
}

/// What a guest has whether or not it is a node.
fn bare_guest(options: &Options) -> Plan {
    let port = |name: &str| {
        let path = port::find(&options.sysfs, &options.dev, name)?;
        match port::open_port(&path) {
            Ok(fd) => Some((fd, path)),
            Err(error) => {
                warn!("port {name}: {}: {error}", path.display());
                None
            }
        }
    };
    let agent = port(AGENT_PORT);
    if agent.is_none() {
        info!("there is no port {AGENT_PORT}: no manager can talk to this agent");
    }
    Plan {
        pod: None,
        endpoint: agent.map(|(fd, path)| Endpoint::Port(fd, path)),
        doorbell: port(FABRIC_PORT).map(|(fd, _)| fd),
        inherited: Vec::new(),
    }
}

/// Best effort: without it, only many clients at once are a problem.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wanted = DESCRIPTORS.min(hard).max(soft);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
    });
    if let Err(error) = raised {
        warn!("descriptor limit: {error}");
    }
}
