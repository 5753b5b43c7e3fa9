//! The barrier: every round has one outcome for all, whoever dies at it.

use core::time::Duration;
use std::collections::BTreeMap;

use lupin::InstanceId;
use lupin::liveness::Liveness;
use lupin::shm::Mapping;
use lupin::sync::barrier::{Barrier, BarrierError, Passed, Seat};

use super::{equal, load};
use crate::case::{BYSTANDER, Case, PREDECESSOR, SURVIVOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Wait, &Join, &Leave];

const BYTES: u64 = 4096;
const AT: u64 = 64;
const SEATS: u32 = 3;
/// Who joins later.
const NEWCOMER: InstanceId = InstanceId::new(10, 1);

fn barrier(memory: &Mapping) -> Barrier<'_> {
    Barrier::at(memory, AT, SEATS).expect("in bounds")
}

fn arrive(memory: &Mapping, who: InstanceId, world: &World) -> Result<Passed, BarrierError> {
    let mut seat = barrier(memory).join(who, world)?;
    seat.wait_timeout(world, Duration::ZERO)
}

/// Up to three members, of which some have arrived at the first round.
fn prepare(memory: &Mapping, state: &str) {
    let (members, arrived): (&[InstanceId], &[InstanceId]) = match state {
        "nobody waits" => (&[SURVIVOR, VICTIM, BYSTANDER], &[]),
        "others wait" => (&[SURVIVOR, VICTIM, BYSTANDER], &[SURVIVOR, BYSTANDER]),
        "the living wait for the dead" => (&[BYSTANDER, PREDECESSOR, VICTIM], &[BYSTANDER]),
        "the dead has arrived" => {
            let arrived = &[PREDECESSOR, BYSTANDER];
            (&[PREDECESSOR, BYSTANDER, VICTIM], arrived)
        }
        "a free seat" => (&[SURVIVOR, BYSTANDER], &[SURVIVOR, BYSTANDER]),
        "the seat of the dead" => (&[SURVIVOR, PREDECESSOR, BYSTANDER], &[BYSTANDER]),
        other => panic!("no such state: {other}"),
    };
    // Those who are dead now lived then.
    let everybody = |_: InstanceId| true;
    for member in members {
        barrier(memory)
            .join(*member, &everybody)
            .expect("there is room");
    }
    for member in arrived {
        let mut seat = barrier(memory)
            .join(*member, &everybody)
            .expect("it has one");
        let _ = seat.wait_timeout(&everybody, Duration::ZERO);
    }
}

/// The members that live in `world`, and who goes on for them.
fn living(memory: &Mapping, state: &str, world: &World) -> Vec<InstanceId> {
    let members = barrier(memory).members();
    let mut living: Vec<_> = members.filter(|member| world.is_alive(*member)).collect();
    // Where a seat may have stayed free, somebody must take it: no round ends without.
    let needed = [world.survivor(), NEWCOMER];
    let needed = match (world.dead.is_empty(), state) {
        (true, _) => &needed[..0],
        (false, "a free seat") => &needed[..],
        _ => &needed[..1],
    };
    for member in needed {
        if !living.contains(member) {
            living.push(*member);
        }
    }
    living
}

/// What the members are told: who broke a round, or nobody.
type Outcomes = BTreeMap<u64, Option<InstanceId>>;

/// Lets `members` wait until one round is whole for all of them. Each round must have the same
/// outcome for all that are told.
fn whole_round(
    memory: &Mapping,
    members: &[InstanceId],
    world: &World,
) -> Result<Outcomes, String> {
    let mut outcomes = Outcomes::new();
    let mut seats: Vec<Option<Seat<'_>>> = members.iter().map(|_| None).collect();
    let mut whole = vec![None; members.len()];
    for _ in 0..16 {
        for (seat, member) in seats.iter_mut().zip(members) {
            if seat.is_none() {
                *seat = match barrier(memory).join(*member, world) {
                    Ok(seat) => Some(seat),
                    // Somebody dead has not been missed yet.
                    Err(BarrierError::Full { .. }) => None,
                    Err(error) => return Err(error.to_string()),
                };
            }
        }
        let last = whole.iter().max().copied().flatten();
        let done = last.is_some() && whole.iter().all(|round| *round == last);
        if done {
            return Ok(outcomes);
        }
        for (seat, whole) in seats.iter_mut().zip(&mut whole) {
            let Some(seat) = seat else { continue };
            let (round, dead) = match seat.wait_timeout(world, Duration::ZERO) {
                Ok(passed) => (passed.round, None),
                Err(BarrierError::Dead { dead, round }) => (round, Some(dead)),
                Err(BarrierError::Timeout { .. }) => continue,
                Err(error) => return Err(error.to_string()),
            };
            let known = *outcomes.entry(round).or_insert(dead);
            equal("the outcome of a round", dead, known)?;
            if dead.is_none() {
                *whole = Some(round);
            }
        }
    }
    Err(format!("no round among {members:?} ends: {outcomes:?}"))
}

/// The living go on until nobody dead counts any more. Returns what they were told.
fn recover(memory: &Mapping, state: &str, world: &World) -> Outcomes {
    let members = living(memory, state, world);
    let mut told = Outcomes::new();
    // Who died after it had arrived breaks the round after that.
    for _ in 0..2 {
        let outcomes = whole_round(memory, &members, world);
        told.extend(outcomes.expect("the living go on"));
    }
    told
}

/// The word on which those sleep who wait, behind the state: each end of a round changes it.
fn wake_ups(memory: &Mapping) -> u64 {
    load(memory, AT + 8) & u64::from(u32::MAX)
}

fn check(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    if world.dead.is_empty() {
        return Ok(());
    }
    let sorted = |mut members: Vec<InstanceId>| {
        members.sort_by_key(|member| member.word());
        members
    };
    let mut expected = vec![world.survivor(), BYSTANDER];
    if state == "a free seat" {
        expected.push(NEWCOMER);
    }
    let members = barrier(memory).members().collect();
    equal("the members", sorted(members), sorted(expected))
}

fn go_on(memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
    let mut members = living(memory, state, world);
    for _ in 0..2 {
        whole_round(memory, &members, world)?;
    }
    if members.len() < SEATS as usize {
        members.push(NEWCOMER);
        let outcomes = whole_round(memory, &members, world)?;
        equal("the deaths told", outcomes.values().flatten().count(), 0)?;
    }
    // One more dies, and all others are told of it, once.
    let mut after = world.clone();
    after.dead.push(BYSTANDER);
    members.retain(|member| *member != BYSTANDER);
    let mut told = Outcomes::new();
    for _ in 0..2 {
        told.extend(whole_round(memory, &members, &after)?);
    }
    let told: Vec<_> = told.into_values().flatten().collect();
    equal("the deaths told", told, vec![BYSTANDER])
}

/// Arrives, and ends the round if it is the last.
#[derive(Debug)]
struct Wait;

impl Case for Wait {
    fn name(&self) -> &'static str {
        "barrier.wait"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "nobody waits",
            "others wait",
            "the living wait for the dead",
            "the dead has arrived",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, state: &str) {
        let result = arrive(memory, VICTIM, &World::without_deaths());
        let as_expected = match state {
            "nobody waits" => matches!(result, Err(BarrierError::Timeout { .. })),
            "the living wait for the dead" => {
                matches!(
                    result,
                    Err(BarrierError::Dead {
                        dead: PREDECESSOR,
                        round: 0
                    })
                )
            }
            _ => {
                result
                    == Ok(Passed {
                        round: 0,
                        last: true,
                    })
            }
        };
        assert!(as_expected, "{result:?}");
    }

    fn recover(&self, memory: &Mapping, state: &str, _: InstanceId, world: &World) {
        let outcomes = recover(memory, state, world);
        // What the dead one was told, the others are told.
        let first = outcomes.get(&0).copied().flatten();
        let whole = ["others wait", "the dead has arrived"].contains(&state);
        if world.returned && state != "nobody waits" {
            let known = if whole { None } else { Some(PREDECESSOR) };
            let told = outcomes.contains_key(&0).then_some(first);
            assert!(told.is_none_or(|told| told == known), "{outcomes:?}");
        }
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            let ended = u64::from(state != "nobody waits");
            equal("the wake-ups", wake_ups(memory), ended)?;
        }
        check(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        go_on(memory, state, world)
    }
}

/// Takes a seat: one that nobody had, or that of a dead member, whose round it breaks first.
#[derive(Debug)]
struct Join;

impl Case for Join {
    fn name(&self) -> &'static str {
        "barrier.join"
    }

    fn states(&self) -> &'static [&'static str] {
        &["a free seat", "the seat of the dead"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let seat = barrier(memory).join(VICTIM, &World::without_deaths());
        assert!(seat.is_ok(), "{seat:?}");
    }

    fn recover(&self, memory: &Mapping, state: &str, _: InstanceId, world: &World) {
        recover(memory, state, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        check(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        go_on(memory, state, world)
    }
}

/// Gives up a seat while the others wait.
#[derive(Debug)]
struct Leave;

impl Case for Leave {
    fn name(&self) -> &'static str {
        "barrier.leave"
    }

    fn states(&self) -> &'static [&'static str] {
        &["others wait", "nobody waits"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        prepare(memory, state);
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let seat = barrier(memory).join(VICTIM, &World::without_deaths());
        let seat = seat.expect("it has one");
        seat.leave().expect("nobody declared it dead");
    }

    fn recover(&self, memory: &Mapping, state: &str, _: InstanceId, world: &World) {
        let outcomes = recover(memory, state, world);
        if world.returned {
            let told: Vec<_> = outcomes.values().flatten().collect();
            assert!(!told.contains(&&VICTIM), "it had left: {outcomes:?}");
        }
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        if world.dead.is_empty() {
            // The last to arrive may have left instead.
            equal("the wake-ups", wake_ups(memory), 1)?;
        }
        check(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        go_on(memory, state, world)
    }
}
