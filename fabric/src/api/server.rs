//! The control server: a UNIX socket on which clients steer the manager.
//!
//! Every client has a thread of its own that calls the [`PodControl`], so a client that is slow,
//! stopped or dead holds up nobody but itself. Their number is bounded, and streams may not use
//! up all of it: while followers and commands fill their share, `status` and `kill` still work.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::clients::{Clients, REPLY_PATIENCE};
use super::control::{ControlError, PodControl};
use super::serve::serve;
use super::wire::Reply;
use crate::sys::socket::listen;

/// Most connections at once.
pub const MAX_CLIENTS: usize = 64;

/// A running control server; dropping it removes the socket, answers what was asked before for at
/// most a second, and closes every client.
#[derive(Debug)]
pub struct Server {
    clients: Arc<Clients>,
    stop: Arc<EventFd>,
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `socket` (for its owner and the group of its folder; a stale one is replaced, so
    /// the caller holds the pod's lock) and serves clients from threads of its own.
    ///
    /// # Errors
    /// If the socket cannot be created.
    pub fn start(control: Arc<dyn PodControl>, socket: &Path) -> io::Result<Self> {
        let listener = listen(socket)?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let clients = Arc::new(Clients::default());
        let (of_thread, stop_thread) = (clients.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &stop_thread, &control, &of_thread))?;
        Ok(Self {
            clients,
            stop,
            socket: socket.into(),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Best effort: what cannot be stopped ends with the process.
        let _ = std::fs::remove_file(&self.socket);
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        self.clients.part();
    }
}

fn accept(
    listener: &UnixListener,
    stop: &EventFd,
    control: &Arc<dyn PodControl>,
    clients: &Arc<Clients>,
) {
    let mut next = 0u64;
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            // Interrupted.
            continue;
        }
        if fds[1].any().unwrap_or(false) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                next += 1;
                admit(stream, next, control.clone(), clients.clone());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                // Out of descriptors, most likely: let others give some back.
                log::warn!("cannot accept a control client: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Starts the thread of a client, unless there are too many.
fn admit(stream: UnixStream, id: u64, control: Arc<dyn PodControl>, clients: Arc<Clients>) {
    let prepared = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_write_timeout(Some(REPLY_PATIENCE)))
        .and_then(|()| stream.try_clone());
    let Ok(clone) = prepared else {
        return;
    };
    {
        let mut open = clients.lock();
        if open.len() >= MAX_CLIENTS {
            let refusal = Reply::Error(ControlError::TooMany {
                what: "control clients".into(),
                limit: MAX_CLIENTS,
            });
            // Fits into the socket's empty buffer, so this cannot block.
            let _ = (&stream).write_all(&super::serve::line(&refusal));
            return;
        }
        open.insert(id, clone);
    }
    let of_thread = clients.clone();
    let spawned = std::thread::Builder::new()
        .name(format!("control-{id}"))
        .spawn(move || {
            // How a client leaves is its own affair.
            let _ = serve(&stream, &*control, &of_thread);
            let _ = stream.shutdown(Shutdown::Both);
            of_thread.lock().remove(&id);
        });
    if let Err(e) = spawned {
        log::warn!("cannot serve a control client: {e}");
        clients.lock().remove(&id);
    }
}
