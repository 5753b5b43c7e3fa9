//! `pod upgrade`: another program for the manager, the same nodes.

use std::path::Path;
use std::time::{Duration, Instant};

use lupin_fabric::api::{Client, PodStatus};

use super::place::Place;
use super::text::span;
use super::{Failure, UpgradeArgs, status};

/// Between looks at the pod.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(super) fn upgrade(base: &Path, args: &UpgradeArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let failed = |e| Failure::of_client(&place, &e);
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let program = args.program.as_deref().map(absolute);
    let mut client = place.connect()?;
    let before = client.status().map_err(failed)?;
    client.upgrade(program.as_deref()).map_err(failed)?;
    let began = Instant::now();
    loop {
        if let Some(after) = newer(&place, before.epoch) {
            let lived = |node: &&lupin_fabric::api::NodeStatus| {
                node.pid.is_some() && before.nodes.iter().any(|old| old.pid == node.pid)
            };
            eprintln!(
                "pod {}: manager {} took over with epoch {} after {}; {} nodes ran on",
                place.name,
                after.manager_pid,
                after.epoch,
                span(began.elapsed().as_nanos() as u64),
                after.nodes.iter().filter(lived).count()
            );
            return Ok(status::OK);
        }
        if began.elapsed() > args.timeout {
            let limit = span(args.timeout.as_nanos() as u64);
            let message = format!(
                "pod {}: no new manager after {limit}; its log is {}; nodes run on, and `lupin-vmm \
                 pod up` with the pod file starts a manager if there is none",
                place.name,
                place.folder.join("fabricd.log").display()
            );
            return Err(Failure::new(status::TIMEOUT, message));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The pod under a manager that took charge after `epoch`.
fn newer(place: &Place, epoch: u64) -> Option<PodStatus> {
    let status = Client::connect(&place.folder).ok()?.status().ok()?;
    (status.epoch > epoch).then_some(status)
}
