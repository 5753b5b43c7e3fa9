use super::super::test_world::{A, B, C, Dead, Random, all_but};
use super::*;
use crate::mem::crash::{Ended, count, dies_after};
use crate::mem::store64;

type Words = OnceWords<3>;

/// The value that `author` computes: words that belong together.
fn value_of(author: InstanceId) -> [u64; 3] {
    let word = author.word();
    [word, word ^ 1, word ^ 2]
}

fn fill(filler: &mut Filler<'_>, author: InstanceId) {
    for (index, word) in value_of(author).into_iter().enumerate() {
        filler.set(index, word);
    }
}

/// The value, computed under the own name if need be, and whether the caller computed it.
fn get_or_init(words: &Words, me: InstanceId, judge: &impl Liveness) -> (InstanceId, bool) {
    let mut computed = false;
    let value = OnceCell::new(words)
        .get_or_init(me, judge, |filler| {
            computed = true;
            fill(filler, me);
            Ok::<_, OnceError>(())
        })
        .unwrap();
    let author = InstanceId::from_word(value.get(0));
    assert!(value.iter().eq(value_of(author)), "a torn value");
    (author, computed)
}

#[test]
fn after_a_death_at_any_store_the_next_computes_or_finds_the_whole() {
    let everybody = all_but(&[]);
    let (_, stores) = count(|| get_or_init(&Words::default(), A, &everybody));
    assert!(stores >= 5, "{stores}");
    for at in 0..=stores {
        let words = Words::default();
        let ended = dies_after(at, || get_or_init(&words, A, &everybody));
        assert_eq!(ended != Ended::Died, at == stores);
        let before = OnceCell::new(&words).get().is_some();
        let (author, computed) = get_or_init(&words, B, &all_but(&[A]));
        assert_eq!(
            author,
            if before { A } else { B },
            "death before store {at}"
        );
        assert_eq!(computed, !before);
        assert_eq!(get_or_init(&words, C, &all_but(&[A])), (author, false));
    }
}

#[test]
fn whoever_takes_over_may_die_at_any_store_too() {
    let everybody = all_but(&[]);
    for first in 0..=6 {
        for second in 0.. {
            let words = Words::default();
            let _ = dies_after(first, || get_or_init(&words, A, &everybody));
            let ended = dies_after(second, || get_or_init(&words, B, &all_but(&[A])));
            let before = OnceCell::new(&words).get().map(|value| value.get(0));
            let (author, _) = get_or_init(&words, C, &all_but(&[A, B]));
            let expected = before.map_or(C, InstanceId::from_word);
            assert_eq!(author, expected, "deaths before {first} and {second}");
            assert_eq!(get_or_init(&words, A, &everybody), (author, false));
            if ended != Ended::Died {
                break;
            }
        }
    }
}

#[test]
fn the_next_is_told_whose_work_it_takes_over() {
    let words = Words::default();
    let cell = OnceCell::new(&words);
    let _ = dies_after(2, || get_or_init(&words, A, &all_but(&[])));
    assert_eq!(cell.computing(), Some(A));
    let value = cell.get_or_init(B, &all_but(&[A]), |filler| {
        assert_eq!(filler.previous(), Some(A));
        assert_eq!(filler.get(0), value_of(A)[0], "what the dead one left");
        fill(filler, B);
        Ok::<_, OnceError>(())
    });
    assert_eq!(value.unwrap().get(0), B.word());
    assert_eq!(cell.computing(), None);
}

#[test]
fn a_computation_that_fails_or_panics_leaves_the_cell_empty() {
    #[derive(Debug, PartialEq)]
    enum Error {
        Once(OnceError),
        Mine,
    }
    impl From<OnceError> for Error {
        fn from(error: OnceError) -> Self {
            Self::Once(error)
        }
    }
    let words = Words::default();
    let cell = OnceCell::new(&words);
    let everybody = all_but(&[]);
    let failed = cell.get_or_init(A, &everybody, |filler| {
        filler.set(0, 7);
        Err(Error::Mine)
    });
    assert_eq!(failed.map(|_| ()), Err(Error::Mine));
    let panicked = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| {
        cell.get_or_init(A, &everybody, |_| -> Result<(), OnceError> {
            std::panic::resume_unwind(Box::new(()))
        })
        .map(|_| ())
    }));
    assert!(panicked.is_err());
    assert!(cell.get().is_none() && cell.computing().is_none());
    assert_eq!(get_or_init(&words, B, &everybody), (B, true));
}

#[test]
fn the_living_are_waited_for_and_the_dead_are_not() {
    let words = Words::default();
    let cell = OnceCell::new(&words);
    let dead = Dead::default();
    let judge = |instance| dead.is_alive(instance);
    let _ = dies_after(3, || get_or_init(&words, A, &judge));
    // A is dead and nobody knows it.
    let timeout = Duration::from_millis(20);
    let error = cell.get_or_init_timeout(B, &judge, timeout, |_| Ok::<_, OnceError>(()));
    let error = error.unwrap_err();
    assert!(matches!(error, OnceError::Timeout { computing: A, waited } if waited >= timeout));
    let at_once = cell.get_or_init_timeout(B, &judge, Duration::ZERO, |_| Ok::<_, OnceError>(()));
    assert!(matches!(
        at_once.unwrap_err(),
        OnceError::Timeout { computing: A, .. }
    ));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| get_or_init(&words, B, &judge));
        std::thread::sleep(timeout);
        dead.add(A);
        assert_eq!(waiter.join().unwrap(), (B, true));
    });
}

#[test]
fn asking_for_the_own_result_is_an_error_and_a_restart_clears_it() {
    let words = Words::default();
    let cell = OnceCell::new(&words);
    let everybody = all_but(&[]);
    let outer = cell.get_or_init(A, &everybody, |_| {
        cell.get_or_init(A, &everybody, |_| Ok::<_, OnceError>(()))
            .map(|_| ())
    });
    assert_eq!(outer.unwrap_err(), OnceError::Deadlock(A));
    assert!(!cell.resolve_own(A));
    let _ = dies_after(2, || get_or_init(&words, A, &everybody));
    assert!(!cell.resolve_own(B) && !cell.resolve_own(InstanceId::NONE));
    assert!(cell.resolve_own(A));
    assert_eq!(get_or_init(&words, A, &everybody), (A, true));
    assert!(!cell.resolve_own(A), "a value is not cleared");
    assert_eq!(
        get_or_init(&words, InstanceId::NONE, &everybody),
        (A, false)
    );
}

#[test]
fn one_that_was_declared_dead_publishes_nothing() {
    let words = Words::default();
    let cell = OnceCell::new(&words);
    let zombie = cell.get_or_init(A, &all_but(&[]), |_| {
        let (author, _) = get_or_init(&words, B, &all_but(&[A]));
        assert_eq!(author, B);
        Ok::<_, OnceError>(())
    });
    assert_eq!(zombie.unwrap_err(), OnceError::Lost(A));
    assert_eq!(get_or_init(&words, C, &all_but(&[])), (B, false));
}

#[test]
fn garbage_computes_nothing() {
    for word in [2, u64::MAX, 0xdead_beef_0000_0001] {
        let words = Words::default();
        store64(&words.header.state, word, Ordering::Relaxed);
        let judge = |instance| instance == A;
        assert_eq!(get_or_init(&words, A, &judge), (A, true));
    }
    let words = Words::default();
    let none = OnceCell::new(&words)
        .get_or_init(InstanceId::NONE, &all_but(&[]), |_| Ok::<_, OnceError>(()));
    assert_eq!(none.unwrap_err(), OnceError::NoInstance(InstanceId::NONE));
}

/// Threads that ask for one value after the other and die at random stores.
#[test]
fn many_deaths_at_once_make_one_value_each_time() {
    const THREADS: u32 = 4;
    const CELLS: usize = 400;
    let cells: Vec<Words> = (0..CELLS).map(|_| Words::default()).collect();
    let dead = Dead::default();
    let judge = |instance: InstanceId| dead.is_alive(instance);
    let found: Vec<Vec<InstanceId>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=THREADS)
            .map(|id| {
                let (cells, dead, judge) = (&cells, &dead, &judge);
                scope.spawn(move || {
                    let mut random = Random::new(id);
                    let mut generation = 1;
                    let ask = |words: &Words| {
                        loop {
                            let me = InstanceId::new(id, generation);
                            let stores = random.next() % 9;
                            match dies_after(stores, || get_or_init(words, me, judge)) {
                                Ended::Completed((author, _)) => return author,
                                Ended::Died => dead.add(me),
                            }
                            generation += 1;
                        }
                    };
                    cells.iter().map(ask).collect()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(found.iter().all(|values| *values == found[0]));
}

#[test]
fn it_can_lie_anywhere_in_a_mapping() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let memory = Mapping::new(&file, 0, 4096, crate::shm::Access::ReadWrite).unwrap();
    let last = 4096 - size_of::<Words>() as u64;
    let words: &Words = memory.get(last).unwrap();
    get_or_init(words, A, &all_but(&[]));
    let cell = OnceCell::at(&memory, last, 3).unwrap();
    assert!(cell.get().unwrap().iter().eq(value_of(A)));
    assert!(OnceCell::at(&memory, last, 4).is_err());
}
