//! Restarting what died: the program `lupin-supervise`, and teams of threads with the library.

#[path = "support/host.rs"]
mod host;
mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use host::Host;
use lupin::liveness::Liveness;
use lupin::supervise::{Policy, SuperviseError, Team};
use lupin::{Patience, Pod, ThreadId};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

const SUPERVISE: &str = env!("CARGO_BIN_EXE_lupin-supervise");
const LIMIT: Duration = Duration::from_secs(60);

fn supervise(options: &[&str], script: &str) -> Command {
    let mut command = Command::new(SUPERVISE);
    command.args(["--pause-ms=1", "--longest-pause-ms=20"]);
    command
        .args(options)
        .args(["--", "/bin/sh", "-c", script])
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn code(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), text)
}

#[test]
fn a_program_is_restarted_with_its_ids_until_it_succeeds_or_failed_too_often() {
    let script = "echo $LUPIN_LIFE:$LUPIN_THREAD_IDS; [ $LUPIN_LIFE = 3 ] || kill -9 $$";
    let (status, text) = code(&mut supervise(&["--threads=7,9-10"], script));
    assert_eq!(
        (status, &*text),
        (Some(0), "1:7,9,10\n2:7,9,10\n3:7,9,10\n")
    );
    let (status, text) = code(&mut supervise(&["--limit=2"], "echo life; exit 3"));
    assert_eq!((status, &*text), (Some(124), "life\nlife\nlife\n"));
    let (status, text) = code(&mut supervise(&["--restart=never"], "echo life; exit 3"));
    assert_eq!((status, &*text), (Some(3), "life\n"));
    let script = "kill -9 $$";
    assert_eq!(
        code(&mut supervise(&["--restart=never"], script)).0,
        Some(137)
    );
    let script = "exit 0";
    let limits = ["--restart=always", "--limit=2"];
    assert_eq!(code(&mut supervise(&limits, script)).0, Some(124));
}

#[test]
fn what_cannot_be_run_is_told_apart() {
    let with = |arguments: &[&str]| {
        let mut command = Command::new(SUPERVISE);
        command.args(arguments).stderr(Stdio::null());
        code(&mut command)
    };
    assert_eq!(with(&["/no/such/program"]).0, Some(127));
    assert_eq!(with(&["/etc/passwd"]).0, Some(126));
    assert_eq!(with(&[]).0, Some(125));
    assert_eq!(with(&["--threads=0", "true"]).0, Some(125));
    assert_eq!(with(&["--pause-ms=20000", "true"]).0, Some(125));
    let (status, help) = with(&["--help"]);
    assert_eq!(status, Some(0));
    assert!(
        help.contains("LUPIN_THREAD_IDS") && help.contains("124"),
        "{help}"
    );
}

/// Killed if a test ends early.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> (Self, impl FnMut() -> String) {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let next = move || lines.next().map_or_else(String::new, Result::unwrap);
        (Self(child), next)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < LIMIT, "the supervisor stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn signals_are_passed_on_and_a_stop_is_clean() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let notify = UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(LIMIT)).unwrap();
    let said = || {
        let mut buffer = [0; 512];
        let len = notify.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    };
    let script = "trap 'echo hup' HUP; trap 'echo term; exit 0' TERM; echo ready; \
                  while :; do sleep 0.02; done";
    let mut command = supervise(&[], script);
    command.env("NOTIFY_SOCKET", &path);
    let (mut running, mut line) = Running::start(command);
    assert!(said().starts_with("READY=1\n"));
    assert_eq!(line(), "ready");
    running.signal(Signal::SIGHUP);
    assert_eq!(line(), "hup");
    running.signal(Signal::SIGTERM);
    assert_eq!(line(), "term");
    assert_eq!(said(), "STOPPING=1");
    assert_eq!(running.code(), Some(0));

    // One that does not obey.
    let script = "trap '' TERM; echo ready; while :; do sleep 0.02; done";
    let (mut running, mut line) = Running::start(supervise(&["--grace-ms=50"], script));
    assert_eq!(line(), "ready");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.code(), Some(137));

    // A supervisor that is killed takes its program along: the pipe's last writer goes.
    let script = "echo ready; exec sleep 1000";
    let (running, mut line) = Running::start(supervise(&[], script));
    assert_eq!(line(), "ready");
    running.signal(Signal::SIGKILL);
    assert_eq!(line(), "");
}

fn attach(socket: &Path) -> Pod {
    let patience = Patience {
        connect: LIMIT,
        ..Patience::default()
    };
    Pod::attach_at(socket, patience).unwrap()
}

fn quick() -> Policy {
    Policy {
        first: Duration::from_millis(1),
        longest: Duration::from_millis(20),
        ..Policy::default()
    }
}

#[test]
fn workers_that_panic_or_fail_live_again_with_their_ids() {
    let host = support::Pod::new();
    let _agent = host.start(&[], &[]);
    let pod = attach(&host.socket());
    let (failed, arrived) = (AtomicU32::new(0), AtomicU32::new(0));
    let team = Team::new(&pod, "team", 2001..=2004).policy(quick());
    let begun = team
        .run(|thread| {
            let instance = thread.instance();
            assert!(thread.pod().threads_alive().is_alive(instance));
            // In its first two lives one of them panics, and one fails.
            let first = instance.generation() < 3;
            match instance.id() {
                2002 if first => panic!("this panic belongs to the test"),
                2003 if first => {
                    failed.fetch_add(1, Ordering::Relaxed);
                    return Err("this failure belongs to the test");
                }
                _ => {}
            }
            arrived.fetch_add(1, Ordering::Relaxed);
            // The work is done when all are there.
            while arrived.load(Ordering::Relaxed) < 4 {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })
        .unwrap();
    assert!(failed.load(Ordering::Relaxed) >= 1);
    for id in 2001..=2004 {
        let lives = begun.iter().filter(|begun| begun.thread.id() == id);
        let generations: Vec<_> = lives.map(|begun| begun.thread.generation()).collect();
        assert!(generations.is_sorted(), "{begun:?}");
        let fails = matches!(id, 2002 | 2003);
        assert_eq!(generations.len() > 1, fails, "{begun:?}");
    }
}

#[test]
fn a_worker_that_always_fails_is_given_up() {
    let host = support::Pod::new();
    let _agent = host.start(&[], &[]);
    let pod = attach(&host.socket());
    let policy = Policy {
        limit: Some(2),
        ..quick()
    };
    let team = Team::new(&pod, "team", 5..=5).policy(policy);
    match team.run(|_| Err("no work today")) {
        Err(SuperviseError::GaveUp {
            id: 5,
            failures: 3,
            last,
        }) => {
            assert_eq!(last, "no work today");
        }
        other => panic!("{other:?}"),
    }
    let none = Team::new(&pod, "team", 0..=5);
    assert!(matches!(
        none.run(|_| Ok::<_, &str>(())),
        Err(SuperviseError::Ids { .. })
    ));
}

const IDS: std::ops::RangeInclusive<u32> = 2001..=2009;

/// A node's part of a team, in a process of its own: its workers go on until there is a file.
fn part(socket: &Path, done: &Path) -> Pid {
    // SAFETY: the child makes system calls, threads and allocations (the C library's allocator is
    // usable after a fork), and leaves without destructors.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let ended = std::panic::catch_unwind(|| {
                let pod = attach(socket);
                let team = Team::new(&pod, "spread", IDS).policy(quick());
                let team = team.gather(3, Duration::from_secs(20));
                team.run(|_| {
                    while !done.exists() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Ok::<_, &str>(())
                })
                .unwrap();
            });
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
    }
}

/// Where each living id is, and in which life.
fn places(pod: &Pod) -> BTreeMap<u32, (u32, u32)> {
    let judge = pod.nodes_alive();
    IDS.filter_map(|id| {
        let entry = pod.instances().thread(ThreadId::new(id)?);
        let (generation, node) = (entry.generation(), entry.node());
        judge
            .is_alive(node)
            .then_some((id, (node.id(), generation)))
    })
    .collect()
}

/// Waits until every id is on one of these nodes.
fn settled(pod: &Pod, nodes: &[u32]) -> BTreeMap<u32, (u32, u32)> {
    let start = Instant::now();
    loop {
        let places = places(pod);
        let is_there = |(node, _): &(u32, u32)| nodes.contains(node);
        if places.len() == IDS.count() && places.values().all(is_there) {
            return places;
        }
        assert!(start.elapsed() < LIMIT, "not on {nodes:?}: {places:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn ids_of_dead_programs_and_nodes_move_to_the_living_and_the_others_stay() {
    let host = Host::new();
    for node in 1..=3 {
        host.live(node, 1);
    }
    let mut agents: Vec<_> = (1..=3).map(|node| host.agent(node, 1)).collect();
    let done = host.folder.path().join("done");
    let mut parts: Vec<Pid> = (1..=3)
        .map(|node| part(&host.socket(node), &done))
        .collect();
    let pod = attach(&host.socket(3));
    let first = settled(&pod, &[1, 2, 3]);
    for node in 1..=3 {
        assert!(first.values().any(|(on, _)| *on == node), "{first:?}");
    }

    // The program of node 1 dies; its node and agent live.
    kill(parts[0], Signal::SIGKILL).unwrap();
    waitpid(parts[0], None).unwrap();
    let second = settled(&pod, &[2, 3]);
    for (id, place) in &first {
        assert_eq!(
            place.0 == 1,
            second[id] != *place,
            "{id}: {first:?} {second:?}"
        );
    }

    // It is back; then node 2 dies with all that was on it.
    parts[0] = part(&host.socket(1), &done);
    let start = Instant::now();
    let is_back = || {
        let groups = pod.groups().unwrap();
        let group = groups.iter().find(|group| group.name == "spread");
        group.is_some_and(|group| group.members as usize == 3 + IDS.count())
    };
    while !is_back() {
        assert!(start.elapsed() < LIMIT, "the program of node 1 is not back");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(parts[1], Signal::SIGKILL).unwrap();
    drop(agents.remove(1));
    waitpid(parts[1], None).unwrap();
    host.live(2, 2);
    let third = settled(&pod, &[1, 3]);
    for (id, place) in &second {
        assert_eq!(
            place.0 == 2,
            third[id] != *place,
            "{id}: {second:?} {third:?}"
        );
    }

    std::fs::write(&done, "").unwrap();
    for part in [parts[0], parts[2]] {
        let status = waitpid(part, None).unwrap();
        assert_eq!(status, nix::sys::wait::WaitStatus::Exited(part, 0));
    }
}
