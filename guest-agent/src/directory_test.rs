use std::collections::BTreeMap;

use lupin_abi::groups::{Admission, Member, MemberState, Row, What};
use lupin_abi::socket::RefusalCode;

use super::*;
use crate::crash::dies_at;
use crate::test_pod::{NODES, POOL, TestPod};

const OWNER: Owner = Owner {
    uid: 5,
    gid: 6,
    mode: 0o640,
};

fn directory(pod: &TestPod, node: u32, generation: u32) -> Directory {
    let directory = Directory::new(pod.attach(node, generation));
    directory.begin(true).unwrap();
    directory
}

fn named(name: &str) -> SegmentName {
    let (group, name) = (None, name.into());
    SegmentName { group, name }
}

fn create_in(
    directory: &Directory,
    name: &SegmentName,
    size: u64,
    lifetime: Lifetime,
) -> Result<Held, DirectoryError> {
    let owner = OWNER;
    directory.create(&NewSegment {
        name,
        size,
        owner,
        lifetime,
    })
}

fn create(directory: &Directory, name: &str, size: u64) -> Result<Held, DirectoryError> {
    create_in(directory, &named(name), size, Lifetime::Kept)
}

fn make(directory: &Directory, name: &str, size: u64) -> Held {
    let held = create(directory, name, size).unwrap();
    directory.publish(&held).unwrap()
}

fn grow(directory: &Directory, name: &str, size: u64) -> Held {
    let held = directory.grow(&named(name), size, any).unwrap();
    directory.publish(&held).unwrap()
}

fn remove(directory: &Directory, name: &str) -> Result<(), DirectoryError> {
    let held = directory.condemn(&named(name), false, any, |_| false)?;
    directory.let_go(&held);
    directory.bury_nodes();
    Ok(())
}

fn any(_: &Segment) -> bool {
    true
}

/// What must hold whenever nobody is at work: every chunk is one extent of exactly one segment or
/// free, every extent is a chunk, extents lie in the pool, names are unique.
fn audit(directory: &Directory) {
    let _guard = directory.lock().unwrap();
    let allocator = directory.allocator().unwrap();
    let audit = allocator.audit(directory.me(), &directory.judge()).unwrap();
    assert_eq!((audit.free + audit.live) * GRANULE, POOL);
    let mut extents = BTreeMap::new();
    let mut names = BTreeMap::new();
    for (index, entry) in directory.entries().iter().enumerate() {
        if entry.state() == SegmentState::Free {
            continue;
        }
        let segment = entry.segment();
        for extent in &segment.extents {
            let owner = (entry.tag(index), extent.size);
            let twice = extents.insert(extent.offset, owner);
            assert_eq!(twice, None, "{segment:?}");
        }
        if entry.state() == SegmentState::Live {
            assert!(in_pool(&segment, POOL), "{segment:?}");
        }
        if entry.state() != SegmentState::Condemned {
            let name = (segment.group, segment.name.clone());
            assert_eq!(names.insert(name, index), None, "{segment:?}");
        }
    }
    let chunks: BTreeMap<u64, (u64, u64)> = allocator
        .chunks()
        .map(|chunk| (chunk.offset, (chunk.owner, chunk.bytes)))
        .collect();
    assert_eq!(chunks, extents);
}

/// Of a quiet pod: nothing is in preparation, nothing grows, nothing waits to be given back.
fn audit_quiet(directory: &Directory) {
    audit(directory);
    for entry in directory.entries() {
        let state = entry.state();
        assert!(
            matches!(state, SegmentState::Free | SegmentState::Live),
            "{state:?}"
        );
        let segment = entry.segment();
        assert!(state == SegmentState::Free || segment.ready == segment.extents.len());
    }
}

/// Everything can be done, and all of the pool be had.
fn is_usable(directory: &Directory) {
    for segment in directory.list() {
        remove(directory, &segment.name).unwrap();
    }
    make(directory, "mine", 2 << 20);
    audit_quiet(directory);
    remove(directory, "mine").unwrap();
    let all = make(directory, "all", POOL);
    assert_eq!(all.segment.extents.len(), 1);
    audit_quiet(directory);
}

type Operation = (&'static str, fn(&Directory));

const OPERATIONS: [Operation; 7] = [
    ("create", |d| drop(make(d, "new", 4 << 20))),
    ("create in pieces", |d| drop(make(d, "new", 14 << 20))),
    ("grow", |d| drop(grow(d, "old", 12 << 20))),
    ("rename", |d| {
        d.rename(&named("old"), "a-name-that-is-longer-than-a-word", any)
            .unwrap();
    }),
    ("open", |d| drop(d.open(&named("old"), any).unwrap())),
    ("remove", |d| remove(d, "old").unwrap()),
    ("abandon", |d| {
        let held = create(d, "new", 6 << 20).unwrap();
        d.abandon(&held).unwrap();
        let held = d.grow(&named("old"), 12 << 20, any).unwrap();
        d.abandon(&held).unwrap();
    }),
];

/// A pod with one segment, "old", of two extents that nobody uses.
fn pod_with_old() -> (TestPod, Directory) {
    let pod = TestPod::new();
    let (one, two) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
    let held = make(&one, "old", 6 << 20);
    assert_eq!(held.segment.extents.len(), 2);
    one.let_go(&held);
    (pod, two)
}

/// What a segment may be after an operation on it that died, or did not.
fn is_one_of_the_two(directory: &Directory) {
    for segment in directory.list() {
        let found = (segment.name.as_str(), segment.size() >> 20);
        let possible = [
            ("old", 6),
            ("old", 12),
            ("new", 4),
            ("new", 14),
            ("a-name-that-is-longer-than-a-word", 6),
        ];
        assert!(possible.contains(&found), "{found:?}");
    }
}

#[test]
fn an_agent_killed_at_any_store_leaves_what_a_survivor_ends() {
    for (name, operation) in OPERATIONS {
        for at in 0.. {
            let (pod, survivor) = pod_with_old();
            let died = dies_at(at, || operation(&Directory::new(pod.attach(1, 1))));
            pod.kill(1);
            survivor.bury_nodes();
            audit_quiet(&survivor);
            is_one_of_the_two(&survivor);
            is_usable(&survivor);
            if !died {
                assert!(at > 1, "{name} has {at} crash points");
                break;
            }
        }
    }
}

#[test]
fn an_agent_killed_at_any_store_is_cleared_up_after_by_its_successor() {
    for (name, operation) in OPERATIONS {
        for (generation, restarted) in [(1, true), (2, false)] {
            for at in 0.. {
                let (pod, _other) = pod_with_old();
                let died = dies_at(at, || operation(&Directory::new(pod.attach(1, 1))));
                if generation == 2 {
                    // All rings are lost, and no survivor looked.
                    pod.kill(1);
                    pod.live(1, 2);
                }
                let again = Directory::new(pod.attach(1, generation));
                for held in again.begin(restarted).unwrap() {
                    again.let_go(&held);
                }
                again.bury_nodes();
                audit_quiet(&again);
                is_one_of_the_two(&again);
                is_usable(&again);
                if !died {
                    assert!(at > 1, "{name}");
                    break;
                }
            }
        }
    }
}

#[test]
fn who_ends_it_may_die_at_any_store_too() {
    let sampled = ["create in pieces", "grow", "rename", "remove"];
    let is_sampled = |(name, _): &Operation| sampled.contains(name);
    for (_, operation) in OPERATIONS.into_iter().filter(is_sampled) {
        // A sample of the deaths, each with all of those of its recovery.
        for first in (0..).step_by(19) {
            let mut died = true;
            for second in 0.. {
                let (pod, survivor) = pod_with_old();
                died = dies_at(first, || operation(&Directory::new(pod.attach(1, 1))));
                pod.kill(1);
                let again = dies_at(second, || Directory::new(pod.attach(3, 1)).bury_nodes());
                pod.kill(3);
                survivor.bury_nodes();
                audit_quiet(&survivor);
                is_one_of_the_two(&survivor);
                if !again {
                    is_usable(&survivor);
                    break;
                }
            }
            if !died {
                break;
            }
        }
    }
}

#[test]
fn the_first_agent_of_a_new_pod_may_die_at_any_store() {
    for at in 0.. {
        let pod = TestPod::new();
        let died = dies_at(at, || drop(directory(&pod, 1, 1)));
        pod.kill(1);
        let two = directory(&pod, 2, 1);
        audit_quiet(&two);
        make(&two, "x", POOL);
        if !died {
            assert!(at > 20);
            break;
        }
    }
}

#[test]
fn a_segment_takes_what_is_free_in_pieces_and_offsets_go_on() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    for n in 0..8 {
        make(&one, &format!("s{n}"), 4 << 20);
    }
    for n in [1, 4, 6] {
        remove(&one, &format!("s{n}")).unwrap();
    }
    let error = create(&one, "x", 14 << 20).unwrap_err();
    assert_eq!(error.code(), RefusalCode::NoSpace);
    assert!(error.to_string().contains("2097152"), "{error}");
    audit_quiet(&one);
    let held = make(&one, "x", 12 << 20);
    assert_eq!(
        (held.segment.extents.len(), held.segment.size()),
        (3, 12 << 20)
    );
    remove(&one, "s0").unwrap();
    let before = held.segment.extents;
    let grown = grow(&one, "x", 16 << 20);
    assert_eq!(grown.segment.extents[..3], before);
    assert_eq!(grown.segment.size(), 16 << 20);
    // It is large enough: nothing to do, whoever asks.
    assert!(
        one.grow(&named("x"), 1, any)
            .unwrap()
            .unready()
            .next()
            .is_none()
    );
    assert!(matches!(
        one.grow(&named("x"), 18 << 20, any),
        Err(DirectoryError::NoSpace { .. })
    ));
    audit_quiet(&one);
}

#[test]
fn what_others_do_meanwhile_is_refused_and_not_lost() {
    let pod = TestPod::new();
    let (one, two) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
    let held = create(&one, "a", 1).unwrap();
    let busy = |result| matches!(result, Err(DirectoryError::Busy { .. }));
    assert!(busy(two.open(&named("a"), any)));
    assert!(matches!(
        create(&two, "a", 1),
        Err(DirectoryError::Exists(_))
    ));
    assert!(two.list().is_empty());
    let held = one.publish(&held).unwrap();
    assert_eq!(two.open(&named("a"), any).unwrap().segment, held.segment);
    assert!(matches!(
        two.open(&named("a"), |_| false),
        Err(DirectoryError::Permission {
            uid: 5,
            gid: 6,
            mode: 0o640,
            ..
        })
    ));
    let grown = one.grow(&named("a"), 8 << 20, any).unwrap();
    // Others see what is ready, and cannot make it grow or remove it now.
    assert_eq!(two.open(&named("a"), any).unwrap().segment.size(), 2 << 20);
    assert!(busy(two.grow(&named("a"), 8 << 20, any)));
    assert!(busy(two.condemn(&named("a"), true, any, |_| false)));
    one.publish(&grown).unwrap();
    assert!(busy(one.condemn(&named("a"), false, any, |_| false)));
    assert!(busy(two.condemn(&named("a"), false, any, |_| true)));
    // Created by a node that died before it was ready: as if it had never been.
    let unfinished = create(&one, "b", 1).unwrap();
    pod.kill(1);
    assert!(matches!(
        two.open(&named("b"), any),
        Err(DirectoryError::NotFound(_))
    ));
    assert!(create(&two, "b", 1).is_ok());
    // The dead creator's agent, should it wake up again, changes nothing.
    assert!(matches!(
        one.publish(&unfinished),
        Err(DirectoryError::Fenced)
    ));
}

#[test]
fn a_name_is_changed_once_and_in_its_group_only() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    make(&one, "a", 1);
    make(&one, "b", 1);
    let rename = |from, to| one.rename(&named(from), to, any).map_err(|e| e.code());
    assert_eq!(rename("a", "b"), Err(RefusalCode::Exists));
    assert_eq!(rename("a", ""), Err(RefusalCode::Invalid));
    assert_eq!(rename("c", "d"), Err(RefusalCode::NotFound));
    assert_eq!(rename("a", "a"), Ok(()));
    assert_eq!(rename("a", "c"), Ok(()));
    assert_eq!(rename("a", "d"), Err(RefusalCode::NotFound));
    let refused = one.rename(&named("c"), "d", |_| false);
    assert!(matches!(refused, Err(DirectoryError::Permission { .. })));
    let names: Vec<String> = one.list().into_iter().map(|s| s.name).collect();
    assert_eq!(names, ["c", "b"]);
}

#[test]
fn a_revoked_segment_keeps_its_memory_until_the_last_node_lets_it_go() {
    let pod = TestPod::new();
    let nodes: Vec<Directory> = (1..=NODES).map(|n| directory(&pod, n, 1)).collect();
    let held = make(&nodes[0], "a", 8 << 20);
    for node in &nodes[1..] {
        node.open(&named("a"), any).unwrap();
    }
    nodes[0].condemn(&named("a"), true, any, |_| true).unwrap();
    // The name is free, the memory is not.
    let second = make(&nodes[1], "a", 8 << 20);
    assert!(nodes[2].is_condemned(&held) && !nodes[2].is_condemned(&second));
    for node in &nodes[..2] {
        node.let_go(&held);
        node.bury_nodes();
        assert!(node.is_condemned(&held));
        audit(node);
    }
    pod.kill(3);
    nodes[3].bury_nodes();
    assert!(nodes[0].is_condemned(&held));
    nodes[3].let_go(&held);
    nodes[1].bury_nodes();
    assert!(!nodes[0].is_condemned(&held));
    audit_quiet(&nodes[0]);
    // A node that is late does not touch what has the entry now.
    let third = make(&nodes[0], "b", 8 << 20);
    assert_eq!(third.index, held.index);
    nodes[0].let_go(&held);
    assert!(nodes[0].entries()[third.index].is_user(nodes[0].node()));
}

#[test]
fn a_new_life_starts_without_the_old_ones_segments_and_a_restart_keeps_them() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let held = make(&one, "kept", 2 << 20);
    create(&one, "unfinished", 2 << 20).unwrap();
    let again = Directory::new(pod.attach(1, 1));
    assert_eq!(again.begin(true).unwrap(), [held]);
    assert!(matches!(
        again.open(&named("unfinished"), any),
        Err(DirectoryError::NotFound(_))
    ));
    pod.kill(1);
    pod.live(1, 2);
    let reborn = Directory::new(pod.attach(1, 2));
    assert!(reborn.begin(false).unwrap().is_empty());
    let two = directory(&pod, 2, 1);
    assert!(remove(&two, "kept").is_ok(), "nobody uses it now");
}

#[test]
fn an_entry_that_makes_no_sense_is_refused_and_not_followed() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let held = make(&one, "bad", 2 << 20);
    let victim = make(&one, "victim", 2 << 20).segment.extents[0];
    let cell = one.entries()[held.index].extent_cell(0).unwrap();
    let word = |offset, size| lupin_abi::system::extent_word(Range { offset, size });
    for bad in [
        word(POOL, 2 << 20),
        word(2 << 20, 0),
        word(0, POOL + GRANULE),
        u64::MAX,
    ] {
        cell.store(bad, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(
            one.open(&named("bad"), any),
            Err(DirectoryError::Damaged(_))
        ));
        let good = make(&one, "good", 2 << 20);
        one.let_go(&good);
        remove(&one, "good").unwrap();
    }
    // It claims what is another's, and does not give that away when it ends.
    cell.store(
        extent_word_of(&victim),
        std::sync::atomic::Ordering::Relaxed,
    );
    remove(&one, "bad").unwrap();
    assert!(one.open(&named("victim"), any).is_ok());
    let chunks: Vec<u64> = one
        .allocator()
        .unwrap()
        .chunks()
        .map(|c| c.offset)
        .collect();
    assert!(chunks.contains(&victim.offset));
}

fn extent_word_of(extent: &Range) -> u64 {
    lupin_abi::system::extent_word(*extent)
}

#[test]
fn the_directory_can_be_full_and_a_user_cannot_fill_it() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let put = |entry: &SegmentEntry, uid| {
        let segment = Segment {
            name: "x".into(),
            group: None,
            lifetime: Lifetime::Kept,
            extents: Vec::new(),
            ready: 0,
            uid,
            gid: 0,
            mode: 0,
            worker: one.me(),
        };
        entry.begin(&segment, || {});
        entry.set_state(SegmentState::Live);
    };
    for entry in &one.entries()[..SEGMENTS_PER_USER] {
        put(entry, OWNER.uid);
    }
    let error = create(&one, "y", 1).unwrap_err();
    assert_eq!(error.code(), RefusalCode::Limit);
    for entry in one.entries() {
        put(entry, 0);
    }
    assert!(matches!(
        create(&one, "y", 1),
        Err(DirectoryError::NoSpace { .. })
    ));
}

/// A group in the tables, with a member on a node.
fn group(directory: &Directory, name: &str, quota: Option<u64>) -> GroupId {
    let mut groups = crate::groups::Groups::new(Arc::clone(directory.memory()), false);
    let peer = crate::peer::Peer {
        pid: 1,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
    };
    let admission = Admission::default();
    groups.create(name, &admission, quota, &peer).unwrap()
}

fn join(directory: &Directory, group: GroupId, thread: u32) {
    let section = directory.memory().groups();
    let slot = section.members().iter();
    let mut slots = slot.filter(|slot| slot.state() == MemberState::Free);
    let member = Member {
        thread: InstanceId::new(thread, 1),
        node: directory.me(),
        pid: 1,
    };
    let row = Row {
        state: MemberState::Alive,
        group,
        member,
        uid: 0,
        end: lupin_abi::groups::End::Unknown,
        joined: 0,
        revocable: false,
    };
    let what = What::Joined { member };
    let change = section
        .change()
        .join(group, slots.next().unwrap(), &row, what);
    section.commit(&change, || {});
}

#[test]
fn a_groups_quota_names_what_it_is_what_is_used_and_what_was_asked() {
    let pod = TestPod::new();
    let one = directory(&pod, 1, 1);
    let group = group(&one, "g", Some(10 << 20));
    let mine = |name: &str| SegmentName {
        group: Some(group),
        name: name.into(),
    };
    let held = create_in(&one, &mine("a"), 6 << 20, Lifetime::Kept).unwrap();
    one.publish(&held).unwrap();
    let error = create_in(&one, &mine("b"), (4 << 20) + 1, Lifetime::Kept).unwrap_err();
    assert_eq!(error.code(), RefusalCode::Quota);
    for number in ["10485760", "6291456"] {
        assert!(error.to_string().contains(number), "{error}");
    }
    let over = one.grow(&mine("a"), 12 << 20, any).unwrap_err();
    assert_eq!(over.code(), RefusalCode::Quota);
    let held = one.grow(&mine("a"), 10 << 20, any).unwrap();
    // What is not ready yet counts.
    let over = create_in(&one, &mine("b"), 1, Lifetime::Kept).unwrap_err();
    assert_eq!(over.code(), RefusalCode::Quota);
    one.abandon(&held).unwrap();
    create_in(&one, &mine("b"), 4 << 20, Lifetime::Kept).unwrap();
    // Others are not concerned, and names are the group's own.
    make(&one, "a", 8 << 20);
    audit(&one);
}

#[test]
fn segments_end_with_their_group_or_with_its_last_member() {
    let pod = TestPod::new();
    let (one, two) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
    let group = group(&one, "g", None);
    crate::groups::Groups::new(Arc::clone(two.memory()), false)
        .begin()
        .unwrap();
    join(&two, group, 7);
    let names = ["kept", "members"].map(|name| SegmentName {
        group: Some(group),
        name: name.into(),
    });
    for (name, lifetime) in names.iter().zip([Lifetime::Kept, Lifetime::Members]) {
        let held = create_in(&two, name, 4 << 20, lifetime).unwrap();
        two.publish(&held).unwrap();
    }
    let left = |directory: &Directory| {
        directory.collect();
        let names: Vec<String> = directory.list().into_iter().map(|s| s.name).collect();
        names
    };
    assert_eq!(left(&one), ["kept", "members"]);
    // The only member's node fails.
    pod.kill(2);
    crate::groups::Groups::new(Arc::clone(one.memory()), false).bury_nodes();
    assert_eq!(left(&one), ["kept"]);
    audit_quiet(&one);
    let section = one.memory().groups();
    let entry = section.group(group).unwrap();
    section.commit(&section.change().remove(entry), || {});
    assert!(left(&one).is_empty());
    audit_quiet(&one);
    // Nobody makes one for a group that is gone.
    let gone = create_in(&one, &names[0], 1, Lifetime::Kept);
    assert!(matches!(gone, Err(DirectoryError::NotFound(_))));
}

#[test]
fn a_collector_may_die_at_any_store() {
    for at in 0.. {
        let pod = TestPod::new();
        let (one, two) = (directory(&pod, 1, 1), directory(&pod, 2, 1));
        let group = group(&one, "g", None);
        let name = SegmentName {
            group: Some(group),
            name: "a".into(),
        };
        let held = create_in(&one, &name, 6 << 20, Lifetime::Members).unwrap();
        one.let_go(&one.publish(&held).unwrap());
        let died = dies_at(at, || Directory::new(pod.attach(3, 1)).collect());
        pod.kill(3);
        two.bury_nodes();
        two.collect();
        assert!(two.list().is_empty());
        audit_quiet(&two);
        if !died {
            assert!(at > 10);
            break;
        }
    }
}

#[test]
fn the_allocator_fits_where_the_layout_leaves_room() {
    use lupin_abi::layout::{ALLOCATOR_AT, INSTANCES_SIZE, PodHeader, system_size_for};
    for nodes in [1, 2, 16, 1023, 1024] {
        for pool in (21..48).flat_map(|n| [1 << n, (1 << n) + GRANULE, (3 << n) - GRANULE]) {
            let pool = u64::next_multiple_of(pool, GRANULE);
            let system = system_size_for(nodes, pool);
            let header = PodHeader::new(1, "p", nodes, system, pool).unwrap();
            let needed = space::spec(&header).metadata_size();
            let room = system - INSTANCES_SIZE - ALLOCATOR_AT;
            assert!(needed <= room, "{nodes} {pool}: {needed} of {room}");
        }
    }
}
