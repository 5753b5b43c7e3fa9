//! Groups as programs use them: the library, two agents as programs of their own, and deaths.

#[path = "support/host.rs"]
mod host;
mod support;

use std::path::Path;
use std::time::Duration;

use host::Host;
use lupin::client::{End, Expulsion, Leftover, Lifetime, RefusalCode, What};
use lupin::shm::Access;
use lupin::{Admission, GroupEvent, Membership, Patience, Pod, Secret, Thread};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};

fn attach(socket: &Path) -> Pod {
    let patience = Patience {
        connect: Duration::from_secs(60),
        ..Patience::default()
    };
    Pod::attach_at(socket, patience).unwrap()
}

fn secret() -> Secret {
    Secret::new(*b"sixteen bytes or more")
}

/// A process that is a member until it is killed.
fn member(socket: &Path, thread: u32) -> Pid {
    // SAFETY: the child makes system calls and small allocations (the C library's allocator is
    // usable after a fork), and never returns.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let _ = std::panic::catch_unwind(|| {
                let pod = attach(socket);
                let thread = pod.register_thread(Some(thread)).unwrap();
                let _member = pod.join_group("g", Some(&secret()), &[&thread]).unwrap();
                loop {
                    pause();
                }
            });
            loop {
                pause();
            }
        }
    }
}

/// Two nodes with their agents, a process of each, and its thread; the first has made group `g`.
struct Two {
    host: Host,
    agents: [support::Agent; 2],
    pods: [Pod; 2],
    threads: [Thread; 2],
}

impl Two {
    fn new() -> Self {
        let host = Host::new();
        let nodes = [1, 2];
        for node in nodes {
            host.live(node, 1);
        }
        let agents = nodes.map(|node| host.agent(node, 1));
        let pods = nodes.map(|node| attach(&host.socket(node)));
        let admission = Admission {
            secret: Some(secret()),
            ..Admission::default()
        };
        pods[0].create_group("g", admission).unwrap();
        let threads = [0, 1].map(|at| pods[at].register_thread(Some(nodes[at])).unwrap());
        Self {
            host,
            agents,
            pods,
            threads,
        }
    }
}

#[test]
fn who_is_expelled_is_told_like_everybody_and_may_no_more() {
    let Two {
        host: _host,
        agents: [_one, _two],
        pods: [a, b],
        threads,
    } = Two::new();
    let mut first = a.join_group("g", Some(&secret()), &[&threads[0]]).unwrap();
    let mut second = b.join_group("g", Some(&secret()), &[&threads[1]]).unwrap();
    let segment = second.segments().create("s", 1, Lifetime::Kept).unwrap();
    let thread = threads[1].instance();
    let expulsion = a.expel_member("g", thread).unwrap();
    // Of a namespace node, which says so.
    let expected = Expulsion {
        members: 1,
        memory: Leftover::Mappings,
    };
    assert_eq!(expulsion, expected);
    let (mut seq, mut seq2) = (0, 1);
    assert_eq!(id_of(next(&mut first, &mut seq)), (1, 1));
    for (membership, seq) in [(&mut first, &mut seq), (&mut second, &mut seq2)] {
        if *seq == 1 {
            assert_eq!(id_of(next(membership, seq)), (2, 2));
        }
        let what = next(membership, seq);
        assert!(
            matches!(what, What::Expelled { member, by: 0 } if member.thread == thread),
            "{what:?}"
        );
    }
    assert!(second.notifications().next().is_none(), "it is over");
    let refused = second.segments().open("s", Access::ReadOnly).unwrap_err();
    assert_eq!(refused.refusal(), Some(RefusalCode::Permission));
    assert!(second.members().is_err());
    let again = a.expel_process("g", thread).unwrap_err();
    assert_eq!(again.refusal(), Some(RefusalCode::NotFound));
    let itself = a.expel_member("g", threads[0].instance()).unwrap_err();
    assert_eq!(itself.refusal(), Some(RefusalCode::Invalid));
    // As was said: what it has mapped here, it keeps.
    segment.copy_in(0, &[1]).unwrap();
    // The thread lives, and the group's rule decides whether it is a member again.
    let third = b.join_group("g", Some(&secret()), &[&threads[1]]).unwrap();
    assert_eq!(third.members().unwrap().len(), 2);
    let another = Secret::new(*b"another sixteen bytes");
    let admission = Admission {
        secret: Some(another.clone()),
        ..Admission::default()
    };
    a.set_admission("g", admission).unwrap();
    assert_eq!(third.members().unwrap().len(), 2, "who is in stays in");
    a.expel_process("g", thread).unwrap();
    let denied = b
        .join_group("g", Some(&secret()), &[&threads[1]])
        .unwrap_err();
    assert_eq!(denied.refusal(), Some(RefusalCode::Permission));
    b.join_group("g", Some(&another), &[&threads[1]]).unwrap();
}

/// The next notification, which must have the next number.
fn next(membership: &mut Membership, seq: &mut u64) -> What {
    let limit = Duration::from_secs(60);
    match membership.notifications().next_within(limit).unwrap() {
        Some(GroupEvent::Notice(notice)) => {
            *seq += 1;
            assert_eq!(notice.seq, *seq, "{notice:?}");
            notice.what
        }
        other => panic!("after {seq}: {other:?}"),
    }
}

fn id_of(what: What) -> (u32, u32) {
    match what {
        What::Joined { member } | What::Rejoined { member, .. } | What::Died { member, .. } => {
            (member.thread.id(), member.node.id())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn members_hear_of_deaths_of_processes_agents_and_nodes() {
    let Two {
        host,
        agents: [_one, two],
        pods: [a, b],
        threads,
    } = Two::new();
    assert!(a.join_group("g", None, &[&threads[0]]).is_err());
    assert!(a.join_group("g", Some(&secret()), &[&threads[1]]).is_err());
    let mut first = a.join_group("g", Some(&secret()), &[&threads[0]]).unwrap();
    let mut second = b.join_group("g", Some(&secret()), &[&threads[1]]).unwrap();
    let child = member(&host.socket(2), 3);
    let (mut seq, mut seq2) = (0, 1);
    for id in [(1, 1), (2, 2), (3, 2)] {
        assert_eq!(id_of(next(&mut first, &mut seq)), id);
    }
    for id in [(2, 2), (3, 2)] {
        assert_eq!(id_of(next(&mut second, &mut seq2)), id);
    }

    // A process dies. Not reaped before it was told, so that the agent can see how.
    kill(child, Signal::SIGKILL).unwrap();
    for (membership, seq) in [(&mut first, &mut seq), (&mut second, &mut seq2)] {
        let what = next(membership, seq);
        assert_eq!(id_of(what), (3, 2));
        assert!(
            matches!(
                what,
                What::Died {
                    end: End::Killed(9),
                    ..
                }
            ),
            "{what:?}"
        );
    }
    waitpid(child, None).unwrap();

    // An agent dies: nobody else does, and no stream is broken.
    drop(two);
    let late = a.register_thread(Some(4)).unwrap();
    let fourth = a.join_group("g", Some(&secret()), &[&late]).unwrap();
    let two = host.agent(2, 1);
    for (membership, seq) in [(&mut first, &mut seq), (&mut second, &mut seq2)] {
        assert_eq!(id_of(next(membership, seq)), (4, 1));
    }
    let living = |membership: &Membership| {
        let members = membership.members().unwrap();
        members.iter().filter(|member| member.end.is_none()).count()
    };
    assert_eq!((living(&first), living(&second)), (3, 3));
    fourth.leave().unwrap();
    for (membership, seq) in [(&mut first, &mut seq), (&mut second, &mut seq2)] {
        assert!(matches!(next(membership, seq), What::Left { .. }));
    }

    // A node dies, as far as the manager says, and comes back.
    drop(two);
    host.live(2, 2);
    let what = next(&mut first, &mut seq);
    assert!(
        matches!(what, What::NodeFailed { node } if node.id() == 2),
        "{what:?}"
    );
    let what = next(&mut first, &mut seq);
    assert_eq!(id_of(what), (2, 2));
    assert!(
        matches!(what, What::Died { end: End::Node, .. }),
        "{what:?}"
    );
    let _two = host.agent(2, 2);
    let what = next(&mut first, &mut seq);
    assert!(
        matches!(what, What::NodeBack { node } if node.generation() == 2),
        "{what:?}"
    );
    assert!(second.members().is_err(), "of a life that is over");
    let again = attach(&host.socket(2));
    let thread = again.register_thread(Some(2)).unwrap();
    let third = again.join_group("g", Some(&secret()), &[&thread]).unwrap();
    let what = next(&mut first, &mut seq);
    assert!(
        matches!(what, What::Rejoined { previous: 1, .. }),
        "{what:?}"
    );
    assert_eq!(living(&third), 2);
    // The first stream ends with its membership.
    drop(threads);
    let mut rest = first.notifications().map(Result::unwrap);
    assert!(
        matches!(rest.next(), Some(GroupEvent::Notice(notice)) if matches!(notice.what, What::Left { .. }))
    );
    assert!(rest.next().is_none());
}
