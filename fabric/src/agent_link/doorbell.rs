//! The doorbell of a namespace node: an eventfd that its agent waits on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Rings a node through its doorbell. Never blocks: an eventfd whose counter is full is ringing
/// already, and the node on the other side, which shares the descriptor's flags, may have filled it
/// and have made it one that blocks.
///
/// # Errors
/// Of the descriptor.
pub fn ring(doorbell: BorrowedFd<'_>) -> io::Result<()> {
    let mut fds = [PollFd::new(doorbell, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let ready = fds[0].revents().unwrap_or(PollFlags::empty());
    if ready.contains(PollFlags::POLLOUT) {
        match nix::unistd::write(doorbell, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Whether a descriptor that an agent sent is an eventfd. Anything else could block the ringer
/// or be a file that it has no business to write to.
pub(super) fn is_eventfd(fd: impl AsFd) -> bool {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EventFd;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn a_node_that_never_listens_keeps_nobody_waiting() {
        // One that blocks, with no room left: a write would wait for the node.
        let bell = EventFd::new().unwrap();
        bell.write(u64::MAX - 1).unwrap();
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            for _ in 0..100 {
                ring(bell.as_fd()).unwrap();
            }
            let _ = done.send(bell);
        });
        let bell = is_done.recv_timeout(Duration::from_secs(20));
        assert_eq!(
            bell.expect("the ringer waits").read().unwrap(),
            u64::MAX - 1
        );
    }
}
