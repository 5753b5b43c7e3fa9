//! Wake-ups that cross nodes, and news of deaths, on their way through this agent.
//!
//! ```text
//!   guests:           process -> its agent -> manager -> agents of the other nodes -> futex
//!   namespace nodes:  process ------------------------> agents of the other nodes -> futex
//! ```
//!
//! Both are hints, which everybody on the way may drop: sleepers look for themselves now and
//! then. So nothing here waits, retries or answers, and every queue is short.

mod doorstep;

use std::sync::atomic::AtomicU32;
use std::time::Instant;

use log::debug;
use lupin_abi::port::{ToManager, Wake};

use crate::memory::mapping::Mapping;
pub use doorstep::Doorstep;

/// Wake-ups that wait for the link to the manager.
const WAITING: usize = 256;
/// Wake-ups and news of deaths that the agent takes at once, and per second in the long run.
const BURST: f64 = 4096.0;
/// Each costs the agent some microseconds: a tenth of a processor is what a hostile process gets.
const PER_SECOND: f64 = 16384.0;

/// Datagrams that cost as much as the rest of a wake-up.
const NODES_FOR_ONE: f64 = 4.0;

/// How many wake-ups may be looked at now.
#[derive(Debug)]
pub struct Allowance {
    tokens: f64,
    filled: Instant,
}

impl Default for Allowance {
    fn default() -> Self {
        let (tokens, filled) = (BURST, Instant::now());
        Self { tokens, filled }
    }
}

impl Allowance {
    /// Whether one more may be, which counts as one.
    pub fn may(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * PER_SECOND).min(BURST);
        self.filled = now;
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    /// Counts what one was that went to so many nodes. It is a debt if there is not so much left.
    pub fn charge(&mut self, nodes: usize) {
        self.tokens -= nodes as f64 / NODES_FOR_ONE;
    }
}

/// What is to be told to the manager, and how much may be.
#[derive(Debug, Default)]
pub struct Wakes {
    waiting: Vec<Wake>,
    deaths: bool,
    groups: bool,
    /// For what processes ask.
    pub allowance: Allowance,
}

impl Wakes {
    /// Passes a wake-up on to other nodes.
    pub fn push(&mut self, wake: Wake) {
        if self.waiting.len() < WAITING {
            self.waiting.push(wake);
        }
    }

    /// Tells of the death of threads of this node: once, however many they are.
    pub fn threads_died(&mut self) {
        self.deaths = true;
    }

    /// Whether there are deaths to be told of.
    pub fn has_deaths(&self) -> bool {
        self.deaths
    }

    /// Tells the other nodes that there are notifications of groups: once, however many.
    pub fn groups_changed(&mut self) {
        self.groups = true;
    }

    /// Wake-ups for the manager to pass on.
    pub fn take_wakes(&mut self) -> impl Iterator<Item = ToManager> + use<> {
        let wakes = std::mem::take(&mut self.waiting);
        wakes.into_iter().map(ToManager::Wake)
    }

    /// News for the manager to pass on.
    pub fn take_news(&mut self) -> impl Iterator<Item = ToManager> + use<> {
        let groups = std::mem::take(&mut self.groups).then_some(ToManager::Groups);
        let deaths = std::mem::take(&mut self.deaths).then_some(ToManager::Deaths);
        groups.into_iter().chain(deaths)
    }
}

/// Wakes sleepers of a node of `class` on the word at `offset` of a mapping.
///
/// Whatever the word is: a wake-up without a reason is a look more for whoever sleeps there.
pub fn wake_word(mapping: &Mapping, offset: u64, class: u32, all: bool) {
    let word = usize::try_from(offset / 8)
        .ok()
        .and_then(|index| mapping.words().get(index));
    let Some(word) = word else {
        return;
    };
    let half = word.as_ptr().cast::<AtomicU32>();
    let count = if all { i32::MAX } else { 1 };
    // SAFETY: the kernel uses the address, which lies in the mapping, as a key and does not write
    // to it. It reads no memory either, so that of a revoked device is an error and no SIGBUS.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            half.wrapping_add((offset / 4 % 2) as usize),
            libc::FUTEX_WAKE_BITSET,
            count,
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            1u32 << class,
        )
    };
    debug!("a wake-up from another node: {woken} woken");
}

#[cfg(test)]
#[path = "wakes_test.rs"]
mod wakes_test;
