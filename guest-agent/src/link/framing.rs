//! Frames in a stream that may lose its other end at any byte.
//!
//! A virtio port is one stream over the whole life of the guest: when the host side is closed and
//! opened again between two looks, the rest of a frame is followed by the start of another
//! stream. So the reader looks for the next frame after damage instead of giving up, and does not
//! wait for ever for the rest of a frame.

use std::time::{Duration, Instant};

use lupin_abi::port::{Decoder, FRAME_HEADER, FrameError, MAX_FRAME, ToAgent};

/// A frame that does not arrive whole in this time is not going to.
const STALL: Duration = Duration::from_secs(1);

/// Collects bytes and gives out messages.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are dealt with.
    taken: usize,
    /// When the last byte came.
    touched: Option<Instant>,
}

impl FrameReader {
    /// Adds bytes as they were read.
    pub fn push(&mut self, bytes: &[u8], now: Instant) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
        self.touched = Some(now);
    }

    /// Forgets what was read.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// Whether a frame has begun and not ended.
    pub fn is_partial(&self) -> bool {
        !self.rest().is_empty()
    }

    /// The next message; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]: the bytes up to the next possible frame are dropped. The caller treats
    /// the connection as lost and may go on reading.
    pub fn next_message(&mut self) -> Result<Option<ToAgent>, FrameError> {
        let rest = self.rest();
        let mut decoder = Decoder::new();
        // The decoder knows frames, but not how to go on after one that is none: it is given
        // one frame at a time.
        let length = rest
            .get(4..8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes) as usize;
        let whole = FRAME_HEADER.saturating_add(length.min(MAX_FRAME + 1));
        decoder.push(&rest[..rest.len().min(whole)]);
        match decoder.next_message() {
            Ok(Some(message)) => {
                self.taken += whole;
                Ok(Some(message))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                self.skip();
                Err(error)
            }
        }
    }

    /// Gives up a frame that has stalled; true if there was one.
    pub fn drop_stalled(&mut self, now: Instant) -> bool {
        let stalled = self.is_partial()
            && self
                .touched
                .is_some_and(|at| now.saturating_duration_since(at) >= STALL);
        if stalled {
            self.skip();
            self.touched = Some(now);
        }
        stalled
    }

    /// Drops at least one byte, and all up to where a frame may begin.
    fn skip(&mut self) {
        const MAGIC: &[u8] = b"LPF1";
        let rest = &self.buffer[self.taken..];
        let next = (1..rest.len())
            .find(|at| {
                let candidate = &rest[*at..];
                let n = candidate.len().min(MAGIC.len());
                candidate[..n] == MAGIC[..n]
            })
            .unwrap_or(rest.len());
        self.taken += next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lupin_abi::port::encode;

    fn hello(pod_id: u128) -> ToAgent {
        ToAgent::Hello { version: 1, pod_id }
    }

    fn drain(reader: &mut FrameReader) -> (Vec<ToAgent>, usize) {
        let (mut messages, mut errors) = (Vec::new(), 0);
        loop {
            match reader.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return (messages, errors),
                Err(_) => errors += 1,
            }
        }
    }

    #[test]
    fn frames_arrive_in_any_pieces() {
        let stream: Vec<u8> = (0..5).flat_map(|i| encode(&hello(i)).unwrap()).collect();
        for size in 1..stream.len() {
            let mut reader = FrameReader::default();
            let mut messages = Vec::new();
            for piece in stream.chunks(size) {
                reader.push(piece, Instant::now());
                messages.extend(drain(&mut reader).0);
            }
            assert_eq!(messages, (0..5).map(hello).collect::<Vec<_>>());
            assert!(!reader.is_partial());
        }
    }

    #[test]
    fn a_new_stream_is_found_after_the_remains_of_an_old_one() {
        let whole = encode(&hello(1)).unwrap();
        for cut in 1..whole.len() {
            let mut reader = FrameReader::default();
            let now = Instant::now();
            reader.push(&whole[..cut], now);
            reader.push(&encode(&hello(2)).unwrap(), now);
            reader.push(&encode(&hello(3)).unwrap(), now);
            let (mut messages, _) = drain(&mut reader);
            // What the old header still waits for is given up after a while.
            while reader.drop_stalled(now + STALL) {
                messages.extend(drain(&mut reader).0);
                reader.touched = Some(now);
            }
            assert!(messages.contains(&hello(3)), "cut at {cut}: {messages:?}");
            assert!(!messages.contains(&hello(1)));
        }
    }

    #[test]
    fn garbage_is_dropped_and_never_kept() {
        let mut reader = FrameReader::default();
        let mut seed = 1u32;
        for _ in 0..64 {
            let noise: Vec<u8> = (0..4096)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8
                })
                .collect();
            reader.push(&noise, Instant::now());
            drain(&mut reader);
            assert!(reader.rest().len() <= FRAME_HEADER + MAX_FRAME);
        }
        reader.clear();
        reader.push(&encode(&hello(7)).unwrap(), Instant::now());
        assert_eq!(drain(&mut reader).0, [hello(7)]);
    }
}
