//! How a text is cut: how large a unit is, how many partitions, how much memory.

use std::time::{Duration, Instant};

use lupin::work::{BLOCK, JobSpec, MAX_ARENA, PARAMS};

use crate::error::Error;
use crate::map::{MAX_UNIT, Mapper, entries_at};
use crate::reduce;
use crate::text::MAX_WORD;

/// Marks a job as a word count: `WORDCNT1` in little-endian bytes.
pub const KIND: u64 = u64::from_le_bytes(*b"WORDCNT1");
/// Smallest unit, in bytes.
pub const MIN_UNIT: u64 = 1 << 10;
/// Most partitions.
const MAX_PARTITIONS: u32 = 1024;
/// Bytes that the calibration counts at a time.
const SAMPLE: usize = 32 << 10;
/// Places of the text that the calibration looks at.
const SAMPLES: usize = 8;

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of the text in a unit.
    pub unit_bytes: u64,
    /// Units.
    pub units: u32,
    /// Partitions.
    pub partitions: u32,
    /// Words in the text.
    pub words: u64,
}

/// What this machine needs for a sample.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    /// Time to count a byte of text, at the slowest place.
    pub nanos_per_byte: f64,
    /// Distinct words in a unit, to its bytes.
    pub distinct_per_byte: f64,
}

impl Calibration {
    /// Counts samples of the text, each a few times: the fastest time of each is the machine's,
    /// the slower ones its neighbours'. The slowest sample counts.
    pub fn run(text: &[u8]) -> Self {
        let mut slowest = Duration::ZERO;
        let (mut distinct, mut bytes) = (0, 0);
        let sample = SAMPLE.min(text.len());
        if sample == 0 {
            return Self {
                nanos_per_byte: 100.0,
                distinct_per_byte: 0.1,
            };
        }
        let mut mapper = Mapper::default();
        let mut out = Vec::new();
        for index in 0..SAMPLES {
            let start = (text.len() - sample) / SAMPLES * index;
            let mut fastest = Duration::MAX;
            for _ in 0..5 {
                out.clear();
                let begin = Instant::now();
                let Ok(()) = mapper.map(text, start as u64, (start + sample) as u64, 64, &mut out);
                fastest = fastest.min(begin.elapsed());
            }
            slowest = slowest.max(fastest);
            distinct += mapper.distinct();
            bytes += sample;
        }
        Self {
            // Never 0, however fast the machine and coarse its clock.
            nanos_per_byte: (slowest.as_nanos() as f64 / sample as f64).max(0.1),
            distinct_per_byte: distinct as f64 / bytes as f64,
        }
    }
}

impl Plan {
    /// Cuts `text` into units of about `unit_time` on a machine like `calibration`'s.
    pub fn new(text: &[u8], unit_time: Duration, calibration: Calibration) -> Result<Self, Error> {
        let (words, longest) = measure(text);
        if longest > MAX_WORD {
            return Err(Error::LongWord(longest));
        }
        let nanos = unit_time.as_nanos() as f64;
        let unit_bytes = (nanos / calibration.nanos_per_byte) as u64 / 1024 * 1024;
        let unit_bytes = unit_bytes.clamp(MIN_UNIT, MAX_UNIT);
        let units = (text.len() as u64).div_ceil(unit_bytes).max(1);
        // Merging an entry reads its word from shared memory and looks it up: about what
        // counting four dozen bytes costs.
        let entries = units as f64 * unit_bytes as f64 * calibration.distinct_per_byte;
        let merge_nanos = entries * 48.0 * calibration.nanos_per_byte;
        let partitions = (merge_nanos / nanos) as u64 + 1;
        let partitions = partitions
            .next_power_of_two()
            .clamp(16, MAX_PARTITIONS.into());
        Ok(Self {
            unit_bytes,
            units: u32::try_from(units).map_err(|_| Error::LargeText(text.len() as u64))?,
            partitions: partitions as u32,
            words,
        })
    }

    /// The job for a text of `input` bytes. Its arena is large enough whatever the words are:
    /// an entry for each word at most, and no more distinct words than the text has room for.
    pub fn spec(&self, input: u64) -> Result<JobSpec, Error> {
        let partitions = u64::from(self.partitions);
        // Each result begins with its length and checksum, and ends at a block's end.
        let slack = 16 + BLOCK;
        let map = self.words * 8 + u64::from(self.units) * (entries_at(self.partitions) + slack);
        let distinct = self.words.min(most_distinct(input));
        let reduce = distinct * reduce::ENTRY as u64 + partitions * slack;
        let arena = (map + reduce).next_multiple_of(BLOCK);
        if arena > MAX_ARENA {
            return Err(Error::LargeText(input));
        }
        let mut params = [0; PARAMS];
        params[..3].copy_from_slice(&[self.unit_bytes, partitions, self.words]);
        Ok(JobSpec {
            kind: KIND,
            phases: vec![self.units, self.partitions],
            input,
            arena,
            params,
        })
    }

    /// The plan of a job, checked: the job's header is another node's word.
    pub fn of(spec: &JobSpec) -> Result<Self, Error> {
        let [units, partitions] = spec.phases[..] else {
            return Err(Error::BadJob("it does not have two phases"));
        };
        let unit_bytes = spec.params[0];
        if !(MIN_UNIT..=MAX_UNIT).contains(&unit_bytes) {
            return Err(Error::BadJob("its unit size is out of range"));
        }
        if u64::from(units) != spec.input.div_ceil(unit_bytes).max(1) {
            return Err(Error::BadJob("its units do not cover its text"));
        }
        let is_valid = partitions.is_power_of_two() && partitions <= MAX_PARTITIONS;
        if !is_valid || spec.params[1] != u64::from(partitions) {
            return Err(Error::BadJob("its number of partitions is out of range"));
        }
        Ok(Self {
            unit_bytes,
            units,
            partitions,
            words: spec.params[2],
        })
    }
}

/// The words of a text and the length of the longest.
fn measure(text: &[u8]) -> (u64, usize) {
    let (mut words, mut longest, mut current) = (0, 0, 0);
    for byte in text {
        if byte.is_ascii_alphabetic() || (*byte == b'\'' && current > 0) {
            words += u64::from(current == 0);
            current += 1;
            longest = longest.max(current);
        } else {
            current = 0;
        }
    }
    (words, longest)
}

/// The most distinct words that a text of `bytes` bytes has room for: all short ones first, each
/// with a byte between it and the next.
fn most_distinct(bytes: u64) -> u64 {
    let (mut left, mut distinct, mut of_length) = (bytes + 1, 0u64, 26u64);
    for length in 1.. {
        let fit = (left / (length + 1)).min(of_length);
        distinct += fit;
        left -= fit * (length + 1);
        if fit < of_length {
            break;
        }
        of_length = of_length.saturating_mul(27);
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plain;

    const SLOW: Calibration = Calibration {
        nanos_per_byte: 300.0,
        distinct_per_byte: 0.06,
    };

    #[test]
    fn words_are_measured_as_they_are_counted() {
        for text in ["", "a", "'", "''a'b' c''d", "It's 'the' dogs' 1st--x '' y"] {
            let text = text.as_bytes();
            let words: Vec<_> = plain::words(text).collect();
            let longest = words.iter().map(|w| w.len()).max().unwrap_or(0);
            assert_eq!(measure(text), (words.len() as u64, longest));
        }
    }

    #[test]
    fn a_plan_covers_its_text_and_comes_back_from_its_job() {
        for len in [0, 1, 1023, 1024, 1025, 5_000_000] {
            let text = b"some words ".repeat(len / 11 + 1);
            let plan = Plan::new(&text[..len], Duration::from_millis(3), SLOW).unwrap();
            assert!(plan.unit_bytes as f64 * SLOW.nanos_per_byte <= 3e6);
            let spec = plan.spec(len as u64).unwrap();
            assert_eq!(Plan::of(&spec).unwrap(), plan);
            assert!(spec.segment_size().unwrap() > len as u64);
        }
    }

    #[test]
    fn a_job_that_lies_is_refused() {
        let text = b"a b c".repeat(10_000);
        let plan = Plan::new(&text, Duration::from_millis(3), SLOW).unwrap();
        let good = plan.spec(text.len() as u64).unwrap();
        let mut wrong = vec![good.clone(); 5];
        wrong[0].phases.pop();
        wrong[1].params[0] = 0;
        wrong[2].phases[0] += 1;
        wrong[3].params[1] = 3;
        wrong[4].phases[1] = 2048;
        for spec in wrong {
            assert!(matches!(Plan::of(&spec), Err(Error::BadJob(_))));
        }
        let long = [b'a'; MAX_WORD + 1];
        assert!(Plan::new(&long[1..], Duration::from_millis(3), SLOW).is_ok());
        assert!(Plan::new(&long, Duration::from_millis(3), SLOW).is_err());
    }

    #[test]
    fn no_text_has_more_distinct_words_than_its_bound() {
        assert_eq!(most_distinct(0), 0);
        assert_eq!(most_distinct(1), 1);
        assert_eq!(most_distinct(51), 26);
        assert_eq!(most_distinct(54), 27);
    }
}
