//! What the nested host tells the outside over its virtio-serial port.
//!
//! A stream of frames: one byte for the kind, the payload's length as a
//! little-endian `u32`, the payload. One stream for everything keeps the order of
//! stdout, stderr and the end.

use std::io::{self, Read, Write};

/// Longer payloads are refused: the other side is not what we think.
pub(super) const MAX_PAYLOAD: usize = 64 * 1024;

/// The name of the port.
pub(super) const PORT: &str = "org.lupin.nested";

/// One message from the nested host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// The host is up and the program starts now.
    Ready,
    /// The program wrote to its stdout.
    Stdout(Vec<u8>),
    /// The program wrote to its stderr.
    Stderr(Vec<u8>),
    /// A piece of the file that is the program's result, after its end.
    Result(Vec<u8>),
    /// The program ended with this exit code. The last frame.
    Exited(i32),
    /// This signal ended the program. The last frame.
    Killed(i32),
    /// The program could not be run. The last frame.
    Failed(String),
}

impl Frame {
    /// Writes the frame with a single call, so that it stays whole.
    pub(super) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let (kind, payload): (u8, &[u8]) = match self {
            Frame::Ready => (0, &[]),
            Frame::Stdout(data) => (1, data),
            Frame::Stderr(data) => (2, data),
            Frame::Exited(code) => (3, &code.to_le_bytes()),
            Frame::Killed(signal) => (4, &signal.to_le_bytes()),
            Frame::Failed(reason) => (5, reason.as_bytes()),
            Frame::Result(data) => (6, data),
        };
        let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(kind);
        // Bounded by MAX_PAYLOAD.
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        out.write_all(&bytes)
    }

    /// Reads one frame; `None` at the end of the stream.
    pub(super) fn read_from(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        if input.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        input.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(bad("a frame is too long"));
        }
        let mut payload = vec![0; length];
        input.read_exact(&mut payload)?;
        let number = |payload: &[u8]| {
            payload
                .try_into()
                .map(i32::from_le_bytes)
                .map_err(|_| bad("a number is cut short"))
        };
        Ok(Some(match kind[0] {
            0 => Frame::Ready,
            1 => Frame::Stdout(payload),
            2 => Frame::Stderr(payload),
            3 => Frame::Exited(number(&payload)?),
            4 => Frame::Killed(number(&payload)?),
            5 => Frame::Failed(String::from_utf8_lossy(&payload).into_owned()),
            6 => Frame::Result(payload),
            _ => return Err(bad("a frame is of unknown kind")),
        }))
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back() {
        let frames = [
            Frame::Ready,
            Frame::Stdout(b"out".to_vec()),
            Frame::Stderr(Vec::new()),
            Frame::Result(b"{}".to_vec()),
            Frame::Exited(-1),
            Frame::Killed(9),
            Frame::Failed("no".into()),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write_to(&mut bytes).unwrap();
        }
        let mut input = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read_from(&mut input).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read_from(&mut input).unwrap(), None);
    }

    #[test]
    fn garbage_is_an_error() {
        for bytes in [
            &[9, 0, 0, 0, 0][..],
            &[1, 255, 255, 255, 255],
            &[3, 1, 0, 0, 0, 7],
            &[1, 9],
        ] {
            assert!(Frame::read_from(&mut &*bytes).is_err(), "{bytes:?}");
        }
    }
}
