//! What agents tell each other through the manager, and what nobody must wait for.
//!
//! A hint is late when it is worth something, so it does not take the way of all frames, through
//! the queue of the link's thread: whoever has one writes it to the socket, if that has room and
//! the thread is not in the middle of a frame. What an agent does not read is dropped.

use std::io::Write;
use std::time::Instant;

use lupin_abi::NodeId;
use lupin_abi::port::{self, ToAgent, Wake};

use super::AgentLink;

/// Bytes waiting for an agent beyond which hints are not added to them.
const CROWDED: usize = 64 << 10;
/// Hints that one agent may give at once, and per second in the long run: as many as an agent
/// takes from its processes.
const BURST: f64 = 4096.0;
const PER_SECOND: f64 = 16384.0;

/// Something for other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Wake sleepers.
    Wake(Wake),
    /// Threads of the node died.
    Deaths,
    /// There are notifications of groups.
    Groups,
}

impl Hint {
    /// Whether it is for `node`.
    pub fn is_for(&self, node: NodeId) -> bool {
        match self {
            Self::Wake(wake) => wake.classes & (1 << node.wake_class()) != 0,
            Self::Deaths | Self::Groups => true,
        }
    }
}

impl AgentLink {
    /// Gives the agent a hint, or drops it. Never blocks.
    pub fn hint(&self, hint: &Hint) {
        let message = match hint {
            Hint::Wake(wake) => ToAgent::Wake(*wake),
            Hint::Deaths => ToAgent::Deaths,
            Hint::Groups => ToAgent::Groups,
        };
        let Ok(frame) = port::encode(&message) else {
            return;
        };
        let mut state = self.shared.lock();
        let waiting = state.outgoing.len() + state.in_flight;
        if state.up.is_none() || waiting + frame.len() > CROWDED {
            return;
        }
        let written = match &state.direct {
            // Under the lock: the thread takes what is to be written under it as well.
            Some(socket) if waiting == 0 => match (&mut &*socket).write(&frame) {
                Ok(written) => written,
                // An agent that reads nothing, or a broken connection, which the thread notices.
                Err(_) => return,
            },
            _ => 0,
        };
        if written < frame.len() {
            // The rest must go out before anything else: nothing else is waiting.
            state.outgoing.extend_from_slice(&frame[written..]);
            drop(state);
            self.shared.wake();
        }
    }
}

/// Limits the hints of one connection.
#[derive(Debug)]
pub(super) struct HintLimit {
    tokens: f64,
    filled: Instant,
}

impl HintLimit {
    pub(super) fn new(now: Instant) -> Self {
        let (tokens, filled) = (BURST, now);
        Self { tokens, filled }
    }

    /// Whether one more may pass.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * PER_SECOND).min(BURST);
        self.filled = now;
        let allowed = self.tokens >= 1.0;
        self.tokens -= if allowed { 1.0 } else { 0.0 };
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_hint_reaches_the_classes_that_it_names() {
        let wake = |classes| {
            Hint::Wake(Wake {
                at: 0,
                classes,
                all: false,
            })
        };
        let node = |id| NodeId::new(id).unwrap();
        assert!(wake(0b10).is_for(node(2)) && wake(0b10).is_for(node(18)));
        assert!(!wake(0b10).is_for(node(1)) && !wake(0).is_for(node(2)));
        assert!(wake(u16::MAX).is_for(node(16)) && Hint::Deaths.is_for(node(7)));
        assert!(Hint::Groups.is_for(node(1)));
    }

    #[test]
    fn a_talkative_agent_is_cut_short() {
        let begin = Instant::now();
        let mut limit = HintLimit::new(begin);
        let allowed = (0..100_000).filter(|_| limit.allows(begin)).count();
        assert_eq!(allowed, BURST as usize);
        assert!(limit.allows(begin + Duration::from_millis(1)));
    }
}
