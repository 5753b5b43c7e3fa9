//! Hooks: programs that an operator wants to be told of failures.
//!
//! A hook is called when it is decided what comes after a failure: nothing waits for it, and what
//! becomes of it changes nothing. It has a process group of its own, no input, its output goes to
//! `hook.log` in the node's folder, and it is ended after [`BOUND`]. It is called at least once for
//! a failure: whoever takes over calls it again unless the ring says that it ran.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a hook may run.
pub(super) const BOUND: Duration = Duration::from_secs(30);
/// Hooks of this manager that may run at once.
const MOST: usize = 16;
/// Between two looks at a hook.
const LOOK_EVERY: Duration = Duration::from_millis(20);

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// One call of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    /// Program and arguments.
    pub words: Vec<String>,
    pub environment: Vec<(String, String)>,
    /// Where its output goes.
    pub log: PathBuf,
}

/// What became of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HookOutcome {
    Done,
    Status(i32),
    Signal(i32),
    /// It was ended.
    Late,
    NotStarted(String),
}

impl Hook {
    /// Runs it to its end; `started` is told its pid.
    pub fn run(&self, started: impl FnOnce(u32)) -> HookOutcome {
        // Relaxed: a count that guards nothing else.
        let among = RUNNING.fetch_add(1, Ordering::Relaxed);
        let outcome = if among >= MOST {
            HookOutcome::NotStarted(format!("{MOST} hooks run already"))
        } else {
            self.run_alone(started)
        };
        RUNNING.fetch_sub(1, Ordering::Relaxed);
        outcome
    }

    fn run_alone(&self, started: impl FnOnce(u32)) -> HookOutcome {
        let not_started = |e: std::io::Error| HookOutcome::NotStarted(e.to_string());
        let Some((program, arguments)) = self.words.split_first() else {
            return HookOutcome::Done;
        };
        let log = File::options().create(true).append(true).open(&self.log);
        let output = log.and_then(|log| Ok((log.try_clone()?, log)));
        let (out, err) = match output {
            Ok((out, err)) => (Stdio::from(out), Stdio::from(err)),
            // No room for its output is no reason not to tell.
            Err(_) => (Stdio::null(), Stdio::null()),
        };
        let child = Command::new(program)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            .env_remove("NOTIFY_SOCKET")
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(e) => return not_started(e),
        };
        started(child.id());
        let until = Instant::now() + BOUND;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => {
                    return match (status.code(), status.signal()) {
                        (Some(0), _) => HookOutcome::Done,
                        (Some(code), _) => HookOutcome::Status(code),
                        (None, signal) => HookOutcome::Signal(signal.unwrap_or_default()),
                    };
                }
                Ok(None) if Instant::now() >= until => {
                    // The group has the pid of its first process, which is not reaped yet.
                    let group = nix::unistd::Pid::from_raw(child.id() as i32);
                    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
                    let _ = child.wait();
                    return HookOutcome::Late;
                }
                Ok(None) => std::thread::sleep(LOOK_EVERY),
                Err(e) => return not_started(e),
            }
        }
    }
}
