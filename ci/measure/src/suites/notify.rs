//! From a death to the notification in other processes of its group: on the same node, on another
//! one, and in groups of many.

use std::path::{Path, PathBuf};

use lupin_report::{Bar, Report, Row};
use nix::sys::signal::Signal;

use super::wakeup::Pair;
use super::{Progress, Times};
use crate::member::READY;
use crate::rig::{PAUSE, Rig, RigError, signal};
use crate::watcher::now_ns;

/// Members of the groups that lose a node; half of them are on that node.
const SIZES: [u32; 4] = [250, 500, 1000, 2000];
/// Processes that the surviving half is spread over.
const LISTENERS: u32 = 4;
/// Nodes that die at each size.
const DEATHS: u32 = 3;

/// Arguments of the suite of that name.
#[derive(Debug, clap::Args)]
pub struct Notify {
    /// How many deaths, and how many wake-ups
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    #[command(flatten)]
    pub(crate) common: crate::Common,
}

impl Notify {
    /// Deaths of processes, wake-ups, and deaths of nodes with many members.
    pub fn run(&self) -> Result<Report, RigError> {
        let binaries = self.common.binaries();
        let mut report = Report::new("notify");
        let mut rig = Rig::start(&binaries, 2, "")?;
        let [same, across, reaped] = deaths_of_processes(&mut rig, self.rounds)?;
        let names = ["another process of the node", "a process of another node"];
        for (name, times, bars) in [
            (names[0], &same, [150.0, 1000.0]),
            (names[1], &across, [250.0, 2000.0]),
        ] {
            for (quantile, share, bar) in [("p50", 0.5, bars[0]), ("p99", 0.99, bars[1])] {
                let row = times.row(&format!("SIGKILL to {name}, {quantile}"), share);
                report.push(row.bar(Bar::AtMost(bar)));
            }
        }
        let part = "part of the kernel: SIGKILL to its parent, p50";
        report.push(reaped.row(part, 0.5));
        let told = (same.0.len() + across.0.len()) as f64;
        let missed = 2.0 * self.rounds as f64 - told;
        let missed = Row::new("deaths not told, or told twice", missed, "deaths");
        report.push(missed.proof(Bar::AtMost(0.0)).n(2 * self.rounds));
        let woken = Pair::start(&rig, "across", 0, [1, 2], self.rounds)?;
        let woken = woken.read(&mut rig, self.rounds)?.late;
        let row = woken.row("release to a sleeper in another node, p50", 0.5);
        report.push(row.bar(Bar::AtMost(60.0)));
        drop(rig);
        let mut progress = Progress::new("sizes");
        for (done, members) in (1..).zip(SIZES) {
            let times = death_of_a_node(&binaries, members)?;
            let name = format!("death of a node to the last of {members} members");
            report.push(times.row(&name, 0.5));
            let each = times.at(0.5) / f64::from(members);
            report.push(Row::new("  for each member", each, "us"));
            progress.tell(done, SIZES.len() as u32);
        }
        Ok(report)
    }
}

/// Starts a program of the suite in a node, which writes to a file of this name.
fn start(
    rig: &Rig,
    node: u32,
    program: &str,
    file: &str,
    more: &[&str],
) -> Result<PathBuf, RigError> {
    let this = std::env::current_exe().unwrap_or_default();
    let path = rig.path().join(file);
    let (this, text) = (this.to_string_lossy(), path.to_string_lossy());
    rig.run_in(
        &format!("n{node}"),
        &[&[&*this, program, &text], more].concat(),
    )?;
    Ok(path)
}

/// Starts a member that listens, and waits until it is one.
fn listen(rig: &mut Rig, node: u32, file: &str, threads: u32) -> Result<PathBuf, RigError> {
    let path = start(
        rig,
        node,
        "member",
        file,
        &["--threads", &threads.to_string()],
    )?;
    rig.until("the joining of a member", |_| {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        Ok(text.starts_with(READY).then_some(()))
    })?;
    Ok(path)
}

/// When a member was told of each death, by its clock.
fn told(file: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let of_deaths = whole.filter_map(|line| {
        let mut words = line.splitn(3, ' ').skip(1);
        let at_ns = words.next()?.parse().ok()?;
        words.next()?.starts_with("Died").then_some(at_ns)
    });
    of_deaths.collect()
}

/// Kills members in node 2 one by one: until another member there knows, one in node 1, and the
/// parent.
fn deaths_of_processes(rig: &mut Rig, rounds: u64) -> Result<[Times; 3], RigError> {
    let across = listen(rig, 1, "across-members", 1)?;
    let same = listen(rig, 2, "same-members", 1)?;
    let killed = start(
        rig,
        2,
        "killer",
        "killed",
        &["--rounds", &rounds.to_string()],
    )?;
    let read_killed = || -> Vec<[u64; 2]> {
        let text = std::fs::read_to_string(&killed).unwrap_or_default();
        let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        let numbers = whole.filter_map(|line| {
            let mut words = line.split_whitespace().map(str::parse);
            Some([words.next()?.ok()?, words.next()?.ok()?])
        });
        numbers.collect()
    };
    let mut seen = 0;
    while seen < rounds as usize {
        // Patience is for each step and not for all.
        seen = rig.until("the next deaths", |_| {
            std::thread::sleep(PAUSE);
            let all = [read_killed().len(), told(&across).len(), told(&same).len()];
            let all = all.into_iter().min().unwrap_or_default();
            Ok((all > seen).then_some(all))
        })?;
    }
    let killed = read_killed();
    let times = |file: &Path| {
        let mut times = Times::default();
        for ([begin, _], end) in killed.iter().zip(told(file)) {
            times.push(*begin, end);
        }
        times
    };
    let reaped = killed.iter().map(|[_, after]| *after as f64 / 1e3);
    Ok([times(&same), times(&across), Times(reaped.collect())])
}

/// Kills a node with half of so many members: until the last of the other half knows of all.
fn death_of_a_node(binaries: &Path, members: u32) -> Result<Times, RigError> {
    let mut rig = Rig::start(binaries, 2, "")?;
    let listeners: Vec<PathBuf> = (0..LISTENERS)
        .map(|index| {
            let file = format!("member-{index}");
            listen(&mut rig, 1, &file, members / 2 / LISTENERS)
        })
        .collect::<Result<_, _>>()?;
    let mut times = Times::default();
    for death in 1..=DEATHS {
        listen(&mut rig, 2, &format!("doomed-{death}"), members / 2)?;
        let node = rig.node(2)?;
        let begin = now_ns();
        signal(node.pid.unwrap_or_default(), Signal::SIGKILL)?;
        let all = (death * (members / 2)) as usize;
        let last = rig.until("the news of all members", |_| {
            let each = listeners.iter().map(|file| told(file));
            let last = each.map(|told| told.get(all - 1).copied());
            let last: Option<Vec<u64>> = last.collect();
            std::thread::sleep(PAUSE);
            Ok(last.and_then(|all| all.into_iter().max()))
        })?;
        times.push(begin, last);
        rig.wait_joined(2, node.generation + 1)?;
    }
    Ok(times)
}
