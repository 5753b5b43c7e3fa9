//! Questions: what changes nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, Uri, header};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::{App, NodeName};
use super::events::{self, EventsQuery, Format};
use super::problem::{Kind, Problem};
use crate::api::{NodeStatus, PodPhase, PodStatus, schema};
use crate::metrics::OPENMETRICS;

/// Where a client of server-sent events stopped.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// How the manager is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Where the pod stands.
    #[schema(value_type = schema::PodPhase)]
    pub phase: PodPhase,
    /// How many managers have taken charge of this pod memory.
    pub epoch: u64,
}

/// The pod and all of its nodes.
#[utoipa::path(get, path = "/v1/pod", tag = "pod",
    responses((status = 200, description = "A snapshot", body = PodStatus)))]
pub(super) async fn pod(State(app): State<Arc<App>>) -> Result<Json<PodStatus>, Problem> {
    app.ask(|app| Ok(Json(app.status()))).await
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
            (schema::StreamLine = "application/x-ndjson"),
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
