//! How a run ends: the first of many threads that has something to say decides.

use std::sync::{Condvar, Mutex, PoisonError};

use lupin_fabric::vmm_protocol::ExitStatus;

/// Why the machine stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The exit status of the process.
    pub status: ExitStatus,
    /// More, for people.
    pub detail: String,
}

impl Outcome {
    /// An outcome.
    pub fn new(status: ExitStatus, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: detail.into(),
        }
    }
}

/// Where the outcome is reported and awaited.
///
/// Only the first report counts: a guest that has asked for a reset does so again by the next
/// method at once, and may triple-fault in the end.
#[derive(Debug, Default)]
pub struct OutcomeSlot {
    outcome: Mutex<Option<Outcome>>,
    reported: Condvar,
}

impl OutcomeSlot {
    /// Reports an outcome; ignored if there is one.
    pub fn report(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(outcome);
            self.reported.notify_all();
        }
    }

    /// Waits for the first report.
    pub fn wait(&self) -> Outcome {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*slot {
                return outcome.clone();
            }
            slot = self
                .reported
                .wait(slot)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_counts() {
        let slot = OutcomeSlot::default();
        slot.report(Outcome::new(ExitStatus::Reset, "first"));
        slot.report(Outcome::new(ExitStatus::Crash, "second"));
        assert_eq!(slot.wait(), Outcome::new(ExitStatus::Reset, "first"));
    }
}
