//! The heap in a segment.
//!
//! Each operation under test is a participant's that joined in another process, and has its slabs
//! and no private memory of them. Its node dies with it: the bystander is dead, too.

use std::time::Duration;

use lupin::InstanceId;
use lupin::crash::dies_after;
use lupin::heap::{Heap, HeapError, HeapSpec, KIND_ALLOC, KIND_FREE, Participant, ROOTS, SPAN};
use lupin::shm::Mapping;

use super::{die_before_end, equal, load};
use crate::case::{BYSTANDER, Case, FIRST_DEAD, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[
    &Operation {
        name: "heap.alloc_into",
        states: &[
            "first slab",
            "first slab with words of its own",
            "own slab",
            "slab of one who left",
            "block that another freed",
            "block that another frees when it is needed",
            "slabs of a dead one",
            "empty slabs of a dead one",
            "full",
            "handed over at once",
            "dead holder of the heap's lock",
            "run of spans",
            "run of spans, dead holder of the heap's lock",
            "run of spans, slabs of a dead one",
        ],
        prepare: prepare_alloc,
        run: |memory, state| on_block(memory, state, run_alloc),
        kind: KIND_ALLOC,
    },
    &Operation {
        name: "heap.free_from",
        states: &[
            "another's block",
            "another's block, allocated again at once",
            "own block",
            "last block of a slab",
            "run of spans",
            "run of spans, dead holder of the heap's lock",
        ],
        prepare: prepare_free,
        run: |memory, state| on_block(memory, state, run_free),
        kind: KIND_FREE,
    },
    &Operation {
        name: "heap.join",
        states: &["empty", "only a dead one's place", "dead while it joined"],
        prepare: prepare_join,
        run: |memory, _| {
            let heap = open(memory, &World::without_deaths());
            std::mem::forget(join(heap, VICTIM));
        },
        kind: 0,
    },
    &Operation {
        name: "heap.leave",
        states: &["empty", "with blocks in its holds"],
        prepare: |memory, _| _ = create(memory, 3),
        run: run_leave,
        kind: 0,
    },
    &Operation {
        name: "heap.recover",
        states: &[
            "dead in an allocation",
            "dead in a free",
            "dead in a run's allocation",
            "dead with blocks in its holds",
            "dead with a block in its holds that another freed",
            "dead while it settled another",
        ],
        prepare: prepare_recover,
        run: |memory, _| {
            let world = World::without_deaths();
            let outcomes = open(memory, &world).recover(VICTIM, &world);
            outcomes.expect("nothing is damaged");
        },
        kind: 0,
    },
    &Create,
];

const BYTES: u64 = 200 << 10;
/// The blocks that states are made of: two fill a span.
const BIG: u64 = 32 << 10;
const TAG: u64 = 5;

type Party<'m> = Participant<'m, World>;

fn create(memory: &Mapping, participants: u32) -> Heap<'_> {
    let spec = HeapSpec { participants };
    Heap::create(memory, &spec, BYSTANDER, &World::without_deaths()).expect("new memory")
}

fn open<'m>(memory: &'m Mapping, world: &World) -> Heap<'m> {
    Heap::open(memory, world, Duration::ZERO).expect("the heap is complete")
}

fn join<'m>(heap: Heap<'m>, me: InstanceId) -> Party<'m> {
    // Those who died before the operation are alive while they prepare its state.
    let judge = World::without_deaths();
    heap.join(me, judge).expect("a place is free")
}

fn root(p: &Party<'_>, index: u32) -> u64 {
    p.heap().root(index).expect("there are 64")
}

fn alloc(p: &mut Party<'_>, index: u32, bytes: u64) {
    p.alloc_into(root(p, index), bytes).expect("there is room");
}

fn free(p: &mut Party<'_>, index: u32) {
    p.free_from(root(p, index)).expect("it is there");
}

/// Allocates big blocks, from a root on, until none is left; returns the root after the last.
fn fill(p: &mut Party<'_>, mut index: u32) -> u32 {
    while p.alloc_into(root(p, index), BIG).is_ok() {
        index += 1;
    }
    index
}

/// Makes a slot own what another owns.
fn copy(memory: &Mapping, from: u64, to: u64) {
    let block = load(memory, from).to_ne_bytes();
    memory.copy_in(to, &block).expect("both are slots");
}

/// Somebody dies so many stores before the end of an operation.
fn die(heap: Heap<'_>, me: InstanceId, stores: u64, operation: impl Fn(&mut Party<'_>)) {
    die_before_end(heap.memory(), stores, || {
        let mut p = join(heap, me);
        operation(&mut p);
        std::mem::forget(p);
    });
}

/// The participant that was prepared.
fn resume<'m>(heap: Heap<'m>, me: InstanceId) -> Party<'m> {
    let judge = World::without_deaths();
    heap.resume(me, judge).expect("it has joined")
}

fn prepare_alloc(memory: &Mapping, state: &str) {
    let heap = create(memory, 3);
    match state {
        "first slab" | "run of spans" => {}
        "first slab with words of its own" => {
            let mut p = join(heap, VICTIM);
            alloc(&mut p, 1, SPAN);
            alloc(&mut p, 2, SPAN);
            for index in [1, 2] {
                let block = load(memory, root(&p, index));
                let bytes = [0xff; SPAN as usize];
                memory
                    .copy_in(block, &bytes)
                    .expect("the block is as large");
                free(&mut p, index);
            }
            std::mem::forget(p);
            return;
        }
        "own slab" | "handed over at once" => {
            let mut p = join(heap, VICTIM);
            alloc(&mut p, 2, BIG);
            std::mem::forget(p);
            std::mem::forget(join(heap, BYSTANDER));
            return;
        }
        "slab of one who left" => {
            let mut p = join(heap, BYSTANDER);
            alloc(&mut p, 1, BIG);
            p.leave().expect("it lives");
        }
        "block that another frees when it is needed" => {
            let mut p = join(heap, VICTIM);
            alloc(&mut p, 1, BIG);
            alloc(&mut p, 2, BIG);
            std::mem::forget(p);
            std::mem::forget(join(heap, BYSTANDER));
            return;
        }
        "empty slabs of a dead one" => {
            let mut p = join(heap, PREDECESSOR);
            for n in 0..4 {
                p.alloc_into(p.hold(n), BIG).expect("there is room");
            }
            std::mem::forget(p);
            let outcomes = heap.recover(BYSTANDER, &World::without_deaths());
            outcomes.expect("nothing is damaged");
        }
        "block that another freed" => {
            let mut p = join(heap, VICTIM);
            alloc(&mut p, 1, BIG);
            alloc(&mut p, 2, BIG);
            std::mem::forget(p);
            let mut p = join(heap, BYSTANDER);
            free(&mut p, 1);
            p.leave().expect("it lives");
            return;
        }
        "full" => {
            let mut p = join(heap, BYSTANDER);
            fill(&mut p, 1);
            std::mem::forget(p);
        }
        "slabs of a dead one" | "run of spans, slabs of a dead one" => {
            let mut p = join(heap, PREDECESSOR);
            let end = fill(&mut p, 1);
            for index in 1..end {
                free(&mut p, index);
            }
            std::mem::forget(p);
        }
        _ => return with_dead_holder(heap),
    }
    std::mem::forget(join(heap, VICTIM));
}

/// One joins who finds the heap's lock orphaned: its holder died right after it had committed a
/// record under it.
fn with_dead_holder(heap: Heap<'_>) {
    std::mem::forget(join(heap, VICTIM));
    die(heap, PREDECESSOR, 3, |p| alloc(p, 1, SPAN));
}

fn run_alloc(p: &mut Party<'_>, state: &str) {
    if state == "block that another frees when it is needed" {
        let mut other = resume(p.heap(), BYSTANDER);
        free(&mut other, 1);
        std::mem::forget(other);
    }
    let bytes = match state {
        "first slab with words of its own" => 896,
        state if state.starts_with("run of spans") => SPAN,
        _ => BIG,
    };
    match p.alloc_into(root(p, 0), bytes) {
        Ok(_) => {}
        Err(HeapError::OutOfMemory { .. }) if state == "full" => {}
        Err(error) => panic!("{error}"),
    }
    if state == "handed over at once" {
        let (from, to) = (root(p, 0), root(p, 1));
        let mut taker = resume(p.heap(), BYSTANDER);
        let mut record = taker.begin(1).expect("its log is empty");
        let block = record.get(from).expect("a root");
        record.set(to, block).expect("there is room");
        record.set(from, 0).expect("there is room");
        record.commit(block).expect("it lives");
        std::mem::forget(taker);
    }
}

fn prepare_free(memory: &Mapping, state: &str) {
    let heap = create(memory, 3);
    let mut p = join(heap, VICTIM);
    let mut other = join(heap, BYSTANDER);
    match state {
        "another's block" | "another's block, allocated again at once" => {
            alloc(&mut other, 0, BIG);
            alloc(&mut other, 1, BIG);
        }
        "own block" => {
            alloc(&mut p, 0, BIG);
            alloc(&mut p, 1, BIG);
        }
        "last block of a slab" => {
            for index in [0, 1, 2, 3] {
                alloc(&mut p, index, BIG);
            }
            for index in [2, 3, 1] {
                free(&mut p, index);
            }
        }
        _ => alloc(&mut p, 0, SPAN),
    }
    std::mem::forget((p, other));
    if state.ends_with("dead holder of the heap's lock") {
        die(heap, PREDECESSOR, 3, |p| alloc(p, 1, SPAN));
    }
}

fn run_free(p: &mut Party<'_>, state: &str) {
    free(p, 0);
    if state == "another's block, allocated again at once" {
        let mut other = resume(p.heap(), BYSTANDER);
        alloc(&mut other, 0, BIG);
        std::mem::forget(other);
    }
}

fn prepare_join(memory: &Mapping, state: &str) {
    let heap = create(memory, if state == "empty" { 3 } else { 1 });
    match state {
        "empty" => {}
        "only a dead one's place" => die(heap, PREDECESSOR, 2, |p| {
            p.alloc_into(p.hold(3), BIG).expect("there is room");
        }),
        _ => die(heap, PREDECESSOR, 3, |_| {}),
    }
}

fn run_leave(memory: &Mapping, state: &str) {
    let mut p = join(open(memory, &World::without_deaths()), VICTIM);
    if state != "empty" {
        p.alloc_into(p.hold(0), BIG).expect("there is room");
        p.alloc_into(p.hold(9), SPAN).expect("there is room");
        alloc(&mut p, 1, BIG);
    }
    p.leave().expect("it lives");
}

fn prepare_recover(memory: &Mapping, state: &str) {
    let heap = create(memory, 4);
    match state {
        "dead in an allocation" => die(heap, PREDECESSOR, 2, |p| alloc(p, 1, BIG)),
        "dead in a free" => die(heap, PREDECESSOR, 2, |p| {
            alloc(p, 1, BIG);
            free(p, 1);
        }),
        "dead in a run's allocation" => die(heap, PREDECESSOR, 5, |p| alloc(p, 1, SPAN)),
        "dead with a block in its holds that another freed" => {
            let mut p = join(heap, PREDECESSOR);
            let hold = p.hold(0);
            p.alloc_into(hold, BIG).expect("there is room");
            std::mem::forget(p);
            // A mistake: two slots for one block.
            copy(memory, hold, heap.root(1).expect("there are 64"));
            let mut other = join(heap, BYSTANDER);
            free(&mut other, 1);
            std::mem::forget(other);
        }
        _ => {
            die(heap, FIRST_DEAD, 1, |p| {
                p.alloc_into(p.hold(0), BIG).expect("there is room");
                p.alloc_into(p.hold(1), SPAN).expect("there is room");
                p.free_from(p.hold(1)).expect("it is there");
                p.alloc_into(p.hold(1), SPAN).expect("there is room");
            });
            if state == "dead while it settled another" {
                let world = World::without_deaths();
                let _ = dies_after(30, || heap.recover(PREDECESSOR, &world));
            }
        }
    }
}

/// An operation on a block, by a participant.
fn on_block(memory: &Mapping, state: &str, run: fn(&mut Party<'_>, &str)) {
    let mut p = resume(open(memory, &World::without_deaths()), VICTIM);
    p.tag(TAG);
    run(&mut p, state);
    // A death runs no destructors.
    std::mem::forget(p);
}

/// An operation of a participant.
#[derive(Debug)]
struct Operation {
    name: &'static str,
    states: &'static [&'static str],
    prepare: fn(&Mapping, &str),
    run: fn(&Mapping, &str),
    /// What it does to root 0, if anything.
    kind: u32,
}

impl Case for Operation {
    fn name(&self) -> &'static str {
        self.name
    }

    fn states(&self) -> &'static [&'static str] {
        self.states
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        (self.prepare)(memory, state);
    }

    fn run(&self, memory: &Mapping, state: &str) {
        (self.run)(memory, state);
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let world = with_bystander(world);
        let outcomes = open(memory, &world).recover(me, &world);
        outcomes.expect("nothing is damaged");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let heap = open(memory, world);
        let audit = heap.audit_with([]).map_err(|error| error.to_string())?;
        if !audit.is_clean() {
            return Err(format!("{audit:?}"));
        }
        let outcome = heap.outcome_of(VICTIM);
        let happened = outcome.is_some_and(|o| (o.kind, o.tag) == (self.kind, TAG) && o.happened);
        let owned = load(memory, heap.root(0).expect("there are 64"));
        match self.kind {
            KIND_ALLOC => {
                let moved = match state {
                    "handed over at once" => load(memory, heap.root(1).expect("there are 64")),
                    _ => 0,
                };
                equal("the outcome", happened, owned | moved != 0)?;
                let result = outcome.filter(|_| happened);
                let result = result.map_or(0, |outcome| outcome.result);
                equal("its result", result, owned | moved)?;
                let seq = outcome.map_or(0, |outcome| outcome.seq);
                let is_record = happened && state.starts_with("run of spans");
                equal("without a sequence number", is_record && seq == 0, false)?;
                equal(
                    "happened",
                    happened,
                    happened || world.returned && state != "full",
                )
            }
            KIND_FREE => {
                let is_again = state == "another's block, allocated again at once";
                if !is_again || world.returned {
                    equal("owned at the end", owned != 0, !happened || is_again)?;
                }
                equal("happened", happened, happened || world.returned)
            }
            _ => Ok(()),
        }
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }

    fn lives_on(&self, _: &str) -> bool {
        // It holds its place, and in it what the others are to use in `go_on`.
        false
    }
}

fn with_bystander(world: &World) -> World {
    let mut world = world.clone();
    world.dead.push(BYSTANDER);
    world
}

/// Survivors free everything that roots own, and can use all of the memory then.
fn go_on(memory: &Mapping, world: &World) -> Result<(), String> {
    let text = |error: HeapError| error.to_string();
    let heap = open(memory, world);
    let mut world = with_bystander(world);
    let outcome = heap.outcome_of(VICTIM);
    let mut p = heap.join(world.survivor(), world.clone()).map_err(text)?;
    // If there is room: what the dead one was about to take.
    let _ = p.alloc_into(root(&p, ROOTS - 1), BIG);
    // The dead one's successor dies before it is there, and the next one as soon as it is: what
    // was settled stays so.
    let heir = InstanceId::new(VICTIM.id(), 2);
    let _ = dies_after(2, || std::mem::forget(heap.join(heir, world.clone())));
    world.dead.push(heir);
    heap.recover(world.survivor(), &world).map_err(text)?;
    let heir = InstanceId::new(VICTIM.id(), 3);
    std::mem::forget(heap.join(heir, world.clone()));
    world.dead.push(heir);
    heap.recover(world.survivor(), &world).map_err(text)?;
    equal("the outcome", heap.outcome_of(VICTIM), outcome)?;
    let audit = heap.audit_with([]).map_err(text)?;
    if !audit.is_clean() {
        return Err(format!("{audit:?}"));
    }
    for index in 0..ROOTS {
        if load(memory, root(&p, index)) != 0 {
            p.free_from(root(&p, index)).map_err(text)?;
        }
    }
    for bytes in [64, BIG, heap.largest_block()] {
        p.alloc_into(root(&p, 0), bytes).map_err(text)?;
        p.free_from(root(&p, 0)).map_err(text)?;
    }
    p.leave().map_err(text)?;
    let audit = heap.audit_with([]).map_err(text)?;
    equal("what is left", (audit.live_blocks, audit.slabs), (0, 0))
}

/// Creating a heap, also after a dead creator who wanted another shape.
#[derive(Debug)]
struct Create;

impl Case for Create {
    fn name(&self) -> &'static str {
        "heap.create"
    }

    fn states(&self) -> &'static [&'static str] {
        &["empty", "dead creator", "dead creator of another shape"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        let participants = match state {
            "empty" => return,
            "dead creator" => 3,
            _ => 1,
        };
        die_before_end(memory, 2, || {
            let spec = HeapSpec { participants };
            Heap::create(memory, &spec, PREDECESSOR, &World::without_deaths()).map(drop)
        });
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let spec = HeapSpec { participants: 3 };
        let heap = Heap::create(memory, &spec, VICTIM, &World::without_deaths());
        heap.expect("nobody alive creates it");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let spec = HeapSpec { participants: 3 };
        match Heap::create(memory, &spec, me, world) {
            Ok(_) | Err(HeapError::Exists) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let audit = open(memory, world).audit_with([]);
        let audit = audit.map_err(|error| error.to_string())?;
        equal("clean", audit.is_clean(), true)?;
        equal("free spans", audit.free_spans, audit.spans)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        go_on(memory, world)
    }
}
