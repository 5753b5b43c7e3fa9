//! Commands that the manager runs on this node.
//!
//! ```text
//!   Exec -> Started -> Output*, Credit* -> (process over, pipes drained) -> Exited
//! ```
//!
//! Each command is a process group of its own with three pipes. Credit bounds what is in flight
//! both ways, so that a stalled reader at the far end stops the command, as a full pipe would,
//! and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use lupin_abi::port::{ExecStatus, INITIAL_CREDIT, MAX_CHUNK, ToManager};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, read, write};

use super::outbox::Outbox;
use crate::poll::{EDGES, Poller, Source};

/// Commands at a time.
pub const MAX_COMMANDS: usize = 64;
/// How long commands may live on after SIGHUP when the manager is gone.
const HANGUP_GRACE: Duration = Duration::from_secs(2);
/// How long output is awaited after the end of a command whose pipes somebody else (a process
/// that it left in the background) keeps open.
const LINGER: Duration = Duration::from_millis(500);

/// Breaks the rules of the stream; the connection is given up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The channel is in use.
    #[error("channel {0} is in use")]
    ChannelInUse(u32),
    /// More input than was granted.
    #[error("channel {channel}: {bytes} bytes of input exceed the credit of {credit}")]
    Credit {
        /// Channel.
        channel: u32,
        /// Bytes sent.
        bytes: usize,
        /// Bytes allowed.
        credit: u32,
    },
}

#[derive(Debug)]
struct Command {
    channel: u32,
    /// Process id, and id of its group.
    pid: Pid,
    stdin: Option<OwnedFd>,
    input: VecDeque<u8>,
    input_ended: bool,
    /// What the manager may still send.
    input_credit: u32,
    /// Standard output and standard error.
    outputs: [Option<OwnedFd>; 2],
    /// What may still be sent to the manager.
    output_credit: u32,
    ended: Option<(ExecStatus, Instant)>,
}

/// A command whose manager is gone.
#[derive(Debug)]
struct Doomed {
    pid: Pid,
    kill_at: Instant,
}

/// The commands that run, by a number that is never used twice in a row.
#[derive(Debug, Default)]
pub struct Commands {
    running: BTreeMap<u32, Command>,
    next: u32,
    doomed: Vec<Doomed>,
}

impl Commands {
    fn by_channel(&mut self, channel: u32) -> Option<(&u32, &mut Command)> {
        self.running.iter_mut().find(|(_, c)| c.channel == channel)
    }

    /// Starts a command, or says that it was not started.
    ///
    /// # Errors
    /// [`Violation::ChannelInUse`].
    pub fn exec(
        &mut self,
        poller: &Poller,
        out: &mut Outbox,
        channel: u32,
        argv: &[String],
        env: Vec<(String, String)>,
        cwd: Option<String>,
    ) -> Result<(), Violation> {
        if self.by_channel(channel).is_some() {
            return Err(Violation::ChannelInUse(channel));
        }
        let started = if self.running.len() + self.doomed.len() >= MAX_COMMANDS {
            let text = format!("{MAX_COMMANDS} commands run on this node already");
            Err((libc::EAGAIN, text))
        } else {
            spawn(argv, env, cwd)
        };
        let (pid, stdin, outputs) = match started {
            Ok(started) => started,
            Err((errno, text)) => {
                info!("exec: {:?}: {text}", argv.first());
                let status = ExecStatus::NotStarted(errno, text);
                out.push(&ToManager::Exited { channel, status });
                return Ok(());
            }
        };
        // Arguments may be long, and not for the log.
        info!("exec: {:?} is process {pid}", argv[0]);
        self.next = self.next.wrapping_add(1);
        let id = self.next;
        for fd in [Some(&stdin), outputs[0].as_ref(), outputs[1].as_ref()]
            .into_iter()
            .flatten()
        {
            if let Err(error) = poller.add(fd, Source::Command(id), EDGES) {
                warn!("exec: a pipe of process {pid} is not watched: {error}");
            }
        }
        out.push(&ToManager::Started {
            channel,
            pid: pid.as_raw().unsigned_abs(),
        });
        let command = Command {
            channel,
            pid,
            stdin: Some(stdin),
            input: VecDeque::new(),
            input_ended: false,
            input_credit: INITIAL_CREDIT,
            outputs,
            output_credit: INITIAL_CREDIT,
            ended: None,
        };
        self.running.insert(id, command);
        Ok(())
    }

    /// Input for a command; empty means end of file. For a channel that is not in use, nothing
    /// happens: its command ended while the input was on its way.
    ///
    /// # Errors
    /// [`Violation::Credit`].
    pub fn input(&mut self, out: &mut Outbox, channel: u32, data: &[u8]) -> Result<(), Violation> {
        let Some((_, command)) = self.by_channel(channel) else {
            return Ok(());
        };
        let credit = command.input_credit;
        command.input_credit = u32::try_from(data.len())
            .ok()
            .and_then(|bytes| credit.checked_sub(bytes))
            .ok_or(Violation::Credit {
                channel,
                bytes: data.len(),
                credit,
            })?;
        command.input_ended |= data.is_empty();
        command.input.extend(data);
        command.feed(out);
        Ok(())
    }

    /// The manager took output.
    pub fn credit(&mut self, out: &mut Outbox, channel: u32, bytes: u32) {
        let Some((&id, command)) = self.by_channel(channel) else {
            return;
        };
        command.output_credit = command.output_credit.saturating_add(bytes);
        self.pump(out, id);
    }

    /// Signals the process group of a command that has not ended.
    pub fn signal(&mut self, channel: u32, signal: i32) {
        let Some((_, command)) = self.by_channel(channel) else {
            return;
        };
        match Signal::try_from(signal) {
            // An ended leader is reaped, and its number may belong to another group.
            Ok(signal) if command.ended.is_none() => {
                let _ = killpg(command.pid, signal);
            }
            Ok(_) => {}
            Err(_) => warn!("exec: channel {channel}: there is no signal {signal}"),
        }
    }

    /// A pipe of a command became ready.
    pub fn on_ready(&mut self, out: &mut Outbox, id: u32) {
        if let Some(command) = self.running.get_mut(&id) {
            command.feed(out);
        }
        self.pump(out, id);
    }

    /// There is room in the stream again.
    pub fn pump_all(&mut self, out: &mut Outbox) {
        let ids: Vec<u32> = self.running.keys().copied().collect();
        for id in ids {
            self.pump(out, id);
        }
    }

    /// Moves output on, and ends the command if that was all.
    fn pump(&mut self, out: &mut Outbox, id: u32) {
        let Some(command) = self.running.get_mut(&id) else {
            return;
        };
        command.drain(out);
        if command.outputs.iter().all(Option::is_none)
            && let Some((status, _)) = &command.ended
        {
            let (channel, status) = (command.channel, status.clone());
            debug!("exec: process {} is over: {status:?}", command.pid);
            out.push(&ToManager::Exited { channel, status });
            self.running.remove(&id);
        }
    }

    /// The processes that [`reaped`](Self::reaped) wants to know about.
    pub fn pids(&self) -> Vec<Pid> {
        let running = self.running.values().filter(|c| c.ended.is_none());
        running
            .map(|c| c.pid)
            .chain(self.doomed.iter().map(|d| d.pid))
            .collect()
    }

    /// A process has ended and is about to be reaped: until then its number is its own.
    pub fn reaped(&mut self, out: &mut Outbox, status: WaitStatus) {
        let (pid, status) = match status {
            WaitStatus::Exited(pid, code) => (pid, ExecStatus::Code(code)),
            WaitStatus::Signaled(pid, signal, _) => (pid, ExecStatus::Signal(signal as i32)),
            _ => return,
        };
        if let Some(at) = self.doomed.iter().position(|d| d.pid == pid) {
            // What it left behind in its group goes with it.
            let _ = killpg(pid, Signal::SIGKILL);
            self.doomed.swap_remove(at);
        }
        let found = self
            .running
            .iter_mut()
            .find(|(_, c)| c.pid == pid && c.ended.is_none());
        if let Some((&id, command)) = found {
            command.ended = Some((status, Instant::now()));
            command.stdin = None;
            self.pump(out, id);
        }
    }

    /// The manager is gone: commands are told to end, and killed if they do not.
    pub fn hang_up(&mut self, now: Instant) {
        for (_, command) in std::mem::take(&mut self.running) {
            if command.ended.is_some() {
                continue;
            }
            info!("exec: process {} loses its manager", command.pid);
            let _ = killpg(command.pid, Signal::SIGHUP);
            // Stopped processes do not act on a signal before they go on.
            let _ = killpg(command.pid, Signal::SIGCONT);
            self.doomed.push(Doomed {
                pid: command.pid,
                kill_at: now + HANGUP_GRACE,
            });
        }
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, out: &mut Outbox, now: Instant) {
        for doomed in &mut self.doomed {
            if now >= doomed.kill_at {
                let _ = killpg(doomed.pid, Signal::SIGKILL);
                doomed.kill_at = now + HANGUP_GRACE;
            }
        }
        let ids: Vec<u32> = self
            .running
            .iter_mut()
            .filter_map(|(id, command)| command.stop_lingering(now).then_some(*id))
            .collect();
        for id in ids {
            self.pump(out, id);
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let lingering = self
            .running
            .values()
            .filter_map(|c| Some(c.ended.as_ref()?.1 + LINGER));
        lingering.chain(self.doomed.iter().map(|d| d.kill_at)).min()
    }
}

impl Command {
    /// Writes input to the command.
    fn feed(&mut self, out: &mut Outbox) {
        let mut taken = 0;
        while let Some(stdin) = &self.stdin {
            let (front, _) = self.input.as_slices();
            if front.is_empty() {
                if self.input_ended {
                    self.stdin = None;
                }
                break;
            }
            match write(stdin, front) {
                Ok(count) => {
                    self.input.drain(..count);
                    taken += count;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                // The command does not read any more.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            // Input without a reader counts as taken, so that the far end does not stall.
            taken += self.input.len();
            self.input.clear();
        }
        if let Ok(bytes @ 1..) = u32::try_from(taken) {
            self.input_credit = self.input_credit.saturating_add(bytes);
            let channel = self.channel;
            out.push(&ToManager::Credit { channel, bytes });
        }
    }

    /// Reads output for as long as there are output, credit and room in the stream.
    fn drain(&mut self, out: &mut Outbox) {
        let mut buffer = vec![0; MAX_CHUNK];
        for (index, output) in self.outputs.iter_mut().enumerate() {
            while let Some(fd) = output
                && self.output_credit > 0
                && !out.is_full()
            {
                let limit = MAX_CHUNK.min(self.output_credit as usize);
                match read(&*fd, &mut buffer[..limit]) {
                    Ok(0) => *output = None,
                    Ok(count) => {
                        self.output_credit -= count as u32;
                        out.push(&ToManager::Output {
                            channel: self.channel,
                            stderr: index == 1,
                            data: buffer[..count].to_vec(),
                        });
                    }
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(error) => {
                        warn!("exec: output of process {}: {error}", self.pid);
                        *output = None;
                    }
                }
            }
        }
    }

    /// Closes pipes that are empty some time after the command's end, but still held open by
    /// others; true if there is something to pump.
    fn stop_lingering(&mut self, now: Instant) -> bool {
        let Some((_, ended)) = &mut self.ended else {
            return false;
        };
        if now.saturating_duration_since(*ended) < LINGER {
            return false;
        }
        // Whatever happens now, the next look is not at once.
        *ended = now;
        for output in &mut self.outputs {
            if output.as_ref().is_some_and(|fd| unread(fd) == 0) {
                *output = None;
            }
        }
        true
    }
}

/// Bytes that wait in a pipe.
fn unread(fd: &OwnedFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(fd),
            libc::FIONREAD,
            &mut count,
        )
    };
    if result == 0 {
        usize::try_from(count).unwrap_or(0)
    } else {
        0
    }
}

type Spawned = (Pid, OwnedFd, [Option<OwnedFd>; 2]);

fn spawn(
    argv: &[String],
    env: Vec<(String, String)>,
    cwd: Option<String>,
) -> Result<Spawned, (i32, String)> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err((libc::EINVAL, "no program is named".into()));
    };
    let error = |e: io::Error| (e.raw_os_error().unwrap_or(libc::EINVAL), e.to_string());
    let cwd = cwd.as_deref().unwrap_or("/");
    // With a folder that is not there, the error of the start would name the program.
    if let Err(e) = std::fs::metadata(cwd) {
        let (errno, text) = error(e);
        return Err((errno, format!("working directory {cwd}: {text}")));
    }
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .envs(env)
        .current_dir(cwd)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(error)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    // The agent may be exempt from the kernel's killing when memory runs out; commands are not.
    let exempt = std::fs::read_to_string("/proc/self/oom_score_adj")
        .is_ok_and(|score| score.starts_with('-'));
    if exempt && let Err(e) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
        debug!("exec: process {pid} keeps the agent's oom_score_adj: {e}");
    }
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        return Err((libc::EPIPE, "the pipes were not made".into()));
    };
    let (stdin, stdout, stderr): (OwnedFd, OwnedFd, OwnedFd) =
        (stdin.into(), stdout.into(), stderr.into());
    for fd in [&stdin, &stdout, &stderr] {
        // Pipes take every flag that there is; a blocking end would only be slow.
        if let Err(e) = fcntl(fd.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)) {
            warn!("exec: a pipe of process {pid} blocks: {e}");
        }
    }
    Ok((pid, stdin, [Some(stdout), Some(stderr)]))
}

#[cfg(test)]
#[path = "exec_test.rs"]
mod exec_test;
