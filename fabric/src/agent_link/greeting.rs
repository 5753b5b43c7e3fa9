//! Finding the agent's hello in a stream that may begin in the middle of something.
//!
//! A guest's port has no connections: what the agent wrote to an earlier manager may still be in
//! its queue, cut anywhere. So until the hello is found, bytes that are not a frame, and frames
//! that are not a hello, are skipped.

use lupin_abi::port::{Decoder, FRAME_HEADER, ToManager};

/// Looks for a hello.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    bytes: Vec<u8>,
}

/// What an agent's hello says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub version: u32,
    pub node: u32,
    pub generation: u32,
    pub agent: String,
    pub kernel: String,
}

impl Greeting {
    /// Adds bytes as they were read. Returns the hello, once it is complete, with a decoder that
    /// holds what followed it.
    ///
    /// Keeps at most one frame and what was added last.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Option<(Hello, Decoder)> {
        const MAGIC: &[u8] = b"LPF1";
        self.bytes.extend_from_slice(bytes);
        let mut at = 0;
        let found = loop {
            let rest = &self.bytes[at..];
            let Some(start) = rest.windows(MAGIC.len()).position(|w| w == MAGIC) else {
                // The magic may be cut at the end.
                at = self.bytes.len() - rest.len().min(MAGIC.len() - 1);
                break None;
            };
            at += start;
            let mut decoder = Decoder::new();
            decoder.push(&self.bytes[at..]);
            match decoder.next_message() {
                Ok(Some(ToManager::Hello {
                    version,
                    node,
                    generation,
                    agent,
                    kernel,
                })) => {
                    let hello = Hello {
                        version,
                        node,
                        generation,
                        agent,
                        kernel,
                    };
                    break Some((hello, decoder));
                }
                Ok(Some(_)) => {
                    // A whole frame, so its header and length are there.
                    let len = self.bytes[at + 4..at + 8]
                        .iter()
                        .rev()
                        .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
                    at += FRAME_HEADER + len;
                }
                Ok(None) => break None,
                Err(_) => at += 1,
            }
        };
        self.bytes.drain(..at);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lupin_abi::port::encode;

    fn hello() -> ToManager {
        ToManager::Hello {
            version: 1,
            node: 2,
            generation: 3,
            agent: "a".into(),
            kernel: "k".into(),
        }
    }

    fn log(message: &str) -> Vec<u8> {
        let message = message.into();
        encode(&ToManager::Log { message }).unwrap()
    }

    #[test]
    fn a_hello_is_found_behind_leftovers_whatever_the_cuts() {
        let mut stream = log("cut in the middle")[20..].to_vec();
        stream.extend(log("whole"));
        stream.extend(b"LPLPF1 not a frame LPF");
        stream.extend(encode(&hello()).unwrap());
        stream.extend(log("after"));
        for step in [1, 2, 3, 7, 1000] {
            let mut greeting = Greeting::default();
            let mut chunks = stream.chunks(step);
            let (found, mut decoder) = chunks.find_map(|chunk| greeting.push(chunk)).unwrap();
            assert_eq!((found.node, found.generation), (2, 3));
            chunks.for_each(|chunk| decoder.push(chunk));
            let next: Option<ToManager> = decoder.next_message().unwrap();
            let message = "after".into();
            assert_eq!(next, Some(ToManager::Log { message }));
        }
    }

    #[test]
    fn garbage_does_not_pile_up() {
        let mut greeting = Greeting::default();
        let garbage = [b"LPF1".as_slice(), &[0xff; 4092]].concat();
        for _ in 0..1000 {
            assert!(greeting.push(&garbage).is_none());
            assert!(greeting.bytes.len() < 70 << 10);
        }
        // A frame that never completes is held up to its length, then found to be damaged.
        let mut endless = b"LPF1".to_vec();
        endless.extend(60_000u32.to_le_bytes());
        endless.extend([0; 4]);
        assert!(greeting.push(&endless).is_none());
        for _ in 0..100 {
            assert!(greeting.push(&[0; 4096]).is_none());
            assert!(greeting.bytes.len() < 70 << 10);
        }
    }
}
