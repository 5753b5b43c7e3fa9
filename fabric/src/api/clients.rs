//! The clients of a control server: their connections, how many of them may stream, and how many
//! wait for an answer.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control::ControlError;
use crate::count::{Count, Counted};

/// Most connections at once that stream events or run commands.
pub(super) const MAX_STREAMS: usize = 48;
/// How long a client may take to read a reply that is not a stream.
pub(super) const REPLY_PATIENCE: Duration = Duration::from_secs(10);
/// How long a server that ends waits until what it was asked before is answered.
const PARTING_PATIENCE: Duration = Duration::from_secs(1);

/// The connections of a server.
#[derive(Debug, Default)]
pub(super) struct Clients {
    open: Mutex<HashMap<u64, UnixStream>>,
    streams: Count,
    /// Requests that are being answered; streams do not count.
    asked: Mutex<usize>,
    all_answered: Condvar,
}

/// A request that is being answered, until dropped.
#[derive(Debug)]
pub(super) struct Asked<'a>(&'a Clients);

impl Clients {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> MutexGuard<'_, usize> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request as being answered.
    pub(super) fn ask(&self) -> Asked<'_> {
        *self.asked() += 1;
        Asked(self)
    }

    /// Ends all connections, after the answers to what was asked before. Who asks a manager to
    /// make place for another one, for example, learns that it does.
    pub(super) fn part(&self) {
        let shutdown = |how| {
            for stream in self.lock().values() {
                // Best effort: it may be closed by its client.
                let _ = stream.shutdown(how);
            }
        };
        shutdown(Shutdown::Read);
        let asked = self.asked();
        // Whoever does not read its answer is not waited for any longer.
        let waited = self
            .all_answered
            .wait_timeout_while(asked, PARTING_PATIENCE, |asked| *asked > 0);
        drop(waited);
        shutdown(Shutdown::Both);
    }

    /// Asks for the right to stream.
    pub(super) fn stream_permit(&self) -> Result<Counted, ControlError> {
        self.streams
            .admit(MAX_STREAMS)
            .ok_or_else(|| ControlError::TooMany {
                what: "event streams and commands".into(),
                limit: MAX_STREAMS,
            })
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut asked = self.0.asked();
        *asked -= 1;
        if *asked == 0 {
            self.0.all_answered.notify_all();
        }
    }
}
