//! What the routes share: the manager that they ask, the node of a path, the body of a request.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, Path, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use lupin_abi::NodeId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use utoipa::ToSchema;

use super::problem::{Kind, Problem};
use crate::api::{ControlError, NodeAction, NodeStatus, PodControl, PodStatus};
use crate::count::{Count, Counted};
use crate::metrics::Metrics;

/// Longest body of a request, in bytes.
pub const MAX_BODY: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Most event streams at once.
pub const MAX_STREAMS: usize = 32;
/// How long processes may take to end by themselves unless the request says otherwise.
pub(super) const DEFAULT_GRACE_MS: u64 = 5000;

/// What the routes share.
pub(super) struct App {
    pub control: Arc<dyn PodControl>,
    pub metrics: Metrics,
    /// The number of the newest event; closed when the server ends.
    pub news: watch::Receiver<u64>,
    /// Event streams at this moment.
    pub streams: Count,
    /// Events that were overwritten before a follower had read them.
    pub lost: AtomicU64,
    /// Somebody begins to follow: look at the ring more often.
    pub wanted: Notify,
    /// Whether the manager's loop moves.
    pub alive: watch::Receiver<bool>,
}

impl App {
    /// Asks for the right to stream.
    pub fn stream_permit(&self) -> Result<Counted, Problem> {
        let too_many = || ControlError::TooMany {
            what: "event streams".into(),
            limit: MAX_STREAMS,
        };
        Ok(self.streams.admit(MAX_STREAMS).ok_or_else(too_many)?)
    }

    /// Calls the manager on a thread where waiting for a lock holds up no other client.
    pub async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce(&App) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let app = self.clone();
        let asked = tokio::task::spawn_blocking(move || question(&app)).await;
        asked.unwrap_or_else(|e| Err(Problem::new(Kind::Internal, e.to_string())))
    }

    pub fn status(&self) -> PodStatus {
        let mut status = self.control.status();
        status.measure();
        status
    }

    /// Asks for something to be done with a node.
    pub async fn order(
        self: &Arc<Self>,
        node: NodeName,
        order: impl FnOnce(&dyn PodControl, NodeId) -> Result<(), ControlError> + Send + 'static,
    ) -> OrderAnswer {
        self.ask(move |app| {
            let id = node.find(&app.control.status())?.id;
            // What happens next has this number or a higher one.
            let events_from = app.control.fabric().state().ring_head() + 1;
            let known = NodeId::new(id).ok_or_else(|| node.unknown())?;
            order(&*app.control, known)?;
            let node = Some(id);
            Ok((StatusCode::ACCEPTED, Json(Accepted { node, events_from })))
        })
        .await
    }

    /// Asks for `action` on a node.
    pub async fn steer(self: &Arc<Self>, node: NodeName, action: NodeAction) -> OrderAnswer {
        self.order(node, move |control, node| control.steer(node, action))
            .await
    }
}

/// The node of a path, by id or name.
pub(super) struct NodeName(pub String);

impl FromRequestParts<Arc<App>> for NodeName {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, app).await;
        path.map(|Path(name)| Self(name))
            .map_err(|e| Problem::new(Kind::BadRequest, e.body_text()))
    }
}

impl NodeName {
    pub fn find<'a>(&self, status: &'a PodStatus) -> Result<&'a NodeStatus, Problem> {
        status.find(&self.0).ok_or_else(|| self.unknown())
    }

    fn unknown(&self) -> Problem {
        // A name may be as long as a header.
        let node = self.0.chars().take(80).collect();
        ControlError::NoSuchNode { node }.into()
    }
}

/// What comes of asking for something that takes its time.
pub(super) type OrderAnswer = Result<(StatusCode, Json<Accepted>), Problem>;

/// What was asked for is on its way; the events tell what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// The node; absent if it is about the pod.
    pub node: Option<u32>,
    /// The events of it have this sequence number or higher ones: `/v1/events?from=`.
    pub events_from: u64,
}

/// How pod or node shall be ended.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DownRequest {
    /// How long processes may take to end by themselves, in milliseconds.
    pub grace_ms: u64,
}

impl Default for DownRequest {
    fn default() -> Self {
        Self {
            grace_ms: DEFAULT_GRACE_MS,
        }
    }
}

/// A request that says nothing beyond its path.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// The body of a request; what an empty one means is the type's default.
pub(super) async fn body<T: DeserializeOwned + Default>(request: Request) -> Result<T, Problem> {
    let collected = Limited::new(request.into_body(), MAX_BODY).collect();
    let bytes = match tokio::time::timeout(BODY_PATIENCE, collected).await {
        Err(_) => {
            let detail = format!("the body took longer than {} s", BODY_PATIENCE.as_secs());
            return Err(Problem::new(Kind::TooSlow, detail));
        }
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            let detail = format!("the body is longer than {MAX_BODY} bytes");
            return Err(Problem::new(Kind::TooLarge, detail));
        }
        Ok(Err(e)) => return Err(Problem::new(Kind::BadRequest, format!("the body: {e}"))),
        Ok(Ok(body)) => body.to_bytes(),
    };
    if bytes.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes)
        .map_err(|e| Problem::new(Kind::BadRequest, format!("the body: {e}")))
}
