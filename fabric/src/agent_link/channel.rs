//! One command's end of the link: what arrived for it and what it may still send.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use lupin_abi::port::{ExecStatus, INITIAL_CREDIT, MAX_CHUNK};

use super::message::ExecMessage;

/// Consumed bytes after which credit is renewed: few enough that the sender never runs dry
/// while the consumer keeps up, many enough that credit frames stay rare.
const RENEW_AT: u32 = INITIAL_CREDIT / 4;

/// Chunks in the queue above which small ones are merged, so that single bytes, alternating
/// between output and error, do not cost a queue entry each.
const MERGE_ABOVE: usize = 1024;

/// Why an agent's frame for a channel breaks the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("{sent} bytes of output on channel {channel}, beyond its credit")]
    Output { channel: u32, sent: usize },
    #[error("{granted} bytes of credit on channel {channel}, but only {sent} were sent")]
    Credit {
        channel: u32,
        granted: u32,
        sent: u32,
    },
}

#[derive(Debug)]
pub(super) struct Channel {
    pub(super) id: u32,
    state: Mutex<ChannelState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ChannelState {
    started: Option<u32>,
    output: VecDeque<(bool, Vec<u8>)>,
    /// Bytes that the agent may send.
    output_credit: u32,
    /// Bytes consumed since credit was last renewed.
    consumed: u32,
    /// Bytes that we may send.
    stdin_credit: u32,
    /// Credit that arrived and was not told to the consumer yet.
    new_credit: u32,
    stdin_closed: bool,
    ended: Option<ExecStatus>,
    /// Nobody will read any more: output is thrown away.
    abandoned: bool,
    /// The end was told.
    over: bool,
}

impl Channel {
    pub(super) fn new(id: u32) -> Self {
        Self {
            id,
            state: Mutex::new(ChannelState {
                started: None,
                output: VecDeque::new(),
                output_credit: INITIAL_CREDIT,
                consumed: 0,
                stdin_credit: INITIAL_CREDIT,
                new_credit: 0,
                stdin_closed: false,
                ended: None,
                abandoned: false,
                over: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent started the command.
    pub(super) fn started(&self, pid: u32) {
        self.lock().started = Some(pid);
        self.changed.notify_all();
    }

    /// Output arrived. Returns the credit to give back at once, for an abandoned command.
    pub(super) fn output(&self, stderr: bool, data: Vec<u8>) -> Result<u32, Violation> {
        let mut state = self.lock();
        let bytes = data.len();
        let violation = Violation::Output {
            channel: self.id,
            sent: bytes,
        };
        let Some(left) = u32::try_from(bytes)
            .ok()
            .and_then(|bytes| state.output_credit.checked_sub(bytes))
        else {
            return Err(violation);
        };
        state.output_credit = left;
        if state.abandoned {
            return Ok(state.consume(bytes));
        }
        if bytes > 0 {
            state.queue(stderr, data);
            self.changed.notify_all();
        }
        Ok(0)
    }

    /// The command took bytes of its standard input.
    pub(super) fn credit(&self, bytes: u32) -> Result<(), Violation> {
        let mut state = self.lock();
        let sent = INITIAL_CREDIT - state.stdin_credit;
        if bytes > sent {
            return Err(Violation::Credit {
                channel: self.id,
                granted: bytes,
                sent,
            });
        }
        state.stdin_credit += bytes;
        state.new_credit += bytes;
        self.changed.notify_all();
        Ok(())
    }

    /// The command is over. The first end counts.
    pub(super) fn end(&self, status: ExecStatus) {
        self.lock().ended.get_or_insert(status);
        self.changed.notify_all();
    }

    /// Nobody will read any more. Returns the credit to give back for what lay in the queue, or
    /// `None` if the command was over or abandoned before.
    pub(super) fn abandon(&self) -> Option<u32> {
        let mut state = self.lock();
        if state.abandoned {
            return None;
        }
        state.abandoned = true;
        let bytes: usize = state.output.iter().map(|(_, data)| data.len()).sum();
        state.output.clear();
        let credit = state.consume(bytes);
        self.changed.notify_all();
        state.ended.is_none().then_some(credit)
    }

    /// Waits for the next message; with it comes the credit to give back. `None` after the end
    /// was told, or once the command was abandoned.
    pub(super) fn next(&self) -> Option<(ExecMessage, u32)> {
        let mut state = self.lock();
        loop {
            if state.over || state.abandoned {
                return None;
            }
            if let Some(pid) = state.started.take() {
                return Some((ExecMessage::Started { pid }, 0));
            }
            if state.new_credit > 0 {
                let bytes = std::mem::take(&mut state.new_credit);
                return Some((ExecMessage::Credit { bytes }, 0));
            }
            if let Some((stderr, data)) = state.output.pop_front() {
                let credit = state.consume(data.len());
                return Some((ExecMessage::Output { stderr, data }, credit));
            }
            if let Some(status) = state.ended.clone() {
                state.over = true;
                return Some((ExecMessage::Exited(status), 0));
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes credit for standard input.
    ///
    /// # Errors
    /// The credit there is, if it does not suffice.
    pub(super) fn take_stdin_credit(&self, bytes: usize) -> Result<(), u32> {
        let mut state = self.lock();
        let left = u32::try_from(bytes)
            .ok()
            .and_then(|bytes| state.stdin_credit.checked_sub(bytes));
        state.stdin_credit = left.ok_or(state.stdin_credit)?;
        Ok(())
    }

    /// Marks standard input as closed; whether it was open.
    pub(super) fn close_stdin(&self) -> bool {
        !std::mem::replace(&mut self.lock().stdin_closed, true)
    }

    pub(super) fn stdin_is_closed(&self) -> bool {
        self.lock().stdin_closed
    }

    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended.is_some()
    }
}

impl ChannelState {
    fn queue(&mut self, stderr: bool, data: Vec<u8>) {
        let crowded = self.output.len() > MERGE_ABOVE;
        if let Some((_, last)) = self
            .output
            .iter_mut()
            .rev()
            .take(if crowded { 2 } else { 1 })
            .find(|(of_stderr, _)| *of_stderr == stderr)
            && (crowded || last.len() + data.len() <= MAX_CHUNK)
        {
            last.extend_from_slice(&data);
            return;
        }
        self.output.push_back((stderr, data));
    }

    /// Counts consumed bytes; returns the credit to give back now.
    fn consume(&mut self, bytes: usize) -> u32 {
        // Bounded by the credit, which is a u32.
        self.consumed += bytes as u32;
        if self.consumed < RENEW_AT {
            return 0;
        }
        self.output_credit += self.consumed;
        std::mem::take(&mut self.consumed)
    }
}
