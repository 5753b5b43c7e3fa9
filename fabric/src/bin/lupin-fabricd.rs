//! `lupin-fabricd`: the fabric manager of one pod, as a program.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use lupin_fabric::api::{PodControl, Server};
use lupin_fabric::http::token::Token;
use lupin_fabric::http::{self, API_SOCKET, HttpServer, openapi};
use lupin_fabric::manager::{Backends, Manager, ManagerError, ManagerHandle, Outcome};
use lupin_fabric::memory::MemoryError;
use lupin_fabric::namespace_init::NamespaceInit;
use lupin_fabric::podfile::{Api, HostLimits, Pod};
use lupin_fabric::power::namespace::NamespacePower;
use lupin_fabric::power::vmm::VmmPower;
use lupin_fabric::runtime::{DEFAULT_RUNTIME_DIR, RUNTIME_DIR_ENV, RuntimeError, RuntimeFolder};
use lupin_fabric::standby::{self, Ending, StandbyError};
use lupin_fabric::sys::spawn::beside;
use lupin_fabric::sys::{journal, notify};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};

/// Environment variable that names the backup to the program that replaces this one.
const OLD_BACKUP: &str = "LUPIN_FABRICD_OLD_BACKUP";

/// The fabric manager of a Lupin pod.
///
/// Starts the nodes of a pod file, watches them, and when one fails: fences it, raises its
/// generation in the pod memory, rings the others, and starts it again. Killed at any moment, it
/// can be started anew and takes the running nodes over; none of them notices.
///
/// Usually started by `lupin-vmm pod up`. Ends the pod in an orderly way on SIGTERM and SIGINT. On
/// SIGUSR2 it executes its program file anew, in the same process: an upgrade that no node notices.
#[derive(Debug, Parser)]
#[command(
    name = "lupin-fabricd",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Exit codes: 0 the pod was brought down; 1 failure; 2 bad arguments or pod file; \
                  3 another manager runs this pod; 4 the pod memory cannot be used."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the description (OpenAPI) of the HTTP interface.
    Openapi,
    /// Become the agent of a namespace node. Used by the manager itself.
    #[command(hide = true)]
    NamespaceInit {
        /// Host name inside.
        #[arg(long)]
        hostname: String,
        /// Folder that becomes /run/lupin.
        #[arg(long)]
        run: PathBuf,
        /// Folder that becomes /run/lupin/peers.
        #[arg(long)]
        peers: PathBuf,
        /// The agent and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
struct Serve {
    /// The pod file (TOML): which nodes, which memory.
    #[arg(long, value_name = "FILE", required = true)]
    pod_file: Option<PathBuf>,

    /// Where pods have their runtime folders: sockets, logs, records of running nodes.
    #[arg(long, value_name = "DIR", env = RUNTIME_DIR_ENV, default_value = DEFAULT_RUNTIME_DIR)]
    runtime_dir: PathBuf,

    /// The VMM of kvm nodes [default: lupin-vmm beside this program].
    #[arg(long, value_name = "PROGRAM", env = "LUPIN_VMM")]
    vmm: Option<PathBuf>,

    /// The agent of namespace nodes [default: lupin-guest-agent beside this program].
    #[arg(long, value_name = "PROGRAM", env = "LUPIN_GUEST_AGENT")]
    agent: Option<PathBuf>,

    /// Stand by for the manager that runs this pod: take over when it dies, or when it does not
    /// look at its nodes for manager.backup_timeout_ms of the pod file, after ending it. Ends when
    /// the pod is brought down. Started by the manager itself if the pod file says
    /// manager.backup = true.
    #[arg(long)]
    standby: bool,

    /// How long processes have to end by themselves when the pod is brought down by a signal.
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    grace_ms: u64,

    /// Write the log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,

    /// What to log: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", env = "LUPIN_LOG", default_value = "info")]
    log_level: log::LevelFilter,

    /// An inherited descriptor: receives the line "ready" once the manager is in charge and
    /// serves its control socket, and is closed. A service manager is told through
    /// NOTIFY_SOCKET as well.
    #[arg(long, value_name = "FD")]
    ready_fd: Option<RawFd>,
}

/// A failure and its exit code.
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: u8, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

impl From<ManagerError> for Failure {
    fn from(error: ManagerError) -> Self {
        let code = match &error {
            ManagerError::Runtime(RuntimeError::Locked { .. }) => 3,
            ManagerError::Runtime(RuntimeError::PathTooLong { .. }) => 2,
            ManagerError::Stray { .. } | ManagerError::OtherBackend { .. } => 2,
            ManagerError::Memory(_) | ManagerError::StillMapped { .. } => 4,
            ManagerError::Runtime(_) | ManagerError::Io { .. } => 1,
        };
        Self::new(code, error)
    }
}

impl From<StandbyError> for Failure {
    fn from(error: StandbyError) -> Self {
        let code = match &error {
            StandbyError::AlreadyThere(_) => 3,
            StandbyError::NoManager(_) | StandbyError::Io { .. } => 1,
        };
        Self::new(code, error)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Openapi) = cli.command {
        print!("{}", openapi::document());
        return ExitCode::SUCCESS;
    }
    if let Some(Command::NamespaceInit {
        hostname,
        run,
        peers,
        command,
    }) = cli.command
    {
        let init = NamespaceInit {
            hostname,
            run,
            peers,
            command,
        };
        let Err(error) = init.run();
        eprintln!("lupin-fabricd: {error}");
        return ExitCode::from(error.code());
    }
    let log_is_elsewhere = cli.serve.log_file.is_some();
    match serve(cli.serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::error!("{}", failure.message);
            if log_is_elsewhere {
                // For whoever waits at the terminal, if it is still there.
                let _ = writeln!(std::io::stderr(), "lupin-fabricd: {}", failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}

fn serve(args: Serve) -> Result<(), Failure> {
    // First of all, while no descriptor of ours can have its number.
    let ready = args.ready_fd.map(adopt_ready_fd).transpose();
    start_log(&args)?;
    let ready = ready?;
    let backup = backup_command(&args)?;
    let file = args.pod_file.clone().unwrap_or_default();
    let pod = Pod::load(&file).map_err(|e| Failure::new(2, e))?;
    pod.check_host(&HostLimits::of_this_host(&pod))
        .map_err(|e| Failure::new(2, e))?;
    let wants_backup = pod.backup.wanted;
    let api = pod.api.clone();
    let tcp = http_over_tcp(&pod, &args)?;
    let init = std::env::current_exe().map_err(|e| Failure::new(1, e))?;
    let backends = Backends {
        kvm: Arc::new(VmmPower {
            program: beside("lupin-vmm", args.vmm.as_deref()),
            fence_bound: pod.fence_timeout,
        }),
        namespace: Arc::new(NamespacePower {
            init,
            agent: beside("lupin-guest-agent", args.agent.as_deref()),
        }),
    };
    let manager = take_charge(pod, &args, &backends)?;
    let Some(manager) = manager else {
        log::info!("the pod was brought down: nothing to stand by for");
        return Ok(());
    };
    let handle = manager.handle();
    // Before anything is started: a signal from here on brings the pod down in order.
    watch_signals(handle.clone(), Duration::from_millis(args.grace_ms))?;
    let socket = manager.runtime().control_socket();
    let server = Server::start(handle, &socket)
        .map_err(|e| Failure::new(1, format!("cannot serve {}: {e}", socket.display())))?;
    let http = serve_http(&api, tcp, &manager)?;
    log::info!(
        "in charge of {}{}",
        manager.runtime().path().display(),
        if manager.is_takeover() {
            ", taken over from a manager that died"
        } else {
            ""
        }
    );
    if let Some(mut ready) = ready {
        let _ = ready.write_all(b"ready\n");
    }
    tell_service_manager(manager.handle());
    end_old_backup();
    if wants_backup {
        keep_backup(backup, manager.handle())?;
    }
    let backup_of = manager.handle();
    let outcome = manager.run();
    drop(http);
    drop(server);
    match outcome? {
        Outcome::Down => Ok(()),
        Outcome::HandOver(program) => {
            let backup = backup_of.backup_pid.load(Ordering::Relaxed);
            Err(become_program(&program, backup))
        }
    }
}

/// Where HTTP is served over TCP. A token that cannot be used stops an operator's start, and not a
/// manager that nodes wait for.
fn http_over_tcp(pod: &Pod, args: &Serve) -> Result<Option<(SocketAddr, Token)>, Failure> {
    match http::tcp_of(&pod.api) {
        Ok(tcp) => Ok(tcp),
        Err(e)
            if args.standby || RuntimeFolder::needs_manager(&args.runtime_dir.join(&pod.name)) =>
        {
            log::error!("HTTP is not served over TCP: {e}");
            Ok(None)
        }
        Err(e) => Err(Failure::new(2, e)),
    }
}

/// Serves HTTP as the pod file says. A pod that is taken over is worth more than its interface.
fn serve_http(
    api: &Api,
    tcp: Option<(SocketAddr, Token)>,
    manager: &Manager,
) -> Result<Option<HttpServer>, Failure> {
    let socket = api
        .socket
        .then(|| manager.runtime().path().join(API_SOCKET));
    if socket.is_none() && tcp.is_none() {
        return Ok(None);
    }
    let options = http::Options {
        socket,
        tcp,
        patience: http::Patience::default(),
    };
    match HttpServer::start(manager.handle(), options) {
        Ok(server) => {
            if let Some(address) = server.tcp() {
                log::info!("HTTP is served on {address}, unencrypted and with a token");
            }
            Ok(Some(server))
        }
        Err(e) if manager.is_takeover() => {
            log::error!("HTTP is not served: {e}");
            Ok(None)
        }
        Err(e) => Err(Failure::new(1, format!("cannot serve HTTP: {e}"))),
    }
}

/// How long a backup waits for locks that the dead manager's unborn children hold.
const LOCKS_INHERITED: Duration = Duration::from_secs(30);

/// How long a manager that somebody started waits for the same, not knowing that one died.
const LOCKS_MAY_BE_INHERITED: Duration = Duration::from_secs(1);

/// Takes charge of the pod: at once, or as a backup when the time comes; `None` if it never does.
fn take_charge(pod: Pod, args: &Serve, backends: &Backends) -> Result<Option<Manager>, Failure> {
    let mut in_use: Option<Instant> = None;
    loop {
        if args.standby && standby::wait(&args.runtime_dir, &pod)? == Ending::PodIsDown {
            return Ok(None);
        }
        let mut inherited =
            |bound: Duration| in_use.get_or_insert_with(Instant::now).elapsed() < bound;
        match Manager::open(pod.clone(), &args.runtime_dir, backends.clone()) {
            // An operator was faster than this backup: there is another manager to stand by for.
            Err(ManagerError::Runtime(RuntimeError::Locked { .. })) if args.standby => {}
            // Or a process that the dead manager was about to start has copies of its locks still,
            // until it gets to notice that nobody will let it run.
            Err(ManagerError::Memory(MemoryError::InUse { .. }))
                if args.standby && inherited(LOCKS_INHERITED) => {}
            // So for whoever starts a manager right after the death of another one; but a living
            // one keeps its locks, and then the answer should not take long.
            Err(
                ManagerError::Runtime(RuntimeError::Locked { .. })
                | ManagerError::Memory(MemoryError::InUse { .. }),
            ) if !args.standby && inherited(LOCKS_MAY_BE_INHERITED) => {}
            outcome => return Ok(Some(outcome?)),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Executes another manager in this process; returns only if that fails.
fn become_program(program: &Path, backup: u32) -> Failure {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(program);
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        // What was for the start of this one: it does not stand by, and nobody waits for it.
        match arg.to_str() {
            Some("--standby") => {}
            Some("--ready-fd") => drop(args.next()),
            Some(text) if text.starts_with("--ready-fd=") => {}
            _ => drop(command.arg(arg)),
        }
    }
    // It stands by until the new manager is in charge, and takes over if that fails.
    command.env(OLD_BACKUP, backup.to_string());
    let error = command.exec();
    Failure::new(1, format!("cannot become {}: {error}", program.display()))
}

/// Ends the backup that the program before this one started in this process: this one starts its
/// own.
fn end_old_backup() {
    let pid = std::env::var(OLD_BACKUP).ok();
    // SAFETY: no other thread of this program reads or writes the environment.
    unsafe { std::env::remove_var(OLD_BACKUP) };
    let Some(pid) = pid.and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 1) else {
        return;
    };
    let pid = nix::unistd::Pid::from_raw(pid);
    // Only a child of ours keeps its number until it is waited for.
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    if waitid(Id::Pid(pid), flags).is_ok() {
        let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
    }
}

/// This program again, as a backup with the same arguments.
fn backup_command(args: &Serve) -> Result<std::process::Command, Failure> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().map_err(|e| Failure::new(1, e))?;
    let mut command = std::process::Command::new(program);
    command.arg("--standby");
    let paths = [
        ("--pod-file", &args.pod_file),
        ("--vmm", &args.vmm),
        ("--agent", &args.agent),
        ("--log-file", &args.log_file),
    ];
    for (flag, path) in paths {
        if let Some(path) = path {
            command.arg(flag).arg(path);
        }
    }
    command.arg("--runtime-dir").arg(&args.runtime_dir);
    command.args(["--grace-ms", &args.grace_ms.to_string()]);
    command.args(["--log-level", &args.log_level.to_string()]);
    // A group of its own: Ctrl-C at a terminal brings the pod down, which is not its business.
    command.stdin(Stdio::null()).process_group(0);
    // It is not what a service manager waits for.
    for variable in notify::VARIABLES {
        command.env_remove(variable);
    }
    Ok(command)
}

fn keep_backup(command: std::process::Command, handle: Arc<ManagerHandle>) -> Result<(), Failure> {
    let spawned = std::thread::Builder::new()
        .name("backup".into())
        .spawn(move || standby::keep(command, &handle.backup_pid));
    spawned.map_err(|e| Failure::new(1, format!("cannot keep a backup: {e}")))?;
    Ok(())
}

/// Owns the descriptor that the starter left for the message.
fn adopt_ready_fd(fd: RawFd) -> Result<File, Failure> {
    let bad = |why: &str| Failure::new(2, format!("--ready-fd {fd}: {why}"));
    if fd <= 2 {
        return Err(bad("standard descriptors cannot be used for this"));
    }
    // SAFETY: reading flags of a descriptor number has no memory effects, open or not.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    if !open {
        return Err(bad("there is no such descriptor"));
    }
    // SAFETY: it is open, was inherited on purpose (the operator named it), and at this point, at
    // the start of the program, nothing else of ours can own it: we have opened nothing yet.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a flag of a descriptor that we own. Nodes shall not inherit it.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    Ok(File::from(fd))
}

fn start_log(args: &Serve) -> Result<(), Failure> {
    let mut builder = env_logger::Builder::new();
    builder
        .filter_level(args.log_level)
        .format_timestamp_millis()
        .format_target(false);
    if let Some(path) = &args.log_file {
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|e| Failure::new(2, format!("cannot log to {}: {e}", path.display())))?;
        builder.target(env_logger::Target::Pipe(Box::new(file)));
    } else if journal::connected() {
        builder
            .format(|out, record| journal::write(out, record.level(), &record.args().to_string()));
    }
    builder.init();
    Ok(())
}

/// The first SIGTERM or SIGINT brings the pod down with the grace, the second without. SIGHUP
/// means that a terminal was closed, which is nothing to a daemon.
fn watch_signals(handle: Arc<impl PodControl + 'static>, grace: Duration) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::new(1, format!("cannot watch signals: {e}"));
    let signals = [SIGTERM, SIGINT, SIGHUP, SIGUSR2];
    let mut signals = signal_hook::iterator::Signals::new(signals).map_err(failed)?;
    let watch = move || {
        let mut grace = grace;
        for signal in signals.forever() {
            if signal == SIGHUP {
                log::info!("SIGHUP ignored");
                continue;
            }
            if signal == SIGUSR2 {
                if let Err(e) = handle.upgrade(None) {
                    log::error!("no upgrade: {e}");
                }
                continue;
            }
            log::info!("signal {signal}: bringing the pod down");
            // Best effort: it sees us end in any case.
            let _ = notify::notify("STOPPING=1\n");
            handle.down(grace);
            grace = Duration::ZERO;
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch)
        .map_err(failed)?;
    Ok(())
}

/// Tells the service manager, if there is one, that we are in charge, and from then on that the
/// loop moves, if it wants to know.
fn tell_service_manager(handle: Arc<ManagerHandle>) {
    if let Err(e) = notify::notify("READY=1\n") {
        log::warn!("the service manager cannot be told that we are ready: {e}");
    }
    let Some(limit) = notify::watchdog() else {
        return;
    };
    let beat = move || handle.fabric().state().manager_beat();
    let spawned = std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || notify::keep_watchdog(limit, beat));
    if let Err(e) = spawned {
        // It will end us in time, and start a manager that can.
        log::error!("nobody tells the service manager that we live: {e}");
    }
}
