//! `pod up`: starting a pod, with progress that says what is being waited for.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lupin_abi::Generation;
use lupin_abi::event::Cause;
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::{Client, ClientError, NodeStatus, PodStatus};
use lupin_fabric::vmm_protocol::CONSOLE_FILE;

use super::place::{self, Place};
use super::text::{size, span, tail};
use super::{Failure, UpArgs, status};

/// Environment variable that names another manager program.
const PROGRAM_ENV: &str = "LUPIN_FABRICD";
const PROGRAM: &str = "lupin-fabricd";
/// How long the manager may take to answer: pod memory may have to be written to disk.
const MANAGER_PATIENCE: Duration = Duration::from_secs(30);
/// How long after the manager's own join timeout the wait is given up.
const JOIN_SLACK: Duration = Duration::from_secs(10);
/// Between looks at the pod.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// Between lines that say that nothing changed.
const PATIENCE_LINE_EVERY: Duration = Duration::from_secs(10);
/// How long a node may have joined without its time to join being known.
const SETTLE_NS: u64 = 500_000_000;
/// What a VMM says, in the node's folder.
const VMM_LOG: &str = "vmm.log";
/// A node that fails this often before it joins is not worth waiting for.
const MOST_FAILURES: u32 = 3;
/// Lines of the console of a node that did not join.
const CONSOLE_LINES: usize = 12;

/// What the manager of the pod says, if one runs. One that ends before it answers runs no more: a
/// process that it was about to start kept its socket open a moment longer than itself.
fn running(place: &Place) -> Result<Option<PodStatus>, Failure> {
    match Client::connect(&place.folder).and_then(|mut client| client.status()) {
        Ok(status) => Ok(Some(status)),
        Err(ClientError::Closed | ClientError::NotRunning { .. }) => Ok(None),
        // No socket can have this path. The manager says so, and what to do.
        Err(ClientError::Io(e)) if e.kind() == ErrorKind::InvalidInput => Ok(None),
        Err(e) => Err(Failure::of_client(place, &e)),
    }
}

pub(super) fn up(base: &Path, args: &UpArgs) -> Result<i32, Failure> {
    let pod = place::load(&args.file)?;
    let place = Place::new(base, &pod.name);
    if let Some(running) = running(&place)? {
        let message = format!(
            "pod {} is already running: {}; manager {}, pod file {}",
            place.name,
            summary(&running),
            running.manager_pid,
            running.pod_file.display()
        );
        return Err(Failure::new(status::WRONG_STATE, message));
    }
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let mut command = Command::new(program());
    command.arg("--pod-file").arg(absolute(&args.file));
    command.arg("--runtime-dir").arg(absolute(base));
    if args.foreground {
        // Only returns if it fails.
        let error = command.exec();
        return Err(not_started(&command, &error));
    }
    let log_path = place.folder.join("fabricd.log");
    let (log, log_start) = open_log(&place.folder, &log_path)?;
    let stderr = log
        .try_clone()
        .map_err(|e| Failure::general(format!("{}: {e}", log_path.display())))?;
    command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(stderr)
        .current_dir("/");
    // SAFETY: setsid is async-signal-safe and allocates nothing, which is what may be done
    // between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // A session of its own: no terminal, and no Ctrl-C of this one. Fails only for a
            // group leader, which a fresh child is not.
            libc::setsid();
            Ok(())
        });
    }
    let began = Instant::now();
    let mut child = command.spawn().map_err(|e| not_started(&command, &e))?;
    let mut client = wait_for_manager(&place, &mut child, &log_path, log_start)?;
    let failed = |e: ClientError| manager_failed(&place, &e, &log_path, log_start);
    let first = client.status().map_err(failed)?;
    eprintln!(
        "pod {}: manager {}, {} shared memory in {}",
        first.pod,
        first.manager_pid,
        size(first.memory_bytes),
        first.memory.display()
    );
    if args.no_wait {
        return Ok(status::OK);
    }
    let mut progress = Progress::new(&first);
    let patience = Duration::from_millis(first.join_timeout_ms) + JOIN_SLACK;
    let mut pod = first;
    loop {
        let all_told = progress.tell(&pod);
        let joined = |node: &NodeStatus| {
            matches!(
                node.state,
                NodeState::Joined | NodeState::Paused | NodeState::Draining
            )
        };
        if all_told && pod.nodes.iter().all(joined) {
            eprintln!(
                "pod {} is up: {} in {}",
                pod.pod,
                summary(&pod),
                span(began.elapsed().as_nanos() as u64)
            );
            return Ok(status::OK);
        }
        let lost = progress.given_up(&pod);
        if !lost.is_empty() || began.elapsed() > patience {
            return Err(not_up(&pod, &lost, began.elapsed() > patience));
        }
        std::thread::sleep(LOOK_EVERY);
        pod = client.status().map_err(failed)?;
    }
}

/// The manager program: beside this one, unless the environment names another.
fn program() -> PathBuf {
    if let Some(given) = std::env::var_os(PROGRAM_ENV) {
        return given.into();
    }
    std::env::current_exe()
        .ok()
        .and_then(|us| Some(us.parent()?.join(PROGRAM)))
        .unwrap_or_else(|| PROGRAM.into())
}

fn not_started(command: &Command, error: &std::io::Error) -> Failure {
    let program = Path::new(command.get_program()).display();
    Failure::general(format!(
        "cannot start the fabric manager {program}: {error}; {PROGRAM_ENV} may name another one"
    ))
}

/// Opens the manager's log for appending; returns where it ends now.
fn open_log(folder: &Path, path: &Path) -> Result<(File, u64), Failure> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .and_then(|()| {
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path)
        })
        .and_then(|log| {
            let end = log.metadata()?.len();
            Ok((log, end))
        })
        .map_err(|e| {
            let path = path.display();
            Failure::general(format!(
                "cannot write the log {path}: {e}; --runtime-dir may name another folder"
            ))
        })
}

/// What the manager logged since it was started, at most the last few KiB.
fn log_since(path: &Path, start: u64) -> String {
    const MOST: u64 = 4 << 10;
    let mut bytes = Vec::new();
    let _ = File::open(path).and_then(|mut log| {
        let end = log.metadata()?.len();
        log.seek(SeekFrom::Start(start.max(end.saturating_sub(MOST))))?;
        log.take(MOST).read_to_end(&mut bytes)
    });
    String::from_utf8_lossy(&bytes).trim_end().into()
}

/// Waits until the manager answers.
fn wait_for_manager(
    place: &Place,
    child: &mut Child,
    log: &Path,
    log_start: u64,
) -> Result<Client, Failure> {
    let deadline = Instant::now() + MANAGER_PATIENCE;
    loop {
        // In this order: a manager that answers and then ends has answered.
        let ended = child.try_wait().ok().flatten();
        match Client::connect(&place.folder) {
            Ok(client) => return Ok(client),
            Err(ClientError::NotRunning { .. }) => {}
            Err(e) => return Err(Failure::of_client(place, &e)),
        }
        if let Some(ended) = ended {
            let code = match ended.code() {
                Some(status::BAD_ARGUMENTS) => status::BAD_ARGUMENTS,
                _ => status::FAILED,
            };
            let said = match log_since(log, log_start).as_str() {
                "" => format!("it said nothing ({ended})"),
                said => format!("it said:\n{said}"),
            };
            let name = &place.name;
            let message = format!("the manager of pod {name} could not start; {said}");
            return Err(Failure::new(code, message));
        }
        if Instant::now() > deadline {
            let (name, log) = (&place.name, log.display());
            let limit = span(MANAGER_PATIENCE.as_nanos() as u64);
            return Err(Failure::new(
                status::TIMEOUT,
                format!(
                    "the manager of pod {name} does not answer after {limit}; its log is {log}"
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The manager ended or failed while its nodes were being waited for.
fn manager_failed(place: &Place, error: &ClientError, log: &Path, log_start: u64) -> Failure {
    let mut failure = Failure::of_client(place, error);
    if matches!(error, ClientError::Closed | ClientError::NotRunning { .. }) {
        let said = log_since(log, log_start);
        failure.status = status::FAILED;
        failure.message = format!(
            "the manager of pod {} has ended; it said:\n{said}",
            place.name
        );
    }
    failure
}

/// `3 nodes joined`, or `2 of 3 nodes joined`.
fn summary(pod: &PodStatus) -> String {
    let all = pod.nodes.len();
    let joined = |node: &&NodeStatus| node.state == NodeState::Joined;
    let s = if all == 1 { "" } else { "s" };
    match pod.nodes.iter().filter(joined).count() {
        joined if joined == all => format!("{all} node{s} joined"),
        joined => format!("{joined} of {all} node{s} joined"),
    }
}

/// What was told about each node so far.
struct Progress {
    told: HashMap<u32, (NodeState, Generation)>,
    /// The generation of each node when the wait began: what failed before does not count.
    began: HashMap<u32, Generation>,
    last: Instant,
    start: Instant,
}

impl Progress {
    fn new(first: &PodStatus) -> Self {
        let generations = first.nodes.iter().map(|node| (node.id, node.generation));
        Self {
            told: HashMap::new(),
            began: generations.collect(),
            last: Instant::now(),
            start: Instant::now(),
        }
    }

    /// Prints what changed; whether that was everything.
    fn tell(&mut self, pod: &PodStatus) -> bool {
        let mut all_told = true;
        for node in &pod.nodes {
            // The table says that a node has joined a moment before the manager says how long
            // it took; of a node that was taken over, it never does.
            let settled = node.joined_in_ns.is_some() || node.in_state_ns > SETTLE_NS;
            if node.state == NodeState::Joined && !settled {
                all_told = false;
                continue;
            }
            let now = (node.state, node.generation);
            if self.told.insert(node.id, now) != Some(now)
                && let Some(line) = news(node)
            {
                eprintln!("  {line}");
                self.last = Instant::now();
            }
        }
        if self.last.elapsed() > PATIENCE_LINE_EVERY {
            self.last = Instant::now();
            let waiting: Vec<_> = pod
                .nodes
                .iter()
                .filter(|node| node.state != NodeState::Joined)
                .map(|node| node.name.as_str())
                .collect();
            eprintln!(
                "  waiting for {} since {} s",
                waiting.join(", "),
                self.start.elapsed().as_secs()
            );
        }
        all_told
    }

    /// The nodes that will not join: they stay down, had their time in this wait, or fail again
    /// and again.
    fn given_up<'a>(&self, pod: &'a PodStatus) -> Vec<&'a NodeStatus> {
        pod.nodes
            .iter()
            .filter(|node| match node.state {
                NodeState::Joined | NodeState::Paused | NodeState::Draining => false,
                NodeState::Down => true,
                _ => {
                    let began = self.began.get(&node.id).copied().unwrap_or_default();
                    let failures = node.generation.saturating_sub(began);
                    let hopeless = matches!(node.cause, Cause::NeverJoined | Cause::StartFailed);
                    failures >= if hopeless { 1 } else { MOST_FAILURES }
                }
            })
            .collect()
    }
}

/// A node's state as news; `None` if it is none.
fn news(node: &NodeStatus) -> Option<String> {
    let (name, generation, cause) = (&node.name, node.generation, node.cause);
    let pid = node.pid.map(|pid| format!(" (process {pid})"));
    let pid = pid.unwrap_or_default();
    Some(match node.state {
        NodeState::Absent => return None,
        // An earlier run of the pod ended in an orderly way, and this one begins.
        NodeState::Restarting if cause == Cause::PodDown => return None,
        NodeState::Starting => format!("{name} started as generation {generation}{pid}"),
        NodeState::Joined => match node.joined_in_ns {
            Some(nanos) => format!("{name} joined in {}", span(nanos)),
            None => format!("{name} has joined{pid}"),
        },
        NodeState::Failing => format!("{name} failed: {cause}"),
        NodeState::Restarting => format!("{name} failed ({cause}) and will be started again"),
        NodeState::Down => format!("{name} is down ({cause})"),
        NodeState::Paused => format!("{name} is paused{pid}"),
        NodeState::Stopping => format!("{name} was asked to end{pid}"),
        NodeState::Draining => format!("{name} drains{pid}"),
    })
}

/// The pod is not up: which nodes, and what their consoles said last.
fn not_up(pod: &PodStatus, lost: &[&NodeStatus], late: bool) -> Failure {
    let mut message = format!("pod {} is not up: {}", pod.pod, summary(pod));
    let missing = pod.nodes.iter().filter(|node| {
        node.state != NodeState::Joined && (late || lost.iter().any(|lost| lost.id == node.id))
    });
    for node in missing {
        message += &format!("\n{} is {}", node.name, node.state);
        if node.cause != Cause::None {
            message += &format!(" (last failure: {})", node.cause);
        }
        if let Some(detail) = &node.detail {
            message += &format!(": {detail}");
        }
        message += &last_words(node);
    }
    let name = &pod.pod;
    message += &format!("\nthe manager goes on; `lupin-vmm pod down {name}` ends it");
    let never_joined = late || lost.iter().any(|node| node.cause == Cause::NeverJoined);
    let code = if never_joined {
        status::TIMEOUT
    } else {
        status::FAILED
    };
    Failure::new(code, message)
}

/// What a node's console said last: in this life, or in the one before; if it never said anything,
/// what its VMM said.
fn last_words(node: &NodeStatus) -> String {
    let places = [
        (CONSOLE_FILE.to_string(), "console"),
        (format!("{CONSOLE_FILE}.1"), "console"),
        (VMM_LOG.to_string(), "VMM"),
    ];
    for (name, who) in places {
        let path = node.folder.join(name);
        let lines = tail(&path, CONSOLE_LINES);
        if !lines.is_empty() {
            let quoted = lines.join("\n  | ");
            return format!("; its {who} ({}) said last:\n  | {quoted}", path.display());
        }
    }
    "; its console said nothing".into()
}
