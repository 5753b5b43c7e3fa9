//! Reading a stream that may carry descriptors.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Most descriptors that Linux passes with one message (`SCM_MAX_FD`): with room for all of them
/// none can be cut off and stay open in this process without an owner.
const MAX_DESCRIPTORS: usize = 253;

/// Reads from `socket` into `buffer`; returns the number of bytes (0 at the end of the stream)
/// and the descriptors that came with them.
///
/// # Errors
/// Of the socket.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut ancillary = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut ancillary),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    if let Ok(ancillary) = message.cmsgs() {
        for item in ancillary {
            if let ControlMessageOwned::ScmRights(fds) = item {
                // SAFETY: the kernel has just made these descriptors for this call, and nobody
                // else knows their numbers.
                let owned = fds
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                descriptors.extend(owned);
            }
        }
    }
    Ok((message.bytes, descriptors))
}
