use std::collections::BTreeSet;

use lupin_abi::ThreadId;
use lupin_abi::groups::{NoticeRead, Notification};
use lupin_abi::instances::Holder;
use lupin_abi::socket::RefusalCode;

use super::*;
use crate::crash::dies_at;
use crate::directory::Directory;
use crate::test_pod::{NODES, TestPod};
use crate::threads::Threads;

/// An agent, as far as threads and groups go.
pub(super) struct Agent {
    pub(super) threads: Threads,
    pub(super) groups: Groups,
}

impl Agent {
    /// Takes over what an earlier agent of this life left, as the server does.
    pub(super) fn new(pod: &TestPod, node: u32, generation: u32) -> Self {
        let memory = pod.attach(node, generation);
        let directory = Directory::new(Arc::clone(&memory));
        directory.begin(true).unwrap();
        let mut agent = Self {
            threads: Threads::new(directory),
            groups: Groups::new(memory, true),
        };
        agent.groups.begin().unwrap();
        agent
    }

    pub(super) fn register(&mut self, id: u32) -> Thread {
        let holder = Holder {
            pid: id,
            ..Holder::default()
        };
        self.threads.register(Some(id), holder).unwrap()
    }

    pub(super) fn join(&mut self, group: &str, thread: Thread) {
        self.groups
            .join(group, None, &[thread], &peer(thread.id.get()))
            .unwrap();
    }

    /// A process's death, as the server handles it.
    pub(super) fn dies(&mut self, thread: Thread) {
        self.threads.end([thread]).unwrap();
        self.groups.died(&[thread], End::Killed(9)).unwrap();
    }
}

pub(super) fn peer(pid: u32) -> Peer {
    Peer {
        pid,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
    }
}

pub(super) fn create(agent: &mut Agent, name: &str) -> GroupId {
    let admission = Admission::default();
    agent
        .groups
        .create(name, &admission, None, &peer(1))
        .unwrap()
}

pub(super) fn history(groups: &Groups) -> Vec<(GroupId, Notification)> {
    let section = groups.section();
    (section.oldest()..=section.head())
        .map(|position| match section.read(position) {
            NoticeRead::Notice(group, notice) => (group, notice),
            other => panic!("{position}: {other:?}"),
        })
        .collect()
}

/// What must hold whatever happened: numbers without gaps, no rejoin before its death, nobody
/// dead twice, and tables that say what the notifications add up to.
pub(super) fn audit(groups: &Groups) {
    let history = history(groups);
    for (index, entry) in groups.section().groups().iter().enumerate() {
        let Some(id) = entry.id(index) else {
            continue;
        };
        let (mut alive, mut dead) = (BTreeSet::new(), BTreeSet::new());
        let mut up = BTreeSet::new();
        let mut next = 1;
        for (_, notice) in history.iter().filter(|(group, _)| *group == id) {
            assert_eq!(notice.seq, next, "{history:?}");
            next += 1;
            match notice.what {
                What::Joined { member } => {
                    assert!(alive.insert(member.thread.word()), "{history:?}");
                    up.insert(member.node.id());
                }
                What::Rejoined { member, previous } => {
                    let old = InstanceId::new(member.thread.id(), previous);
                    assert!(dead.remove(&old.word()), "{history:?}");
                    assert!(alive.insert(member.thread.word()), "{history:?}");
                    up.insert(member.node.id());
                }
                What::Left { member } | What::Expelled { member, .. } => {
                    assert!(alive.remove(&member.thread.word()), "{history:?}");
                }
                What::Died { member, end } => {
                    assert!(alive.remove(&member.thread.word()), "{history:?}");
                    assert!(dead.insert(member.thread.word()), "{history:?}");
                    let failed = end == End::Node;
                    assert_eq!(failed, !up.contains(&member.node.id()), "{history:?}");
                }
                What::NodeFailed { node } => assert!(up.remove(&node.id()), "{history:?}"),
                What::NodeBack { node } => assert!(up.insert(node.id()), "{history:?}"),
            }
        }
        assert_eq!(entry.seq() + 1, next);
        let rows = |state| -> BTreeSet<u64> {
            let rows = groups.rows().map(|(_, entry)| entry.row());
            rows.filter(|row| row.state == state && row.group == id)
                .map(|row| row.member.thread.word())
                .collect()
        };
        assert_eq!(rows(MemberState::Alive), alive, "{history:?}");
        assert_eq!(rows(MemberState::Dead), dead, "{history:?}");
        for node in (1..=NODES).filter_map(lupin_abi::NodeId::new) {
            assert_eq!(entry.is_up(node), up.contains(&node.get()), "{history:?}");
        }
    }
}

fn thread(id: u32, generation: u32) -> Thread {
    let id = ThreadId::new(id).unwrap();
    Thread { id, generation }
}

pub(super) fn deaths_of(groups: &Groups, thread: Thread) -> Vec<End> {
    let instance = InstanceId::of_thread(thread.id, thread.generation);
    history(groups)
        .into_iter()
        .filter_map(|(_, notice)| match notice.what {
            What::Died { member, end } if member.thread == instance => Some(end),
            _ => None,
        })
        .collect()
}

#[test]
fn an_agent_that_dies_at_any_store_is_followed_by_one_that_knows_what_happened() {
    type Operation = fn(&mut Agent);
    let operations: [(&str, Operation); 5] = [
        ("create", |a| {
            create(a, "new");
        }),
        ("join", |a| {
            let thread = a.register(20);
            a.join("g", thread);
        }),
        ("leave", |a| a.groups.leave(None, &[thread(1, 1)]).unwrap()),
        ("die", |a| a.dies(thread(1, 1))),
        ("rejoin", |a| {
            a.dies(thread(1, 1));
            let again = a.register(1);
            a.join("g", again);
        }),
    ];
    for (name, operation) in operations {
        for at in 0.. {
            let pod = TestPod::new();
            let (mut one, mut two) = (Agent::new(&pod, 1, 1), Agent::new(&pod, 2, 1));
            create(&mut one, "g");
            let victim = one.register(1);
            one.join("g", victim);
            let witness = two.register(2);
            two.join("g", witness);
            let died = dies_at(at, || operation(&mut Agent::new(&pod, 1, 1)));
            // The next agent of the same life: nobody who lives is called dead.
            let mut next = Agent::new(&pod, 1, 1);
            audit(&next.groups);
            let alive = pod.attach(1, 1).instances().thread(victim.id).generation() == 1;
            let told = deaths_of(&next.groups, victim).len();
            if alive {
                assert_eq!(told, 0, "{name} died at {at}");
            } else {
                assert!(told == 1, "{name} died at {at}: told {told} times");
            }
            let late = next.register(30);
            next.join("g", late);
            audit(&two.groups);
            // And then the node dies with all that is on it.
            pod.kill(1);
            two.groups.bury_nodes();
            audit(&two.groups);
            assert_eq!(deaths_of(&two.groups, late), [End::Node]);
            if !died {
                assert!(at > 20, "{name} has few crash points: {at}");
                break;
            }
        }
    }
}

#[test]
fn a_rule_changes_whole_or_not_at_all_and_by_its_owner_alone() {
    let rule = |byte: u8, uid: u32| Admission {
        secret: Some(Secret::new([byte; 16])),
        uids: vec![uid, 9],
        gids: Vec::new(),
    };
    let user = |uid| Peer { uid, ..peer(1) };
    for at in 0.. {
        let pod = TestPod::new();
        let mut one = Agent::new(&pod, 1, 1);
        one.groups
            .create("g", &rule(1, 5), Some(7), &user(5))
            .unwrap();
        let first = one.register(1);
        let join = |agent: &mut Agent, thread: Thread, byte, uid| {
            let secret = Secret::new([byte; 16]);
            let joined = agent.groups.join("g", Some(&secret), &[thread], &user(uid));
            joined.map(|_| ()).map_err(|e| e.code())
        };
        let denied = Err(RefusalCode::Permission);
        join(&mut one, first, 1, 5).unwrap();
        for uid in [6, 9] {
            let set = one.groups.set_admission("g", &rule(2, 6), &user(uid));
            assert_eq!(set.map_err(|e| e.code()), denied, "not even as a member");
        }
        let bad = rule(2, 6).uids.repeat(5);
        let bad = Admission {
            uids: bad,
            ..rule(2, 6)
        };
        let refused = one.groups.set_admission("g", &bad, &user(5)).unwrap_err();
        assert_eq!(refused.code(), RefusalCode::Invalid);
        let died = dies_at(at, || {
            let mut agent = Agent::new(&pod, 1, 1);
            agent
                .groups
                .set_admission("g", &rule(2, 6), &user(5))
                .unwrap();
        });
        let mut next = Agent::new(&pod, 1, 1);
        let thread = next.register(2);
        let old = join(&mut next, thread, 1, 5);
        let (byte, uid) = if old.is_ok() { (1, 5) } else { (2, 6) };
        join(&mut next, thread, byte, uid).unwrap();
        let third = next.register(3);
        for (other, someone) in [(1, 5), (1, 6), (2, 5), (2, 6)] {
            if (other, someone) != (byte, uid) {
                assert_eq!(join(&mut next, third, other, someone), denied, "at {at}");
            }
        }
        let group = next.groups.find("g").unwrap().2;
        assert_eq!((group.uid, group.quota), (5, Some(7)), "the rest stays");
        assert!(next.groups.living(next.groups.find("g").unwrap().0).count() == 2);
        audit(&next.groups);
        if !died {
            assert!(at > 20 && old == denied, "{at}");
            break;
        }
    }
}

#[test]
fn survivors_that_die_over_the_telling_are_followed_by_others() {
    for at in 0.. {
        let pod = TestPod::new();
        let mut agents: Vec<Agent> = (1..=3).map(|node| Agent::new(&pod, node, 1)).collect();
        for name in ["a", "b"] {
            create(&mut agents[0], name);
            for id in 1..=6 {
                let agent = &mut agents[id as usize % 3];
                let known = agent.groups.own.keys().find(|t| t.id.get() == id).copied();
                let thread = known.unwrap_or_else(|| agent.register(id));
                agent.join(name, thread);
            }
        }
        pod.kill(1);
        let died = dies_at(at, || agents[1].groups.bury_nodes());
        if at % 2 == 0 {
            // Its node goes with it.
            pod.kill(2);
        } else {
            Agent::new(&pod, 2, 1);
        }
        agents[2].groups.bury_nodes();
        audit(&agents[2].groups);
        for id in [3, 6] {
            let told = deaths_of(&agents[2].groups, thread(id, 1));
            assert_eq!(told, [End::Node; 2], "died at {at}");
        }
        // The node comes back, and so do its members: after their deaths.
        pod.live(1, 2);
        let back = dies_at(at, || drop(Agent::new(&pod, 1, 2)));
        let mut again = Agent::new(&pod, 1, 2);
        let thread = again.register(3);
        again.join("a", thread);
        audit(&again.groups);
        let events = history(&again.groups);
        let backs = events
            .iter()
            .filter(|(_, n)| matches!(n.what, What::NodeBack { .. }));
        assert_eq!(backs.count(), 2, "one for each group");
        assert!(matches!(
            events.last().unwrap().1.what,
            What::Rejoined { previous: 1, .. }
        ));
        if !died && !back {
            assert!(at > 20);
            break;
        }
    }
}

#[test]
fn nobody_hears_of_a_return_before_the_death() {
    let pod = TestPod::new();
    let (mut one, mut two) = (Agent::new(&pod, 1, 1), Agent::new(&pod, 2, 1));
    create(&mut one, "g");
    let thread = one.register(1);
    one.join("g", thread);
    // Its agent has ended the thread, and tells of it only after another node has it.
    one.threads.end([thread]).unwrap();
    let moved = two.register(1);
    two.join("g", moved);
    one.groups.died(&[thread], End::Killed(9)).unwrap();
    audit(&two.groups);
    assert_eq!(deaths_of(&two.groups, thread), [End::Unknown]);
}

#[test]
fn a_repeated_request_changes_nothing() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    create(&mut one, "g");
    let thread = one.register(1);
    one.join("g", thread);
    one.join("g", thread);
    assert_eq!(one.groups.section().head(), 1);
    one.groups.leave(None, &[thread]).unwrap();
    one.groups.leave(None, &[thread]).unwrap();
    assert_eq!(one.groups.section().head(), 2);
    audit(&one.groups);
}

#[test]
fn two_hundred_groups_and_two_thousand_members_lose_nobody() {
    let pod = TestPod::new();
    let mut agents: Vec<Agent> = (1..=NODES).map(|node| Agent::new(&pod, node, 1)).collect();
    for group in 0..200 {
        create(&mut agents[group % 4], &format!("g{group}"));
    }
    for id in 1..=2000 {
        let agent = &mut agents[id as usize % 4];
        let thread = agent.register(id);
        agent.join(&format!("g{}", id / 10 % 200), thread);
    }
    audit(&agents[0].groups);
    pod.kill(1);
    for agent in &agents[1..] {
        agent.groups.bury_nodes();
    }
    audit(&agents[1].groups);
    let dead = history(&agents[1].groups);
    let told = |what: fn(&What) -> bool| dead.iter().filter(|(_, n)| what(&n.what)).count();
    assert_eq!(
        told(|w| matches!(w, What::Died { end: End::Node, .. })),
        500
    );
    assert_eq!(told(|w| matches!(w, What::NodeFailed { .. })), 200);
    let list = agents[1].groups.list(&peer(1));
    assert_eq!(list.len(), 200);
    assert_eq!(list.iter().map(|g| g.members).sum::<u32>(), 1500);
}

#[test]
fn full_tables_are_refused_and_the_dead_make_room() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    create(&mut one, "g");
    let mut threads: Vec<Thread> = (1..=8192).map(|id| thread(id, 1)).collect();
    one.groups.join("g", None, &threads, &peer(1)).unwrap();
    let join = |one: &mut Agent, id| one.groups.join("g", None, &[thread(id, 1)], &peer(1));
    assert!(matches!(join(&mut one, 9000), Err(GroupError::Full(_))));
    let dead = threads.pop().unwrap();
    one.groups.died(&[dead], End::Unknown).unwrap();
    join(&mut one, 9000).unwrap();
    assert!(matches!(join(&mut one, 9001), Err(GroupError::Full(_))));
    // Removed with its members dead, a group leaves all its room.
    one.groups.died(&threads, End::Unknown).unwrap();
    one.groups.died(&[thread(9000, 1)], End::Unknown).unwrap();
    one.groups.remove("g", &peer(1)).unwrap();
    create(&mut one, "h");
    one.groups.join("h", None, &threads, &peer(1)).unwrap();
    for index in 1..MAX_GROUPS_LEFT {
        create(&mut one, &format!("n{index}"));
    }
    let more = one
        .groups
        .create("more", &Admission::default(), None, &peer(1));
    assert_eq!(more.unwrap_err().code(), RefusalCode::NoSpace);
}

const MAX_GROUPS_LEFT: usize = lupin_abi::groups::MAX_GROUPS;

#[test]
fn users_have_quotas() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    let user = Peer { uid: 5, ..peer(1) };
    let mut create = |name: String| one.groups.create(&name, &Admission::default(), None, &user);
    for index in 0..GROUPS_PER_USER {
        create(format!("g{index}")).unwrap();
    }
    let over = create("over".into()).unwrap_err();
    assert_eq!(over.code(), RefusalCode::Limit);
    let threads: Vec<Thread> = (1..=4097).map(|id| thread(id, 1)).collect();
    let over = one.groups.join("g0", None, &threads, &user).unwrap_err();
    assert_eq!(over.code(), RefusalCode::Limit);
    assert_eq!(one.groups.section().head(), 0, "all or none");
    one.groups.join("g0", None, &threads[1..], &user).unwrap();
}

#[test]
fn a_group_is_removed_by_its_creator_when_nobody_is_left() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    let user = |uid| Peer { uid, ..peer(1) };
    let id = one
        .groups
        .create("g", &Admission::default(), None, &user(5))
        .unwrap();
    let thread = one.register(1);
    one.groups.join("g", None, &[thread], &user(5)).unwrap();
    let code = |result: Result<(), GroupError>| result.unwrap_err().code();
    assert_eq!(
        code(one.groups.remove("g", &user(6))),
        RefusalCode::Permission
    );
    assert_eq!(code(one.groups.remove("g", &user(5))), RefusalCode::Busy);
    let mut watch = one.groups.watch(id, 1).unwrap();
    one.groups.leave(None, &[thread]).unwrap();
    one.groups.remove("g", &user(5)).unwrap();
    assert_eq!(
        code(one.groups.remove("g", &user(5))),
        RefusalCode::NotFound
    );
    // What was told is still heard, and then the end.
    let Watched::Notices(notices) = one.groups.read(&mut watch, 100, 100) else {
        panic!();
    };
    assert_eq!(notices.len(), 2);
    assert_eq!(one.groups.read(&mut watch, 100, 100), Watched::Ended);
    assert!(one.groups.members(id, 0).is_err());
    assert!(one.groups.watch(id, 1).is_err());
}

#[test]
fn a_reader_loses_nothing_but_what_the_ring_lost_of_its_group() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    let (noisy, quiet) = (create(&mut one, "noisy"), create(&mut one, "quiet"));
    let (a, b) = (one.register(1), one.register(2));
    let mut slow = one.groups.watch(noisy, 1).unwrap();
    let mut calm = one.groups.watch(quiet, 1).unwrap();
    for _ in 0..lupin_abi::groups::NOTICE_SLOTS {
        one.join("noisy", a);
        one.groups.leave(None, &[a]).unwrap();
    }
    one.join("quiet", b);
    // The ring went over it twice, and its group's first number is still to come.
    let looks = usize::MAX;
    let Watched::Notices(notices) = one.groups.read(&mut calm, looks, 10) else {
        panic!();
    };
    assert_eq!((notices.len(), notices[0].seq), (1, 1));
    let newest = one.groups.section().group(noisy).unwrap().seq();
    let overflow = one.groups.read(&mut slow, looks, 10);
    assert_eq!(overflow, Watched::Overflow(newest + 1));
    assert_eq!(one.groups.read(&mut slow, looks, 10), Watched::Nothing);
    one.join("noisy", a);
    let Watched::Notices(notices) = one.groups.read(&mut slow, looks, 10) else {
        panic!();
    };
    assert_eq!((notices.len(), notices[0].seq), (1, newest + 1));
    // A number that is not yet due is not waited for.
    let mut early = one.groups.watch(noisy, u64::MAX).unwrap();
    one.groups.leave(Some(noisy), &[a]).unwrap();
    let Watched::Notices(notices) = one.groups.read(&mut early, looks, 10) else {
        panic!();
    };
    assert_eq!(notices[0].seq, newest + 2);
}

#[test]
fn a_fenced_node_changes_nothing() {
    let pod = TestPod::new();
    let mut one = Agent::new(&pod, 1, 1);
    create(&mut one, "g");
    let thread = one.register(1);
    one.join("g", thread);
    pod.kill(1);
    let left = one.groups.leave(None, &[thread]);
    assert!(matches!(left, Err(GroupError::Fenced)));
    one.groups.bury_nodes();
    assert_eq!(one.groups.section().head(), 1);
}

#[test]
fn a_node_that_drains_admits_nobody_and_says_who_is_left() {
    let pod = TestPod::new();
    pod.live(1, 1);
    let mut agent = Agent::new(&pod, 1, 1);
    create(&mut agent, "g");
    let (one, two) = (agent.register(1), agent.register(2));
    agent.join("g", one);
    let section = |agent: &Agent, since| agent.groups.memory.node().members_left(since);
    agent.groups.report_drain();
    assert_eq!(section(&agent, 7), None, "it does not drain");
    let entry = pod.fabric().entry(lupin_abi::NodeId::new(1).unwrap());
    entry.set_state(lupin_abi::fabric::NodeState::Draining, 7);
    let refused = agent.groups.join("g", None, &[two], &peer(2)).unwrap_err();
    assert!(matches!(refused, GroupError::Draining), "{refused}");
    assert_eq!(refused.code(), RefusalCode::Busy);
    agent.groups.report_drain();
    assert_eq!(section(&agent, 7), Some(1));
    agent.groups.leave(None, &[one]).unwrap();
    agent.groups.report_drain();
    assert_eq!(section(&agent, 7), Some(0));
    // Called off, and asked for again: the report of before is worth nothing.
    entry.set_state(lupin_abi::fabric::NodeState::Joined, 8);
    agent.join("g", two);
    entry.set_state(lupin_abi::fabric::NodeState::Draining, 9);
    assert_eq!(section(&agent, 9), None);
    agent.groups.report_drain();
    assert_eq!(section(&agent, 9), Some(1));
    audit(&agent.groups);
}
