//! How much one user may ask of the agent.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Connections of one user at a time.
pub const CONNECTIONS_PER_USER: usize = 256;
/// Connections of all users at a time.
pub const CONNECTIONS: usize = 1024;
/// Requests of one user in a burst.
pub const BURST: u32 = 4096;
/// Requests of one user per second, in the long run.
pub const PER_SECOND: u32 = 2048;
/// Thread ids of one process at a time.
pub const THREADS_PER_PROCESS: usize = 4096;

/// Between two looks that others asked for: so many times as long as the last one took.
const PAUSES: u32 = 9;

/// Something to be done when others ask for it, which takes a tenth of a processor however often
/// they do.
#[derive(Debug, Default)]
pub struct Paced {
    /// It was asked for and is not done.
    wanted: bool,
    /// Not before.
    next: Option<Instant>,
}

impl Paced {
    /// Whether it may be done now; if not, it is [due](Self::is_due) later.
    pub fn may(&mut self, now: Instant) -> bool {
        self.wanted = true;
        self.is_due(now)
    }

    /// It was done.
    pub fn took(&mut self, begin: Instant, end: Instant) {
        self.wanted = false;
        self.next = end.checked_add(end.saturating_duration_since(begin) * PAUSES);
    }

    /// When it is to be done, if anybody wants it.
    pub fn deadline(&self) -> Option<Instant> {
        self.next.filter(|_| self.wanted)
    }

    /// Whether it is wanted, and may be done.
    pub fn is_due(&self, now: Instant) -> bool {
        self.wanted && self.next.is_none_or(|next| next <= now)
    }
}

/// What users have in use.
#[derive(Debug, Default)]
pub struct Limits {
    users: HashMap<u32, User>,
    connections: usize,
}

#[derive(Debug)]
struct User {
    connections: usize,
    /// Requests that may be made now.
    tokens: f64,
    filled: Instant,
}

impl Limits {
    /// Counts a connection, which is a request as well; false if it is one too many.
    pub fn connect(&mut self, uid: u32, now: Instant) -> bool {
        let user = self.users.entry(uid).or_insert(User {
            connections: 0,
            tokens: f64::from(BURST),
            filled: now,
        });
        if user.connections >= CONNECTIONS_PER_USER || self.connections >= CONNECTIONS {
            return false;
        }
        user.connections += 1;
        self.connections += 1;
        if !self.request(uid, now) {
            self.disconnect(uid);
            return false;
        }
        true
    }

    /// Ends a connection that was counted.
    pub fn disconnect(&mut self, uid: u32) {
        if let Some(user) = self.users.get_mut(&uid) {
            user.connections = user.connections.saturating_sub(1);
            self.connections = self.connections.saturating_sub(1);
        }
    }

    /// Counts a request; false if it is one too many for now.
    pub fn request(&mut self, uid: u32, now: Instant) -> bool {
        let Some(user) = self.users.get_mut(&uid) else {
            return false;
        };
        let elapsed = now.saturating_duration_since(user.filled).as_secs_f64();
        user.tokens = (user.tokens + elapsed * f64::from(PER_SECOND)).min(f64::from(BURST));
        user.filled = now;
        if user.tokens < 1.0 {
            return false;
        }
        user.tokens -= 1.0;
        true
    }

    /// Forgets users that have nothing in use and whose burst is full again.
    pub fn tidy(&mut self, now: Instant) {
        let full = Duration::from_secs(u64::from(BURST.div_ceil(PER_SECOND)));
        self.users.retain(|_, user| {
            user.connections > 0 || now.saturating_duration_since(user.filled) < full
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cannot_use_up_what_others_have() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        let granted = (0..CONNECTIONS_PER_USER + 9)
            .filter(|_| limits.connect(1, now))
            .count();
        assert_eq!(granted, CONNECTIONS_PER_USER);
        assert!(limits.connect(2, now));
        limits.disconnect(1);
        assert!(limits.connect(1, now));

        // Each connection was a request.
        let granted = (0..BURST + 9).filter(|_| limits.request(1, now)).count();
        assert_eq!(granted, BURST as usize - CONNECTIONS_PER_USER - 1);
        assert!(limits.request(2, now));
        let later = now + Duration::from_millis(10);
        assert!(limits.request(1, later));
        assert!(!limits.request(3, now), "a user without a connection");
    }

    #[test]
    fn what_others_ask_for_is_done_at_once_and_then_a_tenth_of_the_time() {
        let (mut paced, mut now) = (Paced::default(), Instant::now());
        let (cost, begin) = (Duration::from_millis(1), now);
        assert!(!paced.is_due(now) && paced.deadline().is_none());
        let mut done = 0;
        while now < begin + Duration::from_secs(1) {
            if paced.may(now) {
                paced.took(now, now + cost);
                done += 1;
            }
            now += Duration::from_micros(10);
        }
        assert_eq!(done, 100);
        // What was asked for meanwhile is not forgotten.
        let due = paced.deadline().unwrap();
        assert!(!paced.is_due(due - cost) && paced.is_due(due));
        paced.took(due, due);
        assert!(!paced.is_due(due) && paced.deadline().is_none());
    }

    #[test]
    fn users_are_not_kept_for_ever() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        for uid in 0..100 {
            assert!(limits.connect(uid, now));
            limits.disconnect(uid);
        }
        limits.tidy(now);
        assert_eq!(limits.users.len(), 100);
        limits.tidy(now + Duration::from_secs(60));
        assert_eq!(limits.users.len(), 0);
    }
}
