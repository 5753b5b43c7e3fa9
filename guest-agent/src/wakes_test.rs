use super::*;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn wake(at: u64) -> Wake {
    Wake {
        at,
        classes: 1,
        all: true,
    }
}

#[test]
fn what_waits_for_the_manager_is_bounded_and_told_once() {
    let mut wakes = Wakes::default();
    (0..1000).for_each(|at| wakes.push(wake(at * 4)));
    wakes.threads_died();
    wakes.groups_changed();
    wakes.threads_died();
    wakes.groups_changed();
    let told: Vec<ToManager> = wakes.take_wakes().collect();
    assert_eq!(told.len(), WAITING);
    assert_eq!(told[0], ToManager::Wake(wake(0)));
    assert_eq!(wakes.take_wakes().count(), 0);
    let told: Vec<ToManager> = wakes.take_news().collect();
    assert_eq!(told, [ToManager::Groups, ToManager::Deaths]);
    assert_eq!(wakes.take_news().count(), 0);
}

#[test]
fn a_hostile_process_runs_out_of_wake_ups() {
    let (mut allowance, now) = (Allowance::default(), Instant::now());
    let granted = (0..100_000).filter(|_| allowance.may(now)).count();
    assert_eq!(granted, BURST as usize);
    assert!(allowance.may(now + Duration::from_millis(1)));
}

/// Sleeps on a word that holds 0, as one of a node of `class`, until woken.
pub(super) fn sleep_on(word: *const AtomicU32, class: u32) {
    let sleep = || {
        // SAFETY: the caller has the word mapped for the whole call, and the kernel only reads it.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word,
                libc::FUTEX_WAIT_BITSET,
                0,
                std::ptr::null::<libc::timespec>(),
                std::ptr::null::<u32>(),
                1u32 << class,
            )
        }
    };
    while sleep() != 0 {}
}

#[test]
fn a_word_is_woken_for_the_own_class_only() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let mapping = Mapping::new(&file, 0, 4096, true).unwrap();
    let awake = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The high half of a word, so that the half must be chosen right.
            let word = mapping.words()[3].as_ptr().cast::<AtomicU32>();
            sleep_on(word.wrapping_add(1), 2);
            awake.store(1, Ordering::SeqCst);
        });
        for _ in 0..20 {
            wake_word(&mapping, 28, 1, true);
            wake_word(&mapping, 24, 2, true);
            wake_word(&mapping, 4096, 2, true);
            wake_word(&mapping, u64::MAX - 3, 2, true);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(awake.load(Ordering::SeqCst), 0);
        }
        let begin = Instant::now();
        while awake.load(Ordering::SeqCst) == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "nobody woke");
            wake_word(&mapping, 28, 2, false);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}
