//! The kernel's process connector: a hint that some thread of this machine ended, or some process
//! began another program.
//!
//! Only for kernels without descriptors of threads (before Linux 6.9). It needs `CAP_NET_ADMIN`
//! and the initial user, network and PID namespaces, which an agent in a guest has. Processes are
//! watched by pidfd in any case: that was measured to be faster.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, NetlinkAddr, bind, recv, send, setsockopt, sockopt};

use crate::poll::{Poller, Source};

/// With the default, four of five of a thousand exits in a row were lost.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Packets that are taken before others get their turn.
const PACKETS_PER_TURN: usize = 1024;

/// `CN_IDX_PROC` and `CN_VAL_PROC`.
const PROC: u32 = 1;
/// `PROC_CN_MCAST_LISTEN`.
const LISTEN: u32 = 1;
/// Not in the libc crate for every target.
const NETLINK_CONNECTOR: libc::c_int = 11;
const NLMSG_DONE: u16 = 3;
const NETLINK_HEADER: usize = 16;
const CONNECTOR_HEADER: usize = 20;
/// Where `what` of `struct proc_event` is in a packet, and the process of an exit or exec.
const WHAT_AT: usize = NETLINK_HEADER + CONNECTOR_HEADER;
const TGID_AT: usize = WHAT_AT + 20;
const EXEC: u32 = 0x2;
const EXIT: u32 = 0x8000_0000;

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A thread of this process ended, or it began another program.
    Process(u32),
    /// Events were lost: any process may be meant.
    Lost,
}

/// A subscription.
#[derive(Debug)]
pub struct ProcEvents(OwnedFd);

impl ProcEvents {
    /// Subscribes.
    ///
    /// # Errors
    /// If the kernel does not let us.
    pub fn new(poller: &Poller) -> io::Result<Self> {
        let socket = Self::listen()?;
        poller.add(&socket.0, Source::ProcEvents, EpollFlags::EPOLLIN)?;
        Ok(socket)
    }

    fn listen() -> io::Result<Self> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a system call without pointers.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_NETLINK, kind, NETLINK_CONNECTOR) })?;
        // SAFETY: the kernel has just made this descriptor for this process.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        filter(&fd)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, PROC))?;
        send(fd.as_raw_fd(), &subscription(), MsgFlags::empty())?;
        Ok(Self(fd))
    }

    /// Hands what has come to `hear`; without an end only as long as others can wait.
    pub fn drain(&self, mut hear: impl FnMut(Heard)) {
        let mut buffer = [0; 512];
        for _ in 0..PACKETS_PER_TURN {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) => hear_packet(&buffer[..len], &mut hear),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => hear(Heard::Lost),
                Err(_) => return,
            }
        }
    }
}

/// Keeps everything but exits and execs from waking the agent: forks come as often.
fn filter(fd: &OwnedFd) -> Result<(), Errno> {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        // Codes of classic BPF have 16 bits.
        code: code as u16,
        jt,
        jf,
        k,
    };
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut program = [
        // Loads are big-endian, the packet is not.
        step(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            0,
            0,
            WHAT_AT as u32,
        ),
        step(equal, 2, 0, EXIT.to_be()),
        step(equal, 1, 0, EXEC.to_be()),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program, which lives until the call returns, and copies it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// The one message that is sent.
fn subscription() -> Vec<u8> {
    let len = (WHAT_AT + size_of::<u32>()) as u32;
    let mut packet = Vec::new();
    packet.extend(len.to_ne_bytes());
    packet.extend(NLMSG_DONE.to_ne_bytes());
    // Flags, sequence number and sender of the netlink header.
    packet.extend([0; 10]);
    packet.extend(PROC.to_ne_bytes());
    packet.extend(PROC.to_ne_bytes());
    // Sequence number and acknowledgement of the connector's header.
    packet.extend([0; 8]);
    packet.extend((size_of::<u32>() as u16).to_ne_bytes());
    packet.extend([0; 2]);
    packet.extend(LISTEN.to_ne_bytes());
    packet
}

fn hear_packet(packet: &[u8], hear: &mut impl FnMut(Heard)) {
    let word = |at: usize| {
        let bytes = packet.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    if let (Some(EXIT | EXEC), Some(tgid)) = (word(WHAT_AT), word(TGID_AT)) {
        hear(Heard::Process(tgid));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn only_exits_and_execs_are_heard() {
        let mut packet = subscription();
        assert_eq!(packet.len(), WHAT_AT + 4);
        packet.resize(TGID_AT + 4, 0);
        packet[TGID_AT..].copy_from_slice(&77u32.to_ne_bytes());
        let heard = |what: u32, packet: &mut [u8]| {
            packet[WHAT_AT..WHAT_AT + 4].copy_from_slice(&what.to_ne_bytes());
            let mut heard = Vec::new();
            hear_packet(packet, &mut |event| heard.push(event));
            heard
        };
        assert_eq!(heard(EXIT, &mut packet), [Heard::Process(77)]);
        assert_eq!(heard(EXEC, &mut packet), [Heard::Process(77)]);
        assert_eq!(heard(1, &mut packet), []);
        let len = packet.len() - 1;
        assert_eq!(heard(EXIT, &mut packet[..len]), []);
    }

    /// Needs the rights and the namespaces of a guest's agent.
    #[test]
    #[ignore = "needs CAP_NET_ADMIN in the initial namespaces"]
    fn a_thousand_exits_in_a_row_are_heard() {
        let events = ProcEvents::listen().unwrap();
        let mut children = HashMap::new();
        for _ in 0..1000 {
            let child = std::process::Command::new("/bin/true").spawn().unwrap();
            children.insert(child.id(), child);
        }
        let mut left: Vec<u32> = children.keys().copied().collect();
        for child in children.values_mut() {
            child.wait().unwrap();
        }
        while !left.is_empty() {
            let mut fds = [PollFd::new(events.0.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::from(20_000u16)).unwrap();
            assert!(ready > 0, "{} exits were not heard", left.len());
            events.drain(|heard| match heard {
                Heard::Process(pid) => left.retain(|left| *left != pid),
                Heard::Lost => panic!("events were lost"),
            });
        }
    }
}
