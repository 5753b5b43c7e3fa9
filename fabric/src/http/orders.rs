//! Orders: what is done to nodes, and to the pod as its file says now.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::{IntoResponses, ToSchema};

use super::app::{
    Accepted, App, DEFAULT_GRACE_MS, DownRequest, NodeName, Nothing, OrderAnswer, body,
};
use super::problem::Problem;
use crate::api::{Difference, NodeAction};

/// How long members of groups may take to move off a node unless the request says otherwise.
const DEFAULT_DRAIN_MS: u64 = 60_000;

/// What comes of an order for one node.
#[derive(IntoResponses)]
#[expect(
    dead_code,
    reason = "only a description: handlers return what it describes"
)]
enum Ordered {
    /// It is on its way
    #[response(status = 202)]
    Accepted(Accepted),
    /// The pod has no such node
    #[response(status = 404)]
    NoSuchNode(Problem),
    /// The node's state does not allow it
    #[response(status = 409)]
    WrongState(Problem),
    /// The pod is going down
    #[response(status = 503)]
    GoingDown(Problem),
}

/// How a node shall be drained.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// How long members of groups may take to move off, in milliseconds.
    pub wait_ms: u64,
    /// How long the node may take to end by itself then, in milliseconds.
    pub grace_ms: u64,
}

impl Default for DrainRequest {
    fn default() -> Self {
        Self {
            wait_ms: DEFAULT_DRAIN_MS,
            grace_ms: DEFAULT_GRACE_MS,
        }
    }
}

/// Whether the pod file shall only be looked at.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadRequest {
    /// Only say what differs and what would be done.
    pub dry_run: bool,
}

/// Ends this life of a node as if it had failed: fence, generation, ring; then it is started again
/// if its policy says so.
#[utoipa::path(post, path = "/v1/nodes/{node}/kill", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(
        (status = 202, description = "It is on its way", body = Accepted),
        (status = 404, description = "The pod has no such node", body = Problem),
        (status = 409, description = "The node does not run", body = Problem),
        (status = 503, description = "The pod is going down", body = Problem),
    ))]
pub(super) async fn kill(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.order(node, |control, node| control.kill(node)).await
}

/// Stops a node's virtual CPUs, or all its processes. A paused node is not a failed one.
#[utoipa::path(post, path = "/v1/nodes/{node}/pause", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(Ordered))]
pub(super) async fn pause(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.steer(node, NodeAction::Pause {}).await
}

/// Lets a paused node run again.
#[utoipa::path(post, path = "/v1/nodes/{node}/resume", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(Ordered))]
pub(super) async fn resume(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.steer(node, NodeAction::Resume {}).await
}

/// Ends a node in an orderly way and starts it again at once, whatever its policy says.
#[utoipa::path(post, path = "/v1/nodes/{node}/restart", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    request_body(content = inline(Option<DownRequest>), content_type = "application/json"),
    responses(Ordered))]
pub(super) async fn restart(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let DownRequest { grace_ms } = body(request).await?;
    app.steer(node, NodeAction::Restart { grace_ms }).await
}

/// Ends a node in an orderly way and leaves it down.
#[utoipa::path(post, path = "/v1/nodes/{node}/stop", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    request_body(content = inline(Option<DownRequest>), content_type = "application/json"),
    responses(Ordered))]
pub(super) async fn stop(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let DownRequest { grace_ms } = body(request).await?;
    app.steer(node, NodeAction::Stop { grace_ms }).await
}

/// Starts a node that is down, or that waits for its time to be started again.
#[utoipa::path(post, path = "/v1/nodes/{node}/start", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(Ordered))]
pub(super) async fn start(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.steer(node, NodeAction::Start {}).await
}

/// Lets the members of groups move off a node, and stops it then.
///
/// The node's agent admits no new member from now on. The node is stopped as soon as none is left on
/// it, or when the time is up. Asked again, nothing changes.
#[utoipa::path(post, path = "/v1/nodes/{node}/drain", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    request_body(content = inline(Option<DrainRequest>), content_type = "application/json"),
    responses(Ordered))]
pub(super) async fn drain(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let DrainRequest { wait_ms, grace_ms } = body(request).await?;
    app.steer(node, NodeAction::Drain { wait_ms, grace_ms })
        .await
}

/// Lets a node that drains go on as before. Of one that does not drain nothing is done.
#[utoipa::path(post, path = "/v1/nodes/{node}/drain/cancel", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    responses(Ordered))]
pub(super) async fn cancel_drain(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.steer(node, NodeAction::CancelDrain {}).await
}

/// Stops a node if it runs, and takes it out of the pod for good. Its generation stays, for a later
/// node of its id.
#[utoipa::path(post, path = "/v1/nodes/{node}/remove", tag = "nodes",
    params(("node" = String, Path, description = "Name or id")),
    request_body(content = inline(Option<DownRequest>), content_type = "application/json"),
    responses(Ordered))]
pub(super) async fn remove(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let DownRequest { grace_ms } = body(request).await?;
    app.steer(node, NodeAction::Remove { grace_ms }).await
}

/// Takes a node of the pod file, as that is now, into the running pod, and starts it.
#[utoipa::path(post, path = "/v1/nodes/{node}/add", tag = "nodes",
    params(("node" = String, Path, description = "Name or id in the pod file")),
    responses(
        (status = 202, description = "It is on its way", body = Accepted),
        (status = 400, description = "The pod file does not read, or the node cannot be had from \
            it", body = Problem),
        (status = 409, description = "The pod has this node already", body = Problem),
        (status = 503, description = "The pod is going down", body = Problem),
        (status = 507, description = "It could not be put on record", body = Problem),
    ))]
pub(super) async fn add(
    State(app): State<Arc<App>>,
    node: NodeName,
    request: Request,
) -> OrderAnswer {
    let Nothing {} = body(request).await?;
    app.ask(move |app| {
        let events_from = app.control.fabric().state().ring_head() + 1;
        let node = Some(app.control.add(&node.0)?.get());
        Ok((StatusCode::ACCEPTED, Json(Accepted { node, events_from })))
    })
    .await
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

/// Compares the pod file, as it is now, with the pod, and applies what can be applied while the pod
/// runs: all of that, or nothing. Answers with everything that differs.
#[utoipa::path(post, path = "/v1/pod/reload", tag = "pod",
    request_body(content = inline(Option<ReloadRequest>), content_type = "application/json"),
    responses(
        (status = 200, description = "What differs, and when it takes effect",
            body = Vec<Difference>),
        (status = 400, description = "The pod file does not read", body = Problem),
        (status = 503, description = "The pod is going down", body = Problem),
        (status = 507, description = "It could not be put on record", body = Problem),
    ))]
pub(super) async fn reload(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Vec<Difference>>, Problem> {
    let ReloadRequest { dry_run } = body(request).await?;
    app.ask(move |app| Ok(Json(app.control.reload(dry_run)?)))
        .await
}
