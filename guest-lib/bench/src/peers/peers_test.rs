use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;

use super::mcs::Mcs;
use super::robust::RobustMutex;
use super::tatas::{Spinning, Tatas};
use crate::pod::memory;

const THREADS: u32 = 4;
const EACH: u64 = 2000;

/// A peer that lets two in would be fast, and no peer.
fn excludes(exclusively: impl Fn(u32, &dyn Fn()) + Sync) {
    let count = AtomicU64::new(0);
    let add = || count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    scope(|scope| {
        for me in 1..=THREADS {
            let exclusively = &exclusively;
            scope.spawn(move || (0..EACH).for_each(|_| exclusively(me, &add)));
        }
    });
    assert_eq!(count.into_inner(), u64::from(THREADS) * EACH);
}

#[test]
fn the_peers_exclude() {
    let memory = memory("peers", 4096).unwrap();
    let tatas = Tatas::new(memory.get(0).unwrap());
    let spinning = Spinning::default();
    excludes(|_, work| {
        tatas.lock();
        work();
        tatas.unlock();
    });
    excludes(|_, work| {
        spinning.lock();
        work();
        spinning.unlock();
    });
    let robust = RobustMutex::new().unwrap();
    excludes(|_, work| {
        robust.lock();
        work();
        robust.unlock();
    });
    let mcs = Mcs::new(&memory, 1024, THREADS as usize).unwrap();
    excludes(|me, work| {
        let me = mcs.join(me);
        mcs.lock(me);
        work();
        mcs.unlock(me);
    });
}
