//! When a node that ended is started again.

use std::collections::VecDeque;
use std::time::Duration;

use crate::podfile::{Restart, RestartKind};

const MINUTE_NS: u64 = 60_000_000_000;
/// Delay of the second restart within a minute; it doubles with every further one.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Longest delay that comes from doubling.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Shortest delay after a start that failed: something on this host is wrong.
const FAILED_START_DELAY: Duration = Duration::from_secs(1);

/// How the life ended, as far as restarting is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It ran.
    Ran,
    /// It could not be started, or never joined.
    DidNotStart,
    /// It could not be started, and the next one could not either.
    CannotStart,
}

/// The restarts of one node within the last minute.
#[derive(Clone, Debug, Default)]
pub struct History {
    at_ns: VecDeque<u64>,
}

impl History {
    /// Decides on a node that ended at `now_ns`: the delay before it is started again, or `None`
    /// if it stays down.
    ///
    /// The first restart within a minute comes at once, for a pod that lost a node wants it back;
    /// the next ones come ever later, and no more than the policy allows come within a minute.
    pub fn decide(&mut self, policy: &Restart, ending: Ending, now_ns: u64) -> Option<Duration> {
        if policy.kind == RestartKind::Never || ending == Ending::CannotStart {
            return None;
        }
        while let Some(at) = self.at_ns.front() {
            if now_ns.saturating_sub(*at) < MINUTE_NS {
                break;
            }
            self.at_ns.pop_front();
        }
        let recent = self.at_ns.len() as u32;
        let mut delay = match recent {
            0 => Duration::ZERO,
            n => FIRST_DELAY
                .saturating_mul(1 << (n - 1).min(16))
                .min(LONGEST_DELAY),
        };
        if ending == Ending::DidNotStart {
            delay = delay.max(FAILED_START_DELAY);
        }
        if recent >= policy.max_per_minute {
            // Wait until enough of the last minute's restarts are more than a minute old.
            let blocking = self.at_ns[(recent - policy.max_per_minute) as usize];
            let free = (blocking + MINUTE_NS).saturating_sub(now_ns);
            delay = delay.max(Duration::from_nanos(free));
        }
        self.at_ns.push_back(now_ns + delay.as_nanos() as u64);
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALWAYS: Restart = Restart {
        kind: RestartKind::Always,
        max_per_minute: 10,
    };
    const S: u64 = 1_000_000_000;

    #[test]
    fn the_first_restart_is_at_once_and_the_next_ones_ever_later() {
        let mut history = History::default();
        let delays: Vec<_> = (0..9)
            .map(|n| history.decide(&ALWAYS, Ending::Ran, n).unwrap().as_millis())
            .collect();
        assert_eq!(delays, [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        // A node that ran for a while is forgiven.
        assert_eq!(
            history.decide(&ALWAYS, Ending::Ran, 120 * S),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn no_minute_has_more_restarts_than_allowed() {
        let policy = Restart {
            max_per_minute: 3,
            ..ALWAYS
        };
        let (mut history, mut now, mut starts) = (History::default(), 0, Vec::new());
        for _ in 0..50 {
            let delay = history.decide(&policy, Ending::Ran, now).unwrap();
            now += delay.as_nanos() as u64;
            starts.push(now);
            now += S / 100;
        }
        for window in starts.windows(4) {
            assert!(window[3] - window[0] >= MINUTE_NS, "{window:?}");
        }
    }

    #[test]
    fn what_cannot_start_stays_down_and_what_did_not_start_waits() {
        let never = Restart {
            kind: RestartKind::Never,
            ..ALWAYS
        };
        let mut history = History::default();
        assert_eq!(history.decide(&never, Ending::Ran, 0), None);
        assert_eq!(history.decide(&ALWAYS, Ending::CannotStart, 0), None);
        let delay = history.decide(&ALWAYS, Ending::DidNotStart, 0).unwrap();
        assert!(delay >= FAILED_START_DELAY);
    }
}
