//! `pod exec`: a command inside a node, as if it ran here.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lupin_abi::port::ExecStatus;
use lupin_fabric::agent_link::{ExecMessage, ExecSpec};
use lupin_fabric::api::client::ExecStream;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::place::Place;
use super::{ExecArgs, Failure, status};

pub(super) fn exec(base: &Path, args: &ExecArgs) -> Result<i32, Failure> {
    // Of docker and podman: what the machinery has to say must not look like the command's word.
    let machinery = |failure: Failure| Failure::new(status::EXEC_FAILED, failure.message);
    let place = Place::find(base, &args.pod).map_err(machinery)?;
    let client = place.connect().map_err(machinery)?;
    // Before the command starts, so that no signal between its start and here is lost.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])
        .map_err(|e| Failure::new(status::EXEC_FAILED, format!("signals: {e}")))?;
    let spec = ExecSpec {
        argv: args.command.clone(),
        env: args.env.clone(),
        cwd: args.workdir.clone(),
    };
    let stream = client
        .exec(&args.node, spec)
        .map_err(|e| machinery(Failure::of_client(&place, &e)))?;
    let stream = Arc::new(stream);
    if args.no_stdin {
        // An error means that the command is over, which the reader below learns.
        let _ = stream.input.close();
    } else {
        let of_thread = stream.clone();
        spawn("stdin", move || feed(&of_thread, io::stdin().lock()))?;
    }
    let of_thread = stream.clone();
    let patience = args.kill_after;
    spawn("signals", move || forward(&of_thread, signals, patience))?;
    let command = &args.command[0];
    loop {
        let message = stream.recv().map_err(|e| {
            let message = format!("pod {}: {e}; {command} was given up", place.name);
            Failure::new(status::EXEC_FAILED, message)
        })?;
        match message {
            ExecMessage::Output { stderr, data } => {
                let written = if stderr {
                    io::stderr().lock().write_all(&data)
                } else {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&data).and_then(|()| stdout.flush())
                };
                if let Err(e) = written {
                    // As if the command itself had written to a closed pipe.
                    let code = match e.kind() {
                        io::ErrorKind::BrokenPipe => 128 + libc::SIGPIPE,
                        _ => status::EXEC_FAILED,
                    };
                    return Ok(code);
                }
            }
            ExecMessage::Exited(ended) => return outcome(command, &args.node, ended),
            ExecMessage::Started { .. } | ExecMessage::Credit { .. } => {}
        }
    }
}

/// The threads end with the process: they wait for a terminal that may say nothing for ever.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
    spawned
        .map(|_| ())
        .map_err(|e| Failure::new(status::EXEC_FAILED, format!("cannot start a thread: {e}")))
}

/// Standard input to the command, until the end of either.
fn feed(stream: &ExecStream, mut input: impl Read) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => {
                if !matches!(stream.input.write(&buffer[..bytes]), Ok(true)) {
                    return;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // No standard input, or none that can be read.
            Err(_) => break,
        }
    }
    let _ = stream.input.close();
}

/// Signals to the command. Whoever wants this program to end gets that, whatever the command makes
/// of it: the connection closes with the process, and that ends the command.
fn forward(stream: &ExecStream, mut signals: Signals, patience: Duration) {
    let mut wish = Wish::default();
    for signal in signals.forever() {
        if let Some(status) = wish.hear(signal) {
            std::process::exit(status);
        }
        if stream.input.signal(signal).is_err() {
            return;
        }
        if wish.has_begun(signal) {
            let end = move || {
                std::thread::sleep(patience);
                eprintln!("lupin-vmm: the command did not end in {patience:?}: ending it");
                std::process::exit(128 + signal);
            };
            // Without a thread there is still the second signal.
            let _ = spawn("patience", end);
        }
    }
}

/// Whether somebody wants this program to end, and not only the command to hear something.
/// SIGINT and SIGQUIT come from a terminal, and are the command's to take as it likes.
#[derive(Debug, Default)]
struct Wish {
    heard: u32,
}

impl Wish {
    /// A signal has come; the exit status, if the program is to end now.
    fn hear(&mut self, signal: i32) -> Option<i32> {
        if !matches!(signal, SIGTERM | SIGHUP) {
            return None;
        }
        self.heard += 1;
        (self.heard > 1).then_some(128 + signal)
    }

    /// Whether the signal that was just heard is the first of its kind.
    fn has_begun(&self, signal: i32) -> bool {
        self.heard == 1 && matches!(signal, SIGTERM | SIGHUP)
    }
}

/// How the command ended, as an exit status.
fn outcome(command: &str, node: &str, ended: ExecStatus) -> Result<i32, Failure> {
    match ended {
        // Linux keeps eight bits.
        ExecStatus::Code(code) => Ok(code & 0xff),
        ExecStatus::Signal(signal) => Ok(128 + (signal & 0x7f)),
        ExecStatus::NotStarted(errno, why) => {
            let code = match errno {
                libc::ENOENT => status::NOT_FOUND,
                libc::EACCES | libc::ENOEXEC | libc::EISDIR => status::NOT_EXECUTABLE,
                _ => status::EXEC_FAILED,
            };
            let message = format!("node {node} cannot run {command}: {why}");
            Err(Failure::new(code, message))
        }
        ExecStatus::NodeLost => {
            let message = format!("node {node} was lost while it ran {command}");
            Err(Failure::new(status::EXEC_FAILED, message))
        }
    }
}

/// Parses `NAME=VALUE`.
pub(super) fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_become_exit_statuses() {
        let code = |ended| match outcome("cmd", "n1", ended) {
            Ok(code) => code,
            Err(failure) => failure.status,
        };
        assert_eq!(code(ExecStatus::Code(0)), 0);
        assert_eq!(code(ExecStatus::Code(255)), 255);
        assert_eq!(code(ExecStatus::Signal(15)), 143);
        assert_eq!(code(ExecStatus::NotStarted(2, "x".into())), 127);
        assert_eq!(code(ExecStatus::NotStarted(13, "x".into())), 126);
        assert_eq!(code(ExecStatus::NotStarted(12, "x".into())), 125);
        assert_eq!(code(ExecStatus::NodeLost), 125);
        // A node may say anything.
        assert!((0..256).contains(&code(ExecStatus::Code(i32::MIN))));
        assert!((0..256).contains(&code(ExecStatus::Signal(i32::MAX))));
    }

    #[test]
    fn the_second_wish_to_end_is_final_and_a_terminal_wishes_nothing() {
        let mut wish = Wish::default();
        for _ in 0..5 {
            assert_eq!(wish.hear(SIGINT), None);
            assert_eq!(wish.hear(SIGQUIT), None);
            assert!(!wish.has_begun(SIGINT));
        }
        assert_eq!(wish.hear(SIGTERM), None);
        assert!(wish.has_begun(SIGTERM));
        assert_eq!(wish.hear(SIGINT), None);
        assert!(!wish.has_begun(SIGINT), "one wait is enough");
        assert_eq!(wish.hear(SIGHUP), Some(129));
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(parse_variable("=x").is_err() && parse_variable("x").is_err());
    }
}
