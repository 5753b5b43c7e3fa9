use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use lupin_abi::port::{ExecStatus, INITIAL_CREDIT};
use lupin_abi::{NodeId, port};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::fake::FakeAgent;
use super::*;

struct Bench {
    folder: tempfile::TempDir,
    link: Arc<AgentLink>,
    events: Receiver<LinkEvent>,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let (events_in, events) = channel();
    let link = AgentLink::start(
        LinkTarget {
            socket: folder.path().join("agent.sock"),
            pod_id: 7,
            node: NodeId::new(3).unwrap(),
            generation: 5,
        },
        move |event| {
            let _ = events_in.send(event);
        },
    )
    .unwrap();
    Bench {
        folder,
        link,
        events,
    }
}

impl Bench {
    fn agent(&self, node: u32, generation: u32, doorbell: Option<OwnedFd>) -> FakeAgent {
        let path = self.folder.path().join("agent.sock");
        FakeAgent::listen(&path, node, generation, doorbell)
    }

    /// The next event that satisfies `wanted`.
    fn wait<T>(&self, mut wanted: impl FnMut(LinkEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect("event in time");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    }

    fn up(&self) -> AgentInfo {
        self.wait(|event| match event {
            LinkEvent::Up(info) => Some(info),
            _ => None,
        })
    }

    fn lost(&self) -> String {
        self.wait(|event| match event {
            LinkEvent::Lost(why) => Some(why),
            _ => None,
        })
    }

    fn exec(&self, argv: &[&str]) -> Exec {
        let argv = argv.iter().map(|&word| word.into()).collect();
        let spec = ExecSpec {
            argv,
            ..ExecSpec::default()
        };
        self.link.exec(spec).unwrap()
    }
}

/// Reads a command to its end: its output and how it ended.
fn drain(exec: &Exec) -> (Vec<u8>, ExecStatus) {
    let mut output = Vec::new();
    while let Some(message) = exec.recv() {
        match message {
            ExecMessage::Output { data, .. } => output.extend(data),
            ExecMessage::Exited(status) => return (output, status),
            _ => {}
        }
    }
    panic!("ended without a status");
}

#[test]
fn a_command_runs_once_the_agent_appears() {
    let bench = bench();
    assert!(bench.lost().contains("No such file"));
    let refused = bench.link.exec(ExecSpec::default()).unwrap_err();
    assert!(matches!(refused, LinkError::NotConnected(_)));
    let _agent = bench.agent(3, 5, None);
    let info = bench.up();
    assert_eq!((info.agent.as_str(), info.kernel.as_str()), ("fake", "6.1"));
    assert_eq!(bench.link.agent(), Some(info));
    assert!(bench.link.doorbell().is_none());
    let (output, status) = drain(&bench.exec(&["echo", "a", "b"]));
    assert_eq!(
        (output.as_slice(), status),
        (&b"a b"[..], ExecStatus::Code(0))
    );
    let (_, status) = drain(&bench.exec(&["exit", "7"]));
    assert_eq!(status, ExecStatus::Code(7));
    let (_, status) = drain(&bench.exec(&["missing"]));
    let why = "No such file\\u{1b}[31m".to_string();
    assert_eq!(status, ExecStatus::NotStarted(libc::ENOENT, why));
}

#[test]
fn the_doorbell_comes_with_the_hello_and_can_be_rung() {
    let bench = bench();
    let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    let _agent = bench.agent(3, 5, Some(bell.as_fd().try_clone_to_owned().unwrap()));
    bench.up();
    let theirs = bench.link.doorbell().unwrap();
    ring(theirs.as_fd()).unwrap();
    ring(theirs.as_fd()).unwrap();
    assert_eq!(bell.read().unwrap(), 2);
    // A node that fills its own counter cannot block whoever rings it.
    bell.write(u64::MAX - 1).unwrap();
    ring(theirs.as_fd()).unwrap();
}

#[test]
fn only_an_eventfd_is_taken_for_a_doorbell() {
    let bench = bench();
    let file = std::fs::File::open("/dev/null").unwrap();
    let _agent = bench.agent(3, 5, Some(file.into()));
    bench.up();
    assert!(bench.link.doorbell().is_none());
}

#[test]
fn an_agent_of_another_life_is_refused() {
    let bench = bench();
    let _agent = bench.agent(3, 4, None);
    let why = bench.wait(|event| match event {
        LinkEvent::Lost(why) if why.contains("instance") => Some(why),
        _ => None,
    });
    assert_eq!(why, "the agent speaks for instance 3.4, expected 3.5");
    assert!(bench.link.agent().is_none());
}

#[test]
fn a_stalled_command_stops_neither_another_nor_itself_for_ever() {
    const TOTAL: usize = 64 << 20;
    let bench = bench();
    let _agent = bench.agent(3, 5, None);
    bench.up();
    let cat = bench.exec(&["cat"]);
    let writer = std::thread::scope(|scope| {
        let cat = &cat;
        // Feeds as credit comes; the credit is told through the same handle that reads, so the
        // reader passes it on.
        let (credit_in, credit) = channel();
        let feeder = scope.spawn(move || {
            let chunk = vec![b'x'; 32 << 10];
            let (mut left, mut granted) = (TOTAL, INITIAL_CREDIT as usize);
            while left > 0 {
                while granted < chunk.len() {
                    granted += credit.recv().unwrap();
                }
                cat.send_stdin(&chunk).unwrap();
                granted -= chunk.len();
                left -= chunk.len();
            }
            cat.close_stdin().unwrap();
        });
        // Nobody reads `cat` yet: it stalls at its credit. Another command answers promptly.
        std::thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        let (output, _) = drain(&bench.exec(&["echo", "prompt"]));
        assert_eq!(output, b"prompt");
        assert!(began.elapsed() < Duration::from_secs(1));
        let mut total = 0;
        let mut slow = 0;
        let status = loop {
            match cat.recv().unwrap() {
                ExecMessage::Output { data, .. } => {
                    assert!(data.iter().all(|byte| *byte == b'x'));
                    total += data.len();
                    slow += 1;
                    if slow % 100 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                        let (output, _) = drain(&bench.exec(&["echo", "still"]));
                        assert_eq!(output, b"still");
                    }
                }
                ExecMessage::Credit { bytes } => {
                    let _ = credit_in.send(bytes as usize);
                }
                ExecMessage::Exited(status) => break status,
                ExecMessage::Started { .. } => {}
            }
        };
        assert_eq!((total, status), (TOTAL, ExecStatus::Code(0)));
        assert_eq!(cat.recv(), None);
        feeder.join()
    });
    writer.unwrap();
}

#[test]
fn standard_input_beyond_the_credit_is_refused() {
    let bench = bench();
    let _agent = bench.agent(3, 5, None);
    bench.up();
    let hang = bench.exec(&["hang"]);
    let refused = hang.send_stdin(&vec![0; INITIAL_CREDIT as usize + 1]);
    assert!(matches!(refused, Err(LinkError::Credit { .. })));
    hang.send_stdin(b"fits").unwrap();
}

#[test]
fn a_lost_node_ends_its_commands_and_the_link_comes_back() {
    let bench = bench();
    let agent = bench.agent(3, 5, None);
    bench.up();
    let hang = bench.exec(&["hang"]);
    assert_eq!(hang.recv(), Some(ExecMessage::Started { pid: 42 }));
    let hang_up = bench.exec(&["hang-up"]);
    assert_eq!(drain(&hang).1, ExecStatus::NodeLost);
    assert_eq!(drain(&hang_up).1, ExecStatus::NodeLost);
    assert_eq!(hang.signal(libc::SIGINT), Err(LinkError::Over));
    bench.up();
    assert_eq!(drain(&bench.exec(&["exit", "3"])).1, ExecStatus::Code(3));
    assert!(agent.seen.lock().unwrap().connections >= 2);
    // Closing ends commands, too, and for good.
    let hang = bench.exec(&["hang"]);
    bench.link.close();
    assert_eq!(drain(&hang).1, ExecStatus::NodeLost);
    assert!(bench.link.exec(ExecSpec::default()).is_err());
}

#[test]
fn a_hostile_agent_costs_its_connection_and_nothing_else() {
    let bench = bench();
    let _agent = bench.agent(3, 5, None);
    for attack in ["garbage", "flood", "grant"] {
        bench.up();
        let hang = bench.exec(&["hang"]);
        let victim = bench.exec(&[attack]);
        // Nobody reads before the connection is lost: no credit goes back to the agent.
        assert!(bench.lost().contains("broke the protocol"), "{attack}");
        assert_eq!(drain(&victim).1, ExecStatus::NodeLost, "{attack}");
        assert_eq!(drain(&hang).1, ExecStatus::NodeLost, "{attack}");
    }
    bench.up();
    assert_eq!(drain(&bench.exec(&["noise"])).1, ExecStatus::Code(0));
    let lines: Vec<_> = bench.events.try_iter().collect();
    assert!(lines.len() < 110, "{}", lines.len());
    assert_eq!(lines[0], LinkEvent::Log("\\u{1b}[2J0".into()));
}

#[test]
fn an_abandoned_command_is_ended_and_its_output_does_not_clog_the_link() {
    let bench = bench();
    let agent = bench.agent(3, 5, None);
    bench.up();
    let zeros = bench.exec(&["zeros", "4000000"]);
    assert!(zeros.recv().is_some());
    drop(zeros);
    drop(bench.exec(&["hang"]));
    assert_eq!(drain(&bench.exec(&["exit", "0"])).1, ExecStatus::Code(0));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !bench.link.shared.lock().channels.is_empty() {
        assert!(Instant::now() < deadline, "an abandoned command remains");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(agent.seen.lock().unwrap().signals.contains(&libc::SIGTERM));
}

#[test]
fn commands_are_limited_in_number_and_size() {
    let bench = bench();
    let _agent = bench.agent(3, 5, None);
    bench.up();
    let running: Vec<_> = (0..MAX_EXECS).map(|_| bench.exec(&["hang"])).collect();
    let spec = |argv: Vec<String>| ExecSpec {
        argv,
        ..ExecSpec::default()
    };
    let refused = bench.link.exec(spec(vec!["hang".into()])).unwrap_err();
    assert_eq!(refused, LinkError::TooMany(MAX_EXECS));
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !bench.link.shared.lock().channels.is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let long = vec!["echo".into(), "x".repeat(port::MAX_FRAME)];
    let refused = bench.link.exec(spec(long)).unwrap_err();
    assert!(matches!(refused, LinkError::TooLong(_)));
}

#[test]
fn shutdown_reaches_the_agent() {
    let bench = bench();
    let agent = bench.agent(3, 5, None);
    bench.up();
    bench.link.shutdown(Duration::from_millis(1500)).unwrap();
    assert_eq!(drain(&bench.exec(&["exit", "0"])).1, ExecStatus::Code(0));
    assert_eq!(agent.seen.lock().unwrap().shutdown, Some(1500));
}

#[test]
fn hints_go_both_ways_and_are_dropped_while_there_is_no_agent() {
    let bench = bench();
    let wake = port::Wake {
        at: 64,
        classes: 0b100,
        all: false,
    };
    bench.link.hint(&Hint::Deaths);
    let agent = bench.agent(3, 5, None);
    bench.up();
    // The first may meet a thread that is still writing its hello, and goes through the queue.
    let sent: Vec<Hint> = (0..100)
        .map(|at| Hint::Wake(port::Wake { at, ..wake }))
        .chain([Hint::Deaths, Hint::Groups])
        .collect();
    sent.iter().for_each(|hint| bench.link.hint(hint));
    let deadline = Instant::now() + Duration::from_secs(20);
    while agent.seen.lock().unwrap().hints.len() < sent.len() {
        assert!(Instant::now() < deadline, "hints are missing");
        std::thread::sleep(Duration::from_millis(1));
    }
    let expected: Vec<ToAgent> = sent
        .iter()
        .map(|hint| match hint {
            Hint::Wake(wake) => ToAgent::Wake(*wake),
            Hint::Deaths => ToAgent::Deaths,
            Hint::Groups => ToAgent::Groups,
        })
        .collect();
    assert_eq!(agent.seen.lock().unwrap().hints, expected);

    let exec = bench.exec(&["hint"]);
    let told = bench.wait(|event| match event {
        LinkEvent::Hint(hint) => Some(hint),
        _ => None,
    });
    assert_eq!(told, Hint::Deaths);
    drop(exec);
}
