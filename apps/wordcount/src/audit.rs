//! `audit`: was every word counted, and counted once?
//!
//! The text in the pod is counted again by the plain program, word by word, and compared with
//! the job's result; the units and the arena are looked at one by one.

use std::collections::HashMap;

use lupin::Pod;
use lupin::shm::Access;
use lupin::work::{Job, JobAudit};

use crate::error::Error;
use crate::{plain, segment, status};

/// Two counts of one text, compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Words in the text.
    pub expected: u64,
    /// Words counted.
    pub counted: u64,
    /// Words of the text that were not counted.
    pub lost: u64,
    /// Words counted more often than the text has them.
    pub twice: u64,
}

impl Comparison {
    /// Compares what was counted with what the text has.
    pub fn new(
        mut expected: HashMap<Vec<u8>, u64>,
        counted: impl IntoIterator<Item = (Vec<u8>, u64)>,
    ) -> Self {
        let mut comparison = Self {
            expected: expected.values().sum(),
            ..Self::default()
        };
        for (word, count) in counted {
            comparison.counted += count;
            // Removed, so that a word that is listed twice is found as well.
            let in_text = expected.remove(&word).unwrap_or(0);
            comparison.lost += in_text.saturating_sub(count);
            comparison.twice += count.saturating_sub(in_text);
        }
        comparison.lost += expected.values().sum::<u64>();
        comparison
    }

    /// Whether both counts are the same.
    pub fn is_exact(&self) -> bool {
        self.lost == 0 && self.twice == 0
    }
}

/// Audits a complete job. Returns the report; the error is the report as well if it is bad.
pub fn audit(name: &str, json: bool) -> Result<String, Error> {
    segment::name(name)?;
    let pod = Pod::attach()?;
    let segment = segment::open(&pod, name, Access::ReadOnly)?;
    let (job, _) = segment::job(&pod, &segment)?;
    let units = job.audit()?;
    let counted = status::counts(name, &job)?;
    let distinct = counted.len();
    let words = Comparison::new(plain::count(&text_of(&job)?), counted);
    let report = match json {
        true => as_json(name, &units, &words, distinct),
        false => as_text(name, &units, &words, distinct),
    };
    match units.is_clean() && words.is_exact() {
        true => Ok(report),
        false => Err(Error::Audit(report)),
    }
}

fn text_of(job: &Job<'_>) -> Result<Vec<u8>, Error> {
    let mut text = vec![0; job.spec().input as usize];
    job.read_input(0, &mut text)?;
    Ok(text)
}

fn as_text(name: &str, units: &JobAudit, words: &Comparison, distinct: usize) -> String {
    let mut lines = vec![format!("job {name}")];
    for (phase, title) in units.phases.iter().zip(["map", "reduce"]) {
        lines.push(format!(
            "  {title} units: {} of {} with exactly one result; {} with two, {} misplaced; \
             {} attempts, {} units begun more than once",
            phase.done,
            phase.units,
            phase.committed_twice,
            phase.misplaced,
            phase.attempts,
            phase.redone
        ));
    }
    let arena = &units.arena;
    lines.push(format!(
        "  result memory: {} bytes allocated, {} reachable, {} pending, {} lost to crashes, \
         {} used twice",
        arena.allocated, arena.reachable, arena.pending, arena.lost, arena.overlapping
    ));
    lines.push(format!(
        "  words: {} in the text, {} counted ({distinct} distinct); {} lost, {} counted twice",
        words.expected, words.counted, words.lost, words.twice
    ));
    lines.join("\n")
}

fn as_json(name: &str, units: &JobAudit, words: &Comparison, distinct: usize) -> String {
    let phase = |index: usize| {
        let phase = units.phases.get(index).copied().unwrap_or_default();
        format!(
            "{{\"units\":{},\"done\":{},\"committed_twice\":{},\"misplaced\":{},\
             \"attempts\":{},\"redone\":{}}}",
            phase.units,
            phase.done,
            phase.committed_twice,
            phase.misplaced,
            phase.attempts,
            phase.redone
        )
    };
    let arena = &units.arena;
    format!(
        "{{\"job\":\"{name}\",\"clean\":{},\"map\":{},\"reduce\":{},\
         \"arena\":{{\"capacity\":{},\"allocated\":{},\"reachable\":{},\"pending\":{},\
         \"lost\":{},\"overlapping\":{}}},\
         \"words\":{{\"expected\":{},\"counted\":{},\"distinct\":{distinct},\"lost\":{},\
         \"twice\":{}}}}}",
        units.is_clean() && words.is_exact(),
        phase(0),
        phase(1),
        arena.capacity,
        arena.allocated,
        arena.reachable,
        arena.pending,
        arena.lost,
        arena.overlapping,
        words.expected,
        words.counted,
        words.lost,
        words.twice
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(list: &[(&str, u64)]) -> Vec<(Vec<u8>, u64)> {
        let own = |(word, count): &(&str, u64)| (word.as_bytes().to_vec(), *count);
        list.iter().map(own).collect()
    }

    #[test]
    fn each_kind_of_difference_is_found() {
        let compare = |counted: &[(&str, u64)]| {
            let expected = counts(&[("A", 3), ("B", 1)]).into_iter().collect();
            let c = Comparison::new(expected, counts(counted));
            (c.lost, c.twice)
        };
        assert_eq!(compare(&[("A", 3), ("B", 1)]), (0, 0));
        assert_eq!(compare(&[("A", 2), ("B", 1)]), (1, 0));
        assert_eq!(compare(&[("A", 4), ("B", 1)]), (0, 1));
        assert_eq!(compare(&[("A", 3)]), (1, 0));
        assert_eq!(compare(&[("A", 3), ("B", 1), ("C", 2)]), (0, 2));
        assert_eq!(compare(&[("A", 3), ("B", 1), ("B", 1)]), (0, 1));
        // Equal sums do not hide a mistake.
        assert_eq!(compare(&[("A", 2), ("B", 2)]), (1, 1));
    }
}
