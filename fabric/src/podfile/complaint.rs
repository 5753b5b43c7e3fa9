//! What is wrong with a pod file, said with the line, the value and what to do.

use std::fmt::Display;
use std::path::Path;

use lupin_abi::layout::GRANULE;

use super::size::{Size, display};
use super::{PodFileError, line};

/// Builds errors of one file.
pub(super) struct Complaint<'a> {
    file: &'a Path,
    text: &'a str,
}

impl<'a> Complaint<'a> {
    pub(super) fn of(file: &'a Path, text: &'a str) -> Self {
        Self { file, text }
    }

    /// The pod file.
    pub(super) fn file(&self) -> &Path {
        self.file
    }

    pub(super) fn about(
        &self,
        key: impl Display,
        value: impl Display,
        problem: impl Into<String>,
        advice: impl Into<String>,
    ) -> PodFileError {
        let (key, value) = (key.to_string(), value.to_string());
        PodFileError::Value {
            file: self.file.into(),
            line: line::of(self.text, &key, &value),
            key: key.into(),
            value: value.into(),
            problem: problem.into(),
            advice: advice.into(),
        }
    }

    /// Sections and guest memories are whole granules.
    pub(super) fn whole_granules(
        &self,
        key: &str,
        size: &Size,
        least: u64,
    ) -> Result<u64, PodFileError> {
        if !size.bytes.is_multiple_of(GRANULE) {
            let below = size.bytes - size.bytes % GRANULE;
            let advice = if below < least {
                format!("use {}", display(least))
            } else {
                format!("use {} or {}", display(below), display(below + GRANULE))
            };
            let problem = "it is not a multiple of 2 MiB";
            return Err(self.about(key, size, problem, advice));
        }
        if size.bytes < least {
            let advice = format!("use at least {}", display(least));
            return Err(self.about(key, size, "it is too small", advice));
        }
        Ok(size.bytes)
    }
}
