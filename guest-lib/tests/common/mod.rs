//! A pod without a fabric manager, for tests: pod memory in a memfd, nodes that are threads
//! which answer their agent sockets, and deaths on demand.
//!
//! It keeps the same rules as the real thing: generations are raised after a death and never
//! before, threads die with their process (its connection ends after its memory is gone), and
//! segments are ranges of the pool.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lupin::abi::event::EVIDENCE_WORDS;
use lupin::abi::fabric::{FabricSection, NodeState};
use lupin::abi::instances::{Holder, InstancesSection, MAX_THREADS};
use lupin::abi::layout::{
    GRANULE, INSTANCES_SIZE, MIN_SYSTEM_SIZE, PodHeader, SectionKind, write_header,
};
use lupin::abi::socket::{self, Mapping as WireMapping, RefusalCode, Reply, Request, SegmentInfo};
use lupin::abi::{ABI_VERSION, Cause, Event, EventKind, InstanceId, NodeId, ThreadId};
use lupin::shm::{Access, Mapping};

/// A pod in one process.
pub struct FakePod {
    inner: Arc<Inner>,
    dir: tempfile::TempDir,
}

struct Inner {
    file: File,
    header: PodHeader,
    fabric: Mapping,
    instances: Mapping,
    pool: Mapping,
    /// The directory lock of the real system section.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    segments: BTreeMap<String, WireMapping>,
    /// Names of segments that somebody else prepares.
    preparing: BTreeSet<String>,
    nodes: HashMap<u32, Arc<Node>>,
}

struct Node {
    id: NodeId,
    generation: u32,
    gone: AtomicBool,
    listener: OwnedFd,
    connections: Mutex<Vec<RawFd>>,
}

impl FakePod {
    /// A pod with `pool` bytes.
    pub fn new(pool: u64) -> Self {
        let header = PodHeader::new(0xfade, "fake", 16, MIN_SYSTEM_SIZE, pool).unwrap();
        // SAFETY: a C string; the new descriptor is owned by the file.
        let file = unsafe {
            let fd = libc::memfd_create(c"pod".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(header.total_size()).unwrap();
        let map = |range: lupin::abi::layout::Range| {
            Mapping::new(&file, range.offset, range.size, Access::ReadWrite).unwrap()
        };
        let (fabric, instances) = (map(header.fabric()), map(header.instances()));
        let pool = map(header.pool());
        let pod = Self {
            inner: Arc::new(Inner {
                file,
                header,
                fabric,
                instances,
                pool,
                state: Mutex::default(),
            }),
            dir: tempfile::tempdir().unwrap(),
        };
        let inner = &pod.inner;
        let section = inner
            .header
            .encode_section(SectionKind::Instances, 0, INSTANCES_SIZE);
        write_header(inner.instances().header_words(), &section);
        write_header(inner.fabric().header_words(), &inner.header.encode());
        pod
    }

    /// Starts a node, or starts it again after its death. Returns its agent's socket.
    pub fn start_node(&self, id: u32) -> PathBuf {
        let id = NodeId::new(id).unwrap();
        let path = self.dir.path().join(format!("{id}.sock"));
        let entry = self.inner.fabric().entry(id);
        if entry.generation() == 0 {
            entry.set_generation(1);
        }
        entry.set_state(NodeState::Joined, 0);
        let _ = std::fs::remove_file(&path);
        let node = Arc::new(Node {
            id,
            generation: entry.generation(),
            gone: AtomicBool::new(false),
            listener: listen(&path),
            connections: Mutex::default(),
        });
        let mut state = self.inner.state.lock().unwrap();
        state.nodes.insert(id.get(), Arc::clone(&node));
        drop(state);
        self.inner.append(EventKind::NodeJoined, id, Cause::None);
        let inner = Arc::clone(&self.inner);
        std::thread::spawn(move || accept(&inner, &node));
        path
    }

    /// Kills a node: the caller has killed its processes. Generation, event; no restart.
    pub fn kill_node(&self, id: u32) {
        self.stop_agent(id);
        let id = NodeId::new(id).unwrap();
        let entry = self.inner.fabric().entry(id);
        entry.set_generation(entry.generation() + 1);
        self.inner
            .append(EventKind::GenerationRaised, id, Cause::Operator);
    }

    /// Ends a node's agent, and only that; `start_node` starts it again in the same life.
    pub fn stop_agent(&self, id: u32) {
        let node = self.inner.state.lock().unwrap().nodes.remove(&id);
        let node = node.expect("the node runs");
        node.gone.store(true, Ordering::SeqCst);
        // SAFETY: descriptors that `node` keeps open while they are in its list.
        unsafe {
            libc::shutdown(node.listener.as_raw_fd(), libc::SHUT_RDWR);
            for fd in node.connections.lock().unwrap().iter() {
                libc::shutdown(*fd, libc::SHUT_RDWR);
            }
        }
        let _ = std::fs::remove_file(self.dir.path().join(format!("{id}.sock")));
    }

    /// Somebody else prepares a segment of this name, or has died in that.
    pub fn prepare(&self, name: &str, prepares: bool) {
        let mut state = self.inner.state.lock().unwrap();
        match prepares {
            true => state.preparing.insert(name.into()),
            false => state.preparing.remove(name),
        };
    }

    /// The fabric section, as its manager sees it.
    pub fn fabric(&self) -> &FabricSection {
        self.inner.fabric()
    }

    /// Bytes of the pool in use.
    pub fn used(&self) -> u64 {
        let state = self.inner.state.lock().unwrap();
        state.segments.values().map(|m| m.size).sum()
    }
}

impl Inner {
    fn fabric(&self) -> &FabricSection {
        // SAFETY: mapped for as long as `self`, of the section's size, atomics only.
        unsafe { FabricSection::from_ptr(self.fabric.as_ptr()) }
    }

    fn instances(&self) -> &InstancesSection {
        // SAFETY: mapped for as long as `self`, of the section's size, atomics only.
        unsafe { InstancesSection::from_ptr(self.instances.as_ptr()) }
    }

    fn append(&self, kind: EventKind, node: NodeId, cause: Cause) {
        let _one_writer = self.state.lock().unwrap();
        let generation = self.fabric().entry(node).generation();
        self.fabric().append(&Event {
            seq: 0,
            time_ns: 0,
            epoch: 1,
            kind,
            node: node.get(),
            old_generation: generation,
            generation,
            cause,
            evidence: [0; EVIDENCE_WORDS],
        });
    }

    fn answer(
        &self,
        node: &Node,
        owned: &mut Vec<InstanceId>,
        request: Request,
    ) -> (Reply, Vec<OwnedFd>) {
        match request {
            Request::Hello { version } if version != ABI_VERSION => {
                refuse(RefusalCode::Version, "other version")
            }
            Request::Hello { .. } => {
                let wire = |r: lupin::abi::layout::Range| WireMapping {
                    offset: r.offset,
                    size: r.size,
                };
                let reply = Reply::Welcome {
                    version: ABI_VERSION,
                    node: node.id.get(),
                    generation: node.generation,
                    fabric: wire(self.header.fabric()),
                    instances: wire(self.header.instances()),
                };
                (reply, vec![self.open(true), self.open(true)])
            }
            Request::RegisterThread { id, .. } => self.register(node, owned, id),
            Request::ReleaseThread { id, generation } => {
                let instance = InstanceId::new(id, generation);
                if !owned.contains(&instance) {
                    return refuse(RefusalCode::NotFound, "not yours");
                }
                owned.retain(|o| *o != instance);
                self.bury(instance);
                (Reply::Done, vec![])
            }
            Request::CreateSegment { segment, size, .. } => self.create(segment.name, size),
            Request::OpenSegment { segment, read_only } => {
                let name = segment.name;
                let state = self.state.lock().unwrap();
                if state.preparing.contains(&name) {
                    return refuse(RefusalCode::Busy, "it is being prepared");
                }
                match state.segments.get(&name) {
                    Some(mapping) => {
                        let (mappings, created) = (vec![*mapping], false);
                        let fds = vec![self.open(read_only)];
                        let entry = 0;
                        let reply = Reply::Segment {
                            mappings,
                            created,
                            entry,
                            uses: 1,
                            revocable: false,
                        };
                        (reply, fds)
                    }
                    None => refuse(RefusalCode::NotFound, "no such segment"),
                }
            }
            Request::GrowSegment { .. }
            | Request::RenameSegment { .. }
            | Request::ReopenSegment { .. } => {
                refuse(RefusalCode::Failed, "this agent cannot do that")
            }
            Request::RemoveSegment { segment, .. } => {
                let mut state = self.state.lock().unwrap();
                match state.segments.remove(&segment.name) {
                    Some(_) => (Reply::Done, vec![]),
                    None => refuse(RefusalCode::NotFound, "no such segment"),
                }
            }
            Request::ListSegments => {
                let state = self.state.lock().unwrap();
                let list = state.segments.iter().map(|(name, mapping)| SegmentInfo {
                    name: name.clone(),
                    size: mapping.size,
                    uid: 0,
                    gid: 0,
                    mode: 0o660,
                    group: None,
                });
                (Reply::Segments(list.collect()), vec![])
            }
            Request::Subscribe { .. } => (Reply::Done, vec![]),
            Request::Group(_) => refuse(RefusalCode::NotFound, "there are no groups here"),
            // An agent without a way to others: waiters sleep for bounded times.
            Request::WatchDeaths | Request::Wake { .. } => {
                refuse(RefusalCode::Failed, "there is no manager")
            }
        }
    }

    fn register(
        &self,
        node: &Node,
        owned: &mut Vec<InstanceId>,
        id: Option<u32>,
    ) -> (Reply, Vec<OwnedFd>) {
        let _directory = self.state.lock().unwrap();
        let is_free = |id: &ThreadId| {
            let holder = self.instances().thread(*id).node();
            holder.is_none() || !self.fabric().is_current(holder)
        };
        let free = match id {
            Some(id) => ThreadId::new(id).filter(is_free),
            None => (1..=MAX_THREADS).filter_map(ThreadId::new).find(is_free),
        };
        let Some(id) = free else {
            return refuse(RefusalCode::IdTaken, "taken");
        };
        let entry = self.instances().thread(id);
        let generation = entry.raise().unwrap();
        entry.bind(
            InstanceId::of_node(node.id, node.generation),
            Holder::default(),
        );
        owned.push(InstanceId::of_thread(id, generation));
        let id = id.get();
        (Reply::Thread { id, generation }, vec![])
    }

    fn bury(&self, instance: InstanceId) {
        let _directory = self.state.lock().unwrap();
        let entry = self.instances().thread(instance.thread().unwrap());
        if entry.generation() == instance.generation() {
            entry.raise();
            entry.bind(InstanceId::NONE, Holder::default());
        }
    }

    fn create(&self, name: String, size: u64) -> (Reply, Vec<OwnedFd>) {
        let mut state = self.state.lock().unwrap();
        if state.segments.contains_key(&name) || state.preparing.contains(&name) {
            return refuse(RefusalCode::Exists, "a segment of that name exists");
        }
        let pool = self.header.pool();
        let size = size.next_multiple_of(GRANULE).max(GRANULE);
        let mut taken: Vec<_> = state.segments.values().copied().collect();
        taken.sort_by_key(|m| m.offset);
        let mut offset = pool.offset;
        for m in taken {
            if m.offset - offset >= size {
                break;
            }
            offset = m.offset + m.size;
        }
        if offset + size > pool.end() {
            return refuse(RefusalCode::NoSpace, "the pool is used up");
        }
        let zeros = vec![0; 1 << 20];
        for at in (0..size).step_by(1 << 20) {
            let at = offset - pool.offset + at;
            self.pool.copy_in(at, &zeros).unwrap();
        }
        let mapping = WireMapping { offset, size };
        state.segments.insert(name, mapping);
        let (mappings, created) = (vec![mapping], true);
        let entry = 0;
        let reply = Reply::Segment {
            mappings,
            created,
            entry,
            uses: 1,
            revocable: false,
        };
        (reply, vec![self.open(false)])
    }

    fn open(&self, read_only: bool) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = File::options().read(true).write(!read_only).open(path);
        file.unwrap().into()
    }
}

fn refuse(code: RefusalCode, message: &str) -> (Reply, Vec<OwnedFd>) {
    let message = message.into();
    (Reply::Refused { code, message }, vec![])
}

fn accept(inner: &Arc<Inner>, node: &Arc<Node>) {
    loop {
        // SAFETY: no addresses asked for; a new descriptor is owned at once.
        let fd = unsafe {
            libc::accept4(
                node.listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        if fd < 0 {
            if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return;
        }
        // SAFETY: see above.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        node.connections.lock().unwrap().push(fd.as_raw_fd());
        let (inner, node) = (Arc::clone(inner), Arc::clone(node));
        std::thread::spawn(move || serve(&inner, &node, fd));
    }
}

fn serve(inner: &Inner, node: &Node, fd: OwnedFd) {
    let mut owned = Vec::new();
    let mut events = None;
    while !node.gone.load(Ordering::SeqCst) {
        if let Some(next) = events {
            let mut next = next;
            while let lupin::abi::fabric::RingRead::Event(event) = inner.fabric().read(next) {
                send(&fd, &Reply::Event(event), &[]);
                next += 1;
            }
            events = Some(next);
        }
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, 5) } == 0 {
            continue;
        }
        let mut packet = vec![0u8; socket::MAX_PACKET];
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::recv(fd.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
        if n <= 0 {
            break;
        }
        let Ok(request) = socket::decode::<Request>(&packet[..n as usize]) else {
            break;
        };
        if let Request::Subscribe { from } = request {
            events = Some(from);
        }
        let (reply, fds) = inner.answer(node, &mut owned, request);
        send(&fd, &reply, &fds);
    }
    node.connections
        .lock()
        .unwrap()
        .retain(|c| *c != fd.as_raw_fd());
    // A stopped agent forgets; the process lives on under its instances.
    if !node.gone.load(Ordering::SeqCst) {
        for instance in owned {
            inner.bury(instance);
        }
    }
}

fn send(fd: &OwnedFd, reply: &Reply, fds: &[OwnedFd]) {
    let mut packet = socket::encode(reply).unwrap();
    let mut part = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    let mut control = [0u64; 8];
    // SAFETY: an all-zero msghdr is valid; the control buffer has room for 4 descriptors.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            let bytes = size_of_val(fds) as u32;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(bytes) as usize;
            let message = libc::CMSG_FIRSTHDR(&header);
            (*message).cmsg_level = libc::SOL_SOCKET;
            (*message).cmsg_type = libc::SCM_RIGHTS;
            (*message).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let data = libc::CMSG_DATA(message).cast::<RawFd>();
            for (n, fd) in fds.iter().enumerate() {
                data.add(n).write_unaligned(fd.as_raw_fd());
            }
        }
        libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL);
    }
}

fn listen(path: &Path) -> OwnedFd {
    // SAFETY: a zeroed sockaddr_un with a path that was checked to fit.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        let fd = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = path.to_str().unwrap().as_bytes();
        assert!(bytes.len() < address.sun_path.len());
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        assert_eq!(
            libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len),
            0
        );
        assert_eq!(libc::listen(fd.as_raw_fd(), 64), 0);
        fd
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not come true in 10 s");
}
