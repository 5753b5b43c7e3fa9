//! The machine that runs the command: where things are, talking to the user,
//! child processes and Ctrl-C.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};

/// Says something to the user, on stderr: stdout belongs to the programs that are run.
macro_rules! say {
    ($($message:tt)*) => { eprintln!("xtask: {}", format_args!($($message)*)) };
}
pub(crate) use say;

/// How often waiting loops look whether the user wants to stop.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// How long a command may take to clean up after it was asked to end.
const PATIENCE: Duration = Duration::from_secs(15);

/// A child process could not be run, failed, or the user stopped everything.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("cannot start {program}: {source}{hint}")]
    Start {
        program: String,
        source: io::Error,
        hint: &'static str,
    },
    #[error("cannot wait for {program}: {source}")]
    Wait { program: String, source: io::Error },
    #[error("'{command}' failed ({status}); its own messages are above")]
    Failed { command: String, status: ExitStatus },
    #[error("'{command}' was stopped at the time limit")]
    TimeLimit { command: String },
    #[error("interrupted")]
    Interrupted,
}

/// The top of the checkout.
pub(crate) fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("ci/ lies in the checkout")
}

/// Where downloads are kept: `LUPIN_CACHE`, or `.cache` in the checkout.
pub(crate) fn cache_dir() -> PathBuf {
    match std::env::var_os("LUPIN_CACHE") {
        Some(dir) if !dir.is_empty() => {
            std::path::absolute(&dir).unwrap_or_else(|_| PathBuf::from(dir))
        }
        _ => checkout().join(".cache"),
    }
}

/// Whether the user asked to stop, with Ctrl-C, SIGTERM or a closed terminal.
pub(crate) fn interrupted() -> bool {
    stop_flag().load(Ordering::Relaxed)
}

/// From now on, Ctrl-C and its like set a flag instead of ending the process.
pub(crate) fn catch_signals() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signal_hook::flag::register(signal as i32, Arc::clone(stop_flag()))
            .expect("these signals can be caught");
    }
}

fn stop_flag() -> &'static Arc<AtomicBool> {
    static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    STOP.get_or_init(Arc::default)
}

/// Asks the kernel to send us `signal` when the process that started us dies.
pub(crate) fn die_with_parent(signal: Signal) {
    // It only fails for a bad signal number.
    let _ = prctl::set_pdeathsig(signal);
}

/// Sends the child `signal` when this process ends, however it ends.
///
/// The kernel watches the *thread* that starts the child, so start it from the main thread.
fn tie_to_us(command: &mut Command, signal: Signal) -> &mut Command {
    let us = Pid::this();
    let tie = move || {
        prctl::set_pdeathsig(signal)?;
        // We may have died before the line above took effect.
        if getppid() == us {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: `tie` runs in the forked child, where only async-signal-safe calls are allowed. It
    // makes two system calls and allocates nothing.
    unsafe { command.pre_exec(tie) }
}

/// The standard error of this process, to be a child's standard output.
pub(crate) fn our_stderr() -> Stdio {
    match io::stderr().as_fd().try_clone_to_owned() {
        Ok(fd) => Stdio::from(fd),
        Err(_) => Stdio::null(),
    }
}

/// Runs a command to its end, with its output shown, and returns its status.
///
/// When the user stops us, the command is asked to end, and made to after [`PATIENCE`].
pub(crate) fn run(command: &mut Command) -> Result<ExitStatus, RunError> {
    run_until(command, None)
}

/// Like [`run`], but the command is stopped at `deadline`.
pub(crate) fn run_until(
    command: &mut Command,
    deadline: Option<Instant>,
) -> Result<ExitStatus, RunError> {
    let program = command.get_program().to_string_lossy().into_owned();
    // It may have something to clean up.
    let mut child = start_tied(command, Signal::SIGTERM)?;
    let mut asked: Option<Instant> = None;
    loop {
        let stop = if interrupted() {
            Some(RunError::Interrupted)
        } else if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            Some(RunError::TimeLimit {
                command: words(command),
            })
        } else {
            None
        };
        match (child.try_wait(), stop) {
            (Ok(Some(status)), None) => return Ok(status),
            (Ok(Some(_)), Some(stop)) => return Err(stop),
            (Ok(None), None) => {}
            (Ok(None), Some(_)) => match asked {
                None => {
                    terminate(&child);
                    asked = Some(Instant::now());
                }
                Some(since) if since.elapsed() > PATIENCE => {
                    // It may just have ended; then there is nothing to kill.
                    let _ = child.kill();
                }
                Some(_) => {}
            },
            (Err(source), _) => return Err(RunError::Wait { program, source }),
        }
        std::thread::sleep(POLL);
    }
}

/// Like [`run`], but an unsuccessful end is an error.
pub(crate) fn run_ok(command: &mut Command) -> Result<(), RunError> {
    run_ok_until(command, None)
}

/// Like [`run_until`], but an unsuccessful end is an error.
pub(crate) fn run_ok_until(
    command: &mut Command,
    deadline: Option<Instant>,
) -> Result<(), RunError> {
    let status = run_until(command, deadline)?;
    if status.success() {
        Ok(())
    } else {
        Err(RunError::Failed {
            command: words(command),
            status,
        })
    }
}

/// Runs a command and returns what it printed on stdout. An unsuccessful end is an error.
pub(crate) fn output_of(command: &mut Command) -> Result<String, RunError> {
    let output = output(command)?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(RunError::Failed {
            command: words(command),
            status: output.status,
        })
    }
}

/// Runs a command that ends soon and collects its stdout.
pub(crate) fn output(command: &mut Command) -> Result<Output, RunError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = start(command.stdout(Stdio::piped()))?;
    let output = child
        .wait_with_output()
        .map_err(|source| RunError::Wait { program, source })?;
    if interrupted() {
        Err(RunError::Interrupted)
    } else {
        Ok(output)
    }
}

/// Starts a command that dies with us.
pub(crate) fn start(command: &mut Command) -> Result<Child, RunError> {
    start_tied(command, Signal::SIGKILL)
}

/// Starts a command that gets `signal` when we die.
fn start_tied(command: &mut Command, signal: Signal) -> Result<Child, RunError> {
    tie_to_us(command, signal).spawn().map_err(|source| {
        let hint = if source.kind() == io::ErrorKind::NotFound {
            " (is it installed, and in PATH?)"
        } else {
            ""
        };
        RunError::Start {
            program: command.get_program().to_string_lossy().into_owned(),
            source,
            hint,
        }
    })
}

fn terminate(child: &Child) {
    // An ended child is not reaped before the next try_wait, so the id is still its own.
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
}

/// The program that runs now, to be put elsewhere. A name may no longer lead to it: cargo replaces
/// the file when it builds the workspace.
pub(crate) fn this_program() -> &'static Path {
    Path::new("/proc/self/exe")
}

/// `program`, as root: as it is, or through sudo.
pub(crate) fn as_root(program: &Path) -> Command {
    if nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    command
}

/// Cargo, the one that started us if it was cargo.
pub(crate) fn cargo(verb: &str) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.arg(verb).current_dir(checkout());
    command
}

/// A command as one would type it, for messages.
pub(crate) fn words(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
