//! What is measured.

use std::path::Path;
use std::time::{Duration, Instant};

use lupin_abi::Cause;
use lupin_report::{Bar, Report, Row};
use nix::sys::signal::Signal;

use crate::rig::{PAUSE, Rig, RigError, signal};
use crate::watcher::now_ns;

/// Nodes that fail in turn: one that fails often is restarted ever later. Node 1 watches.
const VICTIMS: std::ops::RangeInclusive<u32> = 2..=11;
const NODES: u32 = 11;

/// The node that fails in a round, from 1.
fn victim(round: u32) -> u32 {
    VICTIMS.start() + (round - 1) % VICTIMS.count() as u32
}

/// Shows progress now and then.
struct Progress {
    what: &'static str,
    shown: Instant,
}

impl Progress {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            shown: Instant::now(),
        }
    }

    fn tell(&mut self, done: u32, all: u32) {
        if self.shown.elapsed() > Duration::from_secs(5) || done == all {
            self.shown = Instant::now();
            eprintln!("{}: {done} of {all}", self.what);
        }
    }
}

/// Microseconds.
struct Times(Vec<f64>);

impl Times {
    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * share).round() as usize].round()
    }

    fn row(&self, name: &str, share: f64) -> Row {
        Row::new(name, self.at(share), "us")
            .n(self.0.len() as u64)
            .spread(self.at(0.0), self.at(1.0))
    }
}

/// From the SIGKILL of a node to the application.
pub fn detect(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    let mut rig = Rig::start(binaries, NODES, "")?;
    rig.start_watcher()?;
    let mut times = Times(Vec::new());
    let mut progress = Progress::new("crashes");
    for round in 1..=rounds {
        let node = rig.wait_joined(victim(round), 1)?;
        let pid = node.pid.unwrap_or_default();
        let begin = now_ns();
        signal(pid, Signal::SIGKILL)?;
        let learnt = rig.learnt(node.id, node.generation + 1)?;
        times.0.push((learnt.at_ns - begin) as f64 / 1e3);
        progress.tell(round, rounds);
        std::thread::sleep(PAUSE);
    }
    let mut report = Report::new("detect");
    report.push(
        times
            .row("crash to application, p50", 0.5)
            .bar(Bar::AtMost(300.0)),
    );
    report.push(
        times
            .row("crash to application, p99", 0.99)
            .bar(Bar::AtMost(2000.0)),
    );
    report.push(notice_rows(rounds, &times));
    Ok(report)
}

/// Every failure was noticed, or the measurement would have ended with an error.
fn notice_rows(rounds: u32, times: &Times) -> Row {
    let missed = f64::from(rounds) - times.0.len() as f64;
    Row::new("failures not noticed", missed, "failures")
        .proof(Bar::AtMost(0.0))
        .n(rounds.into())
}

/// From the moment that a node stops to the application.
pub fn hang(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    const DEADLINE_MS: u64 = 100;
    const POLL_MS: u64 = 16;
    let heartbeat =
        format!("[heartbeat]\nperiod_ms = 8\npoll_ms = {POLL_MS}\ndeadline_ms = {DEADLINE_MS}\n");
    let mut rig = Rig::start(binaries, NODES, &heartbeat)?;
    rig.start_watcher()?;
    let mut times = Times(Vec::new());
    let mut progress = Progress::new("hangs");
    for round in 1..=rounds {
        let node = rig.wait_joined(victim(round), 1)?;
        let begin = now_ns();
        signal(node.pid.unwrap_or_default(), Signal::SIGSTOP)?;
        let learnt = rig.learnt(node.id, node.generation + 1)?;
        times.0.push((learnt.at_ns - begin) as f64 / 1e3);
        progress.tell(round, rounds);
        std::thread::sleep(PAUSE);
    }
    let late = Times(
        times
            .0
            .iter()
            .map(|us| us - (DEADLINE_MS * 1000) as f64)
            .collect(),
    );
    let mut report = Report::new("hang");
    report.push(times.row("hang to application, p50", 0.5));
    let bar = Bar::AtMost((POLL_MS * 1000) as f64);
    report.push(late.row("beyond the deadline, p50", 0.5).bar(bar));
    report.push(late.row("beyond the deadline, p99", 0.99).bar(bar));
    report.push(notice_rows(rounds, &times));
    Ok(report)
}

/// Manager and node die at once; the backup finds both.
pub fn failover(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    let mut rig = Rig::start(binaries, NODES, "[manager]\nbackup = true\n")?;
    rig.start_watcher()?;
    let (mut times, mut in_charge) = (Times(Vec::new()), Times(Vec::new()));
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
        in_charge.0.push((now_ns() - begin) as f64 / 1e3);
        let learnt = rig.learnt(node.id, node.generation + 1)?;
        times.0.push((learnt.at_ns - begin) as f64 / 1e3);
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
    report.push(notice_rows(rounds, &times));
    Ok(report)
}

/// Manager and backup, once there are both.
fn with_backup(rig: &mut Rig) -> Result<(u32, u32), RigError> {
    rig.until("a backup", |rig| {
        let status = rig.status().ok();
        Ok(status.and_then(|s| Some((s.manager_pid, s.backup_pid?))))
    })
}

/// Arguments of the suite of that name.
#[derive(Debug, clap::Args)]
pub struct FalseKills {
    /// How many nodes, each with a process that never rests
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=64))]
    nodes: u32,
    /// How long
    #[arg(long, value_name = "S", default_value_t = 60)]
    seconds: u64,
    /// How many nodes to stop in that time, one after the other
    #[arg(long, value_name = "N", default_value_t = 10)]
    hangs: u32,
    #[command(flatten)]
    pub(crate) common: crate::Common,
}

impl FalseKills {
    /// Busy nodes, and hangs among them.
    pub fn run(&self) -> Result<Report, RigError> {
        let mut rig = Rig::start(&self.common.binaries(), self.nodes, "")?;
        let started = rig.status()?;
        for node in &started.nodes {
            rig.run_in(&node.name, &["sh", "-c", "while :; do :; done"])?;
        }
        let (begin, all) = (Instant::now(), Duration::from_secs(self.seconds));
        let mut progress = Progress::new("hangs among busy nodes");
        let (mut injected, mut found) = (0, 0);
        while begin.elapsed() < all || injected < self.hangs {
            let share = begin.elapsed().as_secs_f64() / all.as_secs_f64();
            if injected < self.hangs && share * f64::from(self.hangs) >= f64::from(injected) {
                let id = 1 + injected % self.nodes;
                injected += 1;
                let node = rig.wait_joined(id, 0)?;
                signal(node.pid.unwrap_or_default(), Signal::SIGSTOP)?;
                let back = rig.wait_joined(id, node.generation + 1)?;
                found += u32::from(back.cause == Cause::Hang);
                rig.run_in(&back.name, &["sh", "-c", "while :; do :; done"])?;
                progress.tell(injected, self.hangs);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let raised = |status: &lupin_fabric::api::PodStatus| {
            status.nodes.iter().map(|node| node.generation).sum::<u32>()
        };
        let failures = raised(&rig.status()?) - raised(&started);
        let false_kills = f64::from(failures) - f64::from(injected);
        let seconds = begin.elapsed().as_secs();
        let mut report = Report::new("false-kills");
        report.push(
            Row::new("nodes killed that were only starved", false_kills, "nodes")
                .proof(Bar::AtMost(0.0))
                .n(seconds),
        );
        report.push(
            Row::new("hangs found", found.into(), "hangs")
                .proof(Bar::AtLeast(injected.into()))
                .n(injected.into()),
        );
        Ok(report)
    }
}
