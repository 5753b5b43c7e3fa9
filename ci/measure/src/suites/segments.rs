//! What a segment costs: created, opened and mapped, against plain `mmap`, and the parts of the way.

use std::fs::read_to_string;

use clap::Args;
use lupin_report::{Report, Row};

use super::{Progress, Times};
use crate::Common;
use crate::maker::{LARGE, PARTS};
use crate::rig::{Guest, Rig, RigError, system};

/// Where a guest, which shares no file with us, has this program and keeps its times.
const PROGRAM_THERE: &str = "/usr/bin/lupin-measure";
const FILE_THERE: &str = "/segments";

#[derive(Debug, Args)]
pub struct Segments {
    /// How many segments
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// In the nested test host, in a guest with a stock kernel, where segments are devices
    // The command that boots the host takes it; it is here to be told of.
    #[arg(long)]
    nested: bool,
    #[command(flatten)]
    guest: Guest,
    #[command(flatten)]
    pub common: Common,
}

impl Segments {
    /// Creates, opens and removes segments on a node of a pod.
    pub fn run(&self) -> Result<Report, RigError> {
        let mut rig = Rig::start_with_pool(&self.common.binaries(), "256M", &self.guest)?;
        let lines = if self.guest.is_wanted() {
            self.lines_of_guest(&rig)?
        } else {
            self.lines_of_namespace(&mut rig)?
        };
        Ok(report(lines))
    }

    fn lines_of_guest(&self, rig: &Rig) -> Result<Vec<Vec<u64>>, RigError> {
        let rounds = self.rounds.to_string();
        let maker = [PROGRAM_THERE, "maker", FILE_THERE, "--devdax", "--rounds"];
        rig.output_of("n1", &[&maker[..], &[&rounds]].concat())?;
        Ok(lines(&rig.output_of("n1", &["cat", FILE_THERE])?))
    }

    fn lines_of_namespace(&self, rig: &mut Rig) -> Result<Vec<Vec<u64>>, RigError> {
        let file = rig.path().join("segments");
        let this = std::env::current_exe().map_err(system("find this program"))?;
        let (this, path) = (this.to_string_lossy(), file.to_string_lossy());
        let rounds = self.rounds.to_string();
        rig.run_in("n1", &[&this, "maker", &path, "--rounds", &rounds])?;
        let written = || lines(&read_to_string(&file).unwrap_or_default());
        let mut progress = Progress::new("segments");
        let mut done = 0;
        while done < self.rounds {
            // Patience is for each step and not for all.
            done = rig.until("the next segment", |_| {
                let now = written().len() as u32;
                Ok((now > done).then_some(now))
            })?;
            progress.tell(done, self.rounds);
        }
        Ok(written())
    }
}

fn report(lines: Vec<Vec<u64>>) -> Report {
    let mut times: [Times; PARTS.len()] = Default::default();
    for line in lines {
        for (times, nanos) in times.iter_mut().zip(line) {
            times.push(0, nanos);
        }
    }
    let mut report = Report::new("segments");
    let large = LARGE >> 20;
    for (name, times) in PARTS.iter().zip(&times) {
        for (quantile, share) in [("p50", 0.5), ("p99", 0.99)] {
            report.push(times.row(&format!("{name}, {quantile}"), share));
        }
    }
    // In the order of `PARTS`.
    let [
        created,
        small,
        _,
        touched,
        mapped,
        plain,
        zeroed,
        _,
        allocated,
    ] = times.each_ref().map(|t| t.at(0.5));
    let ratio = |name: &str, of: f64, to: f64| {
        Row::new(
            format!("{large} MiB: {name}, p50"),
            of / to.max(1.0),
            "times",
        )
    };
    report.push(ratio(
        "created and mapped, to plain mmap zeroed",
        created,
        zeroed,
    ));
    report.push(ratio(
        "opened, mapped and read, to plain mmap read",
        touched,
        plain,
    ));
    let scrubbing = Row::new("part of scrubbing, p50", created - small, "us");
    report.push(scrubbing);
    // Asking the agent, the directory, and in guests the kernel, which makes a device of it.
    let asking = (small - allocated - mapped).max(0.0);
    let name = "part of asking and of the device, p50";
    report.push(Row::new(name, asking, "us"));
    report
}

/// The numbers of each whole line.
fn lines(text: &str) -> Vec<Vec<u64>> {
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let numbers = whole.map(|line| line.split_whitespace().map(str::parse).collect());
    numbers.filter_map(Result::ok).collect()
}
