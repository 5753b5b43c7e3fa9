//! Frames on their way to the manager.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use log::error;
use lupin_abi::port::{ToManager, encode};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::write;

/// Bytes beyond which commands are not read further.
const FULL: usize = 256 << 10;

/// A queue of encoded frames.
#[derive(Debug, Default)]
pub struct Outbox {
    frames: VecDeque<Frame>,
    bytes: usize,
}

#[derive(Debug)]
struct Frame {
    bytes: Vec<u8>,
    sent: usize,
    /// Goes with the first byte.
    fd: Option<OwnedFd>,
}

impl Outbox {
    /// Queues a message.
    pub fn push(&mut self, message: &ToManager) {
        self.push_with_fd(message, None);
    }

    /// Queues a message that takes a descriptor along (UNIX sockets only).
    pub fn push_with_fd(&mut self, message: &ToManager, fd: Option<OwnedFd>) {
        match encode(message) {
            Ok(bytes) => {
                self.bytes += bytes.len();
                self.frames.push_back(Frame { bytes, sent: 0, fd });
            }
            // Output is cut into chunks and texts are short: only a mistake of ours is too long.
            Err(e) => error!("a message to the manager is lost: {e}"),
        }
    }

    /// Whether nothing more should be queued that can wait.
    pub fn is_full(&self) -> bool {
        self.bytes >= FULL
    }

    /// Whether everything was sent.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Forgets what was not sent.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Sends what the stream takes now.
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn send(&mut self, stream: BorrowedFd<'_>) -> Result<(), Errno> {
        while let Some(frame) = self.frames.front_mut() {
            let rest = &frame.bytes[frame.sent..];
            let result = match &frame.fd {
                Some(fd) => {
                    let fds = [fd.as_fd().as_raw_fd()];
                    let rights = [ControlMessage::ScmRights(&fds)];
                    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                    let parts = [IoSlice::new(rest)];
                    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, flags, None)
                }
                // SIGPIPE is ignored in every Rust program.
                None => write(stream, rest),
            };
            match result {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
                Ok(sent) => {
                    frame.fd = None;
                    frame.sent += sent;
                    if frame.sent == frame.bytes.len() {
                        self.bytes -= frame.bytes.len();
                        self.frames.pop_front();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
