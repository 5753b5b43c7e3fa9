//! A client that sends whatever it is told, to a server that must not mind: for `cargo fuzz` and
//! for a test with a seed of its own.
//!
//! The input is a list of packets, each after two bytes of length (little-endian; what is missing
//! at the end is left out). The server is the product's, over a real socket and over pod memory in
//! a file; only the clock of its limits is reset between two inputs.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use lupin_abi::ABI_VERSION;
use lupin_abi::socket::{MAX_PACKET, Reply, Request, decode, encode};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};

use super::Server;
use super::limits::Limits;
use crate::directory::Directory;
use crate::poll::{Poller, Source};
use crate::segments::Segments;
use crate::test_pod::TestPod;
use crate::threads::Threads;

/// Inputs that meet one pod, before the next ones meet a new one.
const INPUTS_PER_POD: u32 = 200;
/// Turns that the server gets for one packet: scrubbing takes some.
const TURNS: usize = 16;

/// A server and its pod.
pub struct Target {
    server: Server,
    poller: Poller,
    path: PathBuf,
    inputs: u32,
    _pod: TestPod,
    _folder: tempfile::TempDir,
}

impl Default for Target {
    fn default() -> Self {
        Self::new()
    }
}

impl Target {
    /// A server of a new pod.
    ///
    /// # Panics
    /// If the system gives no socket, file or memory.
    pub fn new() -> Self {
        let pod = TestPod::new();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let mut backend = pod.backend(1, 1);
        crate::memory::Backend::attached(&mut backend, pod.header()).unwrap();
        let directory = Directory::new(pod.attach(1, 1));
        let held = directory.begin(false).unwrap();
        let poller = Poller::new().unwrap();
        let threads = Threads::new(directory.clone());
        let segments = Segments::new(directory, Box::new(backend), held);
        let server = Server::new(&path, &poller, threads, segments, false).unwrap();
        Self {
            server,
            poller,
            path,
            inputs: 0,
            _pod: pod,
            _folder: folder,
        }
    }

    /// Sends what the input says, and then asks as an honest client.
    ///
    /// # Panics
    /// If the server does, sends what is no reply, or does not serve the honest client.
    pub fn run(&mut self, input: &[u8]) {
        self.inputs += 1;
        if self.inputs > INPUTS_PER_POD {
            *self = Self::new();
        }
        self.server.limits = Limits::default();
        let client = self.connect();
        self.say(&client, &hello());
        let mut rest = input;
        while let [low, high, after @ ..] = rest {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
            let (packet, next) = after.split_at(len);
            self.say(&client, packet);
            rest = next;
        }
        drop(client);
        self.step();
        self.server.limits = Limits::default();
        let honest = self.connect();
        let replies = self.say(&honest, &hello());
        assert!(
            matches!(replies[..], [Reply::Welcome { .. }]),
            "{replies:?}"
        );
        drop(honest);
        self.step();
    }

    fn connect(&mut self) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(&self.path).unwrap()).unwrap();
        self.step();
        fd
    }

    /// Sends a packet, and returns what comes back.
    fn say(&mut self, client: &OwnedFd, packet: &[u8]) -> Vec<Reply> {
        // Refused once the server has hung up.
        let _ = send(client.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL);
        self.step();
        let mut replies = Vec::new();
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let mut space = cmsg_space!([i32; 24]);
            let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_DONTWAIT;
            let fd = client.as_raw_fd();
            let Ok(message) = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags) else {
                return replies;
            };
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    for fd in fds {
                        // SAFETY: just received, known to nobody else.
                        drop(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
            }
            let len = message.bytes;
            if len == 0 {
                return replies;
            }
            replies.push(decode(&buffer[..len]).expect("a reply"));
            self.step();
        }
    }

    fn step(&mut self) {
        for _ in 0..TURNS {
            for (source, flags) in self.poller.wait(Some(Duration::ZERO)).unwrap() {
                match source {
                    Source::ClientListener => self.server.on_listener(&self.poller),
                    Source::Client(id) => self.server.on_client(&self.poller, id, flags),
                    Source::Process(pid) => self.server.on_process(pid),
                    Source::Task(pid) => self.server.inspect(pid),
                    Source::ProcEvents => self.server.on_proc_events(),
                    _ => {}
                }
            }
            if !self.server.has_work() {
                break;
            }
            self.server.work(&self.poller);
        }
        self.server.tick(&self.poller);
    }
}

fn hello() -> Vec<u8> {
    let version = ABI_VERSION;
    encode(&Request::Hello { version }).unwrap()
}
