extern crate std;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::socket::{MAX_PACKET, Reply, decode, encode};

fn section() -> &'static GroupSection {
    let words = vec![0u64; size_of::<GroupSection>() / 8 + 512];
    let words: &'static mut [u64] = Box::leak(words.into_boxed_slice());
    let base = words.as_mut_ptr();
    let skip = base.cast::<u8>().align_offset(4096);
    // SAFETY: leaked, so alive for ever; a page more than a granule was allocated, and the start
    // is moved to a page's.
    unsafe { GroupSection::from_ptr(base.cast::<u8>().add(skip)) }
}

fn group(name: &str) -> Group {
    Group {
        name: name.into(),
        creator: InstanceId::new(1, 1),
        uid: 5,
        gid: 6,
        uids: vec![1, u32::MAX, 3],
        gids: vec![9],
        secret: Some(([7; SALT_SIZE], [8; HASH_SIZE])),
        quota: Some(1 << 40),
    }
}

fn row(group: GroupId, thread: u32, generation: u32) -> Row {
    Row {
        state: MemberState::Alive,
        group,
        member: Member {
            thread: InstanceId::new(thread, generation),
            node: InstanceId::new(3, 2),
            pid: 77,
        },
        uid: 5,
        end: End::Unknown,
        joined: 0,
        revocable: thread % 2 == 1,
    }
}

fn create(section: &GroupSection, name: &str) -> GroupId {
    let change = section.change().create(&section.groups()[0], &group(name));
    section.commit(&change, || {});
    section.groups()[0].id(0).unwrap()
}

#[test]
fn what_is_written_is_read_back() {
    let section = section();
    let id = create(section, "a-name");
    assert_eq!(section.group(id).unwrap().group(), group("a-name"));
    let row = row(id, 9, 4);
    let member = row.member;
    let slot = &section.members()[0];
    let change = section
        .change()
        .join(id, slot, &row, What::Joined { member });
    section.commit(&change, || {});
    assert_eq!(slot.row(), Row { joined: 1, ..row });
    let node = NodeId::new(3).unwrap();
    let entry = section.group(id).unwrap();
    assert!(entry.is_known(node) && entry.is_up(node));
    assert!(!entry.is_known(NodeId::new(4).unwrap()));
    let notice = |seq, what| NoticeRead::Notice(id, Notification { seq, what });
    assert_eq!(section.read(1), notice(1, What::Joined { member }));
    for end in [
        End::Unknown,
        End::Exited(-1),
        End::Killed(9),
        End::Node,
        End::Thread,
    ] {
        let change = section.change().die(slot, end);
        section.commit(&change, || {});
        assert_eq!(slot.row().end, end);
        let head = section.head();
        assert_eq!(section.read(head), notice(head, What::Died { member, end }));
    }
    let change = section.change().remove(section.group(id).unwrap());
    section.commit(&change, || {});
    assert!(section.group(id).is_none());
    assert_ne!(create(section, "a-name"), id, "an id names one group ever");
    assert_eq!(section.read(section.head() + 1), NoticeRead::NotYet);
}

#[test]
fn a_change_that_stops_at_any_store_happens_whole_or_not_at_all() {
    struct Stop;
    for at in 0.. {
        let section = section();
        let id = create(section, "g");
        let row = row(id, 9, 4);
        let member = row.member;
        let slot = &section.members()[5];
        let change = section
            .change()
            .join(id, slot, &row, What::Joined { member });
        let mut steps = 0;
        // Whatever step panics is where the writer stops.
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            section.commit(&change, || {
                if steps == at {
                    std::panic::resume_unwind(Box::new(Stop));
                }
                steps += 1;
            });
        }))
        .is_err();
        let redone = section.redo(|| {});
        let happened = slot.state() == MemberState::Alive;
        assert!(redone <= happened);
        assert_eq!(section.head(), u64::from(happened));
        assert_eq!(section.group(id).unwrap().seq(), u64::from(happened));
        if happened {
            assert!(matches!(section.read(1), NoticeRead::Notice(..)));
            assert_eq!(slot.row(), Row { joined: 1, ..row });
        }
        assert!(!section.redo(|| {}));
        if !stopped {
            assert!(happened && at > 40);
            break;
        }
    }
}

#[test]
fn whoever_sees_an_expulsion_sees_it_told_and_who_hears_of_it_knows_when_it_is_done() {
    let section = section();
    let id = create(section, "g");
    let slot = &section.members()[5];
    let row = row(id, 9, 4);
    let member = row.member;
    let joined = What::Joined { member };
    let change = section.change().join(id, slot, &row, joined);
    section.commit(&change, || {});
    let mut seen = Vec::new();
    let change = section.change().expel(slot, 17);
    section.commit(&change, || {
        seen.push((section.head(), section.is_changing(), slot.state()));
    });
    assert_eq!(seen.last(), Some(&(2, false, MemberState::Expelled)));
    for (head, is_changing, state) in seen {
        assert!(state == MemberState::Alive || head == 2);
        assert!(state == MemberState::Expelled || head == 1 || is_changing);
    }
    let what = What::Expelled { member, by: 17 };
    let notice = Notification { seq: 2, what };
    assert_eq!(section.read(2), NoticeRead::Notice(id, notice));
}

#[test]
fn a_reader_that_falls_behind_is_told_where_to_go_on() {
    let section = section();
    let id = create(section, "g");
    let slot = &section.members()[0];
    let row = row(id, 9, 4);
    let member = row.member;
    for _ in 0..NOTICE_SLOTS + 10 {
        let change = section
            .change()
            .join(id, slot, &row, What::Joined { member });
        section.commit(&change, || {});
    }
    let NoticeRead::Lost { oldest } = section.read(1) else {
        panic!("{:?}", section.read(1));
    };
    assert_eq!(oldest, section.oldest());
    for position in oldest..=section.head() {
        assert!(matches!(section.read(position), NoticeRead::Notice(..)));
    }
}

#[test]
fn words_that_no_program_wrote_are_no_notification_and_no_store() {
    let section = section();
    let id = create(section, "g");
    section.tables.head.store(1, Ordering::Relaxed);
    section.tables.ring[1].position.store(1, Ordering::Relaxed);
    section.tables.ring[1].words[1].store(99, Ordering::Relaxed);
    assert_eq!(section.read(1), NoticeRead::Unknown);
    section
        .intent
        .write(&[(usize::MAX, 1), (WORDS, 2)], &mut || {});
    assert!(section.redo(|| {}));
    for word in [0, 1 << 32, u64::MAX, id.word() + 1] {
        assert!(section.group(GroupId::from_word(word)).is_none());
    }
}

#[test]
fn the_largest_lists_fit_into_a_packet() {
    let member = Member {
        thread: InstanceId::new(u32::MAX, u32::MAX),
        node: InstanceId::new(u32::MAX, u32::MAX),
        pid: u32::MAX,
    };
    let end = Some(End::Exited(i32::MIN));
    let members: Vec<_> = core::iter::repeat_n(MemberInfo { member, end }, 1024).collect();
    let reply = Reply::Group(GroupReply::Members {
        seq: u64::MAX,
        members,
        more: Some(u32::MAX),
    });
    let packet = encode(&reply).unwrap();
    assert!(packet.len() <= MAX_PACKET);
    assert_eq!(decode::<Reply>(&packet), Ok(reply));
    let info = GroupInfo {
        name: "x".repeat(MAX_GROUP_NAME),
        members: u32::MAX,
        uid: u32::MAX,
        secret: true,
    };
    let groups = core::iter::repeat_n(info, MAX_GROUPS).collect();
    encode(&Reply::Group(GroupReply::Groups(groups))).unwrap();
}
