//! `pod events`: what happened, as a timeline for people or as JSON for programs.

use std::collections::HashMap;
use std::path::Path;

use lupin_abi::Event;
use lupin_abi::fabric::RingRead;
use lupin_fabric::api::ClientError;
use lupin_fabric::api::client::StreamItem;
use serde_json::{Value, json};

use super::place::{self, Place};
use super::record;
use super::timeline::{relative, words};
use super::{EventsArgs, Failure, print, status};

pub(super) fn events(base: &Path, args: &EventsArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    if !args.follow && !place.runs() && Path::new(&args.pod).is_file() {
        return recorded(args);
    }
    let failed = |e: ClientError| Failure::of_client(&place, &e);
    let pod = place.connect()?.status().map_err(failed)?;
    let names = pod.nodes.iter().map(|node| (node.id, node.name.clone()));
    let mut printer = Printer::new(args, &pod.pod, names.collect())?;
    let mut stream = place
        .connect()?
        .events(args.from, args.follow)
        .map_err(failed)?;
    loop {
        match stream.next_item() {
            Ok(Some(item)) => printer.print(&item)?,
            Ok(None) => return Ok(status::OK),
            // Whoever follows a pod to its end has seen what was asked for.
            Err(ClientError::Closed) if args.follow => {
                eprintln!("the manager of pod {} has ended", pod.pod);
                return Ok(status::OK);
            }
            Err(e) => return Err(failed(e)),
        }
    }
}

/// The events of a pod that does not run, from its pod memory.
fn recorded(args: &EventsArgs) -> Result<i32, Failure> {
    let pod = place::load(Path::new(&args.pod))?;
    let path = &pod.memory.path;
    let memory = record::read(path).map_err(|e| {
        Failure::new(
            status::NOT_RUNNING,
            format!("pod {} does not run, and {}: {e}", pod.name, path.display()),
        )
    })?;
    let names = pod
        .nodes
        .iter()
        .map(|node| (node.id.get(), node.name.clone()));
    let mut printer = Printer::new(args, &pod.name, names.collect())?;
    let ring = memory.fabric();
    let head = ring.state().ring_head();
    let mut next = args.from.unwrap_or(1).max(1);
    while next <= head {
        match ring.read(next) {
            RingRead::Event(event) => {
                printer.print(&StreamItem::Event(event))?;
                next += 1;
            }
            RingRead::NotYet => break,
            RingRead::Lost { oldest } => {
                let resume = oldest.max(next + 1);
                // Without a request for them, nobody misses the oldest ones.
                if args.from.is_some() || next > 1 {
                    printer.print(&StreamItem::Lost { from: next, resume })?;
                }
                next = resume;
            }
        }
    }
    Ok(status::OK)
}

/// Prints events as the arguments ask for.
struct Printer<'a> {
    args: &'a EventsArgs,
    names: HashMap<u32, String>,
    /// The node whose events are shown, if not all are.
    only: Option<u32>,
    /// The time of the first event shown.
    origin: Option<u64>,
}

impl<'a> Printer<'a> {
    fn new(args: &'a EventsArgs, pod: &str, names: HashMap<u32, String>) -> Result<Self, Failure> {
        let only = match &args.node {
            None => None,
            Some(node) => {
                let by_name = names.iter().find(|(_, name)| *name == node);
                let by_id = || names.iter().find(|(id, _)| id.to_string() == *node);
                let found = by_name.or_else(by_id).map(|(id, _)| *id);
                Some(found.ok_or_else(|| {
                    let message = format!("pod {pod} has no node {node}");
                    Failure::new(status::WRONG_STATE, message)
                })?)
            }
        };
        Ok(Self {
            args,
            names,
            only,
            origin: None,
        })
    }

    fn print(&mut self, item: &StreamItem) -> Result<(), Failure> {
        let json = self.args.json;
        let line = match item {
            StreamItem::Event(event) => {
                if self.only.is_some_and(|node| node != event.node) {
                    return Ok(());
                }
                let name = self.names.get(&event.node).cloned();
                let name = name.unwrap_or_else(|| format!("node {}", event.node));
                if json {
                    to_json(event, &name).to_string()
                } else {
                    let origin = *self.origin.get_or_insert(event.time_ns);
                    let time = relative(event.time_ns, origin);
                    format!("{time:>14} s  {}", words(event, &name))
                }
            }
            StreamItem::Lost { from, resume } if json => {
                json!({"lost": {"from": from, "resume": resume}}).to_string()
            }
            StreamItem::Lost { from, resume } => format!(
                "{:>16}  ({} older events are not on record any more)",
                "...",
                resume.saturating_sub(*from)
            ),
        };
        print(&(line + "\n"))
    }
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
