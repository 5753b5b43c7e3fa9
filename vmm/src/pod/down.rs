//! `pod down`: ending a pod.

use std::path::Path;
use std::time::{Duration, Instant};

use super::place::Place;
use super::text::span;
use super::{DownArgs, Failure, status};

pub(super) fn down(base: &Path, args: &DownArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let mut client = place.connect()?;
    let failed = |e| Failure::of_client(&place, &e);
    let began = Instant::now();
    let before = client.status().map_err(failed)?;
    client.down(args.grace).map_err(failed)?;
    // The connection ends first, the process shortly after.
    let manager = Path::new("/proc").join(before.manager_pid.to_string());
    let mut ended = client.wait_end(args.timeout).map_err(failed)?;
    while ended && manager.exists() {
        if began.elapsed() > args.timeout {
            ended = false;
        }
        std::thread::sleep(Duration::from_millis(5));
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
