//! One connection to the agent: introduced, and restored when the agent was restarted.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lupin_abi::groups::GroupRequest;
use lupin_abi::socket::{self, Mapping as WireMapping, Reply, Request};
use lupin_abi::{ABI_VERSION, Generation, InstanceId, NodeId};

use super::error::ClientError;
use super::packet::PacketSocket;
use crate::wait::deadline_after;

/// How patient a client is.
#[derive(Clone, Debug)]
pub struct Patience {
    /// How long to try to connect: an agent that is being restarted is away for a moment.
    pub connect: Duration,
    /// How long one request may take. Creating a large segment scrubs it first; whoever opens it
    /// meanwhile waits as long.
    pub request: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            request: Duration::from_secs(60),
        }
    }
}

/// What the agent says of itself and its node.
#[derive(Debug)]
pub(crate) struct Welcome {
    pub(crate) node: NodeId,
    pub(crate) generation: Generation,
    pub(crate) fabric: (OwnedFd, WireMapping),
    pub(crate) instances: (OwnedFd, WireMapping),
}

impl Welcome {
    pub(crate) fn instance(&self) -> InstanceId {
        InstanceId::of_node(self.node, self.generation)
    }
}

/// Where the agent is and how patient to be with it.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) path: PathBuf,
    pub(crate) patience: Patience,
}

impl Address {
    /// Connects and introduces this program, again and again until patience ends.
    pub(crate) fn connect(&self) -> Result<(PacketSocket, Welcome), ClientError> {
        let deadline = deadline_after(self.patience.connect);
        let mut pause = Duration::from_millis(2);
        loop {
            let source = match self.try_connect() {
                Ok(connected) => return Ok(connected),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again(source)) => source,
            };
            if Instant::now() + pause > deadline {
                let path = self.path.clone();
                return Err(ClientError::NoAgent { path, source });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    fn try_connect(&self) -> Result<(PacketSocket, Welcome), Attempt> {
        let socket = connect_to(&self.path)?;
        let deadline = deadline_after(self.patience.request);
        let version = ABI_VERSION;
        let hello = Request::Hello { version };
        match exchange(&socket, &hello, deadline, self.patience.request) {
            Ok(answer) => Ok((socket, welcome(answer).map_err(Attempt::Final)?)),
            // The agent went away between connect and answer.
            Err(ClientError::Connection { source, .. }) => Err(Attempt::Again(source)),
            Err(other) => Err(Attempt::Final(other)),
        }
    }
}

enum Attempt {
    Again(io::Error),
    Final(ClientError),
}

fn connect_to(path: &Path) -> Result<PacketSocket, Attempt> {
    PacketSocket::connect(path).map_err(|source| match source.raw_os_error() {
        // Not there yet, nobody behind it, or its queue is full.
        Some(libc::ENOENT | libc::ECONNREFUSED | libc::EAGAIN | libc::EINTR) => {
            Attempt::Again(source)
        }
        _ => Attempt::Final(ClientError::NoAgent {
            path: path.into(),
            source,
        }),
    })
}

fn welcome((reply, fds): (Reply, Vec<OwnedFd>)) -> Result<Welcome, ClientError> {
    let what = "hello";
    let protocol = |detail: String| ClientError::Protocol { what, detail };
    let (node, generation, fabric, instances) = match reply {
        Reply::Welcome {
            version,
            node,
            generation,
            fabric,
            instances,
        } => {
            if version != ABI_VERSION {
                let (agent, own) = (version, ABI_VERSION);
                return Err(ClientError::Version { agent, own });
            }
            (node, generation, fabric, instances)
        }
        other => return Err(refused_or(what, other)),
    };
    let node = NodeId::new(node).ok_or_else(|| protocol(format!("{node} is no node id")))?;
    let count = fds.len();
    let [fabric_fd, instances_fd] = <[OwnedFd; 2]>::try_from(fds)
        .map_err(|_| protocol(format!("expected 2 descriptors, got {count}")))?;
    Ok(Welcome {
        node,
        generation,
        fabric: (fabric_fd, fabric),
        instances: (instances_fd, instances),
    })
}

/// The error for a reply that is not the one hoped for.
pub(crate) fn refused_or(what: &'static str, reply: Reply) -> ClientError {
    match reply {
        Reply::Refused { code, message } => ClientError::Refused {
            what,
            code,
            message,
        },
        other => ClientError::Protocol {
            what,
            detail: format!("unexpected {other:?}"),
        },
    }
}

/// The name of a request in messages.
pub(crate) fn name_of(request: &Request) -> &'static str {
    match request {
        Request::Hello { .. } => "hello",
        Request::RegisterThread { .. } => "the registration of a thread",
        Request::ReleaseThread { .. } => "the release of a thread",
        Request::CreateSegment { .. } => "the creation of a segment",
        Request::OpenSegment { .. } => "the opening of a segment",
        Request::ReopenSegment { .. } => "the re-opening of a segment",
        Request::GrowSegment { .. } => "the growth of a segment",
        Request::RenameSegment { .. } => "the renaming of a segment",
        Request::RemoveSegment { .. } => "the removal of a segment",
        Request::ListSegments => "the list of segments",
        Request::Subscribe { .. } => "the subscription to events",
        Request::Group(request) => match request {
            GroupRequest::Create { .. } => "the creation of a group",
            GroupRequest::SetAdmission { .. } => "the change of a group's rule",
            GroupRequest::Remove { .. } => "the removal of a group",
            GroupRequest::List => "the list of groups",
            GroupRequest::Join { .. } => "the joining of a group",
            GroupRequest::Leave { .. } => "the leaving of a group",
            GroupRequest::Members { .. } => "the list of members",
            GroupRequest::Watch { .. } => "the watch of a group",
            GroupRequest::Expel { .. } => "the expulsion of a member",
        },
        Request::WatchDeaths => "the subscription to deaths",
        Request::Wake { .. } => "a wake-up",
    }
}

/// Sends a request and returns the first reply that is not an event, with its descriptors.
pub(crate) fn exchange(
    socket: &PacketSocket,
    request: &Request,
    deadline: Instant,
    waited: Duration,
) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
    let what = name_of(request);
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut => ClientError::Timeout { what, waited },
        io::ErrorKind::InvalidData => ClientError::Protocol {
            what,
            detail: source.to_string(),
        },
        _ => ClientError::Connection { what, source },
    };
    let packet = socket::encode(request).map_err(|e| ClientError::Protocol {
        what,
        detail: format!("the request does not encode: {e}"),
    })?;
    socket.send(&packet, deadline).map_err(failed)?;
    loop {
        let (packet, fds) = socket.receive(deadline).map_err(failed)?;
        let reply = socket::decode(&packet).map_err(|e| ClientError::Protocol {
            what,
            detail: format!("a packet of {} bytes does not decode: {e}", packet.len()),
        })?;
        match reply {
            Reply::Event(_) | Reply::EventsLost { .. } | Reply::Deaths => {}
            reply => return Ok((reply, fds)),
        }
    }
}
