//! Sockets, connections, and what bounds them.
//!
//! All of it runs on one thread with its own executor; what asks the manager runs on a few more.
//! The manager's loop never waits for any of them.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Notify, watch};

use super::app::App;
use super::problem::{Kind, PROBLEM_JSON, Problem};
use super::routes;
use super::slow::Patient;
use super::token::Token;
use crate::api::PodControl;
use crate::count::Count;
use crate::metrics::Metrics;
use crate::sys::socket;

/// Most connections at once.
pub const MAX_CONNECTIONS: usize = 64;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 32 << 10;
/// Threads that ask the manager.
const ASKERS: usize = 4;
/// How often the ring is looked at while somebody follows.
const FOLLOW_EVERY: Duration = Duration::from_millis(10);
/// How often it is looked at for the metrics.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a refusal may take to be read.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);
/// How long answers that are under way may take when the server ends.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// What to serve, and where.
#[derive(Debug)]
pub struct Options {
    /// The UNIX socket, if there shall be one.
    pub socket: Option<PathBuf>,
    /// TCP as well: where, and who may ask.
    pub tcp: Option<(SocketAddr, Token)>,
    /// For how long.
    pub patience: Patience,
}

/// What clients, and the manager, are waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long the head of a request may take to arrive, and a connection may stay idle.
    pub head: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write: Duration,
    /// How long the manager's loop may stand still before `/healthz` says so.
    pub manager: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            write: Duration::from_secs(20),
            // The longest that a pod file allows between two looks, and then some.
            manager: Duration::from_secs(25),
        }
    }
}

/// A running server; dropping it ends the streams and removes the socket.
pub struct HttpServer {
    socket: Option<PathBuf>,
    tcp: Option<SocketAddr>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Serves `control`. The caller holds the pod's lock: a stale socket is replaced.
    ///
    /// # Errors
    /// If a socket cannot be made.
    pub fn start(control: Arc<dyn PodControl>, options: Options) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(ASKERS)
            .thread_name("http-ask")
            .build()?;
        let unix = options.socket.as_deref().map(socket::listen).transpose()?;
        let tcp = options.tcp.map(|(address, token)| {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            io::Result::Ok((listener, token))
        });
        let tcp = tcp.transpose()?;
        let bound = tcp.as_ref().map(|(listener, _)| listener.local_addr());
        let bound = bound.transpose()?;
        // Tokio wants the descriptors registered from inside.
        let (unix, tcp) = {
            let _inside = runtime.enter();
            let tcp = tcp
                .map(|(listener, token)| io::Result::Ok((TcpListener::from_std(listener)?, token)));
            let unix = unix.map(UnixListener::from_std);
            (unix.transpose()?, tcp.transpose()?)
        };
        let stop = Arc::new(Notify::new());
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || {
                runtime.block_on(serve(control, unix, tcp, options.patience, &stopped));
                runtime.shutdown_timeout(END_PATIENCE);
            })?;
        Ok(Self {
            socket: options.socket,
            tcp: bound,
            stop,
            thread: Some(thread),
        })
    }

    /// The UNIX socket that is served.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The address that is served over TCP.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.tcp
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // Best effort: what cannot be stopped ends with the process.
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is done until `stop`.
async fn serve(
    control: Arc<dyn PodControl>,
    unix: Option<UnixListener>,
    tcp: Option<(TcpListener, Token)>,
    patience: Patience,
    stop: &Notify,
) {
    let head = control.fabric().state().ring_head();
    let (tell, news) = watch::channel(head);
    let (tell_alive, alive) = watch::channel(true);
    let metrics = Metrics::new(&control.status().pod);
    let app = Arc::new(App {
        control,
        metrics,
        news,
        streams: Count::default(),
        lost: AtomicU64::new(0),
        wanted: Notify::new(),
        alive,
    });
    let open = Count::default();
    let gate = Gate {
        open: open.clone(),
        patience,
    };
    if let Some(listener) = unix {
        let local = routes::router(app.clone(), None);
        tokio::spawn(accept_unix(listener, local, gate.clone()));
    }
    if let Some((listener, token)) = tcp {
        let remote = routes::router(app.clone(), Some(token));
        tokio::spawn(accept_tcp(listener, remote, gate));
    }
    let looking = tokio::spawn(look(app, tell, tell_alive, patience.manager));
    stop.notified().await;
    // Closes the news, which ends the streams after all that has happened.
    looking.abort();
    let end = Instant::now() + END_PATIENCE;
    while open.now() > 0 && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Looks at the ring and at the manager's beat, for all clients together.
async fn look(
    app: Arc<App>,
    tell: watch::Sender<u64>,
    tell_alive: watch::Sender<bool>,
    patience: Duration,
) {
    let state = app.control.fabric().state();
    let (mut beat, mut moved) = (state.manager_beat(), Instant::now());
    let mut looked: Option<Instant> = None;
    loop {
        tell.send_if_modified(|head| {
            let now = state.ring_head();
            std::mem::replace(head, now) != now
        });
        if looked.is_none_or(|then| then.elapsed() >= LOOK_EVERY) {
            looked = Some(Instant::now());
            app.metrics.catch_up(app.control.fabric());
            if std::mem::replace(&mut beat, state.manager_beat()) != beat {
                moved = Instant::now();
            }
            tell_alive.send_if_modified(|alive| {
                let now = moved.elapsed() < patience;
                std::mem::replace(alive, now) != now
            });
        }
        // A stream that begins reads what is there; what comes later it learns from here.
        let pause = match app.streams.now() {
            0 => LOOK_EVERY,
            _ => FOLLOW_EVERY,
        };
        let _ = tokio::time::timeout(pause, app.wanted.notified()).await;
    }
}

/// Counts connections.
#[derive(Clone)]
struct Gate {
    open: Count,
    patience: Patience,
}

async fn accept_unix(listener: UnixListener, router: Router, gate: Gate) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => admit(stream, &router, &gate),
            Err(e) => rest(&e).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, router: Router, gate: Gate) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // An answer is one or two writes; there is nothing to wait for.
                let _ = stream.set_nodelay(true);
                admit(stream, &router, &gate);
            }
            Err(e) => rest(&e).await,
        }
    }
}

/// Out of descriptors, most likely: lets others give some back.
async fn rest(error: &io::Error) {
    log::warn!("cannot accept an HTTP client: {error}");
    tokio::time::sleep(Duration::from_millis(500)).await;
}

fn admit<S>(stream: S, router: &Router, gate: &Gate)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if let Some(admitted) = gate.open.admit(MAX_CONNECTIONS) {
        let router = router.clone();
        let patience = gate.patience;
        tokio::spawn(async move {
            let _admitted = admitted;
            let stream = TokioIo::new(Patient::new(stream, patience.write));
            // How a client leaves, or what it says that is not HTTP, is its own affair.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(patience.head)
                .max_buf_size(MAX_HEAD)
                .serve_connection(stream, TowerToHyperService::new(router))
                .await;
        });
    } else if let Some(admitted) = gate.open.admit(2 * MAX_CONNECTIONS) {
        tokio::spawn(async move {
            let _admitted = admitted;
            let _ = tokio::time::timeout(REFUSAL_PATIENCE, refuse(stream)).await;
        });
    }
    // Beyond that not even a refusal: the connection is closed.
}

/// Tells a client that there are too many, and lets it read that.
async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let what = format!("there are {MAX_CONNECTIONS} connections already");
    let body = Problem::new(Kind::TooMany, what).to_json();
    let head = format!(
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: {PROBLEM_JSON}\r\n\
         content-length: {}\r\nconnection: close\r\nretry-after: 1\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await?;
    // A socket that is closed with something unread in it takes the answer back.
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}
