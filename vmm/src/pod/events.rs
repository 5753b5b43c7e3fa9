//! `pod events`: what happened, as a timeline for people or as JSON for programs.

use std::path::Path;

use lupin_abi::Event;
use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{ClientError, PodStatus};
use serde_json::{Value, json};

use super::place::Place;
use super::timeline::{relative, words};
use super::{EventsArgs, Failure, print, status};

pub(super) fn events(base: &Path, args: &EventsArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let failed = |e: ClientError| Failure::of_client(&place, &e);
    let pod = place.connect()?.status().map_err(failed)?;
    let only = match &args.node {
        Some(node) => Some(pod.find(node).map(|node| node.id).ok_or_else(|| {
            let message = format!("pod {} has no node {node}", pod.pod);
            Failure::new(status::WRONG_STATE, message)
        })?),
        None => None,
    };
    let mut stream = place
        .connect()?
        .events(args.from, args.follow)
        .map_err(failed)?;
    let mut origin = None;
    loop {
        let item = match stream.next_item() {
            Ok(Some(item)) => item,
            Ok(None) => return Ok(status::OK),
            // Whoever follows a pod to its end has seen what was asked for.
            Err(ClientError::Closed) if args.follow => {
                eprintln!("the manager of pod {} has ended", pod.pod);
                return Ok(status::OK);
            }
            Err(e) => return Err(failed(e)),
        };
        let line = match item {
            StreamItem::Event(event) => {
                if only.is_some_and(|node| node != event.node) {
                    continue;
                }
                let name = name_of(&pod, event.node);
                if args.json {
                    to_json(&event, &name).to_string()
                } else {
                    let origin = *origin.get_or_insert(event.time_ns);
                    let time = relative(event.time_ns, origin);
                    format!("{time:>14} s  {}", words(&event, &name))
                }
            }
            StreamItem::Lost { from, resume } if args.json => {
                json!({"lost": {"from": from, "resume": resume}}).to_string()
            }
            StreamItem::Lost { from, resume } => format!(
                "{:>16}  ({} older events are not on record any more)",
                "...",
                resume.saturating_sub(from)
            ),
        };
        print(&(line + "\n"))?;
    }
}

fn name_of(pod: &PodStatus, node: u32) -> String {
    let found = pod.nodes.iter().find(|found| found.id == node);
    found.map_or_else(|| format!("node {node}"), |found| found.name.clone())
}

/// The event as it is in pod memory, with what a reader would have to look up.
fn to_json(event: &Event, name: &str) -> Value {
    let mut object = serde_json::to_value(event).unwrap_or_default();
    if let Some(object) = object.as_object_mut() {
        if event.node != 0 {
            object.insert("node_name".into(), name.into());
        }
        object.insert("text".into(), words(event, name).into());
    }
    object
}
