//! How fast a sleeper in one node is woken by a release in another, and of what parts that is.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use lupin_report::{Bar, Report, Row};
use nix::sys::signal::Signal;

use super::Times;
use crate::rig::{Rig, RigError, signal, system};

/// Held so long that the waiter sleeps and has no look of its own left but the backstop's.
const HOLD_MS: u64 = 20;
/// Rounds with the manager stopped and no other way: each takes as long as the backstop.
const CONTROL: u64 = 12;
/// Nodes of the pod.
const NODES: u32 = 2;

/// Arguments of the suite of that name.
#[derive(Debug, clap::Args)]
pub struct Wakeup {
    /// How many wake-ups
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    #[command(flatten)]
    pub(crate) common: crate::Common,
}

/// What one pair of applications told.
pub(super) struct Rounds {
    pub(super) late: Times,
    release: Times,
    looks: Times,
}

impl Wakeup {
    /// Wake-ups across nodes, by the short way and through the manager; within a node; and across
    /// nodes without any way.
    pub fn run(&self) -> Result<Report, RigError> {
        let mut rig = Rig::start(&self.common.binaries(), NODES, "")?;
        let [short, long] = [self.rounds, 2 * self.rounds + 1];
        let across = Pair::start(&rig, "across", 0, [1, 2], long + CONTROL)?;
        let woken = across.read(&mut rig, short)?;
        let _full = fill_doorsteps(&rig)?;
        let relayed = across.read(&mut rig, long)?.late;
        let manager = rig.status()?.manager_pid;
        signal(manager, Signal::SIGSTOP)?;
        let all = across.read(&mut rig, long + CONTROL);
        signal(manager, Signal::SIGCONT)?;
        // The round in which something was stopped may be either.
        let relayed = Times(relayed.0[short as usize + 1..].to_vec());
        let control = Times(all?.late.0.split_off(long as usize + 1));
        let within = Pair::start(&rig, "within", 4096, [1, 1], self.rounds)?;
        let within = within.read(&mut rig, self.rounds)?;

        let mut report = Report::new("wakeup");
        let bar = Bar::AtMost(60.0);
        report.push(
            woken
                .late
                .row("release to a sleeper in another node, p50", 0.5)
                .bar(bar),
        );
        report.push(
            woken
                .late
                .row("release to a sleeper in another node, p99", 0.99),
        );
        report.push(
            within
                .late
                .row("the same within a node, by futex alone, p50", 0.5),
        );
        report.push(
            within
                .late
                .row("the same within a node, by futex alone, p99", 0.99),
        );
        let agent = woken.late.at(0.5) - within.late.at(0.5);
        report.push(Row::new("part of the other node's agent, p50", agent, "us"));
        report.push(relayed.row("through agents and manager, as between guests, p50", 0.5));
        report.push(relayed.row("through agents and manager, as between guests, p99", 0.99));
        let release = "the release itself, with a sleeper in another node, p50";
        report.push(woken.release.row(release, 0.5));
        report.push(Row::new(
            format!("looks of a waiter in {HOLD_MS} ms, p50"),
            woken.looks.at(0.5),
            "looks",
        ));
        report.push(control.row("control: without any way, the backstop, p50", 0.5));
        Ok(report)
    }
}

/// Puts sockets with full queues in the place of the agents': wake-ups take the longer way.
fn fill_doorsteps(rig: &Rig) -> Result<Vec<UnixDatagram>, RigError> {
    let fill = |node: u32| -> io::Result<UnixDatagram> {
        let path = rig.runtime().join("peers").join(node.to_string());
        std::fs::remove_file(&path)?;
        let socket = UnixDatagram::bind(&path)?;
        let sender = UnixDatagram::unbound()?;
        sender.set_nonblocking(true)?;
        while sender.send_to(&[0], &path).is_ok() {}
        Ok(socket)
    };
    let filled: io::Result<_> = (1..=NODES).map(fill).collect();
    filled.map_err(system("fill the agents' sockets"))
}

/// A holder and a waiter.
pub(super) struct Pair {
    file: std::path::PathBuf,
}

impl Pair {
    /// Starts the waiter in the first node and the holder in the second.
    pub(super) fn start(
        rig: &Rig,
        name: &str,
        at: u64,
        [waiter, holder]: [u32; 2],
        rounds: u64,
    ) -> Result<Self, RigError> {
        let this = std::env::current_exe().unwrap_or_default();
        let file = rig.path().join(name);
        let (this, path) = (this.to_string_lossy(), file.to_string_lossy());
        let (at, rounds, ms) = (at.to_string(), rounds.to_string(), HOLD_MS.to_string());
        let common = ["--at", &at, "--rounds", &rounds];
        let hold = [&[&*this, "sleeper", "hold", "--ms", &ms], &common[..]].concat();
        let wait = [&[&*this, "sleeper", "wait", &path], &common[..]].concat();
        rig.run_in(&format!("n{holder}"), &hold)?;
        rig.run_in(&format!("n{waiter}"), &wait)?;
        Ok(Self { file })
    }

    /// Waits for so many rounds, and reads them.
    pub(super) fn read(&self, rig: &mut Rig, rounds: u64) -> Result<Rounds, RigError> {
        let mut told = 0;
        while told < rounds {
            // Patience is for each step and not for all.
            told = rig.until("the next wake-ups", |_| {
                let lines = lines(&self.file).len() as u64;
                std::thread::sleep(Duration::from_millis(5));
                Ok((lines >= rounds || lines > told + 20).then_some(lines))
            })?;
        }
        let lines = &lines(&self.file)[..rounds as usize];
        let column = |index: usize, scale: f64| {
            let values = lines.iter().map(|line| line[index] as f64 / scale);
            Times(values.collect())
        };
        Ok(Rounds {
            late: column(0, 1e3),
            looks: column(1, 1.0),
            release: Times(column(2, 1e3).0.split_off(1.min(lines.len() - 1))),
        })
    }
}

/// The numbers of each whole line: since the release, looks, the release before.
fn lines(file: &Path) -> Vec<[u64; 3]> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    whole
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().skip(2).map(str::parse);
            let mut next = || numbers.next()?.ok();
            Some([next()?, next()?, next()?])
        })
        .collect()
}
