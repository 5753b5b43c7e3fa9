//! What can be asked, and by whom.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use lupin_abi::NodeId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use utoipa::ToSchema;

use super::events::{self, EventsQuery, Format};
use super::problem::{Kind, Problem};
use super::token::Token;
use super::{openapi, orders};
use crate::api::{ControlError, NodeAction, NodeStatus, PodControl, PodPhase, PodStatus};
use crate::metrics::{Metrics, OPENMETRICS};

/// Longest body of a request, in bytes.
pub const MAX_BODY: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Most event streams at once.
pub const MAX_STREAMS: usize = 32;
/// Where a client of server-sent events stopped.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How long processes may take to end by themselves unless the request says otherwise.
pub(super) const DEFAULT_GRACE_MS: u64 = 5000;

/// What the routes share.
pub(super) struct App {
    pub control: Arc<dyn PodControl>,
    pub metrics: Metrics,
    /// The number of the newest event; closed when the server ends.
    pub news: watch::Receiver<u64>,
    /// Event streams at this moment.
    pub streams: Arc<AtomicUsize>,
    /// Events that were overwritten before a follower had read them.
    pub lost: AtomicU64,
    /// Somebody begins to follow: look at the ring more often.
    pub wanted: Notify,
    /// Whether the manager's loop moves.
    pub alive: watch::Receiver<bool>,
}

/// The right to stream; given back when dropped.
pub(super) struct StreamPermit(Arc<AtomicUsize>);

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl App {
    fn stream_permit(&self) -> Result<StreamPermit, Problem> {
        // Relaxed: a counter that guards nothing but itself.
        let taken = self
            .streams
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < MAX_STREAMS).then_some(n + 1)
            });
        match taken {
            Ok(_) => Ok(StreamPermit(self.streams.clone())),
            Err(_) => Err(ControlError::TooMany {
                what: "event streams".into(),
                limit: MAX_STREAMS,
            }
            .into()),
        }
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

    fn status(&self) -> PodStatus {
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
    fn find<'a>(&self, status: &'a PodStatus) -> Result<&'a NodeStatus, Problem> {
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

/// How the manager is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Where the pod stands.
    #[schema(value_type = openapi::PodPhase)]
    pub phase: PodPhase,
    /// How many managers have taken charge of this pod memory.
    pub epoch: u64,
}

/// The routes. Over TCP a token is asked for.
pub(super) fn router(app: Arc<App>, token: Option<Token>) -> Router {
    let router = Router::new()
        .route("/v1/pod", get(pod))
        .route("/v1/pod/down", post(down))
        .route("/v1/pod/reload", post(orders::reload))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{node}", get(node))
        .route("/v1/nodes/{node}/kill", post(orders::kill))
        .route("/v1/nodes/{node}/pause", post(orders::pause))
        .route("/v1/nodes/{node}/resume", post(orders::resume))
        .route("/v1/nodes/{node}/restart", post(orders::restart))
        .route("/v1/nodes/{node}/stop", post(orders::stop))
        .route("/v1/nodes/{node}/start", post(orders::start))
        .route("/v1/nodes/{node}/drain", post(orders::drain))
        .route("/v1/nodes/{node}/drain/cancel", post(orders::cancel_drain))
        .route("/v1/nodes/{node}/add", post(orders::add))
        .route("/v1/nodes/{node}/remove", post(orders::remove))
        .route("/v1/events", get(stream))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(description))
        .route("/healthz", get(health))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method);
    let router = match token {
        Some(token) => router.layer(from_fn_with_state(Arc::new(token), check_token)),
        None => router,
    };
    router.with_state(app)
}

async fn check_token(
    State(token): State<Arc<Token>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let shown = request.headers().get(header::AUTHORIZATION);
    // Whoever asks whether the manager lives need not know a secret.
    let admitted = request.uri().path() == "/healthz"
        || shown.is_some_and(|shown| token.admits(shown.as_bytes()));
    if admitted {
        return next.run(request).await;
    }
    let detail = match shown {
        Some(_) => "the token is not the one of this pod",
        None => "the request shows no token",
    };
    Problem::new(Kind::Unauthorized, detail).into_response()
}

async fn nowhere(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(80).collect();
    Problem::new(Kind::NoSuchRoute, format!("there is no {path}"))
}

async fn wrong_method(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(80).collect();
    let detail = format!("{path} cannot be asked with this method");
    Problem::new(Kind::WrongMethod, detail)
}

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

/// The pod and all of its nodes.
#[utoipa::path(get, path = "/v1/pod", tag = "pod",
    responses((status = 200, description = "A snapshot", body = PodStatus)))]
pub(super) async fn pod(State(app): State<Arc<App>>) -> Result<Json<PodStatus>, Problem> {
    app.ask(|app| Ok(Json(app.status()))).await
}

/// Begins to bring the pod down: nodes get the grace to end by themselves, then they are ended.
///
/// Can be asked again, with another grace. The manager ends when all is done, and its sockets
/// with it.
#[utoipa::path(post, path = "/v1/pod/down", tag = "pod",
    request_body(content = inline(Option<DownRequest>), content_type = "application/json"),
    responses(
        (status = 202, description = "It is on its way", body = Accepted),
        (status = 400, description = "The body is no such request", body = Problem),
        (status = 413, description = "The body is too long", body = Problem),
    ))]
pub(super) async fn down(State(app): State<Arc<App>>, request: Request) -> OrderAnswer {
    let wanted: DownRequest = body(request).await?;
    app.ask(move |app| {
        let events_from = app.control.fabric().state().ring_head() + 1;
        app.control.down(Duration::from_millis(wanted.grace_ms));
        let node = None;
        Ok((StatusCode::ACCEPTED, Json(Accepted { node, events_from })))
    })
    .await
}

/// All nodes, by id.
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes",
    responses((status = 200, description = "A snapshot", body = Vec<NodeStatus>)))]
pub(super) async fn nodes(State(app): State<Arc<App>>) -> Result<Json<Vec<NodeStatus>>, Problem> {
    app.ask(|app| Ok(Json(app.status().nodes))).await
}

/// One node.
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(
        (status = 200, description = "A snapshot", body = NodeStatus),
        (status = 404, description = "The pod has no such node", body = Problem),
    ))]
pub(super) async fn node(
    State(app): State<Arc<App>>,
    node: NodeName,
) -> Result<Json<NodeStatus>, Problem> {
    app.ask(move |app| Ok(Json(node.find(&app.status())?.clone())))
        .await
}

/// What happened, from the record in pod memory.
///
/// One JSON object a line, or server-sent events if `Accept` names `text/event-stream`; there,
/// `Last-Event-ID` stands for `from`. A line is an event, or says which events were lost because
/// the client fell behind, or is blank, now and then, where nothing happens.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventsQuery),
    responses(
        (status = 200, description = "Events", content(
            (openapi::StreamLine = "application/x-ndjson"),
            (String = "text/event-stream"),
        )),
        (status = 400, description = "The query makes no sense", body = Problem),
        (status = 429, description = "Too many streams", body = Problem),
    ))]
pub(super) async fn stream(
    State(app): State<Arc<App>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response<Body>, Problem> {
    let query = Query::<EventsQuery>::try_from_uri(&uri);
    let Query(mut query) = query.map_err(|e| Problem::new(Kind::BadRequest, e.body_text()))?;
    let text = |name| {
        headers
            .get(name)
            .and_then(|v: &HeaderValue| v.to_str().ok())
    };
    let format = Format::of(text(header::ACCEPT).unwrap_or_default());
    if let Some(last) = text(LAST_EVENT_ID) {
        let last: u64 = last
            .trim()
            .parse()
            .map_err(|_| Problem::new(Kind::BadRequest, "Last-Event-ID is no sequence number"))?;
        query.from = query.from.or(Some(last.saturating_add(1)));
    }
    let permit = app.stream_permit()?;
    app.wanted.notify_one();
    let mut response = Response::new(events::body(app, query, format, permit));
    let headers = response.headers_mut();
    let media_type = HeaderValue::from_static(format.media_type());
    headers.insert(header::CONTENT_TYPE, media_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "monitoring",
    responses((status = 200, description = "OpenMetrics text", content_type = OPENMETRICS,
        body = String)))]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response<Body>, Problem> {
    let text = app
        .ask(|app| {
            app.metrics.catch_up(app.control.fabric());
            let lost = app.lost.load(Ordering::Relaxed);
            let text = app.metrics.render(&app.status(), lost);
            text.map_err(|e| Problem::new(Kind::Internal, e.to_string()))
        })
        .await?;
    let mut response = Response::new(Body::from(text));
    let media_type = HeaderValue::from_static(OPENMETRICS);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    Ok(response)
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "monitoring",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub(super) async fn description() -> Response<Body> {
    let mut response = Response::new(Body::from(openapi::document()));
    let media_type = HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    response
}

/// Whether the manager looks at its nodes. Needs no token.
#[utoipa::path(get, path = "/healthz", tag = "monitoring", security(()),
    responses(
        (status = 200, description = "It does", body = Health),
        (status = 503, description = "It stands still", body = Problem),
    ))]
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<Json<Health>, Problem> {
    if !*app.alive.borrow() {
        let detail = "the manager's loop has not moved for some time";
        return Err(Problem::new(Kind::Hung, detail));
    }
    app.ask(|app| {
        let status = app.control.status();
        let (phase, epoch) = (status.phase, status.epoch);
        Ok(Json(Health { phase, epoch }))
    })
    .await
}
