//! The buddy allocator of a pod.

use core::time::Duration;

use lupin::InstanceId;
use lupin::buddy::{BuddyAudit, BuddyError, BuddySpec, PodAllocator, PodAllocatorSpec};
use lupin::lock::LockState;
use lupin::shm::Mapping;

use super::{die_before_end, equal};
use crate::case::{BYSTANDER, Case, FIRST_DEAD, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Create, &Alloc, &Free, &Give, &Recover];

const AT: u64 = 64;
const UNIT: u64 = 4096;
/// Bytes of the largest shape of the cases.
const BYTES: u64 = 16 << 10;
/// Whose chunks the operations under test make: not an instance's.
const GROUP: u64 = 77;
/// How the outcome of the operation under test is known.
const TAG: u64 = 5;

fn spec(units: u32) -> PodAllocatorSpec {
    let chunks = BuddySpec { units, unit: UNIT };
    let nodes = BYSTANDER.id();
    PodAllocatorSpec {
        nodes,
        chunks,
        also: 0,
    }
}

fn units(state: &str) -> u32 {
    match state {
        "one unit" => 1,
        "split at the top" | "coalesce to the top" | "large" => 512,
        _ => 70,
    }
}

fn create(memory: &Mapping, units: u32, me: InstanceId, world: &World) -> Result<(), BuddyError> {
    PodAllocator::create(memory, AT, &spec(units), me, world).map(drop)
}

fn open(memory: &Mapping) -> PodAllocator<'_> {
    let pod = PodAllocator::open(memory, AT, &World::without_deaths(), Duration::ZERO);
    pod.expect("complete since the state was prepared")
}

fn alloc(pod: &PodAllocator<'_>, me: InstanceId, units: u64) -> u64 {
    pod.alloc(me, &World::without_deaths(), units * UNIT)
        .expect("room")
}

fn alloc_tagged(pod: &PodAllocator<'_>, me: InstanceId, units: u64) -> Result<u64, BuddyError> {
    pod.alloc_for(me, &World::without_deaths(), units * UNIT, GROUP, TAG)
}

/// The chunks of an owner: first units and units.
fn chunks(pod: &PodAllocator<'_>, owner: u64) -> Vec<(u64, u64)> {
    let chunks = pod.chunks_of(owner);
    chunks
        .map(|chunk| (chunk.offset / UNIT, chunk.bytes / UNIT))
        .collect()
}

fn error(error: BuddyError) -> String {
    error.to_string()
}

fn audit(pod: &PodAllocator<'_>, world: &World) -> Result<BuddyAudit, String> {
    equal(
        "the lock",
        pod.lock_state(world).map_err(error)?,
        LockState::Free,
    )?;
    let audit = pod.audit(world.survivor(), world).map_err(error)?;
    equal("free and live units", audit.free + audit.live, audit.units)?;
    Ok(audit)
}

/// Somebody else dies in an operation, and somebody else recovers.
fn another_death(memory: &Mapping, world: &World) -> Result<(), String> {
    let pod = open(memory);
    let before = audit(&pod, world)?;
    if before.free == 0 {
        return Ok(());
    }
    let owner = FIRST_DEAD.word();
    let alloc = || pod.alloc(FIRST_DEAD, &World::without_deaths(), UNIT);
    // Committed, applied in part.
    die_before_end(memory, 3, alloc);
    let orphaned = LockState::Orphaned {
        previous: FIRST_DEAD,
        recoverer: None,
    };
    let state = pod.lock_state(world).map_err(error)?;
    equal("the lock", state, orphaned)?;
    let outcome = pod.recover(BYSTANDER, world).map_err(error)?;
    let told = outcome.map(|outcome| (outcome.owner, outcome.happened));
    equal("the outcome", told, Some((FIRST_DEAD, true)))?;
    for (first, _) in chunks(&pod, owner) {
        pod.free_of(BYSTANDER, world, first * UNIT, owner, 0)
            .map_err(error)?;
    }
    equal("the audit", audit(&pod, world)?, before)
}

/// Takes everything that is free, in blocks as large as there are, and gives it back.
fn use_up(memory: &Mapping, world: &World) -> Result<(), String> {
    another_death(memory, world)?;
    let pod = &open(memory);
    let before = audit(pod, world)?;
    let mut taken = Vec::new();
    let mut left = before;
    for me in [world.survivor(), BYSTANDER].into_iter().cycle() {
        if left.free == 0 {
            break;
        }
        let at = pod.alloc(me, world, left.largest * UNIT).map_err(error)?;
        taken.push((me, at));
        left = audit(pod, world)?;
    }
    let full = pod.alloc(BYSTANDER, world, UNIT);
    if !matches!(full, Err(BuddyError::NoRoom { largest: 0, .. })) {
        return Err(format!("no unit is free, but {full:?}"));
    }
    for (me, at) in taken {
        pod.free(me, world, at).map_err(error)?;
        match pod.free(me, world, at) {
            Err(BuddyError::DoubleFree { .. }) => {}
            other => return Err(format!("a second free is {other:?}")),
        }
    }
    equal("the audit", audit(pod, world)?, before)
}

/// Whether what the victim's log says of the operation agrees with what is there.
fn outcome(pod: &PodAllocator<'_>, happened: bool, world: &World) -> Result<(), String> {
    let node = VICTIM.node().expect("a node");
    let last = pod.last(node).map_err(error)?;
    if world.returned && !happened {
        return Err("it returned, and has not happened".to_owned());
    }
    if last.tag == TAG && last.happened {
        let locks: Vec<_> = last.locks.iter().collect();
        equal("the locks", locks, vec![(AT + 0x40, true)])?;
    }
    let told = last.tag == TAG && last.happened;
    equal("the outcome's word for it", told, happened)
}

fn recover(memory: &Mapping, me: InstanceId, world: &World) {
    let pod = open(memory);
    pod.recover(me, world).expect("nothing is corrupt");
}

/// A new allocator, or a creator's that died.
#[derive(Debug)]
struct Create;

impl Case for Create {
    fn name(&self) -> &'static str {
        "pod.create"
    }

    fn states(&self) -> &'static [&'static str] {
        &["new", "dead creator", "dead creator of another shape"]
    }

    fn bytes(&self) -> u64 {
        8192
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        let world = World::without_deaths();
        let other = match state {
            "dead creator" => 70,
            "dead creator of another shape" => 100,
            _ => return,
        };
        die_before_end(memory, 2, || create(memory, other, PREDECESSOR, &world));
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World {
            dead: vec![PREDECESSOR],
            ..World::without_deaths()
        };
        create(memory, 70, VICTIM, &world).expect("its creator is dead");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        create(memory, 70, me, world).expect("its creators are dead");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let pod = PodAllocator::open(memory, AT, world, Duration::ZERO);
        let pod = pod.map_err(error)?;
        equal("its shape", pod.spec(), spec(units(state)))?;
        equal("free units", audit(&pod, world)?.free, 70)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        use_up(memory, world)
    }
}

/// Chunks that are there before an operation.
const KEPT: u64 = 2;

/// Allocates.
#[derive(Debug)]
struct Alloc;

impl Alloc {
    fn size(state: &str) -> u64 {
        match state {
            "large" => 128,
            "split" => 3,
            _ => 1,
        }
    }

    /// Chunks of others, before it.
    fn others(state: &str) -> Vec<(InstanceId, u64)> {
        match state {
            "one unit" | "split at the top" => vec![],
            "last unit" => vec![(VICTIM, 64), (VICTIM, 4), (BYSTANDER, 1)],
            "full" => vec![(VICTIM, 64), (BYSTANDER, 4), (VICTIM, 2)],
            _ => vec![(VICTIM, 1), (BYSTANDER, KEPT)],
        }
    }
}

impl Case for Alloc {
    fn name(&self) -> &'static str {
        "pod.alloc"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "one unit",
            "split",
            "split at the top",
            "large",
            "last unit",
            "full",
            "dead owner with the lock",
            "dead owner, half applied",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        create(memory, units(state), BYSTANDER, &World::without_deaths()).expect("new");
        let pod = open(memory);
        for (me, units) in Self::others(state) {
            alloc(&pod, me, units);
        }
        // From the end: unlock, retire, owner and state of the chunk, words of the tree, commit.
        match state {
            "dead owner with the lock" => {
                die_before_end(memory, 12, || alloc(&pod, PREDECESSOR, 1))
            }
            "dead owner, half applied" => die_before_end(memory, 3, || alloc(&pod, PREDECESSOR, 1)),
            _ => {}
        }
    }

    fn run(&self, memory: &Mapping, state: &str) {
        let world = World::without_deaths();
        let world = World {
            dead: vec![PREDECESSOR],
            ..world
        };
        let pod = open(memory);
        let size = Self::size(state) * UNIT;
        let result = pod.alloc_for(VICTIM, &world, size, GROUP, TAG);
        assert_eq!(result.is_err(), state == "full");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        let audit = audit(&pod, world)?;
        let mine = chunks(&pod, GROUP);
        if state == "full" {
            equal("new chunks", mine, vec![])?;
            return equal("free units", audit.free, 0);
        }
        outcome(&pod, !mine.is_empty(), world)?;
        let size = Self::size(state).next_power_of_two();
        if !mine.is_empty() {
            equal("the sizes", mine.iter().map(|c| c.1).collect(), vec![size])?;
        }
        // What the dead owner was committed to is there; what it was not, is not.
        let dead = u64::from(state == "dead owner, half applied");
        equal(
            "the dead owner's chunks",
            chunks(&pod, PREDECESSOR.word()).len() as u64,
            dead,
        )?;
        let others = Self::others(state).into_iter().map(|(_, units)| units);
        let live = others.sum::<u64>() + size * mine.len() as u64 + dead;
        equal("live units", audit.live, live)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        for (first, _) in chunks(&pod, GROUP) {
            pod.free_of(world.survivor(), world, first * UNIT, GROUP, 0)
                .map_err(error)?;
        }
        use_up(memory, world)
    }
}

/// Frees.
#[derive(Debug)]
struct Free;

impl Free {
    fn size(state: &str) -> u64 {
        match state {
            "large" => 128,
            _ => 1,
        }
    }

    /// The chunk beside the one under test.
    fn neighbour(state: &str) -> Option<u64> {
        match state {
            "coalesce to the top" => None,
            _ => Some(1),
        }
    }
}

impl Case for Free {
    fn name(&self) -> &'static str {
        "pod.free"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "no coalesce",
            "coalesce to the top",
            "large",
            "dead owner, half applied",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        create(memory, units(state), BYSTANDER, &World::without_deaths()).expect("new");
        let pod = open(memory);
        alloc_tagged(&pod, BYSTANDER, Self::size(state)).expect("room");
        if let Some(units) = Self::neighbour(state) {
            alloc(&pod, BYSTANDER, units);
        }
        if state == "dead owner, half applied" {
            die_before_end(memory, 3, || alloc(&pod, PREDECESSOR, 1));
        }
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World {
            dead: vec![PREDECESSOR],
            ..World::without_deaths()
        };
        let pod = open(memory);
        let (first, _) = chunks(&pod, GROUP)[0];
        let freed = pod.free_of(VICTIM, &world, first * UNIT, GROUP, TAG);
        freed.expect("the group's chunk");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        let audit = audit(&pod, world)?;
        let left = chunks(&pod, GROUP).len() as u64;
        outcome(&pod, left == 0, world)?;
        let dead = u64::from(state == "dead owner, half applied");
        let others = Self::neighbour(state).unwrap_or(0) + dead;
        equal("live units", audit.live, others + left * Self::size(state))?;
        let owned = chunks(&pod, PREDECESSOR.word()).len() as u64;
        equal("the dead owner's chunks", owned, dead)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        for (first, _) in chunks(&pod, GROUP) {
            pod.free_of(world.survivor(), world, first * UNIT, GROUP, 0)
                .map_err(error)?;
        }
        use_up(memory, world)
    }
}

/// Gives a chunk of the dead to somebody.
#[derive(Debug)]
struct Give;

impl Case for Give {
    fn name(&self) -> &'static str {
        "pod.give"
    }

    fn states(&self) -> &'static [&'static str] {
        &["a dead owner's chunk"]
    }

    fn bytes(&self) -> u64 {
        8192
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        create(memory, units(state), BYSTANDER, &World::without_deaths()).expect("new");
        alloc(&open(memory), PREDECESSOR, KEPT);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let (world, pod) = (World::without_deaths(), open(memory));
        let (first, _) = chunks(&pod, PREDECESSOR.word())[0];
        let given = pod.give(VICTIM, &world, first * UNIT, PREDECESSOR.word(), GROUP, TAG);
        given.expect("its chunk");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        let (old, new) = (chunks(&pod, PREDECESSOR.word()), chunks(&pod, GROUP));
        let sizes: Vec<_> = old.iter().chain(&new).map(|chunk| chunk.1).collect();
        equal("the chunk", sizes, vec![KEPT])?;
        outcome(&pod, !new.is_empty(), world)?;
        equal("live units", audit(&pod, world)?.live, KEPT)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        use_up(memory, world)
    }
}

/// Finishes what a dead node left; whoever does may be a node that was started again.
#[derive(Debug)]
struct Recover;

impl Recover {
    /// Stores that the dead node did not make; from the end: unlock, retire, ...
    fn missing(state: &str) -> u64 {
        match state {
            "lock held" => 12,
            "committed" => 5,
            "half applied" => 3,
            _ => 1,
        }
    }
}

impl Case for Recover {
    fn name(&self) -> &'static str {
        "pod.recover"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "lock held",
            "committed",
            "half applied",
            "retired",
            "its own, half applied",
        ]
    }

    fn bytes(&self) -> u64 {
        8192
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        create(memory, units(state), BYSTANDER, &World::without_deaths()).expect("new");
        let pod = open(memory);
        alloc(&pod, BYSTANDER, KEPT);
        let (who, missing) = match state {
            "its own, half applied" => (VICTIM, 3),
            _ => (PREDECESSOR, Self::missing(state)),
        };
        die_before_end(memory, missing, || alloc_tagged(&pod, who, 1));
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World {
            dead: vec![PREDECESSOR],
            ..World::without_deaths()
        };
        recover(memory, VICTIM, &world);
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        recover(memory, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let pod = open(memory);
        let happened = state != "lock held";
        let new = chunks(&pod, GROUP).len();
        equal("new chunks", new, usize::from(happened))?;
        let live = KEPT + u64::from(happened);
        equal("live units", audit(&pod, world)?.live, live)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        use_up(memory, world)
    }
}
