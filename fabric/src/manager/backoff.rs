//! When a node that ended is started again.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use lupin_abi::Cause;

use crate::podfile::{Policies, Restart, RestartKind};

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
pub struct Histories {
    /// After causes without a policy of their own.
    default: History,
    own: HashMap<Cause, History>,
}

impl Histories {
    /// Decides by the policy for `cause`, as [`History::decide`].
    pub fn decide(
        &mut self,
        policies: &Policies,
        cause: Cause,
        ending: Ending,
        now_ns: u64,
    ) -> Option<Duration> {
        let history = if policies.has_own(cause) {
            self.own.entry(cause).or_default()
        } else {
            &mut self.default
        };
        history.decide(policies.of(cause), ending, now_ns)
    }
}

/// The restarts of one node by one policy within the last minute.
#[derive(Clone, Debug, Default)]
struct History {
    at_ns: VecDeque<u64>,
}

impl History {
    /// Decides on a node that ended at `now_ns`: the delay before it is started again, or `None`
    /// if it stays down.
    ///
    /// Unless the policy has delays, the first restart within a minute comes at once, for a pod
    /// that lost a node wants it back; the next ones come ever later. No more than the policy allows come within a minute.
    fn decide(&mut self, policy: &Restart, ending: Ending, now_ns: u64) -> Option<Duration> {
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
        let last = policy.back_off.len().saturating_sub(1);
        let mut delay = match (policy.back_off.get(last.min(recent as usize)), recent) {
            (Some(delay), _) => *delay,
            (None, 0) => Duration::ZERO,
            (None, n) => FIRST_DELAY
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
        back_off: Vec::new(),
        hook: Vec::new(),
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
    fn a_policy_has_delays_and_a_count_of_its_own() {
        let millis = Duration::from_millis;
        let exit = Restart {
            max_per_minute: 3,
            back_off: vec![millis(7), millis(500)],
            ..ALWAYS
        };
        let down = Restart {
            kind: RestartKind::Never,
            ..ALWAYS
        };
        let policies = Policies {
            default: ALWAYS,
            on: vec![(Cause::VmmExit, exit), (Cause::Panic, down)],
        };
        let mut histories = Histories::default();
        let mut decide = |cause, now| histories.decide(&policies, cause, Ending::Ran, now);
        assert_eq!(decide(Cause::VmmExit, 0), Some(millis(7)));
        assert_eq!(decide(Cause::VmmExit, S), Some(millis(500)));
        assert_eq!(decide(Cause::VmmExit, 2 * S), Some(millis(500)));
        // The fourth within a minute waits for the first to be a minute old.
        assert_eq!(decide(Cause::VmmExit, 3 * S), Some(millis(57_007)));
        assert_eq!(decide(Cause::Panic, 4 * S), None);
        assert_eq!(
            decide(Cause::Hang, 5 * S),
            Some(Duration::ZERO),
            "counted apart"
        );
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
