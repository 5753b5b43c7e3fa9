use super::super::test_world::{A, B, C, D, Dead, Random, all_but};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Instant;

type Words = BarrierWords<3>;

fn barrier(words: &Words) -> Barrier<'_> {
    Barrier::new(words).unwrap()
}

/// One wait that does not sleep: arrives, and makes whatever steps can be made.
fn arrive(words: &Words, me: InstanceId, judge: &impl Liveness) -> Result<Passed, BarrierError> {
    barrier(words)
        .join(me, judge)?
        .wait_timeout(judge, Duration::ZERO)
}

fn is_timeout(result: &Result<Passed, BarrierError>) -> bool {
    matches!(result, Err(BarrierError::Timeout { .. }))
}

/// A, B and C have seats; B and C have arrived at the first round.
fn others_wait() -> Words {
    let words = Words::default();
    for member in [A, B, C] {
        barrier(&words).join(member, &all_but(&[])).unwrap();
    }
    for member in [B, C] {
        assert!(is_timeout(&arrive(&words, member, &all_but(&[]))));
    }
    words
}

/// Lets the living pass rounds until one is whole for all of them, and returns whose deaths the
/// first was told of. Each round has one outcome, whoever is told.
fn until_whole(seats: &mut [Seat<'_>], judge: &impl Liveness) -> Vec<InstanceId> {
    let mut outcomes = BTreeMap::new();
    let mut whole = vec![None; seats.len()];
    let mut told = Vec::new();
    for _ in 0..12 {
        for (n, seat) in seats.iter_mut().enumerate() {
            let furthest = whole.iter().max().copied().flatten();
            if whole[n].is_some() && whole[n] == furthest {
                continue;
            }
            let (round, dead) = match seat.wait_timeout(judge, Duration::ZERO) {
                Ok(passed) => (passed.round, None),
                Err(BarrierError::Dead { dead, round }) => (round, Some(dead)),
                Err(BarrierError::Timeout { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            assert_eq!(
                *outcomes.entry(round).or_insert(dead),
                dead,
                "round {round}"
            );
            if n == 0 {
                told.extend(dead);
            }
            if dead.is_none() {
                whole[n] = Some(round);
            }
        }
        if whole[0].is_some() && whole.iter().all(|round| *round == whole[0]) {
            return told;
        }
    }
    panic!("no round among the living ends: {outcomes:?}");
}

#[test]
fn nobody_passes_before_all_have_arrived() {
    let words = others_wait();
    let everybody = all_but(&[]);
    for member in [B, C] {
        let error = arrive(&words, member, &everybody).unwrap_err();
        assert!(
            matches!(
                error,
                BarrierError::Timeout {
                    missing: A,
                    round: 0,
                    ..
                }
            ),
            "{error}"
        );
    }
    let mut seats = [A, B, C].map(|member| barrier(&words).join(member, &everybody).unwrap());
    let last = seats[0].wait_timeout(&everybody, Duration::ZERO).unwrap();
    assert_eq!(
        last,
        Passed {
            round: 0,
            last: true
        }
    );
    assert_eq!(barrier(&words).round(), 1);
    for seat in &mut seats[1..] {
        let passed = seat.wait_timeout(&everybody, Duration::ZERO);
        assert_eq!(
            passed,
            Ok(Passed {
                round: 0,
                last: false
            })
        );
    }
    assert_eq!(until_whole(&mut seats, &everybody), []);
}

#[test]
fn a_seat_that_nobody_took_is_waited_for_too() {
    let words = Words::default();
    let judge = all_but(&[]);
    let mut seats = [A, B].map(|member| barrier(&words).join(member, &judge).unwrap());
    let missing = seats
        .each_mut()
        .map(|seat| match seat.wait_timeout(&judge, Duration::ZERO) {
            Err(BarrierError::Timeout { missing, .. }) => missing,
            other => panic!("{other:?}"),
        });
    assert_eq!(missing, [B, InstanceId::NONE]);
    assert!(arrive(&words, C, &judge).unwrap().last);
}

#[test]
fn a_death_at_any_store_breaks_at_most_one_round_and_is_told_to_all() {
    let (_, stores) = count(|| arrive(&others_wait(), A, &all_but(&[])));
    assert!(stores >= 2, "{stores}");
    let mut whole_first = BTreeSet::new();
    for at in 0.. {
        let words = others_wait();
        let ended = dies_after(at, || arrive(&words, A, &all_but(&[])).unwrap());
        let judge = all_but(&[A]);
        let mut seats = [B, C].map(|member| Seat {
            barrier: barrier(&words),
            words: &words.seats[member.id() as usize - 1],
            member,
            round: 0,
        });
        let outcomes = [0, 1].map(|n: usize| {
            seats[n]
                .wait_timeout(&judge, Duration::ZERO)
                .map(|passed| passed.round)
        });
        assert_eq!(outcomes[0], outcomes[1], "death before store {at}");
        let expected = match outcomes[0] {
            // It had arrived; its death breaks the next round.
            Ok(0) => vec![A],
            Err(BarrierError::Dead { dead: A, round: 0 }) => vec![],
            _ => panic!("death before store {at}: {outcomes:?}"),
        };
        whole_first.insert(outcomes[0].is_ok());
        assert_eq!(
            until_whole(&mut seats, &judge),
            expected,
            "death before store {at}"
        );
        assert_eq!(barrier(&words).members().collect::<Vec<_>>(), [B, C]);
        // And with another in its place.
        let fresh = barrier(&words).join(D, &judge).unwrap();
        let [b, c] = seats;
        assert_eq!(
            until_whole(&mut [b, c, fresh], &judge),
            [],
            "death before store {at}"
        );
        if ended != Ended::Died {
            break;
        }
    }
    assert_eq!(whole_first.len(), 2, "deaths before and after the arrival");
}

/// A dies at any store of joining and arriving, B at any store of what it does about that; C is
/// told of each that had a seat, once, and goes on with two new members.
#[test]
fn who_deals_with_the_death_may_die_at_any_store_too() {
    let new = [D, InstanceId::new(5, 1)];
    for first in 0.. {
        let mut completed = false;
        for second in 0.. {
            let words = Words::default();
            let everybody = all_but(&[]);
            let mut c = barrier(&words).join(C, &everybody).unwrap();
            barrier(&words).join(B, &everybody).unwrap();
            let _ = dies_after(first, || arrive(&words, A, &everybody));
            let after_a = all_but(&[A]);
            let b = dies_after(second, || {
                let mut seat = barrier(&words).join(B, &after_a).unwrap();
                let _ = seat.wait_timeout(&after_a, Duration::ZERO);
                let _ = seat.wait_timeout(&after_a, Duration::ZERO);
            });
            let had_seats: Vec<_> = barrier(&words)
                .members()
                .filter(|member| *member != C)
                .collect();
            let after_both = all_but(&[A, B]);
            let mut told = Vec::new();
            for _ in 0..6 {
                match c.wait_timeout(&after_both, Duration::ZERO) {
                    Err(BarrierError::Dead { dead, .. }) => told.push(dead),
                    // A seat that nobody took.
                    Err(BarrierError::Timeout { .. }) => break,
                    Ok(_) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            let mut seats = vec![c];
            for member in new {
                seats.push(barrier(&words).join(member, &after_both).unwrap());
                told.extend(until_whole(&mut seats, &after_both));
            }
            let seated_a = words
                .seats
                .iter()
                .any(|seat| seat.reported.load(Ordering::Relaxed) == A.word());
            assert_eq!(told.contains(&A), seated_a, "{first} {second}: {told:?}");
            assert!(told.contains(&B), "{first} {second}: {told:?}");
            assert!(had_seats.iter().all(|dead| told.contains(dead)));
            assert!(told.len() <= 2, "{first} {second}: {told:?}");
            assert_eq!(until_whole(&mut seats, &after_both), [], "{first} {second}");
            if b != Ended::Died {
                completed = true;
                break;
            }
        }
        assert!(completed);
        let words = Words::default();
        barrier(&words).join(C, &all_but(&[])).unwrap();
        barrier(&words).join(B, &all_but(&[])).unwrap();
        if dies_after(first, || arrive(&words, A, &all_but(&[]))) != Ended::Died {
            break;
        }
    }
}

/// All have arrived, and the last died before it ended the round: as all the others, later.
#[test]
fn a_new_member_ends_the_round_of_the_dead() {
    let words = others_wait();
    let seat = |n: usize| words.seats[n].arrived.load(Ordering::Relaxed);
    let ended = dies_after(1, || arrive(&words, A, &all_but(&[])));
    assert_eq!(ended, Ended::Died);
    assert_eq!([0, 1, 2].map(seat), [1; 3]);
    let judge = all_but(&[A, B, C]);
    let mut new = barrier(&words).join(D, &judge).unwrap();
    assert_eq!(
        barrier(&words).round(),
        4,
        "one whole, then one broken by each"
    );
    assert_eq!(until_whole(core::slice::from_mut(&mut new), &judge), []);
    assert_eq!(barrier(&words).members().collect::<Vec<_>>(), [D]);
}

#[test]
fn leaving_is_one_store_and_a_death_before_it_is_told() {
    for at in 0..2 {
        let words = others_wait();
        let everybody = all_but(&[]);
        let seat = barrier(&words).join(A, &everybody).unwrap();
        let _ = dies_after(at, || seat.leave());
        let judge = all_but(&[A]);
        let mut seats = [B, C].map(|member| barrier(&words).join(member, &judge).unwrap());
        for seat in &mut seats {
            seat.round = 0;
        }
        let told = until_whole(&mut seats, &judge);
        assert_eq!(told, if at == 0 { vec![A] } else { vec![] });
    }
}

#[test]
fn who_left_may_come_back_and_others_may_take_the_seat() {
    let words = others_wait();
    let everybody = all_but(&[]);
    let join = |member| barrier(&words).join(member, &everybody);
    let full = join(D).unwrap_err();
    assert_eq!(
        full,
        BarrierError::Full {
            seats: 3,
            member: A
        }
    );
    join(A).unwrap().leave().unwrap();
    assert_eq!(barrier(&words).members().collect::<Vec<_>>(), [B, C]);
    let mut seats = vec![join(A).unwrap(), join(B).unwrap(), join(C).unwrap()];
    seats[1].round = 0;
    seats[2].round = 0;
    assert_eq!(until_whole(&mut seats, &everybody), []);
    seats.remove(0).leave().unwrap();
    let gone = Seat {
        ..seat_of(&words, 0, A, 1)
    };
    seats.push(join(D).unwrap());
    assert_eq!(until_whole(&mut seats, &everybody), []);
    assert_eq!(gone.leave(), Err(BarrierError::Lost(A)));
    assert!(matches!(join(A), Err(BarrierError::Full { .. })));
}

fn seat_of(words: &Words, index: usize, member: InstanceId, round: u64) -> Seat<'_> {
    Seat {
        barrier: barrier(words),
        words: &words.seats[index],
        member,
        round,
    }
}

#[test]
fn the_late_learn_the_outcome_of_each_round_of_their_own() {
    // Each death breaks one round while C is elsewhere.
    let words = others_wait();
    let mut c = seat_of(&words, 2, C, 0);
    let mut dead = vec![A];
    for life in 1..=4 {
        let known = dead.clone();
        let judge = all_but(&known);
        let b = arrive(&words, B, &judge);
        assert!(matches!(b, Err(BarrierError::Dead { .. })), "{b:?}");
        let next = InstanceId::new(10, life);
        barrier(&words).join(next, &judge).unwrap();
        dead.push(next);
    }
    let judge = all_but(&dead);
    let told: Vec<_> = (0..4)
        .map(|_| c.wait_timeout(&judge, Duration::ZERO))
        .collect();
    for (round, told) in told.iter().enumerate() {
        // The seat was A's and is now another's: the names of those between are overwritten.
        let newest = InstanceId::new(10, 3);
        let expected = BarrierError::Dead {
            dead: newest,
            round: round as u64,
        };
        assert_eq!(*told, Err(expected));
    }
    let own = c.wait_timeout(&judge, Duration::ZERO);
    assert_eq!(
        own,
        Err(BarrierError::Dead {
            dead: InstanceId::new(10, 4),
            round: 4
        })
    );
}

#[test]
fn one_that_was_declared_dead_learns_it() {
    let words = others_wait();
    let mut zombie = seat_of(&words, 0, A, 0);
    let judge = all_but(&[A]);
    assert!(matches!(
        arrive(&words, B, &judge),
        Err(BarrierError::Dead { dead: A, .. })
    ));
    let lost = Err(BarrierError::Lost(A));
    assert_eq!(zombie.wait_timeout(&judge, Duration::ZERO), lost);
    assert_eq!(
        zombie.leave().map(|()| Passed {
            round: 0,
            last: false
        }),
        lost
    );
}

#[test]
fn nonsense_is_an_error() {
    let everybody = all_but(&[]);
    let words = Words::default();
    let none = barrier(&words)
        .join(InstanceId::NONE, &everybody)
        .unwrap_err();
    assert_eq!(none, BarrierError::NoInstance(InstanceId::NONE));
    assert!(matches!(
        Barrier::new(&BarrierWords::<0>::default()),
        Err(BarrierError::Seats(0))
    ));
    for word in [u64::MAX, 0x3ff << 8, 200 << 8, (1 << 63) | (9 << 8)] {
        let words = others_wait();
        store64(&words.header.state, word, Ordering::Relaxed);
        let corrupt = arrive(&words, A, &everybody).unwrap_err();
        assert_eq!(corrupt, BarrierError::Corrupt { word });
    }
    let words = others_wait();
    store64(
        &words.seats[0].member,
        0xdead_beef_0000_0001,
        Ordering::Relaxed,
    );
    let judge = |instance| [B, C].contains(&instance);
    let error = arrive(&words, B, &judge).unwrap_err();
    assert!(
        matches!(error, BarrierError::Dead { dead, .. } if dead.word() == 0xdead_beef_0000_0001)
    );
}

#[test]
fn it_can_lie_anywhere_in_a_mapping() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let memory = Mapping::new(&file, 0, 4096, crate::shm::Access::ReadWrite).unwrap();
    let last = 4096 - size_of::<Words>() as u64;
    let words: &Words = memory.get(last).unwrap();
    Barrier::at(&memory, last, 3)
        .unwrap()
        .join(A, &all_but(&[]))
        .unwrap();
    assert_eq!(barrier(words).members().collect::<Vec<_>>(), [A]);
    let error = Barrier::at(&memory, last, 4).unwrap_err();
    assert_eq!(
        error,
        BarrierError::Place {
            offset: last,
            seats: 4
        }
    );
    assert!(matches!(
        Barrier::at(&memory, 0, 1 << 20),
        Err(BarrierError::Seats(_))
    ));
}

#[test]
fn threads_pass_together() {
    const ROUNDS: u64 = 2_000;
    let words = Words::default();
    let everybody = all_but(&[]);
    let arrivals = AtomicU64::new(0);
    let last = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for member in [A, B, C] {
            let (words, everybody, arrivals, last) = (&words, &everybody, &arrivals, &last);
            scope.spawn(move || {
                let mut seat = barrier(words).join(member, everybody).unwrap();
                for round in 0..ROUNDS {
                    arrivals.fetch_add(1, Ordering::Relaxed);
                    let passed = seat.wait(everybody).unwrap();
                    assert_eq!(passed.round, round);
                    assert!(arrivals.load(Ordering::Relaxed) >= 3 * (round + 1));
                    last.fetch_add(passed.last.into(), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(last.load(Ordering::Relaxed), ROUNDS);
}

/// Threads that die at random stores and come back as new members, all at once: every round has
/// one outcome for all.
#[test]
fn many_deaths_at_once_and_all_agree_on_every_round() {
    let words = Words::default();
    let dead = Dead::default();
    let judge = |instance: InstanceId| dead.is_alive(instance);
    let outcomes: Mutex<BTreeMap<u64, (bool, u32)>> = Mutex::default();
    let deaths = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_millis(700);
    std::thread::scope(|scope| {
        for id in 1..=3 {
            let (words, dead, judge, outcomes, deaths) =
                (&words, &dead, &judge, &outcomes, &deaths);
            scope.spawn(move || {
                let mut random = Random::new(id);
                let mut generation = 1;
                while Instant::now() < end {
                    let me = InstanceId::new(id, generation);
                    let stores = random.next() % 60;
                    let lives = || loop {
                        let mut seat = match barrier(words).join(me, judge) {
                            Ok(seat) => seat,
                            // The one before this died after it arrived: until the next round.
                            Err(BarrierError::Full { .. }) => {
                                std::thread::yield_now();
                                continue;
                            }
                            Err(error) => panic!("{error}"),
                        };
                        loop {
                            let round = seat.round();
                            let patience = Duration::from_millis(100);
                            let whole = match seat.wait_timeout(judge, patience) {
                                Ok(passed) => (passed.round, true),
                                Err(BarrierError::Dead { dead: who, round }) => {
                                    assert!(!judge(who), "{who} lives");
                                    (round, false)
                                }
                                // The others are done.
                                Err(BarrierError::Timeout { .. }) if Instant::now() > end => return,
                                Err(BarrierError::Timeout { .. }) => continue,
                                Err(error) => panic!("{error}"),
                            };
                            assert!(whole.0 >= round);
                            let mut outcomes = outcomes.lock().unwrap();
                            let known = outcomes.entry(whole.0).or_insert((whole.1, 0));
                            assert_eq!(known.0, whole.1, "two outcomes of round {}", whole.0);
                            known.1 += 1;
                        }
                    };
                    if dies_after(stores, lives) == Ended::Died {
                        dead.add(me);
                        deaths.fetch_add(1, Ordering::Relaxed);
                        generation += 1;
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    assert!(outcomes.values().all(|(_, members)| *members <= 3));
    let whole = outcomes.values().filter(|(whole, _)| *whole).count();
    let broken = outcomes.len() - whole;
    assert!(deaths.load(Ordering::Relaxed) > 20, "{deaths:?}");
    assert!(whole > 20 && broken > 20, "{whole} whole, {broken} broken");
}

#[test]
fn a_late_member_is_told_of_the_dead_and_not_of_one_who_left_its_seat_since() {
    let words = Words::default();
    let mut seats = [A, B, C].map(|me| barrier(&words).join(me, &all_but(&[])).unwrap());
    // B and C wait while A dies.
    for seat in &mut seats[1..] {
        let result = seat.wait_timeout(&all_but(&[]), Duration::ZERO);
        assert!(is_timeout(&result));
    }
    let judge = all_but(&[A]);
    // D ends the round that A broke, takes its seat, and leaves again.
    let seat = barrier(&words).join(D, &judge).unwrap();
    seat.leave().unwrap();
    for seat in &mut seats[1..] {
        assert_eq!(
            seat.wait_timeout(&judge, Duration::ZERO),
            Err(BarrierError::Dead { dead: A, round: 0 })
        );
    }
}
