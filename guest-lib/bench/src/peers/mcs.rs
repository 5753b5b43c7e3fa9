//! The queue lock of Mellor-Crummey and Scott (ACM TOCS 9(1), 1991), which nobody survives.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lupin::pod_safe::{PodSafe, PodShared};
use lupin::shm::{Mapping, ShmError};
use lupin::wait::{Pacer, Parking};

/// A waiter's state: it may go.
const GO: u64 = 0;
const WAITS: u64 = 1;

#[derive(PodSafe, PodShared)]
#[repr(C, align(64))]
pub struct Node {
    /// The number of the one behind, or 0.
    next: AtomicU64,
    state: AtomicU64,
    waiters: AtomicU32,
    wake: AtomicU32,
    _reserved: [AtomicU64; 5],
}

impl Node {
    #[inline(always)]
    fn parking(&self) -> Parking<'_> {
        Parking {
            flag: &self.waiters,
            word: &self.wake,
        }
    }
}

/// The lock without recovery, as it is in the literature. It lies in the same kind of memory as
/// the recoverable one, and its waiters sleep by the same policy.
pub struct Mcs<'a> {
    tail: &'a AtomicU64,
    nodes: &'a [Node],
}

/// What a thread has to use the lock: its node, and the node's number, from 1 on.
#[derive(Clone, Copy)]
pub struct Waiter<'a> {
    node: &'a Node,
    number: u64,
}

impl<'a> Mcs<'a> {
    /// A lock for so many threads at `at`: its line, and then the nodes.
    pub fn new(memory: &'a Mapping, at: u64, threads: usize) -> Result<Self, ShmError> {
        Ok(Self {
            tail: memory.get(at)?,
            nodes: memory.get_slice(at + 64, threads as u64)?,
        })
    }

    /// The thread with this number, from 1 on.
    pub fn join(&self, number: u32) -> Waiter<'a> {
        Waiter {
            node: &self.nodes[number as usize - 1],
            number: number.into(),
        }
    }

    #[inline(always)]
    pub fn lock(&self, me: Waiter<'_>) {
        me.node.next.store(0, Ordering::Relaxed);
        me.node.state.store(WAITS, Ordering::Relaxed);
        let ahead = self.tail.swap(me.number, Ordering::AcqRel);
        if ahead != 0 {
            self.wait(me, &self.nodes[ahead as usize - 1]);
        }
    }

    #[cold]
    #[inline(never)]
    fn wait(&self, me: Waiter<'_>, ahead: &Node) {
        ahead.next.store(me.number, Ordering::Release);
        let (state, parking) = (&me.node.state, me.node.parking());
        let mut pacer = Pacer::new(None);
        while state.load(Ordering::Acquire) != GO {
            if pacer.spin() {
                continue;
            }
            let seen = parking.announce();
            if state.load(Ordering::Acquire) != GO {
                let _ = pacer.sleep_on(parking.word, seen);
            }
        }
    }

    #[inline(always)]
    pub fn unlock(&self, me: Waiter<'_>) {
        let mut next = me.node.next.load(Ordering::Acquire);
        if next == 0 {
            let (success, failure) = (Ordering::Release, Ordering::Relaxed);
            let last = self.tail.compare_exchange(me.number, 0, success, failure);
            if last.is_ok() {
                return;
            }
            next = Self::next_of(me.node);
        }
        let next = &self.nodes[next as usize - 1];
        next.state.store(GO, Ordering::Release);
        next.parking().wake(1);
    }

    /// Waits for whoever has swapped the tail and not yet linked itself.
    #[cold]
    fn next_of(node: &Node) -> u64 {
        let mut pacer = Pacer::new(None);
        loop {
            let next = node.next.load(Ordering::Acquire);
            if next != 0 {
                return next;
            }
            if !pacer.spin() {
                let _ = pacer.sleep();
            }
        }
    }
}
