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

use lupin_abi::event::{Cause, EventKind};
use lupin_abi::{Event, Generation, NodeId};

use super::record::Note;
use super::state::{Core, Effect, nanos};

/// How long a hook may run.
const BOUND: Duration = Duration::from_secs(30);
/// Hooks of this manager that may run at once.
const MOST: usize = 16;
/// A failure that is older than this is not told by a manager that takes over.
const NEWS_NS: u64 = 60_000_000_000;
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

impl Core {
    /// Tells the hook of a node, if it has one, that a life has failed and what comes now.
    pub fn call_hook(&mut self, id: NodeId, old: Generation, cause: Cause, next: Option<Duration>) {
        if self.is_going_down() || cause == Cause::PodDown {
            return;
        }
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let words = &node.spec.policies.of(cause).hook;
        if words.is_empty() {
            return;
        }
        let is_it = |event: &Event| {
            event.kind == EventKind::FailureDetected
                && event.node == id.get()
                && event.old_generation == old
        };
        let found = self.recorder.newest_first().find(is_it);
        let evidence = found.map(|event| event.evidence).unwrap_or_default();
        let evidence: Vec<_> = evidence.iter().map(u64::to_string).collect();
        let (action, delay) = match next {
            Some(delay) => ("restart", delay.as_millis()),
            None => ("down", 0),
        };
        let environment = [
            ("LUPIN_POD", self.pod.name.clone()),
            ("LUPIN_NODE", id.to_string()),
            ("LUPIN_NODE_NAME", node.spec.name.clone()),
            ("LUPIN_GENERATION", old.to_string()),
            ("LUPIN_CAUSE", cause.to_string()),
            ("LUPIN_EVIDENCE", evidence.join(" ")),
            (
                "LUPIN_DETAIL",
                node.detail.clone().unwrap_or_default().replace('\0', ""),
            ),
            ("LUPIN_ACTION", action.into()),
            ("LUPIN_DELAY_MS", delay.to_string()),
        ];
        let hook = Hook {
            words: words.clone(),
            environment: environment.map(|(name, value)| (name.into(), value)).into(),
            log: node.folder.path().join("hook.log"),
        };
        self.effects.push(Effect::Hook(id, old, hook));
    }

    /// Calls the hooks of failures that a dead manager had told to everybody else.
    pub fn call_missed_hooks(&mut self) {
        let now = self.now();
        let missed = self.nodes.keys().filter_map(|id| {
            let of_node = |event: &Event| event.node == id.get();
            let decided = self.recorder.newest_first().find(|event| {
                of_node(event) && matches!(event.kind, EventKind::NodeRestarting | EventKind::NodeDown)
            })?;
            let (old, cause) = (decided.old_generation, decided.cause);
            let is_news = now.saturating_sub(decided.time_ns) < NEWS_NS;
            let failed = decided.generation > old && is_news;
            let told = self.recorder.has(EventKind::HookStarted, *id, old);
            // What this manager has just decided itself calls the hook anyway.
            let called = |effect: &Effect| matches!(effect, Effect::Hook(of, life, _) if (of, *life) == (id, old));
            let called = self.effects.iter().any(called);
            let delay = Duration::from_millis(decided.evidence[0]);
            let next = (decided.kind == EventKind::NodeRestarting).then_some(delay);
            (failed && !told && !called).then_some((*id, old, cause, next))
        });
        for (id, old, cause, next) in missed.collect::<Vec<_>>() {
            self.call_hook(id, old, cause, next);
        }
    }

    /// A hook runs.
    pub fn hook_started(&mut self, id: NodeId, old: Generation, pid: u32) {
        let note = Note::of(old, Cause::None, &[pid.into()]);
        self.recorder.event(EventKind::HookStarted, Some(id), note);
    }

    /// A hook is over.
    pub fn hook_ended(
        &mut self,
        id: NodeId,
        old: Generation,
        outcome: &HookOutcome,
        took: Duration,
    ) {
        let (code, signal, why) = match outcome {
            HookOutcome::Done => return,
            HookOutcome::Status(code) => (*code as u32, 0, format!("it ended with status {code}")),
            HookOutcome::Signal(signal) => {
                (0, *signal as u32, format!("signal {signal} killed it"))
            }
            HookOutcome::Late => (0, 9, format!("it was ended after {} s", BOUND.as_secs())),
            HookOutcome::NotStarted(why) => (0, 0, why.clone()),
        };
        log::error!("the hook of node {id} for the end of generation {old} failed: {why}");
        let evidence = [code.into(), signal.into(), nanos(took)];
        let note = Note::of(old, Cause::None, &evidence);
        self.recorder.event(EventKind::HookFailed, Some(id), note);
    }
}
