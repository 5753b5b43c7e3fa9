//! The manager's interface for programs that speak HTTP, and for monitoring.
//!
//! | module | what it holds |
//! |---|---|
//! | [`server`] | sockets, connections and their bounds; one thread, apart from the manager's loop |
//! | [`routes`] | what can be asked, as an `axum` router |
//! | `queries`, `orders` | the answers |
//! | `app` | what they share |
//! | [`problem`] | refusals, as `application/problem+json` (RFC 9457) |
//! | [`events`] | the stream of events, as lines of JSON or as server-sent events |
//! | [`token`] | who may ask over TCP |
//! | [`openapi`] | the description of all of it, made from the code |
//!
//! The control socket of [`crate::api`] is for Lupin's own command line: it can also run commands
//! inside nodes. This one is for everybody else. Both call the same
//! [`PodControl`](crate::api::PodControl).

mod app;
pub mod events;
pub mod openapi;
mod orders;
pub mod problem;
mod queries;
pub mod routes;
pub mod server;
mod slow;
pub mod token;

use std::net::SocketAddr;

use crate::podfile::{Api, ApiTcp};
use token::{Token, TokenError};

pub use server::{HttpServer, Options, Patience};

/// Where a pod file wants TCP to be served, and the token that it asks for.
///
/// # Errors
/// If the token cannot be used.
pub fn tcp_of(api: &Api) -> Result<Option<(SocketAddr, Token)>, TokenError> {
    let load = |tcp: &ApiTcp| Ok((tcp.listen, Token::load(&tcp.token_file)?));
    api.tcp.as_ref().map(load).transpose()
}

/// Name of the HTTP socket in a pod's runtime folder.
pub const API_SOCKET: &str = "api.sock";

#[cfg(test)]
mod http_test;
