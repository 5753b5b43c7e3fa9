//! `pod events`: what happened, as a timeline for people or as JSON for programs.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use lupin_abi::Event;
use lupin_abi::fabric::RingRead;
use lupin_fabric::api::client::{EventStream, StreamItem};
use lupin_fabric::api::{Client, ClientError, PodStatus};
use lupin_fabric::runtime::RuntimeFolder;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

use super::place::{self, Place};
use super::record;
use super::timeline::{relative, words};
use super::{EventsArgs, Failure, print, status};

/// How often a follower looks for the next manager.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

pub(super) fn events(base: &Path, args: &EventsArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    if !args.follow && !place.runs() && Path::new(&args.pod).is_file() {
        return recorded(args);
    }
    if args.follow {
        leave_with_the_reader();
    }
    let failed = |e: ClientError| Failure::of_client(&place, &e);
    let mut pod = place.connect()?.status().map_err(failed)?;
    let mut printer = Printer::new(args, &pod)?;
    let mut next = args.from;
    loop {
        let stream = Client::connect(&place.folder);
        let ended = match stream.and_then(|client| client.events(next, args.follow)) {
            Ok(mut stream) => print_all(&mut stream, &mut printer, &mut next)?,
            Err(e) => Some(e),
        };
        match ended {
            None => return Ok(status::OK),
            Some(ClientError::Closed | ClientError::NotRunning { .. }) if args.follow => {}
            Some(e) => return Err(failed(e)),
        }
        let Some(successor) = successor(&place, &mut printer, pod.manager_pid)? else {
            // Whoever follows a pod to its end has seen what was asked for.
            eprintln!("the manager of pod {} has ended", pod.pod);
            return Ok(status::OK);
        };
        pod = successor;
        printer.know(&pod);
    }
}

/// Prints what comes, and keeps `next` behind it; what ended it, if it was not the end.
fn print_all(
    stream: &mut EventStream,
    printer: &mut Printer<'_>,
    next: &mut Option<u64>,
) -> Result<Option<ClientError>, Failure> {
    loop {
        match stream.next_item() {
            Ok(Some(item)) => {
                printer.print(&item)?;
                *next = Some(match item {
                    StreamItem::Event(event) => event.seq.saturating_add(1),
                    StreamItem::Lost { resume, .. } => resume,
                });
            }
            Ok(None) => return Ok(None),
            Err(e) => return Ok(Some(e)),
        }
    }
}

/// Waits for the manager that comes after one that is gone; `None` if the pod was brought down.
fn successor(
    place: &Place,
    printer: &mut Printer<'_>,
    gone: u32,
) -> Result<Option<PodStatus>, Failure> {
    let mut told = false;
    while RuntimeFolder::needs_manager(&place.folder) {
        if !told {
            printer.manager(json!({"lost": {"pid": gone}}), || {
                format!("manager {gone} is gone; waiting for the next one")
            })?;
            told = true;
        }
        let status = Client::connect(&place.folder).and_then(|mut client| client.status());
        if let Ok(pod) = status {
            let (pid, epoch) = (pod.manager_pid, pod.epoch);
            printer.manager(json!({"found": {"pid": pid, "epoch": epoch}}), || {
                format!("manager {pid} is in charge (epoch {epoch}); nothing was missed")
            })?;
            return Ok(Some(pod));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(None)
}

/// Ends this program when nobody reads its output any more, also while there is nothing to write.
fn leave_with_the_reader() {
    let watch = || {
        let stdout = std::io::stdout();
        // Nothing is asked for, so only errors are told: a pipe without a reader, a terminal that
        // is gone.
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Ok(1..) => std::process::exit(128 + libc::SIGPIPE),
                _ => return,
            }
        }
    };
    // Without the thread, the end is noticed with the next event.
    let _ = std::thread::Builder::new()
        .name("reader".into())
        .spawn(watch);
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
    let names = pod.nodes.iter();
    let names = names.map(|node| (node.id.get(), node.name.clone()));
    let mut printer = Printer::with_names(args, &pod.name, names.collect())?;
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
    fn new(args: &'a EventsArgs, pod: &PodStatus) -> Result<Self, Failure> {
        Self::with_names(args, &pod.pod, names_of(pod))
    }

    fn with_names(
        args: &'a EventsArgs,
        pod: &str,
        names: HashMap<u32, String>,
    ) -> Result<Self, Failure> {
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

    /// Takes in what a new manager says of its nodes.
    fn know(&mut self, pod: &PodStatus) {
        self.names.extend(names_of(pod));
    }

    /// Prints what happens to the manager, which no event can tell at that moment.
    fn manager(&self, what: Value, words: impl FnOnce() -> String) -> Result<(), Failure> {
        let line = if self.args.json {
            json!({ "manager": what }).to_string()
        } else {
            format!("{:>16}  ({})", "...", words())
        };
        print(&(line + "\n"))
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

fn names_of(pod: &PodStatus) -> HashMap<u32, String> {
    let nodes = pod.nodes.iter();
    nodes.map(|node| (node.id, node.name.clone())).collect()
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
