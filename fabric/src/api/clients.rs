//! The clients of a control server: their connections, and how many of them may stream.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control::ControlError;

/// Most connections at once that stream events or run commands.
pub(super) const MAX_STREAMS: usize = 48;
/// How long a client may take to read a reply that is not a stream.
pub(super) const REPLY_PATIENCE: Duration = Duration::from_secs(10);

/// The connections of a server.
#[derive(Debug, Default)]
pub(super) struct Clients {
    open: Mutex<HashMap<u64, UnixStream>>,
    streams: AtomicUsize,
}

/// The right to stream; given back when dropped.
#[derive(Debug)]
pub(super) struct StreamPermit<'a>(&'a AtomicUsize);

impl Clients {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the right to stream.
    pub(super) fn stream_permit(&self) -> Result<StreamPermit<'_>, ControlError> {
        // Relaxed: a counter that guards nothing but itself.
        let taken = self
            .streams
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < MAX_STREAMS).then_some(n + 1)
            });
        match taken {
            Ok(_) => Ok(StreamPermit(&self.streams)),
            Err(_) => Err(ControlError::TooMany {
                what: "event streams and commands".into(),
                limit: MAX_STREAMS,
            }),
        }
    }
}

impl Drop for StreamPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
