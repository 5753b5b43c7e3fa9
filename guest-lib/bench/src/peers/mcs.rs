//! The queue lock of Mellor-Crummey and Scott (ACM TOCS 9(1), 1991), which nobody survives.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lupin::wait::{Pacer, wake};

/// A waiter's state: it may go.
const GO: u32 = 0;
const WAITS: u32 = 1;
/// It waits, and must be woken.
const SLEEPS: u32 = 2;

#[repr(C, align(64))]
#[derive(Default)]
struct Node {
    /// The number of the one behind, or 0.
    next: AtomicU64,
    state: AtomicU32,
    wake: AtomicU32,
}

/// The lock without recovery, as it is in the literature, but that its waiters sleep by the
/// library's policy. Threads have numbers from 1 on.
#[repr(C, align(64))]
pub struct Mcs {
    tail: AtomicU64,
    nodes: Box<[Node]>,
}

impl Mcs {
    /// A lock for so many threads.
    pub fn new(threads: usize) -> Self {
        Self {
            tail: AtomicU64::new(0),
            nodes: (0..=threads).map(|_| Node::default()).collect(),
        }
    }

    #[inline]
    pub fn lock(&self, me: u32) {
        let node = &self.nodes[me as usize];
        node.next.store(0, Ordering::Relaxed);
        node.state.store(WAITS, Ordering::Relaxed);
        let ahead = self.tail.swap(me.into(), Ordering::AcqRel);
        if ahead != 0 {
            self.wait(node, &self.nodes[ahead as usize], me);
        }
    }

    #[cold]
    #[inline(never)]
    fn wait(&self, node: &Node, ahead: &Node, me: u32) {
        ahead.next.store(me.into(), Ordering::Release);
        let mut pacer = Pacer::new(None);
        while node.state.load(Ordering::Acquire) != GO {
            if pacer.spin() {
                continue;
            }
            let seen = node.wake.load(Ordering::Acquire);
            let (order, state) = (Ordering::SeqCst, &node.state);
            if state.compare_exchange(WAITS, SLEEPS, order, order) != Err(GO) {
                let _ = pacer.sleep_on(&node.wake, seen);
            }
        }
    }

    #[inline]
    pub fn unlock(&self, me: u32) {
        let node = &self.nodes[me as usize];
        let mut next = node.next.load(Ordering::Acquire);
        if next == 0 {
            let (success, failure) = (Ordering::Release, Ordering::Relaxed);
            let last = self.tail.compare_exchange(me.into(), 0, success, failure);
            if last.is_ok() {
                return;
            }
            next = Self::next_of(node);
        }
        let next = &self.nodes[next as usize];
        if next.state.swap(GO, Ordering::AcqRel) == SLEEPS {
            wake(&next.wake, 1);
        }
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
