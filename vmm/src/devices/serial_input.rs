//! Keyboard input for the serial port, and the terminal's raw mode.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::termios::{InputFlags, LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use vm_superio::serial::Error;
use vmm_sys_util::eventfd::EventFd;

use super::serial::SerialDevice;

/// Starts an escape: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Raw mode of the terminal on standard input; dropping it restores what was.
#[derive(Debug)]
pub struct RawTerminal {
    saved: Termios,
}

impl RawTerminal {
    /// Hands every key to the guest, Ctrl-C among them. `None` if standard input is no terminal.
    pub fn enter() -> Option<Self> {
        let stdin = io::stdin();
        let saved = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = saved.clone();
        raw.local_flags &=
            !(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG | LocalFlags::IEXTEN);
        raw.input_flags &= !(InputFlags::ICRNL | InputFlags::IXON);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self { saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.saved) {
            log::error!("the terminal could not be restored (try `reset`): {e}");
        }
    }
}

/// Splits escapes from input: Ctrl-A x stops, Ctrl-A Ctrl-A is Ctrl-A.
#[derive(Debug, Default)]
struct Escapes {
    pending: bool,
}

impl Escapes {
    /// Appends to `out` what the guest gets. Returns whether to stop.
    fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in input {
            match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => self.pending = true,
                (true, b'x') => return true,
                (_, byte) => out.push(byte),
            }
        }
        false
    }
}

/// Starts the thread that feeds standard input to `serial`. `drained` is signalled whenever the
/// guest has emptied the receive FIFO; `stop` is called once, on Ctrl-A x.
///
/// # Errors
/// When no thread can be started.
pub fn start(
    serial: Arc<Mutex<SerialDevice>>,
    drained: EventFd,
    stop: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new()
        .name("serial-input".into())
        .spawn(move || {
            let mut escapes = Escapes::default();
            let mut buffer = [0; 256];
            loop {
                let input = match io::stdin().lock().read(&mut buffer) {
                    Ok(0) => return,
                    Ok(n) => &buffer[..n],
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => return log::warn!("serial input ends: {e}"),
                };
                let mut bytes = Vec::new();
                if escapes.feed(input, &mut bytes) {
                    return stop();
                }
                if !enqueue(&serial, &drained, &bytes) {
                    return;
                }
            }
        })?;
    Ok(())
}

/// Puts all of `bytes` into the receive FIFO, waiting for the guest to make room. No more input
/// is read meanwhile. Returns whether the port still works.
fn enqueue(serial: &Mutex<SerialDevice>, drained: &EventFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let result = serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .enqueue_raw_bytes(bytes);
        match result {
            // Loop-back mode: the driver is testing the port.
            Ok(0) => return true,
            Ok(n) => bytes = &bytes[n..],
            Err(Error::FullFifo) => {
                if drained.read().is_err() {
                    return false;
                }
            }
            Err(e) => {
                log::warn!("serial input ends: {e:?}");
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let mut escapes = Escapes::default();
        let mut out = Vec::new();
        assert!(!escapes.feed(b"ls\r\x03", &mut out));
        assert!(!escapes.feed(&[ESCAPE], &mut out));
        assert!(!escapes.feed(&[ESCAPE], &mut out));
        assert_eq!(out, b"ls\r\x03\x01");
        assert!(escapes.feed(&[ESCAPE, b'x'], &mut out));
    }
}
