use super::*;
use crate::crash::dies_at;
use crate::test_pod::{POOL, TestPod};

const OWNER: Owner = Owner {
    uid: 5,
    gid: 6,
    mode: 0o640,
};

fn directory(pod: &TestPod, node: u32, generation: u32) -> Directory {
    Directory::new(pod.attach(node, generation))
}

fn make(directory: &Directory, name: &str, size: u64) -> Held {
    let held = directory.create(name, size, OWNER).unwrap();
    directory.publish(&held).unwrap();
    held
}

fn any(_: &Segment) -> bool {
    true
}

/// What must hold whatever happened: extents in the pool, apart from each other, names unique.
fn check(directory: &Directory) {
    let mut used: Vec<Segment> = directory
        .entries()
        .iter()
        .filter(|e| e.state() != SegmentState::Free)
        .map(SegmentEntry::segment)
        .collect();
    used.sort_by_key(|s| s.offset);
    for segment in &used {
        assert!(in_pool(segment, POOL), "{segment:?}");
    }
    for pair in used.windows(2) {
        assert!(pair[0].offset + pair[0].size <= pair[1].offset, "{pair:?}");
        assert_ne!(pair[0].name, pair[1].name);
    }
}

#[test]
fn first_fit_fills_gaps() {
    let at = |taken: &[(u64, u64)], size| {
        let mut taken: Vec<Extent> = taken
            .iter()
            .map(|&(offset, size)| Extent { offset, size })
            .collect();
        first_fit(&mut taken, size, 100)
    };
    assert_eq!(at(&[], 100), Some(0));
    assert_eq!(at(&[], 101), None);
    assert_eq!(at(&[(50, 50), (0, 20)], 30), Some(20));
    assert_eq!(at(&[(50, 40), (0, 20)], 31), None);
    assert_eq!(at(&[(50, 40), (0, 20)], 10), Some(20));
    assert_eq!(at(&[(0, 20), (20, 70)], 10), Some(90));
    // Overlaps, as only a misbehaving node leaves them.
    assert_eq!(at(&[(0, 90), (10, 10)], 10), Some(90));
}

#[test]
fn a_death_at_any_store_leaves_nothing_that_cannot_be_used_again() {
    type Operation = fn(&Directory);
    let operations: [(&str, Operation); 3] = [
        ("create", |d| {
            make(d, "new", 4 << 20);
        }),
        ("open", |d| {
            d.open("old", any).unwrap();
        }),
        ("remove", |d| {
            let held = d.begin_remove("old", any).unwrap();
            d.forget(&held).unwrap();
        }),
    ];
    for (name, operation) in operations {
        for at in 0.. {
            let pod = TestPod::new();
            let (victim, survivor) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
            make(&victim, "old", 2 << 20);
            victim.let_go(&survivor.open("old", any).unwrap());
            survivor.let_go(&survivor.open("old", any).unwrap());
            let died = dies_at(at, || operation(&directory(&pod, 1, 1)));
            check(&survivor);
            pod.kill(1);
            // The survivor can do everything, and gets all of the pool back.
            make(&survivor, "mine", 2 << 20);
            check(&survivor);
            for old in ["old", "new", "mine"] {
                match survivor.begin_remove(old, any) {
                    Ok(held) => survivor.forget(&held).unwrap(),
                    Err(DirectoryError::NotFound(_)) => {}
                    Err(error) => panic!("{name} died at {at}: {old}: {error}"),
                }
            }
            let all = make(&survivor, "all", POOL);
            assert_eq!(all.segment.offset, 0, "{name} died at {at}");
            if !died {
                assert!(at > 0, "{name} has no crash point");
                break;
            }
        }
    }
}

#[test]
fn the_repairer_may_die_too() {
    for first in 0..4 {
        for second in 0.. {
            let pod = TestPod::new();
            let create = |node| {
                let directory = directory(&pod, node, 1);
                make(&directory, "x", 2 << 20);
            };
            assert!(dies_at(first, || create(1)));
            pod.kill(1);
            let died = dies_at(second, || create(2));
            pod.kill(2);
            let third = directory(&pod, 3, 1);
            check(&third);
            match third.create("x", 2 << 20, OWNER) {
                Ok(held) => third.publish(&held).unwrap(),
                Err(DirectoryError::Exists(_)) => {}
                Err(error) => panic!("{first} {second}: {error}"),
            }
            check(&third);
            if !died {
                break;
            }
        }
    }
}

#[test]
fn a_segment_in_preparation_is_not_opened_and_not_lost() {
    let pod = TestPod::new();
    let (one, two) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
    let held = one.create("a", 1, OWNER).unwrap();
    assert!(matches!(
        two.open("a", any),
        Err(DirectoryError::Busy { .. })
    ));
    assert!(matches!(
        two.create("a", 1, OWNER),
        Err(DirectoryError::Exists(_))
    ));
    assert!(two.list().is_empty());
    one.publish(&held).unwrap();
    assert_eq!(two.open("a", any).unwrap().segment, held.segment);
    assert!(matches!(
        two.open("a", |_| false),
        Err(DirectoryError::Permission {
            uid: 5,
            gid: 6,
            mode: 0o640,
            ..
        })
    ));
    // Created by a node that died before it was ready: as if it had never been.
    one.create("b", 1, OWNER).unwrap();
    pod.kill(1);
    assert!(matches!(
        two.open("b", any),
        Err(DirectoryError::NotFound(_))
    ));
    assert!(two.create("b", 1, OWNER).is_ok());
    // The dead creator's agent, should it wake up again, changes nothing.
    assert!(matches!(one.publish(&held), Err(DirectoryError::Fenced)));
}

#[test]
fn a_new_life_starts_without_the_old_ones_segments_and_a_restart_keeps_them() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let held = make(&one, "kept", 2 << 20);
    one.create("unfinished", 2 << 20, OWNER).unwrap();
    let again = directory(&pod, 1, 1);
    assert_eq!(again.begin(true).unwrap(), [held]);
    assert!(matches!(
        again.open("unfinished", any),
        Err(DirectoryError::NotFound(_))
    ));
    pod.kill(1);
    pod.live(1, 2);
    let reborn = directory(&pod, 1, 2);
    assert!(reborn.begin(false).unwrap().is_empty());
    let two = directory(&pod, 2, 1);
    assert!(two.begin_remove("kept", any).is_ok(), "nobody uses it now");
}

#[test]
fn an_entry_that_makes_no_sense_is_refused_and_not_followed() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let mut segment = make(&one, "bad", 2 << 20).segment;
    for (offset, size) in [
        (POOL, 2 << 20),
        (4096, 2 << 20),
        (2 << 20, 0),
        (0xffff_ffff_ffe0_0000, 4 << 20),
    ] {
        (segment.offset, segment.size) = (offset, size);
        one.entries()[0].fill(&segment);
        assert!(matches!(
            one.open("bad", any),
            Err(DirectoryError::Damaged(_))
        ));
        let held = one.create("good", 2 << 20, OWNER).unwrap();
        one.forget(&held).unwrap();
    }
}

#[test]
fn the_directory_can_be_full() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    for entry in one.entries() {
        let segment = Segment {
            name: "x".into(),
            offset: 0,
            size: 2 << 20,
            uid: 0,
            gid: 0,
            mode: 0,
            creator: one.me(),
        };
        entry.fill(&segment);
        entry.set_state(SegmentState::Live);
    }
    assert!(matches!(
        one.create("y", 1, OWNER),
        Err(DirectoryError::NoSpace { .. })
    ));
}
