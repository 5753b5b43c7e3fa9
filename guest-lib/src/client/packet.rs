//! Packets with descriptors over a `SOCK_SEQPACKET` socket, each within a deadline.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use lupin_abi::socket::MAX_PACKET;
use lupin_abi::system::MAX_EXTENTS;

/// Most descriptors that one packet may bring.
const MAX_FDS: usize = MAX_EXTENTS;

/// Words for a control message with that many descriptors: its header takes two.
const CONTROL_WORDS: usize = 2 + MAX_FDS.div_ceil(2);

/// One end of a packet socket.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Connects to the socket at `path`.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket()?;
        let (address, len) = unix_address(path)?;
        // SAFETY: `address` is a sockaddr_un of which `len` bytes are set.
        let result = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) };
        if result == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd })
    }

    /// The descriptor, to poll on.
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Sends one packet.
    pub(crate) fn send(&self, packet: &[u8], deadline: Instant) -> io::Result<()> {
        loop {
            let Err(error) = self.try_send(packet) else {
                return Ok(());
            };
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT, deadline)?,
                _ => return Err(error),
            }
        }
    }

    /// Sends one packet if there is room for it now; else the error is `WouldBlock`.
    pub(crate) fn try_send(&self, packet: &[u8]) -> io::Result<()> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                flags,
            )
        };
        if sent == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Receives one packet and its descriptors. End of file is `UnexpectedEof`, a deadline that
    /// passes `TimedOut`.
    pub(crate) fn receive(&self, deadline: Instant) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        loop {
            match self.try_receive() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(libc::POLLIN, deadline)?;
                }
                other => return other,
            }
        }
    }

    /// Receives one packet if it is there; else the error is `WouldBlock`.
    pub(crate) fn try_receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut packet = vec![0u8; MAX_PACKET];
        let mut part = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        // u64s for the alignment that cmsghdr needs.
        let mut control = [MaybeUninit::<u64>::uninit(); CONTROL_WORDS];
        // SAFETY: an all-zero msghdr is valid (null pointers, zero lengths).
        let mut header: libc::msghdr = unsafe { core::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: a pure computation.
        let space = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
        header.msg_controllen = space.min(size_of_val(&control)) as _;
        // SAFETY: `header` points to buffers that live across the call, with their lengths.
        let received = unsafe {
            libc::recvmsg(
                self.fd.as_raw_fd(),
                &raw mut header,
                libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
            )
        };
        if received == -1 {
            return Err(io::Error::last_os_error());
        }
        let fds = take_fds(&header);
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            let text = "packet or its descriptors are larger than the protocol allows";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        packet.truncate(received as usize);
        Ok((packet, fds))
    }

    fn wait(&self, events: libc::c_short, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events,
            revents: 0,
        };
        // Rounded up, so that the last wait does not become a busy loop.
        let millis = left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, millis) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { core::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte stays for the terminating zero.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let text = format!("{} is not a possible socket path", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let len = core::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    Ok((address, len as libc::socklen_t))
}

/// Takes over every descriptor of a received message, so that none leaks, whatever else is wrong.
fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `header` and the control buffer that it points to; the CMSG
    // functions stay inside `msg_controllen`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: `message` is a control message inside the buffer, see above.
        let (level, kind, len, data) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len as usize,
                libc::CMSG_DATA(message),
            )
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: a pure computation.
            let bytes = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: inside the data of this message; may be unaligned for an int.
                let fd = unsafe { data.cast::<RawFd>().add(index).read_unaligned() };
                // SAFETY: the kernel just gave this process that descriptor.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    fds
}
