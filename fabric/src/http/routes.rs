//! What can be asked, and by whom.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{get, post};

use super::app::App;
use super::problem::{Kind, Problem};
use super::token::Token;
use super::{openapi, orders, queries};

/// The routes. Over TCP a token is asked for.
pub(super) fn router(app: Arc<App>, token: Option<Token>) -> Router {
    let router = Router::new()
        .route("/v1/pod", get(queries::pod))
        .route("/v1/pod/down", post(orders::down))
        .route("/v1/pod/reload", post(orders::reload))
        .route("/v1/nodes", get(queries::nodes))
        .route("/v1/nodes/{node}", get(queries::node))
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
        .route("/v1/events", get(queries::stream))
        .route("/metrics", get(queries::metrics))
        .route("/openapi.json", get(openapi::description))
        .route("/healthz", get(queries::health))
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
