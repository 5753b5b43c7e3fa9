//! A program's way into the pod: through its node's agent.
//!
//! [`Pod::attach`] connects to the agent's socket and maps what every program may read: the
//! generation table with the fabric's events, and the pod's thread instances. From then on the
//! agent is only asked for things that need its authority (segments, thread instances); locks,
//! liveness and data work on shared memory alone, also while the agent is being restarted.

mod connection;
mod error;
mod events;
mod group;
mod group_watch;
mod packet;
// Hidden and not private: agents send in the place of processes that may not.
#[doc(hidden)]
pub mod peers;
mod segment;
mod thread;
pub(crate) mod wake;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lupin_abi::fabric::FabricSection;
use lupin_abi::instances::InstancesSection;
use lupin_abi::layout::{FABRIC_SIZE, INSTANCES_SIZE, PodHeader, SectionKind, read_header};
use lupin_abi::socket::{Reply, Request, SOCKET_ENV, SOCKET_PATH};
use lupin_abi::{AttachError, InstanceId, NodeId};

pub use connection::Patience;
pub use error::ClientError;
pub use events::{Events, Happening};
pub use group::{
    Admission, End, Expulsion, GroupId, GroupInfo, Leftover, Member, MemberInfo, Membership,
    Notification, Secret, What,
};
pub use group_watch::{GroupEvent, Notifications};
pub use lupin_abi::socket::{Lifetime, RefusalCode, SegmentInfo};
pub use segment::{GroupSegments, Segment};
pub use thread::{OwnThread, Thread};

use connection::{Address, Welcome, exchange};
use packet::PacketSocket;

use crate::liveness::{NodeLiveness, ThreadLiveness};
use crate::shm::{Access, Mapping};
use crate::wait::deadline_after;

/// An attached pod. Clones share the attachment.
#[derive(Clone, Debug)]
pub struct Pod {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: Address,
    header: PodHeader,
    me: InstanceId,
    fabric: Arc<Mapping>,
    instances: Mapping,
    /// `None` after it broke, until the next request restores it.
    connection: Mutex<Option<PacketSocket>>,
}

impl Pod {
    /// Attaches through the agent at the usual place: the socket that the environment variable
    /// `LUPIN_AGENT_SOCKET` names, or else `/run/lupin/agent.sock`.
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] if nobody answers for the time of [`Patience::default`];
    /// version, protocol and mapping errors.
    pub fn attach() -> Result<Self, ClientError> {
        let path = std::env::var_os(SOCKET_ENV).map_or_else(|| SOCKET_PATH.into(), PathBuf::from);
        Self::attach_at(path, Patience::default())
    }

    /// Attaches through the agent at `path`.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_at(path: impl Into<PathBuf>, patience: Patience) -> Result<Self, ClientError> {
        let path = path.into();
        let address = Address { path, patience };
        let (socket, welcome) = address.connect()?;
        let me = welcome.instance();
        let fabric = map_section(&welcome.fabric, FABRIC_SIZE)?;
        let instances = map_section(&welcome.instances, INSTANCES_SIZE)?;
        // SAFETY: mapped for as long as `fabric`, of the section's size (checked in
        // `map_section`), page aligned, used through the abi's atomics.
        let section = unsafe { FabricSection::from_ptr(fabric.as_ptr()) };
        // Only the fabric section is mapped: whether the rest is there is the agent's to know.
        let header = PodHeader::decode(&read_header(section.header_words()), u64::MAX)?;
        // SAFETY: as above, for the instances.
        let section = unsafe { InstancesSection::from_ptr(instances.as_ptr()) };
        let found = read_header(section.header_words());
        header.check_section(&found, SectionKind::Instances, 0, INSTANCES_SIZE)?;
        Ok(Self {
            inner: Arc::new(Inner {
                address,
                header,
                me,
                fabric: Arc::new(fabric),
                instances,
                connection: Mutex::new(Some(socket)),
            }),
        })
    }

    /// The pod's header: its name, id and sizes.
    pub fn header(&self) -> &PodHeader {
        &self.inner.header
    }

    /// The node on which this program runs.
    pub fn node(&self) -> NodeId {
        // `connect` accepts node ids only.
        self.inner.me.node().unwrap_or_else(|| unreachable!())
    }

    /// The node and the life of it to which this program belongs.
    pub fn node_instance(&self) -> InstanceId {
        self.inner.me
    }

    /// The generation table and the event ring, read-only.
    pub fn fabric(&self) -> &FabricSection {
        // SAFETY: checked at attach; mapped for as long as `self.inner`.
        unsafe { FabricSection::from_ptr(self.inner.fabric.as_ptr()) }
    }

    /// The pod's thread instances, read-only.
    pub fn instances(&self) -> &InstancesSection {
        // SAFETY: checked at attach; mapped for as long as `self.inner`.
        unsafe { InstancesSection::from_ptr(self.inner.instances.as_ptr()) }
    }

    /// The judge of threads: owners of locks and claims in segments.
    pub fn threads_alive(&self) -> ThreadLiveness<'_> {
        ThreadLiveness::new(self.fabric(), self.instances())
    }

    /// The judge of nodes.
    pub fn nodes_alive(&self) -> NodeLiveness<'_> {
        NodeLiveness::new(self.fabric())
    }

    /// Asks the agent, and asks once more if the connection breaks: the agent was restarted.
    fn request(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        self.request_from(&self.inner.address, request)
    }

    /// Asks the agent if it is there, and does not wait for one.
    fn request_now(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let mut address = self.inner.address.clone();
        address.patience.connect = Duration::ZERO;
        self.request_from(&address, request)
    }

    fn request_from(
        &self,
        address: &Address,
        request: &Request,
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let inner = &self.inner;
        let mut slot = inner
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut tries = 0;
        loop {
            let socket = match slot.take() {
                Some(socket) => socket,
                None => self.reconnect(address)?,
            };
            let patience = address.patience.request;
            match exchange(&socket, request, deadline_after(patience), patience) {
                Ok(answer) => {
                    *slot = Some(socket);
                    return Ok(answer);
                }
                Err(ClientError::Connection { .. }) if tries == 0 => tries += 1,
                // The socket is dropped: after a time-out a late answer would be taken for the
                // answer to the next request.
                Err(error) => return Err(error),
            }
        }
    }

    fn reconnect(&self, address: &Address) -> Result<PacketSocket, ClientError> {
        let (socket, welcome) = address.connect()?;
        check_life(self.inner.me, &welcome)?;
        Ok(socket)
    }
}

fn check_life(own: InstanceId, welcome: &Welcome) -> Result<(), ClientError> {
    let agent = welcome.instance();
    if agent != own {
        return Err(ClientError::OtherLife { own, agent });
    }
    Ok(())
}

fn map_section(
    (fd, mapping): &(OwnedFd, lupin_abi::socket::Mapping),
    needed: u64,
) -> Result<Mapping, ClientError> {
    if mapping.size < needed {
        return Err(ClientError::Attach(AttachError::Truncated {
            expected: needed,
            actual: mapping.size,
        }));
    }
    Ok(Mapping::new(
        fd,
        mapping.offset,
        mapping.size,
        Access::ReadOnly,
    )?)
}
