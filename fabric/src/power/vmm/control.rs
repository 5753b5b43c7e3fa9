//! The manager's side of a VMM's control socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};

use crate::vmm_protocol::{MAX_PACKET, Reply, Request};

/// A connection to a VMM's fence thread.
#[derive(Debug)]
pub(super) struct Control {
    socket: OwnedFd,
}

impl Control {
    /// Connects without waiting: a VMM that does not take connections is as good as none.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self { socket })
    }

    /// Sends a request without waiting.
    pub fn send(&self, request: &Request) -> io::Result<()> {
        let packet = serde_json::to_vec(request)?;
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        send(self.socket.as_raw_fd(), &packet, flags)?;
        Ok(())
    }

    /// Sends a request and waits for its reply, and for the descriptor that comes with it, for at
    /// most `bound` together.
    pub fn ask(&self, request: &Request, bound: Duration) -> io::Result<(Reply, Option<OwnedFd>)> {
        let until = Instant::now() + bound;
        self.send(request)?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let millis = left.as_micros().div_ceil(1000);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            match self.receive() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    fn receive(&self) -> io::Result<(Reply, Option<OwnedFd>)> {
        let mut packet = vec![0u8; MAX_PACKET];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut iov = [IoSliceMut::new(&mut packet)];
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        let mut descriptors = Vec::new();
        for cmsg in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = cmsg {
                // SAFETY: the kernel just installed these descriptors for us; nobody else
                // owns them, and each is owned once.
                descriptors.extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        let length = message.bytes;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let reply = serde_json::from_slice(&packet[..length])?;
        Ok((reply, descriptors.into_iter().next()))
    }
}
