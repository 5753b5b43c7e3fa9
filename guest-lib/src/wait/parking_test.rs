use super::super::futex::Slept;
use super::super::{Pacer, SETTLE, sleepers};
use super::*;
use core::time::Duration;
use std::time::Instant;

const LONG: Duration = Duration::from_secs(60);

fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LONG, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_sleeper_of_another_node_is_named_by_the_flag_and_not_woken_by_this_ones_futex() {
    let (flag, word) = (AtomicU32::new(0), AtomicU32::new(0));
    let parking = Parking {
        flag: &flag,
        word: &word,
    };
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            class::set_of_thread(3);
            let seen = parking.announce();
            futex::wait(&word, seen, LONG)
        });
        class::set_of_thread(1);
        until("the flag", || flag.load(Ordering::SeqCst) != 0);
        assert_eq!(flag.load(Ordering::SeqCst) & class::RAISED, 1 << 3);
        assert_eq!(class::others(flag.load(Ordering::SeqCst)), 1 << 3);
        // Whether it sleeps already or not: the word stays, so only a futex call could end it.
        for _ in 0..20 {
            assert_eq!(futex::wake_own(&word, i32::MAX), 0);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!sleeper.is_finished());
        class::set_of_thread(3);
        until("the wake-up", || {
            futex::wake_own(&word, 1);
            sleeper.is_finished()
        });
        assert_eq!(sleeper.join().unwrap(), Slept::Woken);
    });
    class::set_of_thread(1);
    parking.announce();
    assert_eq!(class::others(flag.load(Ordering::SeqCst)), 1 << 3);
    // Whoever wakes lowers the flag for all, and changes the word.
    parking.wake(1);
    assert_eq!(flag.load(Ordering::SeqCst), 0);
    assert_eq!(word.load(Ordering::SeqCst), 1);
}

#[test]
fn a_bell_changes_the_word_once_and_again_for_sleepers() {
    let (classes, word) = (AtomicU32::new(0), AtomicU32::new(0));
    let bell = Bell {
        classes: &classes,
        word: &word,
    };
    class::set_of_thread(2);
    bell.ring();
    assert_eq!(word.load(Ordering::SeqCst), 1);
    bell.announce();
    bell.announce();
    assert_eq!(classes.load(Ordering::SeqCst), 1 << 2);
    // Nobody sleeps after all, so that the set is emptied for all.
    bell.ring_one();
    assert_eq!(classes.load(Ordering::SeqCst), 0);
    assert_eq!(word.load(Ordering::SeqCst), 3);
}

#[test]
fn an_interruption_ends_long_sleeps_and_keeps_them_from_beginning() {
    let word = AtomicU32::new(0);
    let known = sleepers::interruptions();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let sleep = || futex::wait(&word, 0, LONG);
            sleepers::interruptible(&word, known, sleep)
        });
        // Listed or not yet: it learns of one of these.
        until("the interruption", || {
            sleepers::interrupt_all();
            sleeper.is_finished()
        });
        assert_ne!(sleeper.join().unwrap(), Slept::Whole);
    });
    let sleep = || panic!("there was an interruption");
    assert_eq!(
        sleepers::interruptible(&word, known, sleep),
        Slept::Disturbed
    );
}

#[test]
fn a_waiter_settles_with_a_word_that_stays_and_not_before() {
    let word = AtomicU32::new(0);
    let mut pacer = Pacer::new(None);
    let begin = Instant::now();
    while !pacer.is_settled(&word, 0) {
        pacer.sleep_on(&word, 0).unwrap();
    }
    assert!(begin.elapsed() >= SETTLE);
    assert!(!pacer.is_settled(&word, 1) && !pacer.is_settled(&AtomicU32::new(0), 0));
    // Woken, or the word had changed before.
    pacer.sleep_on(&word, 1).unwrap();
    assert!(!pacer.is_settled(&word, 0));
}
