//! Where other nodes leave wake-ups for this one: a socket, and a thread that does nothing but
//! take them and wake.
//!
//! See [`lupin::client::peers`] for who sends, and why that needs no trust.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use lupin_abi::socket::{MAX_WAKE, PEERS, Request, decode};

use super::{Allowance, wake_word};
use crate::memory::PodMemory;
use crate::memory::mapping::Mapping;
use crate::priority;

/// How long nothing is taken once the allowance is used up. The queue is full then, and senders
/// take the longer way.
const REST: Duration = Duration::from_millis(1);

/// The running thread; ends when dropped.
#[derive(Debug)]
pub struct Doorstep {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: UnixDatagram,
    stop: AtomicBool,
}

impl Doorstep {
    /// Takes wake-ups for the node of `memory`, whose whole pool `pool` maps, beside the agent's
    /// socket at `agent`. `None` if nodes have no such way to each other.
    ///
    /// # Errors
    /// If the socket or the thread cannot be made.
    pub fn open(
        agent: &Path,
        memory: Arc<PodMemory>,
        pool: impl FnOnce() -> io::Result<Mapping>,
    ) -> io::Result<Option<Self>> {
        let Some(folder) = agent.parent().map(|folder| folder.join(PEERS)) else {
            return Ok(None);
        };
        if !folder.is_dir() {
            return Ok(None);
        }
        let pool = pool()?;
        let path = folder.join(memory.identity().node.get().to_string());
        // Left behind by an earlier life, which is fenced, or by an earlier agent of this one. The
        // folder is closed to others, so the socket needs no mode of its own.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let shared = Arc::new(Shared {
            socket: UnixDatagram::bind(&path)?,
            stop: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let run = move || {
            if let Err(error) = priority::raise() {
                info!("no raised priority ({error}): a busy node wakes its sleepers late");
            }
            serve(&of_thread, &memory, &pool);
        };
        let thread = Builder::new()
            .name("doorstep".into())
            .stack_size(128 << 10)
            .spawn(run)?;
        Ok(Some(Self {
            path,
            shared,
            thread: Some(thread),
        }))
    }
}

impl Drop for Doorstep {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.shared.stop.store(true, Ordering::Relaxed);
        // Nothing is received any more, also by who waits already.
        if self.shared.socket.shutdown(Shutdown::Both).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared, memory: &PodMemory, pool: &Mapping) {
    let class = memory.identity().node.wake_class();
    let mut allowance = Allowance::default();
    // One more than the longest, so that a longer one is noticed.
    let mut buffer = [0; MAX_WAKE + 1];
    loop {
        let received = shared.socket.recv(&mut buffer);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let len = match received {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The socket goes with the thread, and senders take the longer way.
            Err(error) => return warn!("wake-ups of other nodes come by the longer way: {error}"),
        };
        // Before a look at what it says: nonsense costs time, too.
        while !allowance.may(Instant::now()) {
            std::thread::sleep(REST);
        }
        let Ok(Request::Wake {
            segment,
            offset,
            classes,
            all,
        }) = decode(&buffer[..len])
        else {
            debug!("a datagram of {len} bytes is no wake-up");
            continue;
        };
        if classes & (1 << class) == 0 || !offset.is_multiple_of(4) {
            continue;
        }
        // Without the directory's lock, so perhaps of a segment that was there a moment ago: then
        // it is a wake-up for nothing.
        let entry = memory.system().segments().get(segment as usize);
        if let Some(at) = entry.and_then(|entry| entry.place(offset)) {
            wake_word(pool, at, class, all);
        }
    }
}

#[cfg(test)]
#[path = "doorstep_test.rs"]
mod doorstep_test;
