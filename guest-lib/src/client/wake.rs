//! The way of a wake-up to other nodes, and of news of deaths to this process: one connection to
//! the agent for the whole process, and one thread that reads from it. Where nodes share a kernel,
//! a wake-up goes to the agents of the other nodes at once ([`peers`](super::peers)).
//!
//! Nothing here waits for anybody: a wake-up is one packet that is sent or dropped, and the
//! thread alone connects. Until it has, wake-ups wait for it, so many as are sure to be few.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use lupin_abi::InstanceId;
use lupin_abi::fabric::FabricSection;
use lupin_abi::socket::{Reply, Request, decode, encode};

use super::connection::{Address, exchange};
use super::packet::PacketSocket;
use super::peers::Peers;
use super::{Pod, check_life};
use crate::shm::Mapping;
use crate::wait::{class, deadline_after, sleepers};

/// Wake-ups that wait for the connection.
const WAITING: usize = 64;
/// Between two attempts to connect: at first, and at last.
const RETRY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// The thread's own patience; an answer that is later is no answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the thread reads before it begins to read anew.
const READ: Duration = Duration::from_secs(3600);

/// The pod of the first segment that this process mapped. Segments of another attachment are
/// woken by the backstop: a process belongs to one node.
static HOME: OnceLock<Home> = OnceLock::new();
/// The mapped segments of that pod.
static SEGMENTS: RwLock<Vec<Place>> = RwLock::new(Vec::new());
/// The process that started the thread; 0 before. A process that was forked off has none.
static STARTED_BY: AtomicU32 = AtomicU32::new(0);
/// Whether the agent tells this process of deaths, and takes wake-ups.
static IS_UP: AtomicBool = AtomicBool::new(false);
/// The short way, where there is one.
static SHORT: OnceLock<Peers> = OnceLock::new();
/// Nodes to which a process sends itself. It does so on the way out of a critical section: more
/// are left to its agent, which has the time.
const FEW: usize = 4;
static ROUTE: Mutex<Route> = Mutex::new(Route {
    socket: None,
    waiting: VecDeque::new(),
});

struct Route {
    socket: Option<Arc<PacketSocket>>,
    waiting: VecDeque<Request>,
}

#[derive(Debug)]
struct Home {
    address: Address,
    me: InstanceId,
    /// Nodes that the pod may have.
    capacity: u32,
    /// The generation table: which nodes there are.
    table: Arc<Mapping>,
}

impl Home {
    fn fabric(&self) -> &FabricSection {
        // SAFETY: `Pod::attach_at` has checked it; mapped for as long as `self`, and used through
        // the abi's atomics.
        unsafe { FabricSection::from_ptr(self.table.as_ptr()) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    start: usize,
    len: usize,
    entry: u32,
}

// No code panics in a critical section here, and none leaves anything half done.
fn route() -> MutexGuard<'static, Route> {
    ROUTE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn segments() -> RwLockReadGuard<'static, Vec<Place>> {
    SEGMENTS.read().unwrap_or_else(PoisonError::into_inner)
}

/// A mapped segment in whose words others can be woken, until this is dropped.
#[derive(Debug)]
pub(super) struct Registered(Option<Place>);

impl Registered {
    /// Registers the mapping of the segment with number `entry`, which the agent of `pod` opened.
    pub(super) fn new(pod: &Pod, entry: u32, memory: &Mapping) -> Self {
        let (address, me) = (&pod.inner.address, pod.inner.me);
        let home = HOME.get_or_init(|| {
            let capacity = pod.header().node_capacity();
            if let Some(node) = me.node() {
                class::set_node(node, capacity);
            }
            Home {
                address: address.clone(),
                me,
                capacity,
                table: Arc::clone(&pod.inner.fabric),
            }
        });
        if (&home.address.path, home.me) != (&address.path, me) {
            return Self(None);
        }
        let place = Place {
            start: memory.as_ptr().addr(),
            len: memory.len() as usize,
            entry,
        };
        SEGMENTS
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(place);
        Self(Some(place))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            SEGMENTS
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|other| other.start != place.start);
        }
    }
}

/// The segment and offset of a word, if it lies in a registered segment.
fn find(word: &AtomicU32) -> Option<(u32, u64)> {
    let at = word.as_ptr().addr();
    segments().iter().find_map(|place| {
        let offset = at.checked_sub(place.start).filter(|o| *o < place.len)?;
        Some((place.entry, offset as u64))
    })
}

/// Whether this process was forked off from one with a thread: it has neither the thread nor an
/// honest copy of the locks above.
fn is_forked() -> bool {
    let starter = STARTED_BY.load(Ordering::Acquire);
    starter != 0 && starter != std::process::id()
}

/// Whether this process started the thread, or does so now.
fn is_started() -> bool {
    let pid = std::process::id();
    match STARTED_BY.compare_exchange(0, pid, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => start(),
        Err(starter) => starter == pid,
    }
}

fn start() -> bool {
    let Some(home) = HOME.get() else {
        STARTED_BY.store(0, Ordering::Release);
        return false;
    };
    // Signals are for the program's threads.
    let blocked = Blocked::all();
    let spawned = std::thread::Builder::new()
        .name("lupin-wake".into())
        .stack_size(128 << 10)
        .spawn(move || serve(home));
    drop(blocked);
    // Without a thread: MAX_SLEEP, and not again and again.
    spawned.is_ok()
}

/// Whether a sleeper on `word` is woken by other nodes, and told of deaths. Starts what it takes.
pub(crate) fn reaches(word: &AtomicU32) -> bool {
    HOME.get().is_some()
        && !is_forked()
        && find(word).is_some()
        && is_started()
        && IS_UP.load(Ordering::Acquire)
}

/// Asks for the sleepers of `word` on nodes of `classes`: one of each node, or all.
pub(crate) fn send(word: &AtomicU32, classes: u32, all: bool) {
    if HOME.get().is_none() || is_forked() {
        return;
    }
    let Some((segment, offset)) = find(word).filter(|_| is_started()) else {
        return;
    };
    let wake = |classes: u32| Request::Wake {
        segment,
        offset,
        classes: classes as u16,
        all,
    };
    let left = by_the_short_way(&wake(classes), classes);
    if left == 0 {
        return;
    }
    let mut route = route();
    let Some(socket) = route.socket.clone() else {
        if route.waiting.len() < WAITING {
            route.waiting.push_back(wake(left));
        }
        return;
    };
    drop(route);
    transmit(&socket, &wake(left));
}

/// Sends to the agents of other nodes, if there are few; gives the classes that are left.
fn by_the_short_way(wake: &Request, classes: u32) -> u32 {
    let (Some(short), Some(home)) = (SHORT.get(), HOME.get()) else {
        return classes;
    };
    let nodes = || short.of(classes, home.fabric());
    match encode(wake) {
        Ok(packet) if nodes().take(FEW + 1).count() <= FEW => short.send(&packet, nodes()),
        _ => classes,
    }
}

/// Sends if there is room. What is lost is found by the sleepers themselves.
fn transmit(socket: &PacketSocket, wake: &Request) {
    if let Ok(packet) = encode(wake) {
        let _ = socket.try_send(&packet);
    }
}

/// The thread: stays connected, and passes interruptions on.
fn serve(home: &Home) {
    if let Some(peers) = Peers::find(&home.address.path, home.me.node(), home.capacity) {
        let _ = SHORT.set(peers);
    }
    let mut address = home.address.clone();
    address.patience.connect = Duration::ZERO;
    address.patience.request = PATIENCE;
    let mut pause = RETRY.0;
    loop {
        match connect(&address, home.me) {
            Ok(Some(socket)) => {
                pause = RETRY.0;
                let socket = Arc::new(socket);
                let waiting = {
                    let mut route = route();
                    route.socket = Some(socket.clone());
                    core::mem::take(&mut route.waiting)
                };
                waiting.iter().for_each(|wake| transmit(&socket, wake));
                IS_UP.store(true, Ordering::Release);
                listen(&socket);
                IS_UP.store(false, Ordering::Release);
                route().socket = None;
                // Back to short sleeps: nobody tells them of anything now.
                sleepers::interrupt_all();
            }
            Ok(None) => {}
            // The node lives again, and this process should not.
            Err(OtherLife) => return,
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
}

struct OtherLife;

/// A connection that is told of deaths; `None` if there is none to be had now.
fn connect(address: &Address, me: InstanceId) -> Result<Option<PacketSocket>, OtherLife> {
    let Ok((socket, welcome)) = address.connect() else {
        return Ok(None);
    };
    check_life(me, &welcome).map_err(|_| OtherLife)?;
    let watching = exchange(
        &socket,
        &Request::WatchDeaths,
        deadline_after(PATIENCE),
        PATIENCE,
    );
    Ok(matches!(watching, Ok((Reply::Done, _))).then_some(socket))
}

/// Reads until the connection breaks.
fn listen(socket: &PacketSocket) {
    loop {
        match socket.receive(deadline_after(READ)) {
            Ok((packet, _)) => {
                if let Ok(Reply::Deaths) = decode(&packet) {
                    sleepers::interrupt_all();
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
            Err(_) => return,
        }
    }
}

/// All signals are blocked for the calling thread, and those that it makes, until this is dropped.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(crate) fn all() -> Self {
        // SAFETY: both sets are valid; an all-zero sigset_t is one, and is filled here.
        unsafe {
            let (mut all, mut old) = (core::mem::zeroed(), core::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            Self(old)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is what the thread had before.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, core::ptr::null_mut())
        };
    }
}
