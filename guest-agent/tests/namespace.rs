//! The agent as its users start it: the program, flags, descriptors, a pod in a memory file.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lupin_abi::event::{Cause, EVIDENCE_WORDS, Event, EventKind};
use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::{MIN_SYSTEM_SIZE, PodHeader, SectionKind};
use lupin_abi::node::{AgentState, NodeSection};
use lupin_abi::port::{Decoder, ExecStatus, ToAgent, ToManager};
use lupin_abi::socket::{Reply, Request};
use lupin_abi::{ABI_VERSION, NodeId};
use lupin_guest_agent::memory::mapping::Mapping;
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    socket,
};

const AGENT: &str = env!("CARGO_BIN_EXE_lupin-guest-agent");

struct Pod {
    header: PodHeader,
    file: File,
    memory: Mapping,
    folder: tempfile::TempDir,
}

impl Pod {
    fn new() -> Self {
        let header = PodHeader::new(0xabcd, "end-to-end", 2, MIN_SYSTEM_SIZE, 16 << 20).unwrap();
        let file = File::from(memfd_create("pod", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(header.total_size()).unwrap();
        let node = header.node(NodeId::new(1).unwrap()).unwrap();
        for (kind, id, range) in [
            (SectionKind::Node, 1, node),
            (SectionKind::Instances, 0, header.instances()),
            (SectionKind::System, 0, header.kernel()),
        ] {
            let bytes = header.encode_section(kind, id, range.size);
            file.write_all_at(&bytes, range.offset).unwrap();
        }
        file.write_all_at(&header.encode(), 0).unwrap();
        let memory = Mapping::new(&file, 0, header.total_size(), true).unwrap();
        let pod = Self {
            header,
            file,
            memory,
            folder: tempfile::tempdir().unwrap(),
        };
        pod.fabric()
            .entry(NodeId::new(1).unwrap())
            .set_generation(1);
        pod
    }

    fn fabric(&self) -> &FabricSection {
        // SAFETY: the mapping begins with the fabric section and lives as long as `self`.
        unsafe { FabricSection::from_ptr(self.memory.base()) }
    }

    fn node(&self) -> &NodeSection {
        let range = self.header.node(NodeId::new(1).unwrap()).unwrap();
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { NodeSection::from_ptr(self.memory.base().add(range.offset as usize)) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/agent.sock")
    }

    fn happen(&self) -> u64 {
        self.fabric().append(&Event {
            seq: 0,
            time_ns: 0,
            epoch: 1,
            kind: EventKind::Rung,
            node: 0,
            old_generation: 0,
            generation: 0,
            cause: Cause::None,
            evidence: [0; EVIDENCE_WORDS],
        })
    }

    fn start(&self, wrapper: &[&str], arguments: &[&str]) -> Agent {
        let listener = UnixListener::bind(self.folder.path().join("manager.sock")).unwrap();
        let doorbell = EventFd::new().unwrap();
        let passed: Vec<RawFd> = vec![
            self.file.as_raw_fd(),
            listener.as_raw_fd(),
            std::os::fd::AsFd::as_fd(&doorbell).as_raw_fd(),
        ];
        let words: Vec<&str> = wrapper.iter().copied().chain([AGENT]).collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(["--namespace", "--node=1", "--generation=1"])
            .args(["--pod-memory-fd=40", "--agent-listener-fd=41"])
            .args(["--doorbell-fd=42", "--heartbeat-ms=2"])
            .arg("--socket")
            .arg(self.socket())
            .args(arguments)
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
        Agent(command.spawn().unwrap())
    }

    fn joined(&self) {
        until("the agent joins", || {
            self.node().agent() == (AgentState::Joined, 1)
        });
    }

    fn manager(&self) -> Manager {
        let stream = UnixStream::connect(self.folder.path().join("manager.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Manager {
            stream,
            decoder: Decoder::new(),
        }
    }
}

/// Killed if a test ends early.
struct Agent(Child);

impl Agent {
    fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(20), "the agent stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Manager {
    stream: UnixStream,
    decoder: Decoder,
}

impl Manager {
    fn send(&mut self, message: &ToAgent) {
        let frame = lupin_abi::port::encode(message).unwrap();
        self.stream.write_all(&frame).unwrap();
    }

    /// Says Hello; returns the doorbell that comes with the answer.
    fn hello(&mut self) -> OwnedFd {
        let version = ABI_VERSION;
        self.send(&ToAgent::Hello {
            version,
            pod_id: 0xabcd,
        });
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 2]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let fd = self.stream.as_raw_fd();
        let flags = MsgFlags::empty();
        let message = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags).unwrap();
        let fds: Vec<RawFd> = message
            .cmsgs()
            .unwrap()
            .flat_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds,
                _ => Vec::new(),
            })
            .collect();
        let len = message.bytes;
        self.decoder.push(&buffer[..len]);
        match self.receive() {
            ToManager::Hello {
                node, generation, ..
            } => assert_eq!((node, generation), (1, 1)),
            other => panic!("{other:?}"),
        }
        assert_eq!(fds.len(), 1);
        // SAFETY: just received, known to nobody else.
        unsafe { OwnedFd::from_raw_fd(fds[0]) }
    }

    fn receive(&mut self) -> ToManager {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return message;
            }
            let count = self.stream.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the agent hung up");
            self.decoder.push(&buffer[..count]);
        }
    }

    fn run(&mut self, script: &str) -> (String, ExecStatus) {
        let channel = 1;
        self.send(&ToAgent::Exec {
            channel,
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: Vec::new(),
            cwd: None,
        });
        let mut text = String::new();
        loop {
            match self.receive() {
                ToManager::Output { data, .. } => text += std::str::from_utf8(&data).unwrap(),
                ToManager::Exited { status, .. } => return (text, status),
                _ => {}
            }
        }
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn client(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

fn ask(client: &OwnedFd, request: &Request) -> Reply {
    let packet = lupin_abi::socket::encode(request).unwrap();
    nix::unistd::write(client, &packet).unwrap();
    answer(client)
}

fn answer(client: &OwnedFd) -> Reply {
    let mut buffer = vec![0; 65536];
    let len = nix::unistd::read(client, &mut buffer).unwrap();
    lupin_abi::socket::decode(&buffer[..len]).unwrap()
}

#[test]
fn a_namespace_node_joins_beats_serves_is_rung_and_shuts_down() {
    let pod = Pod::new();
    let mut agent = pod.start(&[], &[]);
    pod.joined();
    assert_eq!(pod.node().agent_process().1, 1);
    assert_ne!(pod.node().boot_id(), 0);
    let before = pod.node().beats();
    until("the heart beats", || pod.node().beats() > before + 20);

    let subscriber = client(&pod.socket());
    let version = ABI_VERSION;
    assert!(matches!(
        ask(&subscriber, &Request::Hello { version }),
        Reply::Welcome {
            node: 1,
            generation: 1,
            ..
        }
    ));
    assert_eq!(
        ask(&subscriber, &Request::Subscribe { from: 0 }),
        Reply::Done
    );
    let mut manager = pod.manager();
    let doorbell = manager.hello();
    let seq = pod.happen();
    nix::unistd::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
    assert!(matches!(answer(&subscriber), Reply::Event(event) if event.seq == seq));
    // A ring that is lost costs time, not the event.
    let seq = pod.happen();
    assert!(matches!(answer(&subscriber), Reply::Event(event) if event.seq == seq));

    let (text, status) = manager.run("echo $LUPIN_AGENT_SOCKET; exit 3");
    assert_eq!(text.trim_end(), pod.socket().to_str().unwrap());
    assert_eq!(status, ExecStatus::Code(3));
    // A second manager takes over, and gets the doorbell as well.
    let mut manager = pod.manager();
    manager.hello();
    // Not PID 1 here: only the agent itself must end, and no stranger be signalled.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(agent.0.id().cast_signed()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(agent.code(), Some(0));
    assert!(!pod.socket().exists());
}

/// Whether this user may make PID namespaces; where not, there is nothing to test.
fn may_unshare() -> bool {
    let made = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "true"])
        .stderr(Stdio::null())
        .status();
    made.is_ok_and(|status| status.success())
}

#[test]
fn the_first_process_of_a_namespace_reaps_and_ends_all_on_request() {
    if !may_unshare() {
        eprintln!("skipped: no right to make a PID namespace");
        return;
    }
    let pod = Pod::new();
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let mut agent = pod.start(&unshare, &["--init"]);
    pod.joined();
    assert_eq!(pod.node().agent_process(), (1, 1));
    let mut manager = pod.manager();
    manager.hello();
    // An orphan ends, and no zombie of it is left.
    let script = "(sleep 0.1 & ) ; sleep 0.5; grep -h '^State:' /proc/[0-9]*/status";
    let (text, status) = manager.run(script);
    assert_eq!(status, ExecStatus::Code(0));
    assert!(!text.contains('Z'), "{text}");
    // One that does not want to end.
    let script = "(trap '' TERM; sleep 100 & sleep 100) >/dev/null 2>&1 &";
    assert_eq!(manager.run(script).1, ExecStatus::Code(0));
    let start = Instant::now();
    manager.send(&ToAgent::Shutdown { grace_ms: 300 });
    until("it says that it stops", || {
        pod.node().agent().0 == AgentState::Stopping
    });
    assert_eq!(agent.code(), Some(0));
    assert!(start.elapsed() >= Duration::from_millis(300));
}

fn output(arguments: &[&str]) -> Output {
    Command::new(AGENT)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_cannot_work_is_said_with_its_own_exit_status() {
    assert_eq!(output(&["--help"]).status.code(), Some(0));
    assert_eq!(output(&["--nonsense"]).status.code(), Some(2));
    assert_eq!(output(&["--namespace", "--node=1"]).status.code(), Some(2));
    let node = ["--namespace", "--generation=1", "--pod-memory-fd=77"];
    let result = output(&[&node[..], &["--node=1"]].concat());
    assert_eq!(result.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&result.stderr).contains("pod-memory-fd 77"));
    let result = output(&[&node[..], &["--node=9999"]].concat());
    assert_eq!(result.status.code(), Some(2));

    let folder = tempfile::tempdir().unwrap();
    let cmdline = folder.path().join("cmdline");
    let words = format!("--cmdline={}", cmdline.display());
    let empty = format!("--sysfs={}", folder.path().display());
    std::fs::write(&cmdline, "quiet lupin.generation=1\n").unwrap();
    let result = output(&[&words, &empty]);
    assert_eq!(result.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&result.stderr).contains("lupin.node"));
    // An init that is not PID 1 is one on nodes only: else whose machine would it power off?
    assert_eq!(output(&["--init", &words, &empty]).status.code(), Some(2));
}

#[test]
fn a_damaged_pod_is_refused_and_the_node_says_that_it_failed() {
    let pod = Pod::new();
    let at = pod.header.kernel().offset + 8;
    pod.file.write_all_at(&[9], at).unwrap();
    let mut agent = pod.start(&[], &[]);
    assert_eq!(agent.code(), Some(3));
    assert_eq!(pod.node().agent(), (AgentState::Failed, 1));
}
