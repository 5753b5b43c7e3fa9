//! `pod pause`, `resume`, `restart`, `stop`, `start`, `drain`, `add`, `rm`: one node, and waiting
//! until it is done.

use std::path::Path;
use std::time::{Duration, Instant};

use lupin_abi::Event;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{Client, NodeAction, NodeStatus};

use super::place::Place;
use super::text::span;
use super::timeline::words;
use super::{DrainArgs, EndArgs, Failure, NodeArgs, status};

/// Between looks at the pod.
const LOOK_EVERY: Duration = Duration::from_millis(25);

pub(super) fn pause(base: &Path, args: &NodeArgs) -> Result<i32, Failure> {
    steer(base, args, NodeAction::Pause {}, |news| match news.kind() {
        Some(EventKind::NodePaused) => Some(Done::Yes),
        // It runs on, and its detail says why.
        _ if news.is(NodeState::Joined) => Some(Done::No),
        _ => None,
    })
}

pub(super) fn resume(base: &Path, args: &NodeArgs) -> Result<i32, Failure> {
    steer(base, args, NodeAction::Resume {}, |news| {
        (news.kind() == Some(EventKind::NodeResumed)).then_some(Done::Yes)
    })
}

pub(super) fn restart(base: &Path, args: &EndArgs) -> Result<i32, Failure> {
    let grace_ms = millis(args.grace);
    steer(base, &args.node, NodeAction::Restart { grace_ms }, joined)
}

pub(super) fn stop(base: &Path, args: &EndArgs) -> Result<i32, Failure> {
    let grace_ms = millis(args.grace);
    steer(base, &args.node, NodeAction::Stop { grace_ms }, |news| {
        (news.kind() == Some(EventKind::NodeDown)).then_some(Done::Yes)
    })
}

pub(super) fn start(base: &Path, args: &NodeArgs) -> Result<i32, Failure> {
    steer(base, args, NodeAction::Start {}, joined)
}

pub(super) fn drain(base: &Path, args: &DrainArgs) -> Result<i32, Failure> {
    let node = &args.end.node;
    if args.cancel {
        return steer(base, node, NodeAction::CancelDrain {}, |news| {
            match news.kind() {
                Some(EventKind::DrainCancelled) => Some(Done::Yes),
                // It did not drain, whatever else it does.
                None if !news.is(NodeState::Draining) => Some(Done::Yes),
                _ => None,
            }
        });
    }
    let action = NodeAction::Drain {
        wait_ms: millis(args.wait),
        grace_ms: millis(args.end.grace),
    };
    let node = NodeArgs {
        timeout: node.timeout + args.wait + args.end.grace,
        ..node.clone()
    };
    steer(base, &node, action, |news| match news.kind() {
        Some(EventKind::NodeDown) => Some(Done::Yes),
        Some(EventKind::DrainCancelled) => Some(Done::No),
        _ if news.is(NodeState::Down) => Some(Done::Yes),
        _ => None,
    })
}

pub(super) fn rm(base: &Path, args: &EndArgs) -> Result<i32, Failure> {
    let grace_ms = millis(args.grace);
    steer(base, &args.node, NodeAction::Remove { grace_ms }, |news| {
        (news.kind() == Some(EventKind::NodeRemoved)).then_some(Done::Yes)
    })
}

pub(super) fn add(base: &Path, args: &NodeArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let failed = |e| Failure::of_client(&place, &e);
    let mut client = place.connect()?;
    let next = client.status().map_err(failed)?.newest_event + 1;
    client.add(&args.node).map_err(failed)?;
    let id = client.status().map_err(failed)?;
    let id = id.find(&args.node).map(|node| node.id);
    match id {
        Some(id) if !args.no_wait => wait(&place, &mut client, args, (id, next), joined),
        _ => Ok(status::OK),
    }
}

/// Whether the node has come back.
fn joined(news: &News<'_>) -> Option<Done> {
    match news.kind() {
        Some(EventKind::NodeJoined) => Some(Done::Yes),
        _ if news.is(NodeState::Down) => Some(Done::No),
        _ => None,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

enum Done {
    Yes,
    No,
}

/// What is known since the request: an event, or how the node stands after all of them.
enum News<'a> {
    Event(&'a Event),
    Standing(&'a NodeStatus),
}

impl News<'_> {
    fn kind(&self) -> Option<EventKind> {
        match self {
            Self::Event(event) => Some(event.kind),
            Self::Standing(_) => None,
        }
    }

    fn is(&self, state: NodeState) -> bool {
        matches!(self, Self::Standing(node) if node.state == state)
    }
}

/// Asks for something and waits until the events, or the node's state, say that it is done.
fn steer(
    base: &Path,
    args: &NodeArgs,
    action: NodeAction,
    judge: impl Fn(&News<'_>) -> Option<Done>,
) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let failed = |e| Failure::of_client(&place, &e);
    let mut client = place.connect()?;
    let before = client.status().map_err(failed)?;
    client.steer(&args.node, action).map_err(failed)?;
    if args.no_wait {
        return Ok(status::OK);
    }
    let Some(id) = before.find(&args.node).map(|node| node.id) else {
        return Ok(status::OK);
    };
    let next = before.newest_event + 1;
    wait(&place, &mut client, args, (id, next), judge)
}

/// Waits until the events of a node, from a number on, or its state, say that it is done.
fn wait(
    place: &Place,
    client: &mut Client,
    args: &NodeArgs,
    (id, mut next): (u32, u64),
    judge: impl Fn(&News<'_>) -> Option<Done>,
) -> Result<i32, Failure> {
    let failed = |e| Failure::of_client(place, &e);
    let began = Instant::now();
    loop {
        let pod = client.status().map_err(failed)?;
        // After the snapshot: what it shows has been told by then.
        let events = place.connect()?.events(Some(next), false);
        let mut events = events.map_err(failed)?;
        while let Some(item) = events.next_item().map_err(failed)? {
            let StreamItem::Event(event) = item else {
                continue;
            };
            next = event.seq + 1;
            if event.node == id {
                eprintln!("  {}", words(&event, &args.node));
                match judge(&News::Event(&event)) {
                    Some(Done::Yes) => return Ok(status::OK),
                    Some(Done::No) => {
                        let what = words(&event, &args.node);
                        return Err(Failure::general(what));
                    }
                    None => {}
                }
            }
        }
        let Some(node) = pod.nodes.iter().find(|node| node.id == id) else {
            return Ok(status::OK);
        };
        let detail = node.detail.as_deref().unwrap_or("the events say more");
        match judge(&News::Standing(node)) {
            Some(Done::Yes) => return Ok(status::OK),
            Some(Done::No) => {
                let message = format!("node {} is {}: {detail}", node.name, node.state);
                return Err(Failure::general(message));
            }
            None if began.elapsed() > args.timeout => {
                let limit = span(args.timeout.as_nanos() as u64);
                let message = format!(
                    "node {} is {} after {limit}: {detail}",
                    node.name, node.state
                );
                return Err(Failure::new(status::TIMEOUT, message));
            }
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
}
