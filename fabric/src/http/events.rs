//! The stream of events: JSON, one object a line, or server-sent events if the client prefers.
//!
//! A client that falls so far behind that events are overwritten before it has read them learns
//! how many it lost; it never slows down anybody else, because it reads a ring that is written
//! without looking at its readers.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream;
use lupin_abi::Event;
use lupin_abi::fabric::RingRead;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::{IntoParams, ToSchema};

use super::app::App;
use crate::count::Counted;

/// Media type of JSON, one object a line.
pub const NDJSON: &str = "application/x-ndjson";
/// Media type of server-sent events.
pub const EVENT_STREAM: &str = "text/event-stream";

/// Bytes of events that are sent at once.
const BATCH: usize = 32 << 10;
/// Without events for so long, a follower gets a blank line, so that a dead one is found.
const QUIET: Duration = Duration::from_secs(15);

/// What is asked of `/v1/events`.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// First sequence number; the oldest on record if absent.
    #[serde(default)]
    pub from: Option<u64>,
    /// Whether to go on with new events as they happen.
    #[serde(default)]
    #[param(required = false)]
    pub follow: bool,
}

/// Events that were overwritten before they could be sent to this client: re-read
/// `/v1/nodes`, which is the truth. The stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LostEvents {
    /// Which ones.
    pub lost: LostRange,
}

/// A range of sequence numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LostRange {
    /// First sequence number lost.
    pub from: u64,
    /// Next sequence number to come.
    pub resume: u64,
}

/// How a stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Lines,
    ServerSent,
}

impl Format {
    /// By the `Accept` header.
    pub(super) fn of(accept: &str) -> Self {
        let wants = |kind: &str| accept.split([',', ';']).any(|part| part.trim() == kind);
        if wants(EVENT_STREAM) {
            Self::ServerSent
        } else {
            Self::Lines
        }
    }

    pub(super) const fn media_type(self) -> &'static str {
        match self {
            Self::Lines => NDJSON,
            Self::ServerSent => EVENT_STREAM,
        }
    }

    fn write<T: Serialize>(self, out: &mut String, kind: &str, last: u64, value: &T) {
        // Plain structures with string keys: their encoding cannot fail.
        let json = serde_json::to_string(value).unwrap_or_default();
        // Writing to a string cannot fail either.
        let _ = match self {
            Self::Lines => writeln!(out, "{json}"),
            Self::ServerSent => write!(out, "id: {last}\nevent: {kind}\ndata: {json}\n\n"),
        };
    }

    const fn blank(self) -> &'static str {
        match self {
            Self::Lines => "\n",
            Self::ServerSent => ":\n\n",
        }
    }
}

/// A reader of the ring on behalf of one client.
struct Follower {
    app: Arc<App>,
    next: u64,
    /// The last event, for a client that does not follow.
    end: Option<u64>,
    format: Format,
    news: watch::Receiver<u64>,
    _permit: Counted,
}

impl Follower {
    /// What can be sent now.
    fn batch(&mut self) -> String {
        let app = self.app.clone();
        let ring = app.control.fabric();
        let mut batch = String::new();
        while batch.len() < BATCH && self.end.is_none_or(|end| self.next <= end) {
            match ring.read(self.next) {
                RingRead::Event(event) => {
                    self.next += 1;
                    self.write(&mut batch, &event);
                }
                RingRead::NotYet => break,
                RingRead::Lost { oldest } => {
                    // A ring that answers nonsense must not make us go back or stand still.
                    let resume = oldest.max(self.next + 1);
                    let lost = LostRange {
                        from: self.next,
                        resume,
                    };
                    app.lost.fetch_add(resume - self.next, Ordering::Relaxed);
                    self.next = resume;
                    let mark = LostEvents { lost };
                    self.format.write(&mut batch, "lost", resume - 1, &mark);
                }
            }
        }
        batch
    }

    fn write(&self, batch: &mut String, event: &Event) {
        self.format.write(batch, "event", event.seq, event);
    }
}

/// The events as a body. Ends with the manager, after all that has happened was sent.
pub(super) fn body(app: Arc<App>, query: EventsQuery, format: Format, permit: Counted) -> Body {
    let ring = app.control.fabric();
    let oldest = || match ring.read(1) {
        RingRead::Lost { oldest } => oldest,
        _ => 1,
    };
    // There is no event 0; and without following, no event is newer than those of now.
    let next = query.from.unwrap_or_else(oldest).max(1);
    let end = (!query.follow).then(|| ring.state().ring_head());
    let follower = Follower {
        next,
        end,
        format,
        news: app.news.clone(),
        app,
        _permit: permit,
    };
    let chunks = stream::unfold(Some(follower), async |follower| {
        let mut follower = follower?;
        loop {
            let batch = follower.batch();
            if !batch.is_empty() {
                return Some((Ok::<_, Infallible>(Bytes::from(batch)), Some(follower)));
            }
            if follower.end.is_some() {
                return None;
            }
            match tokio::time::timeout(QUIET, follower.news.changed()).await {
                Ok(Ok(())) => {}
                // The server ends: what happened since the last batch is still told.
                Ok(Err(_)) => {
                    let rest = follower.batch();
                    return (!rest.is_empty()).then(|| (Ok(Bytes::from(rest)), None));
                }
                Err(_) => {
                    let blank = Bytes::from_static(follower.format.blank().as_bytes());
                    return Some((Ok(blank), Some(follower)));
                }
            }
        }
    });
    Body::from_stream(chunks)
}
