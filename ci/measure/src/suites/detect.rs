//! From the SIGKILL of a node to an application in another node, and the parts of that way.

use std::path::Path;

use lupin_abi::event::EventKind;
use lupin_fabric::sys::process::{Process, ProcessName, start_time};
use lupin_report::{Bar, Report};
use nix::sys::signal::Signal;

use super::{NODES, Progress, Times, notice_row, victim};
use crate::rig::{PAUSE, Rig, RigError, signal};
use crate::watcher::now_ns;

/// In one round of so many another thread waits for the process as well, to tell what of the way
/// is the kernel's. Not in all, for it takes the processor in the very moment that is measured.
const PROBED: u32 = 4;

/// The parts of the way, in their order.
#[derive(Default)]
struct Parts {
    gone: Times,
    detected: Times,
    raised: Times,
    rung: Times,
    ringing: Times,
    learnt: Times,
}

/// Crashes nodes.
pub fn detect(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    let mut rig = Rig::start(binaries, NODES, "")?;
    rig.start_watcher()?;
    let mut times = Times::default();
    let mut parts = Parts::default();
    let mut killed = Vec::new();
    let mut progress = Progress::new("crashes");
    for round in 1..=rounds {
        let node = rig.wait_joined(victim(round), 1)?;
        let pid = node.pid.unwrap_or_default();
        let probe = (round % PROBED == 0).then(|| watch_end(pid)).flatten();
        let begin = now_ns();
        signal(pid, Signal::SIGKILL)?;
        let learnt = rig.learnt(EventKind::GenerationRaised, node.id, node.generation)?;
        times.push(begin, learnt.at_ns);
        killed.push((node.id, node.generation, begin));
        if let Some(gone_ns) = probe.and_then(|probe| probe.join().ok()) {
            parts.gone.push(begin, gone_ns);
        }
        progress.tell(round, rounds);
        std::thread::sleep(PAUSE);
    }
    for (node, old, begin) in killed {
        let detected = rig.learnt(EventKind::FailureDetected, node, old)?;
        let raised = rig.learnt(EventKind::GenerationRaised, node, old)?;
        let rung = rig.learnt(EventKind::Rung, node, old)?;
        let ring_ns = rung.written_ns.saturating_sub(rung.evidence);
        parts.detected.push(begin, detected.written_ns);
        parts.raised.push(detected.written_ns, raised.written_ns);
        parts.rung.push(raised.written_ns, ring_ns);
        parts.ringing.push(ring_ns, rung.written_ns);
        parts.learnt.push(ring_ns, raised.at_ns);
    }
    let mut report = Report::new("detect");
    let p50 = times.row("crash to application, p50", 0.5);
    report.push(p50.bar(Bar::AtMost(300.0)));
    report.push(times.row("crash to application, p90", 0.9));
    let p99 = times.row("crash to application, p99", 0.99);
    report.push(p99.bar(Bar::AtMost(2000.0)));
    for (name, part) in [
        (
            "crash to end of the process (the kernel's part)",
            &parts.gone,
        ),
        ("crash to detected", &parts.detected),
        ("detected to raised", &parts.raised),
        ("raised to first ring", &parts.rung),
        ("first ring to last ring", &parts.ringing),
        ("first ring to application", &parts.learnt),
    ] {
        for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
            report.push(part.row(&format!("  {name}, {quantile}"), share));
        }
    }
    report.push(notice_row(rounds, &times));
    Ok(report)
}

/// A thread that returns when a process is gone, with the time.
fn watch_end(pid: u32) -> Option<std::thread::JoinHandle<u64>> {
    let name = ProcessName {
        pid,
        start_time: start_time(pid)?,
    };
    let process = Process::find(name).ok()??;
    Some(std::thread::spawn(move || {
        process.wait_gone(None);
        now_ns()
    }))
}
