//! The server in a thread, and clients of it: in this process, and in others that are killed.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lupin_abi::ABI_VERSION;
use lupin_abi::groups::{Admission, GroupId, GroupReply, GroupRequest, Secret};
use lupin_abi::layout::{PodHeader, SectionKind};
use lupin_abi::port::ToManager;
use lupin_abi::socket::{
    Lifetime, MAX_PACKET, Mapping as Window, RefusalCode, Reply, Request, SegmentName, decode,
    encode,
};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::Server;
use crate::directory::Directory;
use crate::memory::podfile::PodFile;
use crate::memory::{Backend, Extent, MemoryError, Owner, SectionFd};
use crate::poll::{Poller, Source};
use crate::segments::Segments;
use crate::test_pod::TestPod;
use crate::threads::Threads;

/// An agent's socket in a thread of its own.
pub(super) struct Served {
    pub(super) path: PathBuf,
    /// What the agent would have told the manager.
    pub(super) to_manager: Arc<Mutex<Vec<ToManager>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

/// A folder that clients of other users may enter.
pub(super) fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

impl Served {
    pub(super) fn new(pod: &TestPod, node: u32, generation: u32) -> Self {
        Self::start(pod, node, generation, false)
    }

    pub(super) fn start(pod: &TestPod, node: u32, generation: u32, restarted: bool) -> Self {
        let backend = Box::new(pod.backend(node, generation));
        Self::on(folder(), backend, pod, node, generation, restarted)
    }

    /// One that finds something in its folder.
    pub(super) fn start_in(folder: tempfile::TempDir, pod: &TestPod, node: u32) -> Self {
        Self::on(folder, Box::new(pod.backend(node, 1)), pod, node, 1, false)
    }

    /// One of a node that can take mappings away, as it says; `taken` gets what it would take.
    pub(super) fn revocable(
        pod: &TestPod,
        node: u32,
        restarted: bool,
        taken: &Arc<Mutex<Vec<Extent>>>,
    ) -> Self {
        let (file, taken) = (pod.backend(node, 1), Arc::clone(taken));
        let backend = Box::new(Revocable { file, taken });
        Self::on(folder(), backend, pod, node, 1, restarted)
    }

    fn on(
        folder: tempfile::TempDir,
        mut backend: Box<dyn Backend>,
        pod: &TestPod,
        node: u32,
        generation: u32,
        restarted: bool,
    ) -> Self {
        let path = folder.path().join("run/agent.sock");
        let memory = pod.attach(node, generation);
        backend.attached(pod.header()).unwrap();
        let directory = Directory::new(memory);
        let held = directory.begin(restarted).unwrap();
        let poller = Poller::new().unwrap();
        let threads = Threads::new(directory.clone());
        let segments = Segments::new(directory, backend, held);
        let mut server = Server::new(&path, &poller, threads, segments, restarted).unwrap();
        let to_manager = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&to_manager);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let wait = if server.has_work() { 0 } else { 20 };
                for (source, flags) in poller.wait(Some(Duration::from_millis(wait))).unwrap() {
                    match source {
                        Source::ClientListener => server.on_listener(&poller),
                        Source::Client(id) => server.on_client(&poller, id, flags),
                        Source::Process(pid) => server.on_process(pid),
                        Source::Task(pid) => server.inspect(pid),
                        Source::ProcEvents => server.on_proc_events(),
                        other => panic!("{other:?}"),
                    }
                }
                server.work(&poller);
                server.tick(&poller);
                let news = server.take_news(&poller);
                told.lock().unwrap().extend(server.take_wakes().chain(news));
            }
        });
        Self {
            path,
            to_manager,
            stop,
            thread: Some(thread),
            _folder: folder,
        }
    }

    pub(super) fn connect(&self) -> Connection {
        Connection::new(&self.path)
    }

    pub(super) fn hello(&self) -> Connection {
        let connection = self.connect();
        connection.welcome();
        connection
    }
}

/// A file, of which devices are said to be cut.
struct Revocable {
    file: PodFile,
    taken: Arc<Mutex<Vec<Extent>>>,
}

impl Backend for Revocable {
    fn available(&self) -> u64 {
        self.file.available()
    }

    fn attached(&mut self, header: &PodHeader) -> Result<(), MemoryError> {
        self.file.attached(header)
    }

    fn section(&mut self, kind: SectionKind, read_only: bool) -> Result<SectionFd, MemoryError> {
        self.file.section(kind, read_only)
    }

    fn open_segment(
        &mut self,
        extent: Extent,
        owner: Owner,
        read_only: bool,
    ) -> Result<SectionFd, MemoryError> {
        self.file.open_segment(extent, owner, read_only)
    }

    fn can_revoke(&self) -> bool {
        true
    }

    fn close_segment(&mut self, extent: Extent) -> Result<(), MemoryError> {
        self.taken.lock().unwrap().push(extent);
        Ok(())
    }

    fn is_mapped(&self, extent: Extent) -> bool {
        self.file.is_mapped(extent)
    }

    fn is_used_by(&self, extent: Extent, pid: u32) -> bool {
        self.file.is_used_by(extent, pid)
    }

    fn held_segments(&mut self) -> Result<Vec<Extent>, MemoryError> {
        self.file.held_segments()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the server must survive whatever clients do");
        }
    }
}

pub(super) struct Connection(pub(super) OwnedFd);

impl Connection {
    pub(super) fn new(path: &Path) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(20, 0)).unwrap();
        Self(fd)
    }

    pub(super) fn send_bytes(&self, bytes: &[u8]) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None)
    }

    pub(super) fn send(&self, request: &Request) {
        self.send_bytes(&encode(request).unwrap()).unwrap();
    }

    /// The next packet; `None` at the end of the connection.
    pub(super) fn receive(&self) -> Option<(Reply, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = nix::cmsg_space!([i32; 24]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::empty();
        let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            Err(Errno::ECONNRESET) => return None,
            Err(error) => panic!("no answer: {error}"),
        };
        let fds = message
            .cmsgs()
            .unwrap()
            .filter_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            // SAFETY: just received, known to nobody else.
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect();
        let len = message.bytes;
        (len > 0).then(|| (decode(&buffer[..len]).unwrap(), fds))
    }

    pub(super) fn ask(&self, request: &Request) -> (Reply, Vec<OwnedFd>) {
        self.send(request);
        self.receive().expect("the agent hung up")
    }

    pub(super) fn welcome(&self) -> (Reply, Vec<OwnedFd>) {
        let version = ABI_VERSION;
        self.ask(&Request::Hello { version })
    }

    pub(super) fn register(&self, id: Option<u32>) -> Result<(u32, u32), RefusalCode> {
        self.register_for(id, None)
    }

    pub(super) fn register_for(
        &self,
        id: Option<u32>,
        tid: Option<u32>,
    ) -> Result<(u32, u32), RefusalCode> {
        match self.ask(&Request::RegisterThread { id, tid }).0 {
            Reply::Thread { id, generation } => Ok((id, generation)),
            Reply::Refused { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn create(&self, name: &str, size: u64) -> Result<(Window, OwnedFd), RefusalCode> {
        segment(self.ask(&creation(named(None, name), size)), true)
    }

    pub(super) fn open(
        &self,
        name: &str,
        read_only: bool,
    ) -> Result<(Window, OwnedFd), RefusalCode> {
        let segment_name = named(None, name);
        let request = Request::OpenSegment {
            segment: segment_name,
            read_only,
        };
        segment(self.ask(&request), false)
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), RefusalCode> {
        self.done(&Request::RemoveSegment {
            segment: named(None, name),
            revoke: false,
        })
    }

    /// A request that is done or refused.
    pub(super) fn done(&self, request: &Request) -> Result<(), RefusalCode> {
        match self.ask(request).0 {
            Reply::Done => Ok(()),
            Reply::Refused { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn group(&self, request: GroupRequest) -> Result<GroupReply, RefusalCode> {
        match self.ask(&Request::Group(request)).0 {
            Reply::Group(reply) => Ok(reply),
            Reply::Done => Ok(GroupReply::Ended),
            Reply::Refused { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn create_group(
        &self,
        name: &str,
        secret: Option<&[u8]>,
    ) -> Result<GroupId, RefusalCode> {
        let admission = Admission {
            secret: secret.map(Secret::new),
            ..Admission::default()
        };
        let name = name.into();
        match self.group(GroupRequest::Create {
            name,
            admission,
            quota: None,
        })? {
            GroupReply::Created { group } => Ok(group),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn join_group(
        &self,
        name: &str,
        secret: Option<&[u8]>,
        threads: &[(u32, u32)],
    ) -> Result<(GroupId, u64), RefusalCode> {
        let request = GroupRequest::Join {
            name: name.into(),
            secret: secret.map(Secret::new),
            threads: threads.to_vec(),
        };
        match self.group(request)? {
            GroupReply::Joined { group, before } => Ok((group, before)),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn refused(&self) -> RefusalCode {
        match self.receive().expect("a refusal before the end").0 {
            Reply::Refused { code, .. } => code,
            other => panic!("{other:?}"),
        }
    }
}

pub(super) fn named(group: Option<GroupId>, name: &str) -> SegmentName {
    let name = name.into();
    SegmentName { group, name }
}

pub(super) fn creation(segment: SegmentName, size: u64) -> Request {
    Request::CreateSegment {
        segment,
        size,
        mode: 0o600,
        lifetime: Lifetime::Kept,
    }
}

/// The parts of a segment.
pub(super) fn parts(
    (reply, fds): (Reply, Vec<OwnedFd>),
    new: bool,
) -> Result<Vec<(Window, OwnedFd)>, RefusalCode> {
    match reply {
        Reply::Segment {
            mappings, created, ..
        } => {
            assert_eq!((created, fds.len()), (new, mappings.len()));
            Ok(mappings.into_iter().zip(fds).collect())
        }
        Reply::Refused { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

/// The only part of a segment.
pub(super) fn segment(
    answer: (Reply, Vec<OwnedFd>),
    new: bool,
) -> Result<(Window, OwnedFd), RefusalCode> {
    let mut parts = parts(answer, new)?;
    assert_eq!(parts.len(), 1);
    Ok(parts.remove(0))
}

pub(super) fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed().as_secs() < 20, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A client in a process of its own, which is killed.
pub(super) struct Forked(nix::unistd::Pid);

impl Forked {
    pub(super) fn new(act: impl FnOnce()) -> Self {
        // SAFETY: the child calls only `act`, which makes system calls and small allocations
        // (the C library's allocator is usable after a fork), and leaves without destructors.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Parent { child } => Self(child),
            nix::unistd::ForkResult::Child => {
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
                loop {
                    nix::unistd::pause();
                }
            }
        }
    }

    pub(super) fn kill(&self) {
        nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(self.0, None).unwrap();
    }
}
