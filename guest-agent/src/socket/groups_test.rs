use std::time::Duration;

use lupin_abi::groups::{End, GroupId, GroupReply, GroupRequest, MemberInfo, Notification, What};
use lupin_abi::port::ToManager;
use lupin_abi::socket::{RefusalCode, Reply, Request};

use super::harness::{Connection, Forked, Served};
use crate::test_pod::TestPod;

const TOKEN: &[u8] = b"a token of enough bytes";

impl Connection {
    fn watch_group(&self, group: GroupId, from: u64) -> Result<(), RefusalCode> {
        self.group(GroupRequest::Watch { group, from }).map(|_| ())
    }

    fn members(&self, group: GroupId) -> Result<Vec<MemberInfo>, RefusalCode> {
        match self.group(GroupRequest::Members { group, after: 0 })? {
            GroupReply::Members { members, .. } => Ok(members),
            other => panic!("{other:?}"),
        }
    }

    /// The next `count` notifications.
    fn notices(&self, count: usize) -> Vec<Notification> {
        let mut all = Vec::new();
        while all.len() < count {
            match self.receive().expect("more notifications").0 {
                Reply::Group(GroupReply::Notices(notices)) => all.extend(notices),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(all.len(), count, "{all:?}");
        all
    }
}

#[test]
fn members_are_told_of_each_other_on_all_nodes() {
    let pod = TestPod::new();
    let (one, two) = (Served::new(&pod, 1, 1), Served::new(&pod, 2, 1));
    let (a, b) = (one.hello(), two.hello());
    let group = a.create_group("g", Some(TOKEN)).unwrap();
    let first = a.register(Some(1)).unwrap();
    assert_eq!(a.join_group("g", Some(TOKEN), &[first]), Ok((group, 0)));
    let watch = one.hello();
    watch.watch_group(group, 1).unwrap();
    let second = b.register(Some(2)).unwrap();
    b.join_group("g", Some(TOKEN), &[second]).unwrap();
    let path = two.path.clone();
    let child = Forked::new(|| {
        let c = Connection::new(&path);
        c.welcome();
        let third = c.register(Some(3)).unwrap();
        c.join_group("g", Some(TOKEN), &[third]).unwrap();
    });
    let notices = watch.notices(3);
    assert!(matches!(notices[2].what, What::Joined { member } if member.thread.id() == 3));
    child.kill();
    match watch.notices(1)[0].what {
        What::Died { member, end } => {
            assert_eq!((member.thread.id(), member.node.id()), (3, 2));
            // Reaped by its parent at once: before Linux 6.15 nobody else may know how it died.
            assert!(matches!(end, End::Killed(9) | End::Unknown), "{end:?}");
        }
        other => panic!("{other:?}"),
    }
    super::harness::until("the other agents are told to look", || {
        two.to_manager.lock().unwrap().contains(&ToManager::Groups)
    });
    // The node of the second member dies, as far as the manager says.
    pod.kill(2);
    let notices = watch.notices(2);
    assert!(matches!(notices[0].what, What::NodeFailed { node } if node.id() == 2));
    assert!(
        matches!(notices[1].what, What::Died { member, end: End::Node } if member.thread.id() == 2)
    );
    assert_eq!(notices[1].seq, 6);
    let members = a.members(group).unwrap();
    assert_eq!(members.len(), 3);
    assert_eq!(members.iter().filter(|m| m.end.is_none()).count(), 1);
}

#[test]
fn nobody_gets_in_without_the_right_credentials_or_with_anothers_threads() {
    let pod = TestPod::new();
    let one = Served::new(&pod, 1, 1);
    let path = one.path.clone();
    let a = one.hello();
    let group = a.create_group("g", Some(TOKEN)).unwrap();
    let own = a.register(Some(1)).unwrap();
    let denied = Err(RefusalCode::Permission);
    for secret in [None, Some(&b""[..]), Some(&TOKEN[1..]), Some(&[0; 4096])] {
        assert_eq!(a.join_group("g", secret, &[own]), denied);
    }
    // A thread of another process, of no process, of a former life, of no number.
    let child = Forked::new(|| {
        let c = Connection::new(&path);
        c.welcome();
        c.register(Some(2)).unwrap();
    });
    super::harness::until("the other registers", || {
        pod.attach(2, 1)
            .instances()
            .thread(lupin_abi::ThreadId::new(2).unwrap())
            .generation()
            == 1
    });
    for thread in [(2, 1), (3, 1), (1, 2), (1, 0), (0, 0), (u32::MAX, 1)] {
        assert_eq!(a.join_group("g", Some(TOKEN), &[own, thread]), denied);
    }
    child.kill();
    for threads in [vec![], vec![own; 4097]] {
        let joined = a.join_group("g", Some(TOKEN), &threads);
        assert_eq!(joined, Err(RefusalCode::Invalid));
    }
    // Nothing of all this made anybody a member, and who is none learns nothing.
    let foreign = [group, GroupId::from_word(0), GroupId::from_word(u64::MAX)];
    for group in foreign {
        let nothing = Err(RefusalCode::Permission);
        assert_eq!(a.members(group).map(|_| ()), nothing);
        assert_eq!(a.watch_group(group, 1), nothing);
    }
    let no_group = a.join_group("h", None, &[own]);
    assert_eq!(no_group, Err(RefusalCode::NotFound));
    for name in ["", ".g", "a/b", "../g", "x\0", &"n".repeat(65)] {
        assert_eq!(a.create_group(name, None), Err(RefusalCode::Invalid));
    }
    assert_eq!(a.create_group("g", None), Err(RefusalCode::Exists));
    assert_eq!(
        a.create_group("s", Some(b"short")),
        Err(RefusalCode::Invalid)
    );
    assert_eq!(a.join_group("g", Some(TOKEN), &[own, own]).unwrap().1, 0);
    assert_eq!(
        a.members(group).unwrap().len(),
        1,
        "named twice, there once"
    );
}

#[test]
fn a_flood_of_wrong_secrets_is_limited_and_harms_nobody() {
    let pod = TestPod::new();
    let one = Served::new(&pod, 1, 1);
    let a = one.hello();
    a.create_group("g", Some(TOKEN)).unwrap();
    let own = a.register(None).unwrap();
    let refused: Vec<RefusalCode> = (0..6000)
        .map(|_| a.join_group("g", Some(&[1; 16]), &[own]).unwrap_err())
        .collect();
    assert!(refused.contains(&RefusalCode::Permission));
    std::thread::sleep(Duration::from_millis(20));
    super::harness::until("the agent lets the right one in", || {
        a.join_group("g", Some(TOKEN), &[own]).is_ok()
    });
}

#[test]
fn who_leaves_hears_no_more() {
    let pod = TestPod::new();
    let one = Served::new(&pod, 1, 1);
    let a = one.hello();
    let group = a.create_group("g", None).unwrap();
    let (x, y) = (a.register(None).unwrap(), a.register(None).unwrap());
    a.join_group("g", None, &[x, y]).unwrap();
    let watch = one.hello();
    watch.watch_group(group, 1).unwrap();
    watch.notices(2);
    let leave = |threads: &[(u32, u32)]| {
        let threads = threads.to_vec();
        a.group(GroupRequest::Leave { group, threads }).unwrap();
    };
    leave(&[x]);
    assert!(matches!(watch.notices(1)[0].what, What::Left { .. }));
    // Released while a member: an orderly end, too.
    let (id, generation) = y;
    let released = a.ask(&Request::ReleaseThread { id, generation }).0;
    assert_eq!(released, Reply::Done);
    assert!(matches!(watch.notices(1)[0].what, What::Left { .. }));
    let end = watch.receive().unwrap().0;
    assert_eq!(end, Reply::Group(GroupReply::Ended));
    assert_eq!(watch.watch_group(group, 1), Err(RefusalCode::Permission));
}

#[test]
fn memberships_survive_the_agent_and_deaths_without_one_are_told() {
    let pod = TestPod::new();
    let first = Served::new(&pod, 1, 1);
    let (path, a) = (first.path.clone(), first.hello());
    let group = a.create_group("g", None).unwrap();
    let own = a.register(Some(1)).unwrap();
    a.join_group("g", None, &[own]).unwrap();
    let child = Forked::new(|| {
        let c = Connection::new(&path);
        c.welcome();
        let thread = c.register(Some(2)).unwrap();
        c.join_group("g", None, &[thread]).unwrap();
    });
    super::harness::until("both are members", || a.members(group).unwrap().len() == 2);
    drop((a, first));
    child.kill();
    let second = Served::start(&pod, 1, 1, true);
    let a = second.hello();
    let watch = second.hello();
    watch.watch_group(group, 2).unwrap();
    let notices = watch.notices(2);
    assert_eq!((notices[0].seq, notices[1].seq), (2, 3));
    assert!(matches!(notices[1].what, What::Died { member, .. } if member.thread.id() == 2));
    let members = a.members(group).unwrap();
    let living: Vec<u32> = members
        .iter()
        .filter(|m| m.end.is_none())
        .map(|m| m.member.thread.id())
        .collect();
    assert_eq!(living, [1]);
}

#[test]
fn a_reader_that_does_not_read_harms_nobody_and_loses_nothing() {
    let pod = TestPod::new();
    let one = Served::new(&pod, 1, 1);
    let a = one.hello();
    let group = a.create_group("g", None).unwrap();
    let (x, y) = (a.register(None).unwrap(), a.register(None).unwrap());
    a.join_group("g", None, &[x]).unwrap();
    let (slow, quick) = (one.hello(), one.hello());
    slow.watch_group(group, 1).unwrap();
    quick.watch_group(group, 1).unwrap();
    quick.notices(1);
    for _ in 0..500 {
        a.join_group("g", None, &[y]).unwrap();
        let threads = vec![y];
        a.group(GroupRequest::Leave { group, threads }).unwrap();
        quick.notices(2);
    }
    let all = slow.notices(1001);
    assert!(all.iter().map(|n| n.seq).eq(1..=1001));
}
