//! `pod down`: ending a pod.

use std::path::Path;
use std::time::Instant;

use lupin_fabric::sys::process::{Process, ProcessName, start_time};

use super::place::Place;
use super::text::span;
use super::{DownArgs, Failure, status};

pub(super) fn down(base: &Path, args: &DownArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let mut client = place.connect()?;
    let failed = |e| Failure::of_client(&place, &e);
    let began = Instant::now();
    let before = client.status().map_err(failed)?;
    let manager = process(before.manager_pid);
    client.down(args.grace).map_err(failed)?;
    // The connection ends first, the process shortly after. It may stay a zombie for as long as
    // its parent likes, so its pidfd is asked and not its pid.
    let mut ended = client.wait_end(args.timeout).map_err(failed)?;
    if let (true, Some(manager)) = (ended, &manager) {
        ended = manager.wait_gone(Some(args.timeout.saturating_sub(began.elapsed())));
    }
    if !ended {
        let left: Vec<_> = place
            .connect()
            .ok()
            .and_then(|mut client| client.status().ok())
            .map(|status| status.nodes)
            .unwrap_or_default()
            .into_iter()
            .filter(|node| node.pid.is_some())
            .map(|node| format!("{} is {}", node.name, node.state))
            .collect();
        let limit = span(args.timeout.as_nanos() as u64);
        return Err(Failure::new(
            status::TIMEOUT,
            format!(
                "pod {} did not end within {limit}: {}; its log is {}",
                place.name,
                left.join(", "),
                place.folder.join("fabricd.log").display()
            ),
        ));
    }
    eprintln!(
        "pod {} is down ({} nodes, {})",
        place.name,
        before.nodes.len(),
        span(began.elapsed().as_nanos() as u64)
    );
    Ok(status::OK)
}

/// A handle on a process that runs now; `None` if it has just ended.
fn process(pid: u32) -> Option<Process> {
    let start_time = start_time(pid)?;
    Process::find(ProcessName { pid, start_time })
        .ok()
        .flatten()
}
