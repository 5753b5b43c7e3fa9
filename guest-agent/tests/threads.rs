//! Deaths of single threads, whose processes live on: an agent, the library, and every way in
//! which a thread ends.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lupin::client::{End, What};
use lupin::liveness::Liveness;
use lupin::{Admission, ClientError, GroupEvent, InstanceId, Membership, OwnThread, Patience, Pod};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};

const LIMIT: Duration = Duration::from_secs(60);

fn attach(socket: &Path) -> Pod {
    let patience = Patience {
        connect: LIMIT,
        ..Patience::default()
    };
    Pod::attach_at(socket, patience).unwrap()
}

/// A member that listens.
struct Listener {
    pod: Pod,
    membership: Membership,
    seq: u64,
}

impl Listener {
    fn new(socket: &Path) -> Self {
        let pod = attach(socket);
        pod.create_group("g", Admission::default()).unwrap();
        let thread = pod.register_thread(Some(1)).unwrap();
        let membership = pod.join_group("g", None, &[&thread]).unwrap();
        // Lives as long as this process.
        std::mem::forget(thread);
        let mut listener = Self {
            pod,
            membership,
            seq: 0,
        };
        assert!(matches!(listener.next(), What::Joined { .. }));
        listener
    }

    /// The next notification, which must have the next number.
    fn next(&mut self) -> What {
        match self.membership.notifications().next_within(LIMIT).unwrap() {
            Some(GroupEvent::Notice(notice)) => {
                self.seq += 1;
                assert_eq!(notice.seq, self.seq, "{notice:?}");
                notice.what
            }
            other => panic!("after {}: {other:?}", self.seq),
        }
    }

    /// A member comes, for the first time or again.
    fn comes(&mut self, id: u32) -> InstanceId {
        match self.next() {
            What::Joined { member } => {
                assert_eq!(member.thread.id(), id);
                member.thread
            }
            What::Rejoined { member, previous } => {
                assert_eq!(member.thread.id(), id);
                assert!(member.thread.generation() > previous);
                member.thread
            }
            other => panic!("{other:?}"),
        }
    }

    /// Members die, in any order; their lives are over when that is told.
    fn die(&mut self, mut expected: Vec<InstanceId>, how: End) {
        while !expected.is_empty() {
            match self.next() {
                What::Died { member, end } => {
                    assert_eq!(end, how, "{member:?}");
                    let before = expected.len();
                    expected.retain(|instance| *instance != member.thread);
                    assert_eq!(expected.len(), before - 1, "{member:?} was not expected");
                    assert!(!self.pod.threads_alive().is_alive(member.thread));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Registers the calling thread, whose id may have a former life that is not yet known to be over.
fn register(pod: &Pod, id: u32) -> OwnThread {
    let start = Instant::now();
    loop {
        match pod.register_own_thread(Some(id)) {
            Ok(thread) => return thread,
            Err(ClientError::Refused {
                code: lupin::client::RefusalCode::IdTaken,
                ..
            }) => {
                assert!(start.elapsed() < LIMIT, "the former life does not end");
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Makes the calling thread a member that does not leave in an orderly way.
fn join(pod: &Pod, id: u32) -> OwnThread {
    let thread = register(pod, id);
    std::mem::forget(pod.join_group("g", None, &[&thread]).unwrap());
    thread
}

/// A process of its own, killed when dropped.
struct Process(Pid);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// A process of its own that acts, and then waits to be killed.
fn process(act: impl FnOnce()) -> Process {
    // SAFETY: the child makes system calls and small allocations (the C library's allocator is
    // usable after a fork), and never returns.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Process(child),
        ForkResult::Child => {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            loop {
                pause();
            }
        }
    }
}

fn exit_this_thread() -> ! {
    // SAFETY: ends this thread alone; nobody joins it or needs what is on its stack.
    unsafe { libc::syscall(libc::SYS_exit, 3) };
    unreachable!("the thread is over")
}

#[test]
fn threads_that_end_while_their_process_lives_die() {
    let pod = support::Pod::new();
    let _agent = pod.start(&[], &[]);
    let mut listener = Listener::new(&pod.socket());
    let mut former = None;
    let ways: [fn(OwnThread); 4] = [
        // Returns.
        std::mem::forget,
        // Panics.
        |_thread| panic!("this panic belongs to the test"),
        // Panics, and so does not leave.
        |thread| {
            let _member = thread.pod().join_group("g", None, &[&thread]).unwrap();
            panic!("this panic belongs to the test");
        },
        // Ends itself without anybody's knowledge.
        |_thread| exit_this_thread(),
    ];
    for way in ways {
        let attached = listener.pod.clone();
        let handle = std::thread::spawn(move || way(join(&attached, 5)));
        let life = listener.comes(5);
        assert_ne!(former.replace(life), Some(life));
        listener.die(vec![life], End::Thread);
        drop(handle);
    }
    // Dropped in an orderly way it leaves, and takes nobody's id along.
    let attached = listener.pod.clone();
    std::thread::spawn(move || drop(join(&attached, 5)))
        .join()
        .unwrap();
    listener.comes(5);
    assert!(matches!(listener.next(), What::Left { .. }));
    // A panic that is caught ends nothing.
    let attached = listener.pod.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        let thread = join(&attached, 5);
        let caught = std::panic::catch_unwind(|| panic!("this panic belongs to the test"));
        tell.send(caught.is_err()).unwrap();
        let _ = wait.recv();
        drop(thread);
    });
    let life = listener.comes(5);
    assert!(told.recv_timeout(LIMIT).unwrap());
    assert!(listener.pod.threads_alive().is_alive(life));
    drop(go);
    worker.join().unwrap();
    assert!(matches!(listener.next(), What::Left { .. }));
}

#[test]
fn the_first_threads_end_is_its_own_and_a_process_that_is_killed_dies_as_a_whole() {
    let pod = support::Pod::new();
    let _agent = pod.start(&[], &[]);
    let socket = pod.socket();
    let mut listener = Listener::new(&socket);
    let child = process(|| {
        let pod = attach(&socket);
        let _first = join(&pod, 5);
        let other = std::thread::spawn(move || {
            let _other = join(&pod, 6);
            loop {
                pause();
            }
        });
        drop(other);
        std::thread::sleep(Duration::from_millis(50));
        exit_this_thread();
    });
    // The two join in any order.
    let mut lives = Vec::new();
    while lives.len() < 2 {
        match listener.next() {
            What::Joined { member } => lives.push(member.thread),
            other => panic!("{other:?}"),
        }
    }
    let first: Vec<_> = lives.iter().copied().filter(|t| t.id() == 5).collect();
    let other: Vec<_> = lives.iter().copied().filter(|t| t.id() == 6).collect();
    listener.die(first, End::Thread);
    assert!(listener.pod.threads_alive().is_alive(other[0]));
    kill(child.0, Signal::SIGKILL).unwrap();
    // Not reaped before it was told, so that the agent can see how.
    listener.die(other, End::Killed(9));
}

#[test]
fn a_program_that_is_replaced_dies_with_all_its_threads_and_its_process_goes_on() {
    let pod = support::Pod::new();
    let _agent = pod.start(&[], &[]);
    let socket = pod.socket();
    let mut listener = Listener::new(&socket);
    for from_first in [false, true] {
        let child = process(|| {
            let pod = attach(&socket);
            std::mem::forget(join(&pod, 5));
            let unbound = pod.register_thread(Some(6)).unwrap();
            std::mem::forget(pod.join_group("g", None, &[&unbound]).unwrap());
            std::mem::forget(unbound);
            let replace = || {
                use std::os::unix::process::CommandExt;
                // Of no output: it must not keep the test's open.
                let mut sleep = Command::new("/bin/sleep");
                sleep.stdin(Stdio::null()).stdout(Stdio::null());
                let error = sleep.stderr(Stdio::null()).arg("1000").exec();
                panic!("{error}");
            };
            if from_first {
                replace();
            }
            std::thread::spawn(move || {
                let _third = join(&pod, 7);
                replace();
            });
        });
        let mut lives = vec![listener.comes(5), listener.comes(6)];
        if !from_first {
            lives.push(listener.comes(7));
        }
        listener.die(lives, End::Thread);
        assert!(kill(child.0, None).is_ok(), "the process goes on");
    }
}
