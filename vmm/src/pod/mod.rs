//! `lupin-vmm pod`: starting and steering pods from the command line.
//!
//! Everything here is a client of the fabric manager's control socket
//! ([`lupin_fabric::api`]); `up` starts the manager. What is printed on standard output is for
//! the caller (tables, events, JSON, the output of a command); progress and complaints go to
//! standard error.

mod console;
mod down;
mod events;
mod exec;
mod place;
mod ps;
mod record;
mod reload;
mod steer;
mod text;
mod timeline;
mod top;
mod up;
mod upgrade;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use lupin_fabric::api::{ClientError, ControlError};
use lupin_fabric::runtime::{DEFAULT_RUNTIME_DIR, RUNTIME_DIR_ENV};

use place::Place;
use text::parse_duration;

/// Starts and steers pods: nodes that share one memory.
///
/// A POD is named by its pod file or by its name. Exit status: 0 done, 1 failed, 2 bad arguments
/// or pod file, 3 the pod does not run, 4 no such node or in the wrong state, 5 not done in time.
#[derive(Debug, Args)]
pub struct PodArgs {
    /// Folder with the runtime folders of pods [default: $LUPIN_RUNTIME_DIR, else
    /// /run/lupin/pods].
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: PodCommand,
}

#[derive(Debug, Subcommand)]
enum PodCommand {
    Up(UpArgs),
    Down(DownArgs),
    Ps(PsArgs),
    Events(EventsArgs),
    Top(TopArgs),
    Kill(KillArgs),
    /// Makes a node stand still: its virtual CPUs, or all its processes. That is no failure: no
    /// heartbeat is expected of it until it is resumed. It can be killed meanwhile.
    Pause(NodeArgs),
    /// Lets a paused node run on.
    Resume(NodeArgs),
    /// Ends a node in an orderly way and starts it again, whatever its restart policy says.
    ///
    /// For its peers this is a failure: its generation is raised once. A node that does not end in
    /// the time that it has is fenced, as with kill.
    Restart(EndArgs),
    /// Ends a node in an orderly way and leaves it down, whatever its restart policy says.
    Stop(EndArgs),
    /// Starts a node that is down, or that waits for its time to be started again.
    Start(NodeArgs),
    Drain(DrainArgs),
    /// Takes a node of the pod file into the running pod, and starts it.
    ///
    /// Write the node into the pod file first. Its id may be any up to memory.node_capacity that the
    /// pod does not use; an id that was used before goes on with its generations.
    Add(NodeArgs),
    /// Ends a node and takes it out of the pod for good.
    ///
    /// For its peers this is a failure: its generation is raised, and it never goes back. Take the
    /// node out of the pod file, too, or the next `pod up` starts it again.
    Rm(EndArgs),
    Reload(ReloadArgs),
    Upgrade(UpgradeArgs),
    Exec(ExecArgs),
    Console(ConsoleArgs),
}

/// Starts a pod's manager in the background and waits until its nodes have joined.
///
/// If the manager of a running pod has died, the new one takes over the nodes as they are. When a
/// node does not join, the last lines of its console are shown, the exit status is 5, and the
/// pod is left up for a look around.
#[derive(Debug, Args)]
struct UpArgs {
    /// The pod file (TOML).
    file: PathBuf,
    /// Stay in the foreground as the manager; SIGTERM or Ctrl-C bring the pod down.
    #[arg(long)]
    foreground: bool,
    /// Return as soon as the manager runs, without waiting for nodes.
    #[arg(long, conflicts_with = "foreground")]
    no_wait: bool,
}

/// Ends all nodes and the manager of a pod. The pod memory stays.
#[derive(Debug, Args)]
struct DownArgs {
    /// Pod file or name.
    pod: OsString,
    /// How long nodes may take to end by themselves.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    grace: Duration,
    /// How long to wait for all of it, at most.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
}

/// Lists the nodes of a pod, or of every running pod.
#[derive(Debug, Args)]
struct PsArgs {
    /// Pod file or name; all running pods if absent.
    pod: Option<OsString>,
    /// Show also heartbeats, memory and time of the processors.
    #[arg(short, long, conflicts_with = "json")]
    wide: bool,
    /// Print JSON: one object a pod, one line each.
    #[arg(long)]
    json: bool,
}

/// Shows what happened in a pod: nodes started, joined, failed, fenced, restarted.
///
/// Times are relative to the first event shown. With --follow, a manager that dies is waited for
/// to be replaced, with a mark; nothing is missed, and the end of the pod ends it. The record is kept in pod memory: for a pod that
/// does not run, name its pod file.
#[derive(Debug, Args)]
struct EventsArgs {
    /// Pod file or name.
    pod: OsString,
    /// Go on with new events as they happen.
    #[arg(short, long)]
    follow: bool,
    /// Begin with this event number instead of the oldest one on record.
    #[arg(long, value_name = "SEQ")]
    from: Option<u64>,
    /// Only events of this node (id or name).
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print JSON: one object an event, one line each.
    #[arg(long)]
    json: bool,
}

/// Shows the nodes of a pod as they are now, again and again, and what happens below.
///
/// BEAT is the time since a node's last heartbeat; LEFT how much it has left until it is called
/// hung, which shrinks only while it could run; STEAL how much of the time in which it wanted a
/// processor it waited for one. Keys: q quit, up and down select, p pause or resume, k kill (asks before). A new
/// manager of the pod is found by itself. Prints plain text if standard output is no terminal.
#[derive(Debug, Args)]
struct TopArgs {
    /// Pod file or name.
    pod: OsString,
    /// How often to look.
    #[arg(short, long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// Print one look as plain text and end.
    #[arg(long)]
    once: bool,
    /// Print one look after the other as plain text.
    #[arg(short, long, conflicts_with = "once")]
    batch: bool,
}

/// Kills one node, as a test of what the others do; it is started again if its policy says so.
#[derive(Debug, Args)]
struct KillArgs {
    /// Pod file or name.
    pod: OsString,
    /// Node id or name.
    node: String,
}

/// Replaces the program of a pod's manager while the nodes run on.
///
/// The manager executes the program in its own process; it takes the nodes over as they are, with
/// the next epoch, and starts a backup of its own version. A program that does not run is refused
/// before anything is begun.
#[derive(Debug, Args)]
struct UpgradeArgs {
    /// Pod file or name.
    pod: OsString,
    /// The new lupin-fabricd [default: the file that the manager was started from].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// How long to wait for the new manager, at most.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

/// Applies what has changed in the pod file to the running pod, and says what differs.
///
/// Nodes that are new in the file are added; policies and hooks change at once, kernels, sizes and
/// disks of a guest when it is started the next time. What cannot change while the pod runs is
/// named, and the exit status is 4 then. A node that is missing in the file is not removed: that is
/// for rm.
#[derive(Debug, Args)]
struct ReloadArgs {
    /// Pod file or name.
    pod: OsString,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON: one object a difference, one line each.
    #[arg(long)]
    json: bool,
}

/// Lets the groups of a node move off it, and then stops it.
///
/// Its agent admits no new member, and everybody can read its state, `draining`. As soon as no member of
/// a group is left on it, or after --wait, it is ended as by stop. A drain holds across managers.
#[derive(Debug, Args)]
struct DrainArgs {
    #[command(flatten)]
    end: EndArgs,
    /// How long the groups may take to move off.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    wait: Duration,
    /// Call a drain off that is under way.
    #[arg(long, conflicts_with_all = ["wait", "grace"])]
    cancel: bool,
}

/// One node, and how long to wait for it.
#[derive(Clone, Debug, Args)]
struct NodeArgs {
    /// Pod file or name.
    pod: OsString,
    /// Node id or name.
    node: String,
    /// Return as soon as the manager has begun.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait until it is done, at most.
    #[arg(long, value_name = "TIME", default_value = "90s", value_parser = parse_duration)]
    timeout: Duration,
}

/// One node that is to end.
#[derive(Debug, Args)]
struct EndArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// How long it may take to end by itself; with 0 it is fenced at once.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    grace: Duration,
}

/// Runs a command inside a node.
///
/// Standard input, output and error, SIGINT, SIGTERM, SIGHUP and SIGQUIT reach it. If it does not
/// end after SIGTERM or SIGHUP, a second one, or --kill-after, ends exec with 128+N, and with it
/// the command by SIGKILL. Exit status:
/// that of the command; 128+N if signal N killed it; 126 not executable, 127 not found, 125 if
/// the node was lost or the command could not be run for another reason.
#[derive(Debug, Args)]
struct ExecArgs {
    /// Pod file or name.
    pod: OsString,
    /// Node id or name.
    node: String,
    /// Set a variable in the command's environment.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = exec::parse_variable)]
    env: Vec<(String, String)>,
    /// Working directory inside the node.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// How long the command may go on after the first SIGTERM or SIGHUP.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    kill_after: Duration,
    /// Give the command an empty standard input.
    #[arg(short, long)]
    no_stdin: bool,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Prints what a node wrote to its console.
#[derive(Debug, Args)]
struct ConsoleArgs {
    /// Pod file or name.
    pod: OsString,
    /// Node id or name.
    node: String,
    /// Go on with what is written from now on.
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines.
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,
    /// The console of the node's life before this one.
    #[arg(long, conflicts_with = "follow")]
    previous: bool,
}

/// Exit statuses of `lupin-vmm pod`.
pub mod status {
    /// Done.
    pub const OK: i32 = 0;
    /// Failed in a way that has no status of its own.
    pub const FAILED: i32 = 1;
    /// Bad arguments or pod file.
    pub const BAD_ARGUMENTS: i32 = 2;
    /// The pod does not run.
    pub const NOT_RUNNING: i32 = 3;
    /// No such node, or node or pod in the wrong state.
    pub const WRONG_STATE: i32 = 4;
    /// Not done in time.
    pub const TIMEOUT: i32 = 5;
    /// `exec`: the command could not be run, or the node was lost.
    pub const EXEC_FAILED: i32 = 125;
    /// `exec`: the command is not executable.
    pub const NOT_EXECUTABLE: i32 = 126;
    /// `exec`: the command was not found.
    pub const NOT_FOUND: i32 = 127;
}

/// Why a command of the command line failed.
#[derive(Debug)]
struct Failure {
    /// Exit status.
    status: i32,
    /// One or more sentences; empty if all has been said.
    message: String,
}

impl Failure {
    fn new(status: i32, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    /// A failure with status 1.
    fn general(message: impl Into<String>) -> Self {
        Self::new(status::FAILED, message)
    }

    /// A failure of a request to the manager of `place`.
    fn of_client(place: &Place, error: &ClientError) -> Self {
        match error {
            ClientError::NotRunning { .. } => place.not_running(),
            ClientError::Refused(refusal) => {
                let code = match refusal {
                    ControlError::NoSuchNode { .. }
                    | ControlError::WrongState { .. }
                    | ControlError::GoingDown => status::WRONG_STATE,
                    ControlError::BadRequest { .. } => status::BAD_ARGUMENTS,
                    _ => status::FAILED,
                };
                Self::new(code, format!("pod {}: {refusal}", place.name))
            }
            ClientError::Io(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                let folder = place.folder.display();
                Self::general(format!(
                    "pod {}: {folder} belongs to another user: run this as that user, or as root",
                    place.name
                ))
            }
            other => Self::general(format!("pod {}: {other}", place.name)),
        }
    }
}

/// Runs a `pod` command; returns the exit status.
pub fn run(args: &PodArgs) -> i32 {
    let base = &args.runtime_dir.clone().unwrap_or_else(|| {
        let given = std::env::var_os(RUNTIME_DIR_ENV).filter(|given| !given.is_empty());
        given.map_or_else(|| DEFAULT_RUNTIME_DIR.into(), PathBuf::from)
    });
    let done = match &args.command {
        PodCommand::Up(args) => up::up(base, args),
        PodCommand::Down(args) => down::down(base, args),
        PodCommand::Ps(args) => ps::ps(base, args),
        PodCommand::Events(args) => events::events(base, args),
        PodCommand::Top(args) => top::top(base, args),
        PodCommand::Kill(args) => kill(base, args),
        PodCommand::Pause(args) => steer::pause(base, args),
        PodCommand::Resume(args) => steer::resume(base, args),
        PodCommand::Restart(args) => steer::restart(base, args),
        PodCommand::Stop(args) => steer::stop(base, args),
        PodCommand::Start(args) => steer::start(base, args),
        PodCommand::Drain(args) => steer::drain(base, args),
        PodCommand::Add(args) => steer::add(base, args),
        PodCommand::Rm(args) => steer::rm(base, args),
        PodCommand::Reload(args) => reload::reload(base, args),
        PodCommand::Upgrade(args) => upgrade::upgrade(base, args),
        PodCommand::Exec(args) => exec::exec(base, args),
        PodCommand::Console(args) => console::console(base, args),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("lupin-vmm: {}", failure.message);
            }
            failure.status
        }
    }
}

fn kill(base: &std::path::Path, args: &KillArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let mut client = place.connect()?;
    client
        .kill(&args.node)
        .map_err(|e| Failure::of_client(&place, &e))?;
    eprintln!("node {} of pod {} is being killed", args.node, place.name);
    Ok(status::OK)
}

/// Prints to standard output; whoever closed it has read enough, which ends the program.
fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::new(
            128 + libc::SIGPIPE,
            // The shell's own words for it are silence.
            String::new(),
        )),
        Err(e) => Err(Failure::general(format!("standard output: {e}"))),
    }
}

#[cfg(test)]
#[path = "pod_test.rs"]
mod pod_test;
