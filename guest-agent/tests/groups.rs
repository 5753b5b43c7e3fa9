//! Groups as programs use them: the library, two agents as programs of their own, and deaths.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lupin::client::{End, What};
use lupin::{Admission, GroupEvent, Membership, Patience, Pod, Secret};
use lupin_abi::NodeId;
use lupin_abi::fabric::{FabricSection, NodeState};
use lupin_abi::layout::{MIN_SYSTEM_SIZE, PodHeader, SectionKind};
use lupin_abi::node::{AgentState, NodeSection};
use lupin_guest_agent::memory::mapping::Mapping;
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};

const AGENT: &str = env!("CARGO_BIN_EXE_lupin-guest-agent");
const NODES: u32 = 2;

/// Pod memory as the manager has it, and the agents' folder.
struct Host {
    header: PodHeader,
    file: File,
    memory: Mapping,
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let header = PodHeader::new(0xabcd, "groups", NODES, MIN_SYSTEM_SIZE, 16 << 20).unwrap();
        let file = File::from(memfd_create("pod", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(header.total_size()).unwrap();
        let nodes = (1..=NODES).map(|id| {
            let range = header.node(NodeId::new(id).unwrap()).unwrap();
            (SectionKind::Node, id, range)
        });
        for (kind, id, range) in nodes.chain([
            (SectionKind::Instances, 0, header.instances()),
            (SectionKind::System, 0, header.kernel()),
        ]) {
            let bytes = header.encode_section(kind, id, range.size);
            file.write_all_at(&bytes, range.offset).unwrap();
        }
        file.write_all_at(&header.encode(), 0).unwrap();
        let memory = Mapping::new(&file, 0, header.total_size(), true).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self {
            header,
            file,
            memory,
            folder,
        }
    }

    fn socket(&self, node: u32) -> PathBuf {
        self.folder.path().join(format!("agent{node}.sock"))
    }

    fn live(&self, node: u32, generation: u32) {
        // SAFETY: the mapping begins with the fabric section and lives as long as `self`.
        let fabric = unsafe { FabricSection::from_ptr(self.memory.base()) };
        let entry = fabric.entry(NodeId::new(node).unwrap());
        entry.set_generation(generation);
        entry.set_state(NodeState::Joined, 0);
    }

    fn node(&self, node: u32) -> &NodeSection {
        let range = self.header.node(NodeId::new(node).unwrap()).unwrap();
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { NodeSection::from_ptr(self.memory.base().add(range.offset as usize)) }
    }

    /// Starts an agent and waits until it has joined.
    fn agent(&self, node: u32, generation: u32) -> Agent {
        let (doorbell, folder) = (EventFd::new().unwrap(), tempfile::tempdir().unwrap());
        let listener = UnixListener::bind(folder.path().join("manager.sock")).unwrap();
        let passed: [RawFd; 3] = [
            self.file.as_raw_fd(),
            listener.as_raw_fd(),
            doorbell.as_fd().as_raw_fd(),
        ];
        let mut command = Command::new(AGENT);
        command
            .args(["--namespace", "--pod-memory-fd=40", "--heartbeat-ms=8"])
            .args(["--agent-listener-fd=41", "--doorbell-fd=42"])
            .arg(format!("--node={node}"))
            .arg(format!("--generation={generation}"))
            .arg("--socket")
            .arg(self.socket(node))
            .stdin(Stdio::null());
        let dup = move || {
            for (fd, target) in passed.iter().zip(40..) {
                // SAFETY: system calls on descriptors of the child alone, after the fork.
                if unsafe { libc::dup2(*fd, target) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(dup) };
        let agent = Agent(command.spawn().unwrap());
        let start = Instant::now();
        while self.node(node).agent() != (AgentState::Joined, generation)
            || self.node(node).agent_process().0 != agent.0.id()
        {
            assert!(start.elapsed() < Duration::from_secs(60), "no agent");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }
}

/// Killed when dropped.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

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
    let host = Host::new();
    host.live(1, 1);
    host.live(2, 1);
    let (_one, two) = (host.agent(1, 1), host.agent(2, 1));
    let (a, b) = (attach(&host.socket(1)), attach(&host.socket(2)));
    let admission = Admission {
        secret: Some(secret()),
        ..Admission::default()
    };
    a.create_group("g", admission).unwrap();
    let threads = [a.register_thread(Some(1)), b.register_thread(Some(2))].map(Result::unwrap);
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
