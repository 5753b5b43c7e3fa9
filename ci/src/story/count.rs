//! The pod's answer held against a plain program's.

use std::collections::BTreeMap;
use std::fmt;

/// Two word counts, compared.
#[derive(Debug, PartialEq, Eq)]
pub struct Comparison {
    same_bytes: bool,
    different_words: usize,
    words: u64,
    lost: u64,
    twice: u64,
}

impl Comparison {
    /// Compares outputs of the form `WORD COUNT\n`.
    ///
    /// # Errors
    /// Names the first line that has another form.
    pub fn of(plain: &str, pod: &str) -> Result<Self, String> {
        let (expected, found) = (parse(plain)?, parse(pod)?);
        if expected.is_empty() {
            return Err("the plain program found no words: there is nothing to compare".into());
        }
        let missing = |count: &u64, other: Option<&u64>| count.saturating_sub(*other.unwrap_or(&0));
        Ok(Self {
            same_bytes: plain == pod,
            different_words: expected.len(),
            words: expected.values().sum(),
            lost: expected
                .iter()
                .map(|(word, n)| missing(n, found.get(word)))
                .sum(),
            twice: found
                .iter()
                .map(|(word, n)| missing(n, expected.get(word)))
                .sum(),
        })
    }

    /// Whether the outputs are the same, byte for byte.
    pub fn identical(&self) -> bool {
        self.same_bytes && self.lost == 0 && self.twice == 0
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            words,
            different_words,
            lost,
            twice,
            ..
        } = self;
        write!(
            f,
            "{} the count of a plain single-process program: {words} words, {different_words} \
             different; {lost} words lost, {twice} counted twice",
            if self.same_bytes {
                "identical to"
            } else {
                "NOT identical to"
            }
        )
    }
}

fn parse(text: &str) -> Result<BTreeMap<&str, u64>, String> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let entry = line
            .split_once(' ')
            .and_then(|(word, n)| Some((word, n.parse::<u64>().ok()?)));
        let (word, count) = entry.ok_or_else(|| format!("not `WORD COUNT`: `{line}`"))?;
        *counts.entry(word).or_insert(0) += count;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_doubles_are_told_apart() {
        let c = Comparison::of("A 3\nB 2\n", "A 1\nB 3\nC 1\n").unwrap();
        assert_eq!((c.lost, c.twice), (2, 2));
        assert!(!c.identical());
        assert!(Comparison::of("A 3\n", "A 3\n").unwrap().identical());
        assert!(
            !Comparison::of("A 3\nB 1\n", "B 1\nA 3\n")
                .unwrap()
                .identical()
        );
    }

    #[test]
    fn nothing_is_not_an_answer() {
        assert!(Comparison::of("", "").is_err());
        assert!(Comparison::of("A x\n", "A 1\n").is_err());
    }
}
