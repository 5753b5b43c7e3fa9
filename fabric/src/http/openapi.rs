//! The description of the HTTP interface, made from the code that serves it.
//!
//! `lupin-fabricd openapi` prints it; `docs/openapi.json` is its copy in the repository, and a
//! test fails when that is stale.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::app::{Accepted, DownRequest};
use super::events::{LostEvents, LostRange};
use super::orders::{self, DrainRequest, ReloadRequest};
use super::problem::Problem;
use super::queries::{self, Health};
use crate::api::schema::{EventLine, FailureCause, Kind, PodPhase, State, StreamLine};
use crate::api::{Difference, Effect, HeartbeatStatus, NodeStatus, PodStatus};
use crate::sys::usage::Usage;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lupin fabric manager",
        description = "Watch and steer one pod. Served on the UNIX socket `api.sock` in the pod's \
                       runtime folder, and over TCP where the pod file says so, with a token. \
                       Refusals are `application/problem+json`.",
    ),
    paths(
        queries::pod,
        orders::down,
        queries::nodes,
        queries::node,
        orders::kill,
        orders::pause,
        orders::resume,
        orders::restart,
        orders::stop,
        orders::start,
        orders::drain,
        orders::cancel_drain,
        orders::add,
        orders::remove,
        orders::reload,
        queries::stream,
        queries::metrics,
        description,
        queries::health,
    ),
    components(schemas(
        PodStatus, NodeStatus, HeartbeatStatus, Usage, PodPhase, State, FailureCause, Kind,
        EventLine, StreamLine, LostEvents, LostRange, Accepted, DownRequest, DrainRequest,
        ReloadRequest, Difference, Effect, Health, Problem,
    )),
    modifiers(&Security),
    security(("token" = [])),
)]
struct Description;

struct Security;

impl Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("Over TCP only: the text of api.token_file"))
            .build();
        if let Some(components) = &mut document.components {
            components.add_security_scheme("token", SecurityScheme::Http(scheme));
        }
    }
}

/// The description, as JSON text with a newline at its end.
pub fn document() -> String {
    // Plain structures with string keys: their encoding cannot fail.
    let mut text = Description::openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "monitoring",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub(super) async fn description() -> Response<Body> {
    let mut response = Response::new(Body::from(document()));
    let media_type = HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    response
}
