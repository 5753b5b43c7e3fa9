//! The example `locks` in processes on two nodes that are killed at random moments.

mod common;
#[path = "../examples/locks.rs"]
mod example;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::FakePod;
use lupin::shm::Access;
use lupin::{Patience, Pod};

/// Processes at a time.
const PROCESSES: usize = 3;
const DEATHS: usize = 30;

fn spawn(body: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the child only runs `body` and `_exit`s. Other threads of the parent are gone in
    // it; glibc keeps its allocator usable across a fork.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        pid => pid,
    }
}

/// Kills and reaps a child, which had not ended by itself.
fn kill(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: a child of this process that was not reaped yet.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
    }
    assert!(libc::WIFSIGNALED(status), "it ended by itself");
}

#[test]
fn the_counters_of_each_pair_stay_equal_whoever_is_killed() {
    let pod = FakePod::new(4 << 20);
    let sockets = [1, 2].map(|id| pod.start_node(id));
    let start = |n: usize| {
        let socket = sockets[n % 2].clone();
        spawn(|| {
            let pod = Pod::attach_at(socket, Patience::default()).unwrap();
            let stand = example::count(&pod, u64::MAX);
            panic!("{stand:?}");
        })
    };
    let mut running: Vec<_> = (0..PROCESSES).map(start).collect();
    for death in 0..DEATHS {
        std::thread::sleep(Duration::from_micros(3000 + 977 * (death as u64 % 7)));
        kill(running[death % PROCESSES]);
        running[death % PROCESSES] = start(death);
    }
    running.into_iter().for_each(kill);

    let survivor = Pod::attach_at(sockets[0].clone(), Patience::default()).unwrap();
    let stand = example::count(&survivor, 100).unwrap();
    assert!(stand.iter().all(|counter| *counter >= 10), "{stand:?}");
    let segment = survivor.open_segment("locks", Access::ReadOnly).unwrap();
    for (at, counter) in example::PAIRS.into_iter().zip(stand) {
        let [left, right] = [at, at + 64].map(|at| segment.get::<AtomicU64>(at).unwrap());
        assert_eq!(left.load(Ordering::Relaxed), counter);
        assert_eq!(right.load(Ordering::Relaxed), counter);
    }
}
