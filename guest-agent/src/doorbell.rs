//! The doorbell: somebody says that something happened, not what.
//!
//! A byte on the virtio port `org.lupin.fabric`, or a count in an eventfd. It may be lost or come
//! twice; whoever is rung re-reads the event ring.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::read;

use crate::poll::{EDGES, Poller, Source};

/// A doorbell, either kind.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

impl Doorbell {
    /// Watches a port or eventfd.
    ///
    /// # Errors
    /// If it cannot be watched.
    pub fn new(fd: OwnedFd, poller: &Poller) -> Result<Self, Errno> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        poller.add(&fd, Source::Doorbell, EDGES)?;
        Ok(Self(fd))
    }

    /// Takes what was rung; true if it was.
    pub fn drain(&self) -> bool {
        let mut rung = false;
        // An eventfd wants at least 8 bytes. 0 is a port whose host side is closed.
        let mut buffer = [0; 64];
        while let Ok(1..) = read(self.0.as_fd(), &mut buffer) {
            rung = true;
        }
        rung
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EventFd;
    use std::time::Duration;

    #[test]
    fn rings_are_noticed_once_and_silence_costs_nothing() {
        let bell = EventFd::new().unwrap();
        let poller = Poller::new().unwrap();
        let doorbell = Doorbell::new(bell.as_fd().try_clone_to_owned().unwrap(), &poller).unwrap();
        // Edges report the state at first.
        poller.wait(Some(Duration::ZERO)).unwrap();
        assert!(!doorbell.drain());
        for _ in 0..3 {
            bell.write(1).unwrap();
            bell.write(1).unwrap();
            let events = poller.wait(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(events[0].0, Source::Doorbell);
            assert!(doorbell.drain());
            assert!(!doorbell.drain());
        }
    }
}
