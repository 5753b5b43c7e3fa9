//! Processes that are killed with SIGKILL at random moments while they use what they share.
//!
//! The enumerations beside the code try every store in turn; here the kernel chooses the moment,
//! the processes are real, and their memory goes away for real.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::FakePod;
use lupin::abi::system::LockWords;
use lupin::lock::{LockError, RecoverableLock};
use lupin::shm::Access;
use lupin::work::{BLOCK, Job, JobSpec, PARAMS, WorkError, Worker};
use lupin::{Patience, Pod};

const MIB: u64 = 1 << 20;
const LEFT: u64 = 64;
const RIGHT: u64 = 128;
const CHANGES: u64 = 192;
const DEATHS: u64 = 256;

/// Forks; the child runs `body` and ends without running anything of its parent's.
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

/// Kills and reaps a child; the exit code if it had ended by itself.
fn kill(pid: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    // SAFETY: a child of this process that was not reaped yet.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
    }
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// Changes two halves under a lock for ever; a third word counts what was begun.
fn change_for_ever(socket: &std::path::Path) {
    let pod = Pod::attach_at(socket, Patience::default()).unwrap();
    let thread = pod.register_thread(None).unwrap();
    let segment = pod.open_segment("pair", Access::ReadWrite).unwrap();
    let lock = RecoverableLock::new(segment.get::<LockWords>(0).unwrap());
    let word = |at| segment.get::<AtomicU64>(at).unwrap();
    loop {
        let guard = lock
            .lock(thread.instance(), &pod.threads_alive())
            .unwrap()
            .or_repair(|_| {
                word(DEATHS).fetch_add(1, Ordering::Relaxed);
                let left = word(LEFT).load(Ordering::Relaxed);
                word(RIGHT).store(left, Ordering::Relaxed);
                word(CHANGES).store(left, Ordering::Relaxed);
                Ok::<_, LockError>(())
            })
            .unwrap();
        let next = word(LEFT).load(Ordering::Relaxed) + 1;
        assert_eq!(word(RIGHT).load(Ordering::Relaxed) + 1, next);
        assert_eq!(word(CHANGES).load(Ordering::Relaxed) + 1, next);
        word(LEFT).store(next, Ordering::Relaxed);
        for _ in 0..50 {
            std::hint::spin_loop();
        }
        word(RIGHT).store(next, Ordering::Relaxed);
        word(CHANGES).store(next, Ordering::Relaxed);
        guard.unlock().unwrap();
    }
}

#[test]
fn a_lock_outlives_its_holders_on_three_nodes() {
    let pod = FakePod::new(8 * MIB);
    let sockets: Vec<_> = (1..=3).map(|id| pod.start_node(id)).collect();
    let own = Pod::attach_at(&sockets[0], Patience::default()).unwrap();
    let segment = own.create_segment("pair", 4096, 0o660).unwrap();
    let left = segment.get::<AtomicU64>(LEFT).unwrap();
    let mut random = Random(7);
    let start = |index: usize| spawn(|| change_for_ever(&sockets[index]));
    let mut children: Vec<_> = (0..3).map(|index| (index, start(index))).collect();
    let end = Instant::now() + Duration::from_secs(4);
    let mut kills = 0;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_micros(500 + random.below(15_000)));
        let victim = random.below(children.len() as u64) as usize;
        let (index, pid) = children.swap_remove(victim);
        assert_eq!(kill(pid), None, "it ended by itself: an assertion failed");
        kills += 1;
        children.push((index, start(index)));
    }
    // Whoever is left goes on: nobody is stuck behind the dead.
    let before = left.load(Ordering::Relaxed);
    common::eventually("progress", || left.load(Ordering::Relaxed) > before + 100);
    for (_, pid) in children {
        assert_eq!(kill(pid), None);
    }
    let orphans = segment.get::<AtomicU64>(DEATHS).unwrap();
    let orphans = orphans.load(Ordering::Relaxed);
    println!("{kills} kills, {orphans} orphaned locks, {before} changes");
    assert!(kills > 20 && orphans > 0);
}

const KIND: u64 = 77;
const UNITS: u32 = 300;

fn work_on(socket: &std::path::Path) {
    let pod = Pod::attach_at(socket, Patience::default()).unwrap();
    let thread = pod.register_thread(None).unwrap();
    let segment = pod.open_segment("job", Access::ReadWrite).unwrap();
    let judge = pod.threads_alive();
    let job = Job::open(&segment, KIND, &judge, Duration::from_secs(5)).unwrap();
    let phase = job.phase(0).unwrap();
    let mut worker = Worker::new(thread.instance(), judge);
    let result = phase.run(&mut worker, |unit, out| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(300) {
            std::hint::spin_loop();
        }
        out.resize(unit as usize * 7, unit as u8);
        Ok::<_, WorkError>(())
    });
    result.unwrap();
}

#[test]
fn a_job_outlives_its_workers_on_three_nodes() {
    let pod = FakePod::new(16 * MIB);
    let sockets: Vec<_> = (1..=3).map(|id| pod.start_node(id)).collect();
    let own = Pod::attach_at(&sockets[0], Patience::default()).unwrap();
    let thread = own.register_thread(None).unwrap();
    let spec = JobSpec {
        kind: KIND,
        phases: vec![UNITS],
        input: 0,
        arena: (0..u64::from(UNITS))
            .map(|u| (16 + u * 7).div_ceil(BLOCK) * BLOCK)
            .sum(),
        params: [0; PARAMS],
    };
    let (mut random, mut rounds, mut kills, mut redone) = (Random(3), 0, 0, 0);
    let end = Instant::now() + Duration::from_secs(4);
    while rounds < 5 || Instant::now() < end {
        let size = spec.segment_size().unwrap();
        let segment = own.create_segment("job", size, 0o660).unwrap();
        let judge = own.threads_alive();
        let job = Job::create(&segment, &spec, thread.instance(), &judge).unwrap();
        let job = job.publish().unwrap();
        let start = |index: usize| spawn(|| work_on(&sockets[index]));
        let mut children: Vec<_> = (0..3).map(|index| (index, start(index))).collect();
        let phase = job.phase(0).unwrap();
        while !phase.progress().unwrap().is_complete() {
            std::thread::sleep(Duration::from_micros(500 + random.below(20_000)));
            let (index, pid) = children.swap_remove(random.below(3) as usize);
            let ended = kill(pid);
            assert!(
                matches!(ended, None | Some(0)),
                "a worker failed: {ended:?}"
            );
            kills += u32::from(ended.is_none());
            children.push((index, start(index)));
        }
        for (_, pid) in children {
            kill(pid);
        }
        let audit = job.audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
        assert_eq!(
            audit.arena.allocated, spec.arena,
            "not a byte more than needed"
        );
        for unit in 0..UNITS {
            let bytes = phase.result(unit).unwrap().unwrap().read_all().unwrap();
            assert_eq!(bytes, vec![unit as u8; unit as usize * 7]);
        }
        redone += audit.phases[0].redone;
        own.remove_segment("job").unwrap();
        rounds += 1;
    }
    println!("{rounds} jobs, {kills} kills, {redone} units begun again");
    assert!(kills > 10 && redone > 0);
}
