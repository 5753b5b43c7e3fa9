//! Those who come back: a singleton that is started again within one life of its instance, and a
//! member that takes its seat at a barrier again.

use core::mem::forget;
use core::time::Duration;

use lupin::InstanceId;
use lupin::crash::{Ended, dies_after};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;
use lupin::sync::barrier::{Barrier, BarrierError, Seat};
use lupin::sync::once::{OnceCell, OnceError};
use lupin::sync::semaphore::Semaphore;

use super::{equal, text};
use crate::case::{BYSTANDER, Case, Operation, SURVIVOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&SEMAPHORE, &ONCE, &BARRIER];

const BYTES: u64 = 4096;
const AT: u64 = 64;
const PERMITS: u32 = 2;
const SEATS: u32 = 3;
const VALUE: [u64; 3] = [11, 22, 33];

fn semaphore(memory: &Mapping) -> Semaphore<'_> {
    Semaphore::at(memory, AT, PERMITS).expect("it lies in the memory")
}

const SEMAPHORE: Operation = Operation {
    name: "semaphore.resolve_own",
    states: &["own permit"],
    bytes: BYTES,
    prepare: |memory, _| {
        for holder in [VICTIM, BYSTANDER] {
            forget(semaphore(memory).try_acquire(holder, &World::without_deaths()));
        }
    },
    run: |memory, _| assert_eq!(semaphore(memory).resolve_own(VICTIM), 1),
    recover: |memory, _, _, _| {
        // Started again, as the same instance.
        semaphore(memory).resolve_own(VICTIM);
    },
    check: |memory, _, _| {
        let holders: Vec<_> = semaphore(memory).holders().collect();
        equal("the holders", holders, vec![BYSTANDER])
    },
    go_on: |memory, _, world| {
        let semaphore = semaphore(memory);
        let permit = semaphore.try_acquire(world.survivor(), world);
        permit.map_err(text)?.release().map_err(text)?;
        equal("permits held", semaphore.holders().count(), 1)
    },
    lives_on: true,
};

fn once(memory: &Mapping) -> OnceCell<'_> {
    OnceCell::at(memory, AT, VALUE.len() as u32).expect("it lies in the memory")
}

fn init(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<Vec<u64>, OnceError> {
    let value = once(memory).get_or_init(me, judge, |filler| {
        for (index, word) in VALUE.into_iter().enumerate() {
            filler.set(index, word);
        }
        Ok::<_, OnceError>(())
    })?;
    Ok(value.iter().collect())
}

const ONCE: Operation = Operation {
    name: "once.resolve_own",
    states: &["own computation"],
    bytes: BYTES,
    prepare: |memory, _| {
        let ended = dies_after(2, || init(memory, VICTIM, &World::without_deaths()));
        assert!(matches!(ended, Ended::Died));
    },
    run: |memory, _| assert!(once(memory).resolve_own(VICTIM)),
    recover: |memory, _, _, _| {
        once(memory).resolve_own(VICTIM);
    },
    check: |memory, _, _| equal("who computes", once(memory).computing(), None),
    go_on: |memory, _, world| {
        let value = init(memory, world.survivor(), world).map_err(text)?;
        equal("the value", value, VALUE.to_vec())
    },
    lives_on: true,
};

fn seat<'m>(memory: &'m Mapping, me: InstanceId, judge: &impl Liveness) -> Seat<'m> {
    let barrier = Barrier::at(memory, AT, SEATS).expect("it lies in the memory");
    barrier.join(me, judge).expect("there is room")
}

/// Arrives; whether the round is over for this member.
fn arrive(seat: &mut Seat<'_>, judge: &impl Liveness) -> bool {
    match seat.wait_timeout(judge, Duration::ZERO) {
        Ok(_) | Err(BarrierError::Dead { .. }) => true,
        Err(BarrierError::Timeout { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

const BARRIER: Operation = Operation {
    name: "barrier.come_back",
    states: &["the others arrived", "nobody arrived"],
    bytes: BYTES,
    prepare: |memory, state| {
        let world = World::without_deaths();
        for member in [VICTIM, SURVIVOR, BYSTANDER] {
            seat(memory, member, &world);
        }
        if state == "the others arrived" {
            for member in [SURVIVOR, BYSTANDER] {
                assert!(!arrive(&mut seat(memory, member, &world), &world));
            }
        }
    },
    run: |memory, _| {
        let world = World::without_deaths();
        let left = seat(memory, VICTIM, &world).leave();
        left.expect("it is a member");
        seat(memory, VICTIM, &world);
    },
    recover: |memory, _, me, world| {
        // The one that recovers may be no member yet, and becomes one.
        seat(memory, me, world);
    },
    check: |memory, _, world| {
        let barrier = Barrier::at(memory, AT, SEATS).map_err(text)?;
        let is_back = barrier.members().any(|member| member == VICTIM);
        // Whoever came back is waited for again.
        equal("it takes part", is_back || !world.returned, true)
    },
    go_on: |memory, _, world| {
        let barrier = Barrier::at(memory, AT, SEATS).map_err(text)?;
        let members: Vec<_> = barrier.members().filter(|m| world.is_alive(*m)).collect();
        let mut seats: Vec<_> = members.iter().map(|m| seat(memory, *m, world)).collect();
        let target = barrier.round() + 3;
        for _ in 0..40 {
            for seat in seats.iter_mut().filter(|seat| seat.round() < target) {
                arrive(seat, world);
            }
        }
        let rounds: Vec<_> = seats.iter().map(Seat::round).collect();
        equal("the rounds", rounds, vec![target; members.len()])
    },
    lives_on: true,
};
