//! The one place where the agent waits.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A signal for the agent.
    Signals,
    /// The doorbell.
    Doorbell,
    /// A manager connects (namespace nodes).
    LinkListener,
    /// The stream to the manager.
    Link,
    /// A process connects.
    ClientListener,
    /// A connection of a process, by its number.
    Client(u32),
    /// The end of a process, by its pid.
    Process(u32),
    /// A pipe of a command, by the command's number.
    Command(u32),
    /// The end of a thread, by its process's pid.
    Task(u32),
    /// News of the kernel's process connector.
    ProcEvents,
}

impl Source {
    fn pack(self) -> u64 {
        let (tag, id) = match self {
            Self::Signals => (0, 0),
            Self::Doorbell => (2, 0),
            Self::LinkListener => (3, 0),
            Self::Link => (4, 0),
            Self::ClientListener => (5, 0),
            Self::Client(id) => (6, id),
            Self::Process(id) => (7, id),
            Self::Command(id) => (8, id),
            Self::Task(pid) => (9, pid),
            Self::ProcEvents => (10, 0),
        };
        tag << 32 | u64::from(id)
    }

    fn unpack(word: u64) -> Option<Self> {
        let id = word as u32;
        Some(match word >> 32 {
            0 => Self::Signals,
            2 => Self::Doorbell,
            3 => Self::LinkListener,
            4 => Self::Link,
            5 => Self::ClientListener,
            6 => Self::Client(id),
            7 => Self::Process(id),
            8 => Self::Command(id),
            9 => Self::Task(id),
            10 => Self::ProcEvents,
            _ => return None,
        })
    }
}

/// Level-triggered: readable, or the other side is gone.
pub const READABLE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP);
/// Edge-triggered: anything changed. The owner tries all it can do until it would block.
///
/// For descriptors whose hang-up lasts (a virtio port without a host, a pipe without a reader):
/// level-triggered, they would be reported over and over.
pub const EDGES: EpollFlags = READABLE
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLET);

/// A set of descriptors to wait for.
#[derive(Debug)]
pub struct Poller(Epoll);

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// If the kernel has no room for it.
    pub fn new() -> Result<Self, Errno> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Adds a descriptor. It leaves the set when its last duplicate is closed.
    ///
    /// # Errors
    /// If the kernel refuses, for example for a regular file.
    pub fn add(&self, fd: impl AsFd, source: Source, flags: EpollFlags) -> Result<(), Errno> {
        self.0.add(fd, EpollEvent::new(flags, source.pack()))
    }

    /// Changes what a descriptor is watched for.
    ///
    /// # Errors
    /// If it is not in the set.
    pub fn modify(&self, fd: impl AsFd, source: Source, flags: EpollFlags) -> Result<(), Errno> {
        let mut event = EpollEvent::new(flags, source.pack());
        self.0.modify(fd, &mut event)
    }

    /// Takes a descriptor out of the set; one that is not in it is no error.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = self.0.delete(fd);
    }

    /// Waits until something is ready or the time is over (`None`: no limit).
    ///
    /// # Errors
    /// None that an operation can cause; EINTR counts as nothing ready.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Vec<(Source, EpollFlags)>, Errno> {
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            // Rounded up: a wait of less than a millisecond must not become a busy loop.
            Some(time) => {
                let ms = time.as_nanos().div_ceil(1_000_000);
                EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX))
                    .unwrap_or(EpollTimeout::MAX)
            }
        };
        let mut events = [EpollEvent::empty(); 64];
        match self.0.wait(&mut events, timeout) {
            Ok(count) => Ok(events[..count]
                .iter()
                .filter_map(|e| Some((Source::unpack(e.data())?, e.events())))
                .collect()),
            Err(Errno::EINTR) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        for source in [
            Source::Signals,
            Source::Doorbell,
            Source::LinkListener,
            Source::Link,
            Source::ClientListener,
            Source::Client(u32::MAX),
            Source::Process(1),
            Source::Command(0),
            Source::Task(2),
            Source::ProcEvents,
        ] {
            assert_eq!(Source::unpack(source.pack()), Some(source));
        }
        assert_eq!(Source::unpack(u64::MAX), None);
    }
}
