//! A manager that dies together with a node.

use std::path::Path;

use lupin_abi::event::EventKind;
use lupin_report::{Bar, Report, Row};
use nix::sys::signal::Signal;

use super::{NODES, Progress, Times, notice_row, victim};
use crate::rig::{PAUSE, Rig, RigError, signal};
use crate::watcher::now_ns;

/// Manager and node die at once; the backup finds both.
pub fn failover(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    let mut rig = Rig::start(binaries, NODES, "[manager]\nbackup = true\n")?;
    rig.start_watcher()?;
    let (mut times, mut in_charge) = (Times::default(), Times::default());
    let mut progress = Progress::new("managers and nodes");
    for round in 1..=rounds {
        let node = rig.wait_joined(victim(round), 1)?;
        let (manager, _) = with_backup(&mut rig)?;
        let begin = now_ns();
        signal(manager, Signal::SIGKILL)?;
        signal(node.pid.unwrap_or_default(), Signal::SIGKILL)?;
        rig.until("the take-over", |rig| {
            let status = rig.status().ok();
            Ok(status.filter(|s| s.manager_pid != manager).map(|_| ()))
        })?;
        in_charge.push(begin, now_ns());
        let learnt = rig.learnt(EventKind::GenerationRaised, node.id, node.generation)?;
        times.push(begin, learnt.at_ns);
        progress.tell(round, rounds);
        std::thread::sleep(PAUSE);
    }
    let mut report = Report::new("failover");
    report.push(in_charge.row(
        "death of the manager to the backup's first answer, p50",
        0.5,
    ));
    let bar = Bar::AtMost(100_000.0);
    report.push(times.row("both deaths to application, p50", 0.5).bar(bar));
    report.push(times.row("both deaths to application, p99", 0.99).bar(bar));
    let raised: u32 = rig.status()?.nodes.iter().map(|n| n.generation).sum();
    let skipped = f64::from(raised) - f64::from(rounds) - f64::from(NODES);
    report.push(
        Row::new("generations skipped", skipped, "generations")
            .proof(Bar::AtMost(0.0))
            .n(rounds.into()),
    );
    report.push(notice_row(rounds, &times));
    Ok(report)
}

/// Manager and backup, once there are both.
fn with_backup(rig: &mut Rig) -> Result<(u32, u32), RigError> {
    rig.until("a backup", |rig| {
        let status = rig.status().ok();
        Ok(status.and_then(|s| Some((s.manager_pid, s.backup_pid?))))
    })
}
