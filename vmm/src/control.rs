//! The control socket: JSON packets over `SOCK_SEQPACKET`.
//!
//! Only plumbing; what requests mean is the business of [`crate::fence`].

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use lupin_fabric::vmm_protocol::{MAX_PACKET, Reply, Request};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, recv, sendmsg, socket,
};

/// The listening socket.
#[derive(Debug)]
pub struct ControlListener(OwnedFd);

impl ControlListener {
    /// Listens at `path`. A socket left there by an earlier process is replaced.
    ///
    /// # Errors
    /// When the path is longer than a socket address holds (107 bytes), or its folder does not
    /// exist.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let address = UnixAddr::new(path)?;
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(fd.as_raw_fd(), &address)?;
        listen(&fd, Backlog::new(16)?)?;
        Ok(Self(fd))
    }

    /// Takes a waiting connection, if there is one.
    ///
    /// # Errors
    /// Of `accept`, for example when descriptors run out.
    pub fn accept(&self) -> io::Result<Option<Connection>> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(self.0.as_raw_fd(), flags) {
            // SAFETY: accept4 has just returned this descriptor, and nobody else owns it.
            Ok(fd) => Ok(Some(Connection(unsafe { OwnedFd::from_raw_fd(fd) }))),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for ControlListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What came in on a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A request.
    Request(Request),
    /// A packet that is none; the text says why.
    Garbage(String),
    /// Nothing yet.
    Nothing,
    /// The other side is gone.
    Closed,
}

/// One client.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// Takes the next packet. Never blocks.
    pub fn receive(&self) -> Received {
        let mut packet = vec![0; MAX_PACKET + 1];
        match recv(self.0.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            Ok(0) => Received::Closed,
            Ok(len) if len > MAX_PACKET => {
                Received::Garbage(format!("packet longer than {MAX_PACKET} bytes"))
            }
            Ok(len) => match serde_json::from_slice(&packet[..len]) {
                Ok(request) => Received::Request(request),
                Err(e) => Received::Garbage(format!("not a request: {e}")),
            },
            Err(Errno::EAGAIN | Errno::EINTR) => Received::Nothing,
            Err(_) => Received::Closed,
        }
    }

    /// Sends a reply, with a descriptor if there is one. Never blocks.
    ///
    /// # Errors
    /// When the client is gone or does not read.
    pub fn send(&self, reply: &Reply, fd: Option<BorrowedFd>) -> io::Result<()> {
        let packet = serde_json::to_vec(reply)?;
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&packet)],
            control,
            flags,
            None,
        )?;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
