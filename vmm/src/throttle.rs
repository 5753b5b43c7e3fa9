//! Log lines that a guest can cause as often as it likes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lets one line a second through, and counts the others.
#[derive(Debug)]
pub struct Throttle {
    /// Second of the last line that went through, from 1.
    last: AtomicU64,
    held: AtomicU64,
}

impl Throttle {
    /// A throttle that lets the first line through.
    #[must_use]
    pub const fn new() -> Self {
        let (last, held) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { last, held }
    }

    /// `Some(lines held back since the last one)` if a line may be logged at `second`.
    ///
    /// Relaxed throughout: two threads may both win or lose by a line, and nothing depends on it.
    fn pass_at(&self, second: u64) -> Option<u64> {
        if self.last.swap(second, Ordering::Relaxed) == second {
            self.held.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.held.swap(0, Ordering::Relaxed))
    }

    /// `Some(lines held back since the last one)` if a line may be logged now.
    #[must_use]
    pub fn pass(&self) -> Option<u64> {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let running = START.get_or_init(Instant::now).elapsed();
        self.pass_at(running.as_secs() + 1)
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

/// `log::warn!` for what a guest does: at most once a second for each place in the code.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)*) => {{
        static THROTTLE: $crate::throttle::Throttle = $crate::throttle::Throttle::new();
        match THROTTLE.pass() {
            Some(0) => log::warn!($($arg)*),
            Some(held) => log::warn!("{} (and {held} times before)", format_args!($($arg)*)),
            None => {}
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_tells_of_the_others() {
        let throttle = Throttle::new();
        assert_eq!(throttle.pass_at(1), Some(0));
        assert_eq!(throttle.pass_at(1), None);
        assert_eq!(throttle.pass_at(1), None);
        assert_eq!(throttle.pass_at(2), Some(2));
        assert_eq!(throttle.pass_at(9), Some(0));
    }
}
