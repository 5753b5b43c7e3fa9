//! A command that runs inside a node.

use std::sync::Arc;

use lupin_abi::port::{MAX_CHUNK, ToAgent};

use super::channel::Channel;
use super::message::ExecMessage;
use super::{LinkError, Shared};

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecSpec {
    /// Program and arguments; at least one.
    pub argv: Vec<String>,
    /// Variables added to the agent's own environment.
    pub env: Vec<(String, String)>,
    /// Working directory; `/` if absent.
    pub cwd: Option<String>,
}

/// A command that runs inside a node. Dropping it before the end ends the command: SIGTERM to
/// its process group, SIGKILL two seconds later.
#[derive(Debug)]
pub struct Exec {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
}

impl Exec {
    pub(super) fn new(shared: Arc<Shared>, channel: Arc<Channel>) -> Self {
        Self { shared, channel }
    }

    /// Waits for the next message. `None` after `Exited` was given out, or after
    /// [`cancel`](Self::cancel).
    pub fn recv(&self) -> Option<ExecMessage> {
        let (message, bytes) = self.channel.next()?;
        self.give_credit(bytes);
        Some(message)
    }

    /// Sends standard input within the credit, which begins at
    /// [`INITIAL_CREDIT`](lupin_abi::port::INITIAL_CREDIT) and is renewed by
    /// [`ExecMessage::Credit`]. Never blocks. Empty data is ignored.
    ///
    /// # Errors
    /// [`LinkError::Credit`] (nothing was sent), [`LinkError::Over`],
    /// [`LinkError::NotConnected`].
    pub fn send_stdin(&self, data: &[u8]) -> Result<(), LinkError> {
        if self.channel.stdin_is_closed() || self.channel.has_ended() {
            return Err(LinkError::Over);
        }
        self.channel
            .take_stdin_credit(data.len())
            .map_err(|credit| LinkError::Credit {
                sent: data.len(),
                credit,
            })?;
        for chunk in data.chunks(MAX_CHUNK) {
            self.send(&ToAgent::Stdin {
                channel: self.channel.id,
                data: chunk.into(),
            })?;
        }
        Ok(())
    }

    /// Closes the command's standard input. Idempotent.
    ///
    /// # Errors
    /// [`LinkError::Over`], [`LinkError::NotConnected`].
    pub fn close_stdin(&self) -> Result<(), LinkError> {
        if !self.channel.close_stdin() {
            return Ok(());
        }
        self.send(&ToAgent::Stdin {
            channel: self.channel.id,
            data: Vec::new(),
        })
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// [`LinkError::Over`], [`LinkError::NotConnected`].
    pub fn signal(&self, signal: i32) -> Result<(), LinkError> {
        self.send(&ToAgent::Signal {
            channel: self.channel.id,
            signal,
        })
    }

    /// Gives the command up, from any thread: it is ended as by dropping, and
    /// [`recv`](Self::recv) returns `None`. Idempotent.
    pub fn cancel(&self) {
        if let Some(bytes) = self.channel.abandon() {
            self.give_credit(bytes);
            let _ = self.signal(libc::SIGTERM);
            // The SIGKILL comes from a helper thread, and only if it is still needed then; a
            // thread that cannot be made means SIGKILL now.
            let (shared, channel) = (self.shared.clone(), self.channel.clone());
            let kill = move || {
                if !channel.has_ended() {
                    let _ = shared.send(&ToAgent::Signal {
                        channel: channel.id,
                        signal: libc::SIGKILL,
                    });
                }
            };
            let later = kill.clone();
            let spawned = std::thread::Builder::new().spawn(move || {
                std::thread::sleep(std::time::Duration::from_secs(2));
                later();
            });
            if spawned.is_err() {
                kill();
            }
        }
    }

    fn give_credit(&self, bytes: u32) {
        if bytes > 0 {
            // Without a connection there is nobody to give it to, and the end is on its way.
            let _ = self.shared.send(&ToAgent::Credit {
                channel: self.channel.id,
                bytes,
            });
        }
    }

    fn send(&self, message: &ToAgent) -> Result<(), LinkError> {
        if self.channel.has_ended() {
            return Err(LinkError::Over);
        }
        self.shared.send(message)
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        self.cancel();
    }
}
