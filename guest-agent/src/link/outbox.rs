//! Frames on their way to the manager.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use log::error;
use lupin_abi::port::{ToManager, encode};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::uio::writev;

/// Bytes beyond which commands are not read further.
const FULL: usize = 256 << 10;

/// Most frames that one write takes.
const TOGETHER: usize = 64;

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
            let result = match &frame.fd {
                Some(fd) => {
                    let fds = [fd.as_fd().as_raw_fd()];
                    let rights = [ControlMessage::ScmRights(&fds)];
                    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                    let parts = [IoSlice::new(&frame.bytes[frame.sent..])];
                    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, flags, None)
                }
                // Together: each write wakes the manager. SIGPIPE is ignored in every Rust
                // program.
                None => {
                    let plain = self.frames.iter().take_while(|frame| frame.fd.is_none());
                    let rests = plain.map(|frame| IoSlice::new(&frame.bytes[frame.sent..]));
                    writev(stream, &rests.take(TOGETHER).collect::<Vec<_>>())
                }
            };
            match result {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
                Ok(sent) => self.is_sent(sent),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes bytes that the stream took, and with them the descriptor of the first frame.
    fn is_sent(&mut self, mut bytes: usize) {
        while let Some(frame) = self.frames.front_mut() {
            frame.fd = None;
            let now = bytes.min(frame.bytes.len() - frame.sent);
            frame.sent += now;
            bytes -= now;
            if frame.sent < frame.bytes.len() {
                return;
            }
            self.bytes -= frame.bytes.len();
            self.frames.pop_front();
            if bytes == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn frames_are_sent_whole_and_in_order_however_little_is_taken() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for index in 0..400u32 {
            let message = ToManager::Log {
                message: index.to_string().repeat(1 + index as usize),
            };
            let (fd, _other) = nix::unistd::pipe().unwrap();
            outbox.push_with_fd(&message, index.is_multiple_of(100).then_some(fd));
            expected.extend(encode(&message).unwrap());
        }
        let (mut received, mut buffer) = (Vec::<u8>::new(), [0; 1000]);
        while received.len() < expected.len() {
            outbox.send(ours.as_fd()).unwrap();
            let waiting: usize = outbox.frames.iter().map(|f| f.bytes.len()).sum();
            assert_eq!(outbox.bytes, waiting);
            if let Ok(count) = theirs.read(&mut buffer) {
                received.extend(&buffer[..count]);
            }
        }
        assert!(received == expected && outbox.is_empty() && outbox.bytes == 0);
    }
}
