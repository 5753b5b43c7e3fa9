//! What a segment costs: created, opened and mapped, against plain `mmap`, and the parts of the way.

use std::path::Path;

use lupin_report::{Report, Row};

use super::{Progress, Times};
use crate::maker::{LARGE, PARTS};
use crate::rig::{Rig, RigError, system};

/// Creates, opens and removes segments on a node of a pod.
pub fn segments(binaries: &Path, rounds: u32) -> Result<Report, RigError> {
    let mut rig = Rig::start_with_pool(binaries, 1, "256M", "")?;
    let file = rig.path().join("segments");
    let this = std::env::current_exe().map_err(system("find this program"))?;
    let (this, path) = (this.to_string_lossy(), file.to_string_lossy());
    rig.run_in(
        "n1",
        &[&this, "maker", &path, "--rounds", &rounds.to_string()],
    )?;
    let mut progress = Progress::new("segments");
    let mut done = 0;
    while done < rounds {
        // Patience is for each step and not for all.
        done = rig.until("the next segment", |_| {
            let now = lines(&file).len() as u32;
            Ok((now > done).then_some(now))
        })?;
        progress.tell(done, rounds);
    }
    let mut times: [Times; PARTS.len()] = Default::default();
    for line in lines(&file) {
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
    let [created, small, _, touched, _, _, plain, zeroed, _] = times.each_ref().map(|t| t.at(0.5));
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
    Ok(report)
}

/// The numbers of each whole line.
fn lines(file: &Path) -> Vec<Vec<u64>> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let numbers = whole.map(|line| line.split_whitespace().map(str::parse).collect());
    numbers.filter_map(Result::ok).collect()
}
