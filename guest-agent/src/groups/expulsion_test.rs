use lupin_abi::socket::RefusalCode;

use super::super::groups_test::*;
use super::*;
use crate::crash::dies_at;
use crate::test_pod::TestPod;
use lupin_abi::groups::{Admission, End, What};

fn instance(thread: Thread) -> InstanceId {
    InstanceId::of_thread(thread.id, thread.generation)
}

/// How often it was told that a thread was expelled.
fn expulsions_of(groups: &Groups, thread: Thread) -> usize {
    let told = history(groups).into_iter().filter(|(_, notice)| {
        matches!(notice.what, What::Expelled { member, .. } if member.thread == instance(thread))
    });
    told.count()
}

fn expel(agent: &mut Agent, thread: Thread) -> Result<(u32, Leftover), GroupError> {
    agent.groups.expel("g", instance(thread), false, &peer(99))
}

/// Two agents with a group, of which thread 1 on node 1 and thread 2 on node 2 are members.
fn two(pod: &TestPod) -> (Agent, Agent, Thread, Thread) {
    let (mut one, mut two) = (Agent::new(pod, 1, 1), Agent::new(pod, 2, 1));
    create(&mut one, "g");
    let (first, second) = (one.register(1), two.register(2));
    one.join("g", first);
    two.join("g", second);
    (one, two, first, second)
}

#[test]
fn agents_that_die_over_an_expulsion_on_either_side_are_followed_by_others() {
    for at in 0.. {
        let pod = TestPod::new();
        let (_, mut host, _, victim) = two(&pod);
        let id = host.groups.find("g").unwrap().0;
        let died = dies_at(at, || {
            expel(&mut Agent::new(&pod, 1, 1), victim).unwrap();
        });
        // Whoever comes next finds it done, or not begun.
        let mut next = Agent::new(&pod, 1, 1);
        audit(&next.groups);
        let told = expulsions_of(&next.groups, victim);
        assert!(told == 1 || died, "died at {at}");
        assert_eq!(host.groups.is_member(id, [&victim]), told == 0);
        if told == 0 {
            expel(&mut next, victim).unwrap();
        }
        audit(&next.groups);
        // The agent of the expelled one: this life of it, or the next.
        let due = host.groups.take_expelled();
        assert_eq!(due.len(), 1);
        assert_eq!(due, Agent::new(&pod, 2, 1).groups.left_expelled());
        let settled = !dies_at(at, || {
            let mut agent = Agent::new(&pod, 2, 1);
            let due = agent.groups.left_expelled();
            agent.groups.settle(&due).unwrap();
        });
        let mut last = Agent::new(&pod, 2, 1);
        let left = last.groups.left_expelled();
        assert!(left.is_empty() || !settled, "died at {at}");
        last.groups.settle(&left).unwrap();
        assert!(last.groups.left_expelled().is_empty());
        assert_eq!(expulsions_of(&last.groups, victim), 1);
        assert_eq!(deaths_of(&last.groups, victim), []);
        // It lives, and may come again if it is admitted.
        last.join("g", victim);
        audit(&next.groups);
        assert!(last.groups.is_member(id, [&victim]));
        if !died && settled {
            assert!(at > 20, "few crash points: {at}");
            break;
        }
    }
}

#[test]
fn a_node_that_fails_takes_its_expelled_members_with_it() {
    for at in 0.. {
        let pod = TestPod::new();
        let (mut one, _, _, victim) = two(&pod);
        expel(&mut one, victim).unwrap();
        pod.kill(2);
        let died = dies_at(at, || one.groups.bury_nodes());
        let mut next = Agent::new(&pod, 1, 1);
        audit(&next.groups);
        let rows = next.groups.rows();
        let left = rows.filter(|(_, row)| row.state() == MemberState::Expelled);
        assert_eq!(left.count(), 0);
        assert_eq!(deaths_of(&next.groups, victim), [], "it was no member");
        let late = next.register(5);
        next.join("g", late);
        if !died {
            break;
        }
    }
}

#[test]
fn only_living_members_are_expelled_and_only_by_those_who_may() {
    let pod = TestPod::new();
    let (mut one, mut host, first, victim) = two(&pod);
    let code = |result: Result<(u32, Leftover), GroupError>| result.unwrap_err().code();
    let head = one.groups.section().head();
    // Not the creator's user; not even as a member.
    let stranger = Peer { uid: 7, ..peer(99) };
    let denied = one
        .groups
        .expel("g", instance(victim), true, &stranger)
        .unwrap_err();
    assert_eq!(denied.code(), RefusalCode::Permission);
    // No such group; nobody's thread; another life of it; the words 0 and all ones.
    let absent = one.groups.expel("h", instance(victim), false, &peer(99));
    assert_eq!(code(absent), RefusalCode::NotFound);
    let (id, generation) = (victim.id.get(), victim.generation);
    for (id, generation) in [
        (3, 1),
        (id, generation + 1),
        (id, generation - 1),
        (0, 0),
        (u32::MAX, u32::MAX),
    ] {
        let thread = InstanceId::new(id, generation);
        for process in [false, true] {
            let nobody = one.groups.expel("g", thread, process, &peer(99));
            assert_eq!(code(nobody), RefusalCode::NotFound);
        }
    }
    // Itself: `join` of these tests gives each thread a process of its number.
    let own = one.groups.expel("g", instance(first), false, &peer(1));
    assert_eq!(code(own), RefusalCode::Invalid);
    assert_eq!(one.groups.section().head(), head, "nothing happened");
    // A process of another node may have the same number.
    let same = one.groups.expel("g", instance(victim), false, &peer(2));
    assert_eq!(same.unwrap(), (1, Leftover::Nothing));
    assert_eq!(
        code(expel(&mut one, victim)),
        RefusalCode::NotFound,
        "twice"
    );
    // Who is dead is told of as dead, once, also if nobody has told yet.
    host.groups.settle(&host.groups.left_expelled()).unwrap();
    host.join("g", victim);
    host.threads.end([victim]).unwrap();
    assert_eq!(code(expel(&mut one, victim)), RefusalCode::NotFound);
    host.groups.died(&[victim], End::Killed(9)).unwrap();
    assert_eq!(code(expel(&mut one, victim)), RefusalCode::NotFound);
    assert_eq!(deaths_of(&one.groups, victim), [End::Killed(9)]);
    audit(&one.groups);
    // A node that is none any more expels nobody.
    pod.kill(1);
    assert_eq!(code(expel(&mut one, first)), RefusalCode::Failed);
}

#[test]
fn an_expelled_member_that_dies_leaves_or_comes_again_is_still_seen_to() {
    type Act = fn(&mut Agent, Thread);
    let acts: [(&str, Act); 3] = [
        ("dies", |agent, thread| agent.dies(thread)),
        ("leaves", |agent, thread| {
            agent.groups.leave(None, &[thread]).unwrap()
        }),
        ("comes again", |agent, thread| agent.join("g", thread)),
    ];
    for (name, act) in acts {
        let pod = TestPod::new();
        let (mut one, mut host, _, victim) = two(&pod);
        expel(&mut one, victim).unwrap();
        act(&mut host, victim);
        audit(&host.groups);
        let due = host.groups.take_expelled();
        assert_eq!(due.len(), 1, "{name}");
        host.groups.settle(&due).unwrap();
        assert_eq!(host.groups.take_expelled(), []);
        assert_eq!(expulsions_of(&one.groups, victim), 1);
        assert_eq!(deaths_of(&one.groups, victim), []);
        audit(&one.groups);
    }
}

#[test]
fn a_process_is_expelled_with_all_its_threads_and_keeps_all_with_one() {
    let pod = TestPod::new();
    let (mut one, mut host, ..) = two(&pod);
    let threads: Vec<Thread> = (10..13).map(|id| host.register(id)).collect();
    host.groups.join("g", None, &threads, &peer(50)).unwrap();
    let other = host.register(20);
    host.join("g", other);
    assert_eq!(
        expel(&mut one, threads[0]).unwrap(),
        (1, Leftover::Membership)
    );
    let all = one
        .groups
        .expel("g", instance(threads[1]), true, &peer(99))
        .unwrap();
    assert_eq!(all, (2, Leftover::Nothing));
    audit(&one.groups);
    let members = one.groups.living(one.groups.find("g").unwrap().0);
    let mut ids: Vec<u32> = members.map(|row| row.member.thread.id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 20]);
    assert_eq!(host.groups.take_expelled().len(), 3);
    // Of a node that cannot take mappings away, the answer says so.
    let mut poor = Agent::new(&pod, 3, 1);
    poor.groups.revocable = false;
    let third = poor.register(30);
    poor.join("g", third);
    assert_eq!(expel(&mut one, third).unwrap(), (1, Leftover::Mappings));
}

#[test]
fn the_owner_need_not_be_a_member_and_root_need_not_own() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    let user = |uid, pid| Peer { uid, ..peer(pid) };
    let admission = Admission {
        uids: vec![5, 6],
        ..Admission::default()
    };
    one.groups
        .create("g", &admission, None, &user(5, 1))
        .unwrap();
    let threads = [one.register(1), one.register(2)];
    for (thread, pid) in threads.into_iter().zip([11, 12]) {
        one.groups
            .join("g", None, &[thread], &user(6, pid))
            .unwrap();
    }
    for (thread, uid) in threads.into_iter().zip([5, 0]) {
        let refused = one.groups.expel("g", instance(thread), false, &user(6, 12));
        assert_eq!(refused.unwrap_err().code(), RefusalCode::Permission);
        one.groups
            .expel("g", instance(thread), false, &user(uid, 2))
            .unwrap();
    }
    audit(&one.groups);
}
