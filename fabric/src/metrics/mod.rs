//! Metrics for Prometheus (OpenMetrics text), as a reader of the record that the manager keeps
//! anyway: the event ring in pod memory, and the snapshot that any client can ask for. The
//! manager's loop does nothing for them.
//!
//! Whatever is counted from the ring begins with the oldest event that it holds, so a manager that
//! takes over goes on where the last one was, and nothing resets as long as the ring (4,096
//! events) still holds the pod's history. Beyond that its counters begin anew, lower than before,
//! which Prometheus takes for what it is: the reset of a counter. False alarms are counted by the
//! manager in memory and begin anew at each take-over; generations, restarts and states are in pod
//! memory and never do.
//!
//! | module | what it holds |
//! |---|---|
//! | `history` | what is counted from the ring |
//! | `snapshot` | what is true at the moment of a scrape |

mod history;
mod snapshot;

use std::sync::{Mutex, PoisonError};

use lupin_abi::fabric::FabricSection;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::api::PodStatus;
use history::History;
use snapshot::Snapshot;

/// Media type of the text.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of one pod.
pub struct Metrics(Mutex<Inner>);

struct Inner {
    registry: Registry,
    history: History,
    snapshot: Snapshot,
}

impl Metrics {
    /// Metrics of the pod with this name; nothing is read yet.
    pub fn new(pod: &str) -> Self {
        let labels = [("pod".into(), pod.to_string().into())].into_iter();
        let mut registry = Registry::with_prefix_and_labels("lupin", labels);
        let history = History::new(&mut registry);
        let snapshot = Snapshot::new(&mut registry);
        Self(Mutex::new(Inner {
            registry,
            history,
            snapshot,
        }))
    }

    /// Reads what the ring holds and was not read yet. To be called more often than the ring can
    /// go round, else events are missed (and counted as missed).
    pub fn catch_up(&self, fabric: &FabricSection) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.history.catch_up(fabric);
    }

    /// The text: the history so far, the given snapshot, and how many events the followers of the
    /// event stream have lost.
    ///
    /// # Errors
    /// If the text cannot be formatted, which would be a defect of the encoder.
    pub fn render(&self, status: &PodStatus, lost: u64) -> Result<String, std::fmt::Error> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = &mut *inner;
        inner.history.show(status, lost);
        inner.snapshot.show(status);
        let mut text = String::new();
        encode(&mut text, &inner.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod metrics_test;
