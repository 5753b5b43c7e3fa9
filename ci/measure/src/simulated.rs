//! Nodes without processes: a thousand of them for a manager to look at.
//!
//! What the manager sees of a node is its section of pod memory, its process and the accounts of
//! its threads. Here a thread moves all the heartbeats, and there is no process. The manager is the
//! product's: it starts, judges, fences and restarts these nodes as any others.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lupin_abi::event::FencePath;
use lupin_abi::layout::HEADER_SIZE;
use lupin_abi::node::{AgentState, NodeSection};
use lupin_abi::{Generation, NodeId, PodHeader};
use lupin_fabric::power::{
    Exit, Fence, Instance, PowerControl, Prepared, StartError, StartRequest,
};
use lupin_fabric::runtime::NodeRecord;
use lupin_fabric::sys::process::ProcessName;
use lupin_fabric::sys::threads::ThreadTimes;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Starts nodes that have no process.
pub struct Simulation {
    /// Where every agent would listen: somebody takes the connection and never answers.
    agents: PathBuf,
    lives: AtomicU32,
}

impl Simulation {
    /// Agents "listen" on a socket in `folder`.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let agents = folder.join("agents.sock");
        let listener = UnixListener::bind(&agents)?;
        std::thread::spawn(move || {
            let mut connections = Vec::new();
            connections.extend(listener.incoming().map_while(Result::ok));
        });
        Ok(Self {
            agents,
            lives: AtomicU32::new(0),
        })
    }
}

impl PowerControl for Simulation {
    fn prepare(&self, request: &StartRequest<'_>) -> Result<Box<dyn Prepared>, StartError> {
        let failed = |message: String| StartError::permanent(message);
        let section = request.memory.node(request.node.id);
        let section = section.ok_or_else(|| failed("no such node".into()))?;
        symlink(&self.agents, request.folder.agent_socket())
            .map_err(|e| failed(format!("cannot make the agent's socket: {e}")))?;
        let number = self.lives.fetch_add(1, Ordering::Relaxed);
        section.introduce(request.generation, 1, 1);
        section.set_state(AgentState::Joined);
        Ok(Box::new(Life {
            // No process has such a number: it is beyond what Linux gives.
            pid: (1 << 30) + number,
            gone: AtomicBool::new(false),
        }))
    }

    fn adopt(
        &self,
        _request: &StartRequest<'_>,
        _record: &NodeRecord,
    ) -> io::Result<Option<Arc<dyn Instance>>> {
        Ok(None)
    }
}

/// One life of such a node.
struct Life {
    pid: u32,
    gone: AtomicBool,
}

impl Prepared for Life {
    fn process(&self) -> ProcessName {
        Instance::process(self)
    }

    fn release(self: Box<Self>) -> Result<Arc<dyn Instance>, StartError> {
        Ok(Arc::new(*self))
    }
}

impl Instance for Life {
    fn process(&self) -> ProcessName {
        ProcessName {
            pid: self.pid,
            start_time: 0,
        }
    }

    fn watch(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn fence(&self) -> io::Result<Fence> {
        self.kill();
        Ok(Fence {
            path: FencePath::Killed,
            nanos: 0,
            slots: 0,
        })
    }

    fn pause(&self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&self) -> io::Result<()> {
        Ok(())
    }

    fn quit(&self) {
        self.kill();
    }

    fn kill(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn ring(&self) -> bool {
        true
    }

    fn exit(&self) -> Exit {
        Exit::unknown()
    }

    fn thread_times(&self) -> Option<Vec<ThreadTimes>> {
        Some(Vec::new())
    }
}

/// What moves the heartbeats; stops when dropped.
pub struct Heart {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// A life that beats no more.
    hung: Mutex<Option<(NodeId, Generation)>>,
}

impl Heart {
    /// Moves the heartbeat of every node in `pod`, a pod memory, every `period`.
    pub fn start(pod: &Path, period: Duration) -> io::Result<Self> {
        let sections = sections(pod)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            hung: Mutex::new(None),
        });
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let mut next = Instant::now();
            while !seen.stop.load(Ordering::Relaxed) {
                let hung = *seen.hung.lock().unwrap_or_else(PoisonError::into_inner);
                for (node, section) in &sections {
                    let (state, generation) = section.agent();
                    if state == AgentState::Joined && hung != Some((*node, generation)) {
                        section.beat();
                    }
                }
                next = (next + period).max(Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on this life beats no more, and the last one that did not does again.
    pub fn hang(&self, node: NodeId, generation: Generation) {
        let mut hung = self
            .shared
            .hung
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *hung = Some((node, generation));
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The nodes' sections, mapped for as long as this process lives.
fn sections(pod: &Path) -> io::Result<Vec<(NodeId, &'static NodeSection)>> {
    let file = File::options().read(true).write(true).open(pod)?;
    let size = file.metadata()?.len();
    let mut bytes = [0; HEADER_SIZE];
    file.read_exact_at(&mut bytes, 0)?;
    let header = PodHeader::decode(&bytes, size).map_err(io::Error::other)?;
    let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
    let length = length.ok_or(io::ErrorKind::InvalidData)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new shared mapping at an address of the kernel's choice, never unmapped.
    let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0)? };
    let ids = (1..=header.node_capacity()).filter_map(NodeId::new);
    let section = |id| {
        let range = header.node(id)?;
        // SAFETY: inside the mapping, which is as long as the header says (checked by `decode`),
        // aligned to the granule, and used through atomics.
        let section =
            unsafe { NodeSection::from_ptr(base.as_ptr().cast::<u8>().add(range.offset as usize)) };
        Some((id, section))
    };
    Ok(ids.filter_map(section).collect())
}
