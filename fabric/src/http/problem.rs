//! Refusals: `application/problem+json` (RFC 9457) with a code for programs, and for people what
//! is wrong and what to do.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::ControlError;

/// Media type of a problem.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The status of the answer.
    pub status: u16,
    /// For programs; never changes its meaning.
    pub code: String,
    /// The code in words.
    pub title: String,
    /// What is wrong with this request.
    pub detail: String,
    /// What to do about it.
    pub advice: String,
}

impl Problem {
    /// A problem of a kind, with what is wrong this time.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        let (status, code, title, advice) = kind.text();
        Self {
            status: status.as_u16(),
            code: code.into(),
            title: title.into(),
            detail: detail.into(),
            advice: advice.into(),
        }
    }

    /// The status of the answer.
    pub fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The body.
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and a number: their encoding cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// The kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense.
    BadRequest,
    /// No token, or a wrong one.
    Unauthorized,
    /// The path leads nowhere.
    NoSuchRoute,
    /// The pod has no such node.
    NoSuchNode,
    /// The path cannot be asked like that.
    WrongMethod,
    /// The request did not arrive in time.
    TooSlow,
    /// State of node or pod do not allow it.
    WrongState,
    /// The body is too long.
    TooLarge,
    /// Too many at once.
    TooMany,
    /// The manager failed inside.
    Internal,
    /// It could not be put on record.
    NotRecorded,
    /// The node's agent cannot be reached.
    Agent,
    /// The pod is going down.
    GoingDown,
    /// The manager's loop stands still.
    Hung,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::NoSuchRoute,
        Self::NoSuchNode,
        Self::WrongMethod,
        Self::TooSlow,
        Self::WrongState,
        Self::TooLarge,
        Self::TooMany,
        Self::Internal,
        Self::NotRecorded,
        Self::Agent,
        Self::GoingDown,
        Self::Hung,
    ];

    /// Status, code, title and advice.
    const fn text(self) -> (StatusCode, &'static str, &'static str, &'static str) {
        match self {
            Self::BadRequest => (
                StatusCode::BAD_REQUEST,
                "bad-request",
                "The request is malformed",
                "GET /openapi.json describes every request",
            ),
            Self::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "A token is needed",
                "send the text of api.token_file: `Authorization: Bearer TOKEN`",
            ),
            Self::NoSuchRoute => (
                StatusCode::NOT_FOUND,
                "no-such-route",
                "Nothing is there",
                "GET /openapi.json lists the paths",
            ),
            Self::NoSuchNode => (
                StatusCode::NOT_FOUND,
                "no-such-node",
                "The pod has no such node",
                "GET /v1/nodes lists them; use an id or a name",
            ),
            Self::WrongMethod => (
                StatusCode::METHOD_NOT_ALLOWED,
                "wrong-method",
                "This path is not asked with this method",
                "the header Allow names the right ones",
            ),
            Self::TooSlow => (
                StatusCode::REQUEST_TIMEOUT,
                "too-slow",
                "The request did not arrive in time",
                "send it again, in one piece",
            ),
            Self::WrongState => (
                StatusCode::CONFLICT,
                "wrong-state",
                "The state of node or pod does not allow this",
                "GET /v1/nodes shows the states; wait, or ask for something else",
            ),
            Self::TooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-large",
                "The body is too long",
                "no request needs so much",
            ),
            Self::TooMany => (
                StatusCode::TOO_MANY_REQUESTS,
                "too-many",
                "Too many at once",
                "close what is not needed, and try again later",
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "The manager failed inside",
                "see its log",
            ),
            Self::NotRecorded => (
                StatusCode::INSUFFICIENT_STORAGE,
                "not-recorded",
                "It could not be put on record",
                "make room in the runtime folder, and ask again",
            ),
            Self::Agent => (
                StatusCode::BAD_GATEWAY,
                "agent",
                "The node's agent cannot be reached",
                "see the console and the events of the node",
            ),
            Self::GoingDown => (
                StatusCode::SERVICE_UNAVAILABLE,
                "going-down",
                "The pod is going down",
                "bring it up again first",
            ),
            Self::Hung => (
                StatusCode::SERVICE_UNAVAILABLE,
                "manager-hung",
                "The manager does not look at its nodes",
                "see its log; end it with SIGKILL and start another, which takes the nodes over",
            ),
        }
    }

    /// The status of the answer.
    pub const fn status(self) -> StatusCode {
        self.text().0
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let kind = match &error {
            ControlError::NoSuchNode { .. } => Kind::NoSuchNode,
            ControlError::WrongState { .. } => Kind::WrongState,
            ControlError::GoingDown => Kind::GoingDown,
            ControlError::Agent { .. } => Kind::Agent,
            ControlError::TooMany { .. } => Kind::TooMany,
            ControlError::NotRecorded { .. } => Kind::NotRecorded,
            ControlError::BadRequest { .. } => Kind::BadRequest,
            ControlError::Internal { .. } => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status_code();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if self.status_code() == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"lupin\"");
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}
