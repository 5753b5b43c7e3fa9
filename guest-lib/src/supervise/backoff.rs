//! When to try again.

use std::time::Duration;

/// How a program or thread that fails is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The pause after the first failure; it doubles with each further one.
    pub first: Duration,
    /// The longest pause.
    pub longest: Duration,
    /// A life that lasted so long makes former failures forgotten.
    pub calm: Duration,
    /// Failures in a row, each sooner than `calm`, after which no other life is begun; `None`: never.
    pub limit: Option<u32>,
}

impl Default for Policy {
    /// From 0.1 s to 10 s, forgotten after a minute, ten failures in a row.
    fn default() -> Self {
        Self {
            first: Duration::from_millis(100),
            longest: Duration::from_secs(10),
            calm: Duration::from_secs(60),
            limit: Some(10),
        }
    }
}

/// Counts failures by a [`Policy`].
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    policy: Policy,
    failures: u32,
}

impl Backoff {
    /// Nothing has failed yet.
    pub const fn new(policy: Policy) -> Self {
        let failures = 0;
        Self { policy, failures }
    }

    /// Failures in a row.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// A life ended in a failure after `lived`. How long to pause before the next one; `None` if
    /// there shall be none.
    pub fn failed(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= self.policy.calm {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        if self.policy.limit.is_some_and(|limit| self.failures > limit) {
            return None;
        }
        let doublings = (self.failures - 1).min(31);
        let pause = self.policy.first.saturating_mul(1 << doublings);
        Some(pause.min(self.policy.longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_bound_and_end_at_the_limit() {
        let policy = Policy {
            limit: Some(9),
            ..Policy::default()
        };
        let mut backoff = Backoff::new(policy);
        let mut last = policy.first / 2;
        for _ in 0..9 {
            let pause = backoff.failed(Duration::ZERO).unwrap();
            assert_eq!(pause, (last * 2).min(policy.longest));
            last = pause;
        }
        assert_eq!(last, policy.longest);
        assert_eq!(backoff.failed(Duration::ZERO), None);
        // A long life is forgiven; and without a limit there is no end.
        assert_eq!(backoff.failed(policy.calm), Some(policy.first));
        let limit = None;
        let mut backoff = Backoff::new(Policy { limit, ..policy });
        for _ in 0..100 {
            assert!(backoff.failed(Duration::ZERO).is_some());
        }
        assert_eq!(backoff.failures(), 100);
    }
}
