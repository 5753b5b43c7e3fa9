//! Packets of the application socket, with what the kernel says of their senders.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use lupin_abi::socket::MAX_PACKET;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg,
};

/// What was received.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet of this length, sent by this pid (0 if the kernel did not say).
    Packet(usize, u32),
    /// A packet longer than [`MAX_PACKET`].
    Oversize,
    /// The other side has closed, or sent an empty packet, which no message is.
    End,
}

/// Receives one packet. Descriptors that a client sends along are closed.
///
/// # Errors
/// `EAGAIN` if there is none; others end the connection.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8; MAX_PACKET]) -> Result<Received, Errno> {
    let mut space = nix::cmsg_space!(UnixCredentials, [RawFd; 4]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut sender = 0;
    // An Err here is a truncated control buffer: the kernel has dropped what did not fit.
    if let Ok(controls) = message.cmsgs() {
        for control in controls {
            match control {
                ControlMessageOwned::ScmCredentials(c) => {
                    sender = u32::try_from(c.pid()).unwrap_or(0);
                }
                ControlMessageOwned::ScmRights(fds) => {
                    for fd in fds {
                        // SAFETY: the kernel has just made this descriptor for this process, and
                        // nothing else knows it.
                        drop(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
                _ => {}
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(Received::Oversize);
    }
    Ok(match message.bytes {
        0 => Received::End,
        len => Received::Packet(len, sender),
    })
}

/// Sends one packet with descriptors; never blocks, never raises SIGPIPE.
///
/// # Errors
/// `EAGAIN` if the other side does not read; others end the connection.
pub fn send(fd: BorrowedFd<'_>, packet: &[u8], fds: &[OwnedFd]) -> Result<(), Errno> {
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let controls = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(
        fd.as_raw_fd(),
        &[IoSlice::new(packet)],
        controls,
        flags,
        None,
    )?;
    Ok(())
}
