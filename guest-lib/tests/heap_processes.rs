//! Processes that share a heap, free each other's blocks, and are killed with SIGKILL at random
//! moments.
//!
//! The enumerations beside the code try every store and every instruction; here the kernel chooses
//! the moment, and many die at once, also while they settle the work of others.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::FakePod;
use lupin::heap::{Heap, HeapError, HeapSpec, Participant};
use lupin::liveness::Liveness;
use lupin::shm::{Access, Mapping};
use lupin::{InstanceId, Patience, Pod};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// Slots of each process, in a table that root 0 owns; then one word a process for its instance.
const SLOTS: u64 = 64;
const PROCESSES: u64 = 4;
/// Bytes of each size that is used: slabs of small and of large blocks, and runs of spans.
const SIZES: [u64; 6] = [8, 64, 500, 5_000, 32_768, 100_000];

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
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % bound
    }
}

fn word(memory: &Mapping, at: u64) -> &AtomicU64 {
    memory.get(at).unwrap()
}

/// Allocates into its own slots and frees from them for ever; now and then frees what a dead
/// neighbour has left in one of its slots.
fn churn(socket: &Path, number: u64) {
    let pod = Pod::attach_at(socket, Patience::default()).unwrap();
    let thread = pod.register_thread(None).unwrap();
    let segment = pod.open_segment("heap", Access::ReadWrite).unwrap();
    let judge = pod.threads_alive();
    let heap = Heap::open(&segment, &judge, Duration::from_secs(5)).unwrap();
    let mut me = heap.join(thread.instance(), judge).unwrap();
    let table = word(&segment, heap.root(0).unwrap()).load(Ordering::Acquire);
    let slots = table + number * SLOTS * 8;
    claim(&mut me, number);
    let mut random = Random(thread.instance().word() | 1);
    for turn in 1u64.. {
        me.tag(turn);
        let slot = slots + random.below(SLOTS) * 8;
        let bytes = SIZES[random.below(SIZES.len() as u64) as usize];
        if word(&segment, slot).load(Ordering::Acquire) != 0 {
            me.free_from(slot).unwrap();
            continue;
        }
        match me.alloc_into(slot, bytes) {
            Ok(block) => segment.copy_in(block, &[number as u8; 8]).unwrap(),
            Err(HeapError::OutOfMemory { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        if turn.is_multiple_of(4) {
            let other = (number + 1) % PROCESSES;
            free_of_dead(&mut me, other, random.below(SLOTS));
        }
    }
}

/// The word that says whose the slots of a process are.
fn claim_of<'m, J: Liveness>(me: &Participant<'m, J>, number: u64) -> (u64, &'m AtomicU64) {
    let memory = me.memory();
    let table = word(memory, me.heap().root(0).unwrap()).load(Ordering::Acquire);
    (
        table,
        word(memory, table + (PROCESSES * SLOTS + number) * 8),
    )
}

/// Makes slots the caller's own, if they are a dead one's or nobody's; settles the dead one first.
fn try_claim<J: Liveness>(me: &mut Participant<'_, J>, number: u64) -> bool {
    let (_, claim) = claim_of(me, number);
    let found = claim.load(Ordering::Acquire);
    let owner = InstanceId::from_word(found);
    if !owner.is_none() {
        if me.judge().is_alive(owner) {
            return false;
        }
        me.settle(owner).unwrap();
    }
    let own = me.instance().word();
    let swapped = claim.compare_exchange(found, own, Ordering::AcqRel, Ordering::Relaxed);
    swapped.is_ok()
}

fn claim<J: Liveness>(me: &mut Participant<'_, J>, number: u64) {
    while !try_claim(me, number) {
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Frees what a dead process has in one of its slots: often a block of its own slabs.
fn free_of_dead<J: Liveness>(me: &mut Participant<'_, J>, number: u64, index: u64) {
    let (table, claim) = claim_of(me, number);
    let owner = InstanceId::from_word(claim.load(Ordering::Acquire));
    if owner.is_none() || me.judge().is_alive(owner) || !try_claim(me, number) {
        return;
    }
    let slot = table + (number * SLOTS + index) * 8;
    if word(me.memory(), slot).load(Ordering::Acquire) != 0 {
        me.free_from(slot).unwrap();
    }
    claim.store(0, Ordering::Release);
}

#[test]
fn a_heap_outlives_its_participants_on_three_nodes() {
    let pod = FakePod::new(16 * MIB);
    let sockets: Vec<_> = (1..=3).map(|id| pod.start_node(id)).collect();
    let own = Pod::attach_at(&sockets[0], Patience::default()).unwrap();
    let thread = own.register_thread(None).unwrap();
    let segment = own.create_segment("heap", SIZE, 0o660).unwrap();
    let spec = HeapSpec { participants: 12 };
    let judge = own.threads_alive();
    let heap = Heap::create(&segment, &spec, thread.instance(), &judge).unwrap();
    let root = heap.root(0).unwrap();
    let mut me = heap.join(thread.instance(), own.threads_alive()).unwrap();
    let table = me
        .alloc_into(root, (PROCESSES * SLOTS + PROCESSES) * 8)
        .unwrap();
    for n in 0..PROCESSES * SLOTS + PROCESSES {
        word(&segment, table + n * 8).store(0, Ordering::Relaxed);
    }
    me.leave().unwrap();

    let mut random = Random(11);
    let start = |number: u64| spawn(|| churn(&sockets[number as usize % 3], number));
    let (mut kills, mut happened, mut undone) = (0, 0, 0);
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        let mut children: Vec<_> = (0..PROCESSES).map(|n| (n, start(n))).collect();
        for _ in 0..8 {
            std::thread::sleep(Duration::from_micros(500 + random.below(12_000)));
            let victim = random.below(PROCESSES) as usize;
            let (number, pid) = children[victim];
            assert_eq!(kill(pid), None, "it ended by itself: an assertion failed");
            kills += 1;
            children[victim] = (number, start(number));
        }
        for (_, pid) in children {
            assert_eq!(kill(pid), None, "it ended by itself: an assertion failed");
            kills += 1;
        }
        // Everybody is dead, as soon as the pod knows it: nothing is lost and nothing is twice.
        common::eventually("the pod knows of all deaths", || {
            let claims = segment.get_slice::<AtomicU64>(table + PROCESSES * SLOTS * 8, PROCESSES);
            let claims = claims.unwrap().iter();
            let mut owners =
                claims.map(|claim| InstanceId::from_word(claim.load(Ordering::Acquire)));
            !owners.any(|owner| judge.is_alive(owner))
        });
        let outcomes = heap.recover(thread.instance(), &judge).unwrap();
        happened += outcomes.iter().filter(|outcome| outcome.happened).count();
        undone += outcomes.iter().filter(|outcome| !outcome.happened).count();
        let slots = segment
            .get_slice::<AtomicU64>(table, PROCESSES * SLOTS)
            .unwrap();
        let owned: Vec<_> = slots
            .iter()
            .map(|slot| slot.load(Ordering::Acquire))
            .collect();
        let audit = heap
            .audit_with(owned.into_iter().filter(|block| *block != 0))
            .unwrap();
        assert!(audit.is_clean(), "after {kills} kills: {audit:?}");
    }
    let mut me = heap.join(thread.instance(), own.threads_alive()).unwrap();
    for n in 0..PROCESSES * SLOTS {
        let slot = table + n * 8;
        if word(&segment, slot).load(Ordering::Acquire) != 0 {
            me.free_from(slot).unwrap();
        }
    }
    me.free_from(root).unwrap();
    me.alloc_into(root, heap.largest_block()).unwrap();
    me.free_from(root).unwrap();
    me.leave().unwrap();
    let audit = heap.audit_with([]).unwrap();
    assert_eq!((audit.live_blocks, audit.slabs), (0, 0), "{audit:?}");
    println!("{kills} kills; last operations: {happened} happened, {undone} did not");
    assert!(kills > 20);
}
