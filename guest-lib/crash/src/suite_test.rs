//! The suite itself: it sees what there is to see, and is not stopped by it.

use super::*;
use crate::case::{SURVIVOR, World};
use crate::cases::{load, store};
use lupin::InstanceId;
use lupin::shm::Mapping;
use std::sync::atomic::{AtomicU64, Ordering};

/// A case made of three functions; word 0 of its memory is what they are about.
struct Made {
    run: fn(&Mapping),
    recover: fn(&Mapping, InstanceId),
    check: fn(u64) -> Result<(), String>,
}

impl Case for Made {
    fn name(&self) -> &'static str {
        "made"
    }
    fn states(&self) -> &'static [&'static str] {
        &["zero"]
    }
    fn bytes(&self) -> u64 {
        4096
    }
    fn prepare(&self, _: &Mapping, _: &str) {}
    fn run(&self, memory: &Mapping, _: &str) {
        (self.run)(memory);
    }
    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, _: &World) {
        (self.recover)(memory, me);
    }
    fn check(&self, memory: &Mapping, _: &str, _: &World) -> Result<(), String> {
        (self.check)(load(memory, 0))
    }
    fn go_on(&self, _: &Mapping, _: &str, _: &World) -> Result<(), String> {
        Ok(())
    }
}

const HARMLESS: Made = Made {
    run: |_| {},
    recover: |_, _| {},
    check: |_| Ok(()),
};

fn run_one(task: Task<'_>) -> Findings {
    let mut found = None;
    run_all(&[task], 1, |_, findings| found = Some(findings)).unwrap();
    found.unwrap()
}

fn step(case: &Made, depth: Depth) -> Findings {
    run_one(step_task(case, "zero", depth, Duration::from_millis(300)))
}

fn square(case: &Made) -> Findings {
    run_one(square_task(
        case,
        "zero",
        Extent::Full,
        Duration::from_millis(300),
    ))
}

fn word(memory: &Mapping, at: u64) -> &AtomicU64 {
    memory.get(at).unwrap()
}

#[test]
fn each_store_of_a_known_function_is_a_state() {
    let case = Made {
        run: |memory| {
            for at in [0, 8, 16] {
                word(memory, at).store(1, Ordering::Relaxed);
            }
            // Back to a state that was there before: not a new one.
            word(memory, 16).store(0, Ordering::Relaxed);
            word(memory, 16).swap(2, Ordering::Relaxed);
        },
        ..HARMLESS
    };
    let found = step(&case, Depth::Full);
    assert!(bad(&found).is_empty(), "{found:?}");
    // The first, three, one more, and the last one again with the operation returned.
    assert_eq!(found.counts.states, 6);
    assert!((5..500).contains(&found.counts.points), "{found:?}");
}

#[test]
fn system_calls_and_repeated_instructions_are_stepped_right() {
    let case = Made {
        run: |memory| {
            word(memory, 0).store(1, Ordering::Relaxed);
            assert!(nix::unistd::getppid().as_raw() > 0);
            std::thread::sleep(Duration::from_millis(2));
            #[cfg(target_arch = "x86_64")]
            // SAFETY: fills the last 64 bytes of the mapping, which nobody else uses now; the
            // direction flag is clear in Rust code.
            unsafe {
                let at = memory.as_ptr().cast_mut().add(4096 - 64);
                core::arch::asm!(
                    "rep stosb",
                    inout("rcx") 64usize => _,
                    inout("rdi") at => _,
                    in("al") 7u8,
                );
            }
            assert_eq!(word(memory, 4096 - 8).load(Ordering::Relaxed) & 0xff, 7);
        },
        ..HARMLESS
    };
    let found = step(&case, Depth::Full);
    assert!(bad(&found).is_empty(), "{found:?}");
    assert!(found.counts.points >= 64);
    // An iteration is a point of its own, unless the processor makes several at once.
    assert!((4..=67).contains(&found.counts.states), "{found:?}");
}

#[inline(never)]
fn passes_by_thirteen(memory: &Mapping) {
    word(memory, 0).store(13, Ordering::Relaxed);
    word(memory, 0).store(0, Ordering::Relaxed);
}

#[test]
fn a_state_that_is_bad_at_one_instruction_only_is_found_and_named() {
    let case = Made {
        run: passes_by_thirteen,
        check: |word| match word {
            13 => Err("unlucky".into()),
            _ => Ok(()),
        },
        ..HARMLESS
    };
    let found = step(&case, Depth::Full);
    let bad = bad(&found);
    assert_eq!(bad.len(), 1, "{found:?}");
    assert!(
        bad[0].contains("unlucky") && bad[0].contains("0x0: 0x0 -> 0xd"),
        "{bad:?}"
    );
    assert!(bad[0].contains("passes_by_thirteen+0x"), "{bad:?}");
    assert!(super::bad(&step(&case, Depth::AtMost(1))).is_empty());
}

#[test]
fn hangs_panics_and_lost_processes_are_bad_and_stop_nothing() {
    let hangs = Made {
        run: |memory| {
            store(memory, 0, 1);
            store(memory, 0, 2);
        },
        recover: |memory, _| {
            while load(memory, 0) == 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
        },
        ..HARMLESS
    };
    let found = step(&hangs, Depth::Full);
    assert_eq!(bad(&found).len(), 1, "{found:?}");
    assert!(bad(&found)[0].contains("hangs"), "{found:?}");
    let found = square(&hangs);
    assert_eq!(found.lost.len(), 1, "{found:?}");
    // Deaths before the stores 0 and 2 were tried all the same.
    assert_eq!(found.counts.pairs, 3, "{found:?}");
    let panics = Made {
        recover: |memory, me| assert!(load(memory, 0) != 1, "{me} is helpless"),
        ..hangs
    };
    for found in [step(&panics, Depth::Full), square(&panics)] {
        assert!(bad(&found)[0].contains("helpless"), "{found:?}");
    }
    let aborts = Made {
        recover: |memory, _| {
            if load(memory, 0) == 1 {
                std::process::abort()
            }
        },
        ..panics
    };
    for found in [step(&aborts, Depth::Full), square(&aborts)] {
        assert!(bad(&found)[0].contains("SIGABRT"), "{found:?}");
    }
}

#[test]
fn an_operation_that_panics_is_bad() {
    let case = Made {
        run: |_| panic!("by itself"),
        ..HARMLESS
    };
    for found in [step(&case, Depth::Full), square(&case)] {
        assert!(bad(&found)[0].contains("by itself"), "{found:?}");
    }
}

#[test]
fn the_square_is_full() {
    let case = Made {
        run: |memory| (0..3).for_each(|n| store(memory, 8 * n, 1)),
        recover: |memory, me| {
            let place = if me == SURVIVOR { 64 } else { 128 };
            (0..4).for_each(|n| store(memory, place + 8 * n, 1));
        },
        ..HARMLESS
    };
    let found = square(&case);
    assert!(bad(&found).is_empty(), "{found:?}");
    // 0 to 3 stores of the operation, and 0 to 4 of the recovery.
    assert_eq!(found.counts.pairs, 4 * 5);
    assert_eq!(found.counts.points, 4);
    assert_eq!(places(&found).len(), 1, "{found:?}");
}

#[test]
fn a_sample_has_both_ends() {
    let case = Made {
        run: |memory| (0..100).for_each(|n| store(memory, 8 * n, 1)),
        check: |word| match word {
            0 => Err("nothing".into()),
            _ => Ok(()),
        },
        ..HARMLESS
    };
    let extent = Extent::Sample(5, 1);
    let found = run_one(square_task(&case, "zero", extent, LIMIT));
    assert_eq!(bad(&found).len(), 1, "{found:?}");
    assert_eq!(found.counts.points, 6);
}

#[test]
fn the_broken_case_is_called_bad() {
    let options = |short| Options {
        short,
        control: true,
        op: None,
    };
    for short in [true, false] {
        let report = crash(&options(short)).unwrap();
        assert!(!report.is_proven(), "{}", report.table());
    }
}

#[test]
fn operations_are_chosen_by_name_or_module() {
    let chosen = |op: &str| {
        let options = Options {
            op: Some(op.into()),
            ..Options::default()
        };
        options.cases().map(|cases| cases.len())
    };
    assert_eq!(chosen("tatas.lock").unwrap(), 1);
    assert!(chosen("tatas").unwrap() > 1);
    for none in ["tat", "tatas.", "tatas.lock.x", ""] {
        assert!(matches!(chosen(none), Err(SuiteError::NoSuchOperation(_))));
    }
    let names: Vec<_> = crate::cases::all().iter().map(|case| case.name()).collect();
    let distinct: BTreeSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:?}");
}

#[test]
fn a_lock_without_its_release_is_caught() {
    let options = Options {
        op: Some("tatas.lock".into()),
        ..Options::default()
    };
    let report = crate::mutants::mutants(&options).unwrap();
    let table = report.table();
    let caught = table.lines().find(|line| line.contains("caught")).unwrap();
    let share: f64 = caught.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(share > 50.0, "{table}");
}
