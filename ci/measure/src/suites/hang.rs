//! How long it takes until a node that stopped running is known to be hung.

use std::path::Path;

use lupin_abi::event::EventKind;
use lupin_report::{Bar, Report};
use nix::sys::signal::Signal;

use super::{NODES, Progress, Times, notice_row, victim};
use crate::rig::{PAUSE, Rig, RigError, signal};
use crate::watcher::now_ns;

/// From the moment that a node stops to the application.
pub fn hang(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    const DEADLINE_MS: u64 = 100;
    const POLL_MS: u64 = 16;
    let heartbeat =
        format!("[heartbeat]\nperiod_ms = 8\npoll_ms = {POLL_MS}\ndeadline_ms = {DEADLINE_MS}\n");
    let mut rig = Rig::start(binaries, NODES, &heartbeat)?;
    rig.start_watcher()?;
    let (mut times, mut late) = (Times::default(), Times::default());
    let mut progress = Progress::new("hangs");
    for round in 1..=rounds {
        let node = rig.wait_joined(victim(round), 1)?;
        let begin = now_ns();
        signal(node.pid.unwrap_or_default(), Signal::SIGSTOP)?;
        let learnt = rig.learnt(EventKind::GenerationRaised, node.id, node.generation)?;
        times.push(begin, learnt.at_ns);
        let verdict = rig.learnt(EventKind::FailureDetected, node.id, node.generation)?;
        late.push(DEADLINE_MS * 1_000_000, verdict.evidence);
        progress.tell(round, rounds);
        std::thread::sleep(PAUSE);
    }
    let mut report = Report::new("hang");
    report.push(times.row("hang to application, p50", 0.5));
    report.push(times.row("hang to application, p99", 0.99));
    let bar = Bar::AtMost((POLL_MS * 1000) as f64);
    // The deadline is one of time that the node could have run; the event says how much it was.
    report.push(late.row("judged after the deadline, p50", 0.5).bar(bar));
    report.push(late.row("judged after the deadline, latest", 1.0).bar(bar));
    report.push(notice_row(rounds, &times));
    Ok(report)
}
