//! The doorbell of a namespace node: an eventfd that its agent waits on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Rings a node through its doorbell. Never blocks: an eventfd whose counter is full is ringing
/// already, and the node on the other side may have filled it.
///
/// # Errors
/// Of the descriptor.
pub fn ring(doorbell: BorrowedFd<'_>) -> io::Result<()> {
    let mut fds = [PollFd::new(doorbell, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let ready = fds[0].revents().unwrap_or(PollFlags::empty());
    if ready.contains(PollFlags::POLLOUT) {
        nix::unistd::write(doorbell, &1u64.to_ne_bytes())?;
    }
    Ok(())
}

/// Whether a descriptor that an agent sent is an eventfd. Anything else could block the ringer
/// or be a file that it has no business to write to.
pub(super) fn is_eventfd(fd: impl AsFd) -> bool {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}
